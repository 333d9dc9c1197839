// A film to look at: zoom, pan, window and level in its own grey values, attention and outline over it. Mouse and keyboard do the same.

import * as api from "./api.js";
import { drawFilm, drawOverlay, overlaid, placed, prepared, tint, windowOf } from "./film.js";
import { html, signal, useEffect, useLayoutEffect, useRef, useState } from "./html.js";
import { overlay } from "./state.js";
import { brief } from "./words.js";

const STEP = 1.25; // of a key or a notch of the wheel
const MOST_ZOOM = 40;

/** How a film is looked at; two viewers that are given the same one move together. */
export const looking = () => ({
  view: signal({ zoom: 1, x: 0.5, y: 0.5 }),
  window: signal({ shift: 0, factor: 1 }),
});

export function reset(look) {
  look.view.value = { zoom: 1, x: 0.5, y: 0.5 };
  look.window.value = { shift: 0, factor: 1 };
}

/** Films that were looked at last, so that going back does not fetch them again. */
const kept = new Map();
const KEPT = 4;

export function Viewer({ film, title, look, children }) {
  const canvas = useRef(null);
  const [shown, setShown] = useState(null);
  const [over, setOver] = useState(null);
  const [problem, setProblem] = useState(null);
  const [bare, setBare] = useState(null); // why nothing lies over it
  const [size, setSize] = useState(null);

  useEffect(() => {
    const gone = new AbortController();
    for (const set of [setShown, setOver, setProblem, setBare]) set(null);
    const into = (set) => (found) => gone.signal.aborted || set(found);
    const failing = (set) => (error) => gone.signal.aborted || set(error.message);
    fetched(`${film} greys`, async () => prepared(await api.greys(film, gone.signal))).then(into(setShown), failing(setProblem));
    fetched(`${film} over`, async () => overlaid(await api.explanation(film, gone.signal))).then(into(setOver), failing(setBare));
    return () => gone.abort();
  }, [film]);

  useLayoutEffect(() => {
    const watcher = new ResizeObserver(() => {
      const { clientWidth, clientHeight } = canvas.current;
      setSize({ width: clientWidth, height: clientHeight, dots: devicePixelRatio });
    });
    watcher.observe(canvas.current);
    return () => watcher.disconnect();
  }, []);

  const { view, window } = look;
  const [seen, through, lies] = [view.value, window.value, overlay.value];
  useLayoutEffect(() => {
    if (!size) return;
    const width = Math.round(size.width * size.dots);
    const height = Math.round(size.height * size.dots);
    if (canvas.current.width !== width || canvas.current.height !== height) Object.assign(canvas.current, { width, height });
    const context = canvas.current.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!shown) return;
    drawFilm(context, shown, seen, through, width, height);
    if (over) drawOverlay(context, shown, over, seen, lies, width, height, 1.4 * size.dots);
    canvas.current.dataset.drawn = "yes";
    if (over) canvas.current.dataset.over = "yes";
  });

  const hand = useHand(canvas, shown, look);
  const values = shown && windowOf(shown, through);
  return html`<figure class="viewer" aria-label=${title}>
    <figcaption>
      <strong>${title}</strong>
      ${shown && html`<span class="quiet">${shown.shrunk > 1 ? `averaged over ${shown.shrunk} × ${shown.shrunk} pixels, ` : ""}${zoomWords(shown, seen, size)}</span>`}
    </figcaption>
    <div class="stage">
      <canvas
        ref=${canvas}
        tabindex="0"
        role="application"
        aria-label=${`${title}. Arrows pan, plus and minus zoom, Shift and arrows change window and level, R resets.`}
        ...${hand}
      ></canvas>
      ${!shown && !problem && html`<p class="stage-note" role="status">Reading the film …</p>`}
      ${problem && html`<p class="stage-note" role="alert">${problem}</p>`}
    </div>
    <div class="window">
      ${slider("Level", values?.centre, shown && { least: shown.centre - shown.span, most: shown.centre + shown.span }, (value) => {
        window.value = { ...window.value, shift: (value - shown.centre) / shown.span };
      })}
      ${slider("Width", values?.width, shown && { least: shown.span * 0.02, most: shown.span * 2 }, (value) => {
        window.value = { ...window.value, factor: value / shown.span };
      })}
      <button type="button" onClick=${() => reset(look)} title="R">Reset</button>
    </div>
    ${bare && html`<p class="bare">No attention or outline: ${bare}</p>`}
    ${children}
  </figure>`;
}

function slider(name, value, range, onChange) {
  return html`<label>
    <span>${name}</span>
    <input
      type="range"
      min=${range?.least ?? 0}
      max=${range?.most ?? 1}
      step="any"
      value=${value ?? 0}
      disabled=${!range}
      aria-valuetext=${value === undefined || value === null ? "" : brief(value)}
      onInput=${(event) => onChange(Number(event.target.value))}
    />
    <output>${value === undefined || value === null ? "" : brief(value)}</output>
  </label>`;
}

function zoomWords(film, view, size) {
  if (!size) return "";
  return `${Math.round(100 * placed(film, view, size.width * size.dots, size.height * size.dots).scale)} %`;
}

async function fetched(name, fetching) {
  const found = kept.get(name) ?? (await fetching());
  kept.delete(name);
  kept.set(name, found);
  while (kept.size > 2 * KEPT) kept.delete(kept.keys().next().value);
  return found;
}

/** Turns mouse and keys into changes of `look`. */
function useHand(canvas, film, look) {
  const dragged = useRef(null);
  const { view, window } = look;

  const pan = (dx, dy) => {
    if (!film) return;
    const { scale } = placed(film, view.value, canvas.current.clientWidth, canvas.current.clientHeight);
    const { zoom, x, y } = view.value;
    view.value = { zoom, x: within(x - dx / (film.width * scale)), y: within(y - dy / (film.height * scale)) };
  };
  const zoom = (by, px, py) => {
    if (!film) return;
    const { clientWidth: width, clientHeight: height } = canvas.current;
    const before = placed(film, view.value, width, height);
    const [fx, fy] = [(px - before.left) / (film.width * before.scale), (py - before.top) / (film.height * before.scale)];
    const next = Math.min(MOST_ZOOM, Math.max(1, view.value.zoom * by));
    if (next === 1) {
      view.value = { zoom: 1, x: 0.5, y: 0.5 };
      return;
    }
    const ratio = view.value.zoom / next; // what lies under the pointer stays there
    view.value = { zoom: next, x: within(fx + (view.value.x - fx) * ratio), y: within(fy + (view.value.y - fy) * ratio) };
  };
  const middle = (by) => zoom(by, canvas.current.clientWidth / 2, canvas.current.clientHeight / 2);
  const shade = (dx, dy) => {
    const { shift, factor } = window.value;
    window.value = { shift: Math.min(1, Math.max(-1, shift + dy)), factor: Math.min(2, Math.max(0.02, factor * Math.exp(dx))) };
  };

  useEffect(() => {
    const wheel = (event) => {
      event.preventDefault();
      const at = canvas.current.getBoundingClientRect();
      zoom(event.deltaY < 0 ? STEP : 1 / STEP, event.clientX - at.left, event.clientY - at.top);
    };
    canvas.current.addEventListener("wheel", wheel, { passive: false });
    return () => canvas.current?.removeEventListener("wheel", wheel);
  });

  const keys = {
    ArrowLeft: (far) => pan(far, 0),
    ArrowRight: (far) => pan(-far, 0),
    ArrowUp: (far) => pan(0, far),
    ArrowDown: (far) => pan(0, -far),
    "+": () => middle(STEP),
    "=": () => middle(STEP),
    "-": () => middle(1 / STEP),
    0: () => middle(0),
    r: () => reset(look),
  };
  const shifted = {
    ArrowLeft: () => shade(-0.08, 0),
    ArrowRight: () => shade(0.08, 0),
    ArrowUp: () => shade(0, 0.02),
    ArrowDown: () => shade(0, -0.02),
  };
  return {
    onKeyDown: (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const act = (event.shiftKey && shifted[event.key]) || keys[event.key];
      if (!act) return;
      event.preventDefault();
      event.stopPropagation();
      act(40);
    },
    onContextMenu: (event) => event.preventDefault(),
    onDblClick: () => reset(look),
    onPointerDown: (event) => {
      canvas.current.focus({ preventScroll: true });
      canvas.current.setPointerCapture(event.pointerId);
      dragged.current = { x: event.clientX, y: event.clientY, shading: event.button === 2 || held.has("w") };
    },
    onPointerMove: (event) => {
      const from = dragged.current;
      if (!from) return;
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      if (from.shading) shade(dx / 300, dy / 500);
      else pan(dx, dy);
      dragged.current = { ...from, x: event.clientX, y: event.clientY };
    },
    onPointerUp: () => {
      dragged.current = null;
    },
    onPointerCancel: () => {
      dragged.current = null;
    },
  };
}

const within = (part) => Math.min(1, Math.max(0, part));

/** Keys that are down: W turns dragging into window and level. */
const held = new Set();
addEventListener("keydown", (event) => held.add(event.key.toLowerCase()));
addEventListener("keyup", (event) => held.delete(event.key.toLowerCase()));
addEventListener("blur", () => held.clear());

/** What lies over the films, for all viewers, with its key. */
export function OverlayTools() {
  const bar = useRef(null);
  useEffect(() => {
    const context = bar.current.getContext("2d");
    const picture = new ImageData(bar.current.width, 1);
    for (let x = 0; x < picture.width; x++) {
      const [r, g, b, a] = tint(x / (picture.width - 1));
      const share = (overlay.value.opacity * a) / 255;
      picture.data.set([r, g, b].map((colour) => share * colour + (1 - share) * 96), 4 * x);
      picture.data[4 * x + 3] = 255;
    }
    for (let y = 0; y < bar.current.height; y++) context.putImageData(picture, 0, y);
  }, [overlay.value.opacity]);
  const set = (change) => {
    overlay.value = { ...overlay.value, ...change };
  };
  return html`<fieldset class="overlay-tools">
    <legend class="unseen">What lies over the films</legend>
    <label><input type="checkbox" checked=${overlay.value.lungs} onChange=${(event) => set({ lungs: event.target.checked })} /> Lung outline</label>
    <label
      ><input type="checkbox" checked=${overlay.value.attention} onChange=${(event) => set({ attention: event.target.checked })} />
      Attention</label
    >
    <label class="opacity">
      <span>Opacity</span>
      <input
        type="range"
        min="0"
        max="1"
        step="0.05"
        value=${overlay.value.opacity}
        disabled=${!overlay.value.attention}
        onInput=${(event) => set({ opacity: Number(event.target.value) })}
      />
      <output>${Math.round(100 * overlay.value.opacity)} %</output>
    </label>
    <div class="key">
      <canvas ref=${bar} width="200" height="8" aria-hidden="true"></canvas>
      <span class="ends"><span>0</span><span>0.5 no colour below</span><span>1</span></span>
      <span class="caution">Where the network looked. Bright is no proof of disease, and dark no proof of health.</span>
    </div>
  </fieldset>`;
}
