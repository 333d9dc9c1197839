// The gallery at a glance: its cases as points, coloured by what is known of them; a region of it, and what it holds.

import * as api from "./api.js";
import { StoredCase } from "./cases.js";
import { html, signal, useEffect, useMemo, useRef, useState } from "./html.js";
import { Trouble } from "./parts.js";
import { home, painter, scaleOf, toMap, toPixels } from "./points.js";
import { answer, said } from "./state.js";
import { brief, labelColour, labelName, percent } from "./words.js";

const STEP = 1.25; // of a key or a notch of the wheel
const MOST_ZOOM = 200;
const SHOWN = 24;
const POLL_MS = { working: 500, idle: 10_000 };
const FRAME = 0.5; // of the view's width and height: what Enter takes
const LEAST_MOVE = 3; // pixels between two corners of a lasso
const MOST_CORNERS = 800; // the server takes 1,000
const SHADES = 254; // codes of a scale (view/atlas.py)
const FAINT = 0.09; // opacity of what is not chosen in the legend
const TOOLS = [
  ["move", "Move", "Drag moves the map"],
  ["rectangle", "Rectangle", "Drag a rectangle around cases; so does Shift while dragging"],
  ["lasso", "Lasso", "Draw around cases"],
];

/** How the map is looked at, kept while other pages are shown. */
const view = signal(home);
const field = signal("label");
const region = signal(null); // {map, corners}

export function MapPage() {
  const [state, setState] = useState(null); // as the server tells it, or {problem}
  const [sheet, setSheet] = useState(null); // {id, points, marks}
  const [colours, setColours] = useState(null);
  const [chosen, setChosen] = useState([]); // places in the legend
  const [tries, setTries] = useState(0);

  useEffect(() => {
    let later;
    let gone = false;
    const look = async () => {
      let found;
      try {
        found = await api.map();
      } catch (problem) {
        found = { map: null, doing: null, problem };
      }
      if (gone) return;
      setState((now) => (JSON.stringify(now) === JSON.stringify(found) ? now : found));
      if (!found.problem || found.map) later = setTimeout(look, found.doing ? POLL_MS.working : POLL_MS.idle);
    };
    look();
    return () => {
      gone = true;
      clearTimeout(later);
    };
  }, [tries]);

  const map = state?.map;
  const query = answer.value?.id;
  useEffect(() => {
    if (!map) return undefined;
    let gone = false;
    const marked = query ? api.mapMarks(map.id, query).catch(() => null) : null;
    Promise.all([sheet?.id === map.id ? sheet.points : api.mapPoints(map.id), marked]).then(
      ([points, marks]) => gone || setSheet({ id: map.id, points, marks }),
      () => gone || setTries((now) => now + 1), // there is a newer one
    );
    return () => {
      gone = true;
    };
  }, [map?.id, query]);

  const by = map?.fields.some((one) => one.name === field.value) ? field.value : "label";
  useEffect(() => {
    if (!map) return undefined;
    let gone = false;
    setChosen([]);
    api.mapColours(map.id, by).then(
      (found) => gone || setColours({ ...found, id: map.id, by }),
      () => gone || setTries((now) => now + 1),
    );
    return () => {
      gone = true;
    };
  }, [map?.id, by]);

  const again = (anew) => api.mapAgain({ anew }).then(() => setTries((now) => now + 1), (problem) => setState({ map: null, doing: null, problem }));
  if (!map) return html`<${Waiting} state=${state} again=${again} />`;
  const ready = sheet?.id === map.id && colours?.id === map.id;
  return html`<main class="map">
    <section class="atlas" aria-label="Map">${ready && html`<${Stage} sheet=${sheet} colours=${colours} chosen=${chosen} cases=${map.cases} />`}</section>
    <aside class="legend-side" aria-label="What the map shows">
      <h1>The gallery at a glance</h1>
      ${map.told.map((line) => html`<p class="told">${line}</p>`)}
      ${state.problem && html`<p class="wrong" role="alert">${state.problem}</p>`}
      <${Age} map=${map} doing=${state.doing} again=${again} />
      <label class="by"
        ><span>Coloured by</span>
        <select id="coloured-by" value=${by} onChange=${(event) => { field.value = event.target.value; }}>
          ${map.fields.map(({ name, title }) => html`<option value=${name} selected=${name === by}>${title}</option>`)}
        </select></label
      >
      ${ready && html`<${Legend} colours=${colours} chosen=${chosen} setChosen=${setChosen} />`}
      ${ready && sheet.marks?.query && html`<p class="told"><button type="button" onClick=${() => toMarks(sheet.marks)}>Show the film asked about</button></p>`}
      ${region.value?.map === map.id && html`<${Region} map=${map.id} corners=${region.value.corners} />`}
    </aside>
  </main>`;
}

/** Before there is a map. */
function Waiting({ state, again }) {
  const problem = state?.problem;
  return html`<main class="welcome">
    ${problem
      ? html`<${Trouble} problem=${problem} title="There is no map of the gallery">
          <button type="button" onClick=${() => again(false)}>Try again</button>
          ${problem.parts?.kind === "SetupError" && html` <button type="button" onClick=${() => again(true)}>Compute it anew</button>`}
        <//>`
      : html`<section class="drop">
          <h1>The gallery at a glance</h1>
          <p>There is no map of this gallery yet. It is computed once, and kept on this machine.</p>
          ${state?.doing && html`<${Doing} doing=${state.doing} />`}
        </section>`}
  </main>`;
}

const Doing = ({ doing }) => html`<p class="doing"><progress max="1" value=${doing.share} aria-label="Computing the map"></progress> ${doing.what}, ${percent(doing.share)}</p>`;

/** How old the map is, and whether it should be computed anew. */
function Age({ map, doing, again }) {
  if (doing) return html`<${Doing} doing=${doing} />`;
  const since = map.changed > 0 ? `; ${percent(map.changed)} of its cases are new or gone since, new ones lie between their nearest` : "";
  return html`<p class=${map.stale ? "age stale" : "age"}>
    ${map.part ? "A part of the gallery. " : ""}Computed ${map.made} from ${map.drawn.toLocaleString("en")} cases${since}.${" "}
    <button type="button" class="link" onClick=${() => again(true)}>Compute anew</button>
  </p>`;
}

/** The map itself, moved and brushed by mouse and by keys. */
function Stage({ sheet, colours, chosen, cases }) {
  const points = useRef(null);
  const over = useRef(null);
  const [tool, setTool] = useState("move");
  const scene = useMemo(() => ({ sheet, brushed: null, painter: null, asked: false }), []);
  scene.sheet = sheet;
  const dots = () => devicePixelRatio;

  const draw = () => {
    scene.asked = false;
    if (!points.current) return;
    const { clientWidth, clientHeight } = points.current;
    const [width, height] = [Math.round(clientWidth * dots()), Math.round(clientHeight * dots())];
    for (const canvas of [points.current, over.current]) if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const { zoom } = view.value;
    const side = Math.min(clientWidth, clientHeight);
    const dot = Math.min(0.013 * side, Math.max(2, (0.55 * side) / Math.sqrt(cases))) * Math.min(2.5, zoom ** 0.35);
    scene.painter.draw(view.value, dot * dots());
    drawOver(over.current.getContext("2d"), scene, width, height, dots() * (parseFloat(getComputedStyle(document.documentElement).fontSize) / 14), points.current.matches(":focus-visible"));
    points.current.dataset.drawn = scene.painter.kind;
  };
  const redraw = () => {
    if (scene.asked) return;
    scene.asked = true;
    requestAnimationFrame(draw);
  };

  useEffect(() => {
    const begin = () => {
      scene.painter = painter(points.current);
      scene.painter.put(scene.given?.() ?? {});
      redraw();
    };
    begin();
    const lost = (event) => event.preventDefault();
    points.current.addEventListener("webglcontextlost", lost);
    points.current.addEventListener("webglcontextrestored", begin);
    const sized = new ResizeObserver(redraw);
    sized.observe(points.current);
    const themed = () => {
      scene.painter.put(scene.given());
      redraw();
    };
    const watcher = new MutationObserver(themed);
    watcher.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    const system = matchMedia("(prefers-color-scheme: light)");
    system.addEventListener("change", themed);
    const follow = [view.subscribe(redraw), region.subscribe(redraw)];
    return () => {
      sized.disconnect();
      watcher.disconnect();
      system.removeEventListener("change", themed);
      follow.forEach((end) => end());
    };
  }, []);

  useEffect(() => {
    scene.given = () => ({ points: sheet.points, codes: colours.codes, palette: paletteOf(colours, chosen), ground: styled("--paper") });
    scene.painter.put(scene.given());
    redraw();
  }, [sheet, colours, chosen]);

  const brush = (corners) => {
    scene.brushed = null;
    region.value = corners && { map: sheet.id, corners };
    redraw();
  };
  const hand = useHand(points, scene, tool, brush, redraw);
  return html`<div class="tools" role="group" aria-label="What dragging does">
      ${TOOLS.map(([name, text, title]) => html`<button type="button" title=${title} aria-pressed=${tool === name} onClick=${() => setTool(name)}>${text}</button>`)}
      <button type="button" title="0" onClick=${() => { view.value = home; }}>All</button>
      ${region.value && html`<button type="button" title="Escape" onClick=${() => brush(null)}>Clear the region</button>`}
    </div>
    <div class=${`stage of-map tool-${tool}`}>
      <canvas
        ref=${points}
        tabindex="0"
        role="application"
        aria-label="Map of the gallery. Arrows pan, plus and minus zoom, 0 shows all, Enter takes the cases inside the frame, Escape clears the region."
        onFocus=${redraw}
        onBlur=${redraw}
        ...${hand}
      ></canvas>
      <canvas ref=${over} class="over" aria-hidden="true"></canvas>
    </div>`;
}

/** What lies over the points: the region, the frame of Enter, the film asked about and its neighbours. */
function drawOver(context, { sheet, brushed }, width, height, dots, focused) {
  const style = getComputedStyle(document.documentElement);
  const [ink, accent, paper, focus] = ["--ink", "--accent", "--paper", "--focus"].map((name) => style.getPropertyValue(name));
  context.clearRect(0, 0, width, height);
  const corners = brushed ?? (region.value?.map === sheet.id ? region.value.corners : null);
  if (corners) {
    context.beginPath();
    for (const corner of corners) context.lineTo(...toPixels(view.value, width, height, corner));
    context.closePath();
    Object.assign(context, { globalAlpha: 0.12, fillStyle: accent });
    context.fill();
    Object.assign(context, { globalAlpha: 1, strokeStyle: accent, lineWidth: 1.5 * dots });
    context.stroke();
  }
  if (focused) {
    context.setLineDash([6 * dots, 5 * dots]);
    Object.assign(context, { strokeStyle: focus, lineWidth: dots });
    context.strokeRect((width * (1 - FRAME)) / 2, (height * (1 - FRAME)) / 2, width * FRAME, height * FRAME);
    context.setLineDash([]);
  }
  if (!sheet.marks?.query) return;
  const at = toPixels(view.value, width, height, sheet.marks.query);
  Object.assign(context, { font: `600 ${11 * dots}px system-ui, sans-serif`, textAlign: "center", textBaseline: "middle", lineJoin: "round" });
  const twice = (colour, thick, draw) => {
    Object.assign(context, { strokeStyle: paper, lineWidth: (thick + 3) * dots });
    draw();
    Object.assign(context, { strokeStyle: colour, lineWidth: thick * dots });
    draw();
  };
  for (const { rank, x, y } of [...sheet.marks.neighbours].reverse()) {
    const [px, py] = toPixels(view.value, width, height, [x, y]);
    twice(ink, 1.6, () => {
      context.beginPath();
      context.arc(px, py, 6 * dots, 0, 2 * Math.PI);
      context.stroke();
    });
    Object.assign(context, { strokeStyle: paper, lineWidth: 3 * dots, fillStyle: ink });
    context.strokeText(rank, px, py - 13 * dots);
    context.fillText(rank, px, py - 13 * dots);
  }
  twice(accent, 3, () => {
    context.beginPath();
    for (const [dx, dy] of [[-1, 0], [0, -1]]) {
      context.moveTo(at[0] + 12 * dx * dots, at[1] + 12 * dy * dots);
      context.lineTo(at[0] - 12 * dx * dots, at[1] - 12 * dy * dots);
    }
    context.stroke();
  });
}

/** Turns mouse and keys into changes of the view, or a region. */
function useHand(canvas, scene, tool, brush, redraw) {
  const dragged = useRef(null);
  const size = () => [canvas.current.clientWidth, canvas.current.clientHeight];
  const place = (event) => {
    const at = canvas.current.getBoundingClientRect();
    return [event.clientX - at.left, event.clientY - at.top];
  };
  const pan = (dx, dy) => {
    const by = scaleOf(view.value, ...size());
    view.value = { ...view.value, x: within(view.value.x - dx / by), y: within(view.value.y + dy / by) };
  };
  const zoom = (by, at) => {
    const next = Math.min(MOST_ZOOM, Math.max(1, view.value.zoom * by));
    if (next === 1) {
      view.value = home;
      return;
    }
    const [x, y] = toMap(view.value, ...size(), at);
    const ratio = view.value.zoom / next; // what lies under the pointer stays there
    view.value = { zoom: next, x: within(x + (view.value.x - x) * ratio), y: within(y + (view.value.y - y) * ratio) };
  };
  const middle = (by) => zoom(by, size().map((length) => length / 2));
  const mapped = (pixels) => pixels.map((one) => toMap(view.value, ...size(), one));
  const frame = () => {
    const [width, height] = size();
    const [left, right] = [(width * (1 - FRAME)) / 2, (width * (1 + FRAME)) / 2];
    const [top, bottom] = [(height * (1 - FRAME)) / 2, (height * (1 + FRAME)) / 2];
    brush(mapped([[left, top], [right, top], [right, bottom], [left, bottom]]));
  };

  useEffect(() => {
    const wheel = (event) => {
      event.preventDefault();
      zoom(event.deltaY < 0 ? STEP : 1 / STEP, place(event));
    };
    canvas.current.addEventListener("wheel", wheel, { passive: false });
    return () => canvas.current?.removeEventListener("wheel", wheel);
  });

  const keys = {
    ArrowLeft: () => pan(60, 0),
    ArrowRight: () => pan(-60, 0),
    ArrowUp: () => pan(0, 60),
    ArrowDown: () => pan(0, -60),
    "+": () => middle(STEP),
    "=": () => middle(STEP),
    "-": () => middle(1 / STEP),
    0: () => middle(0),
    Enter: frame,
    Escape: () => brush(null),
  };
  const end = (event) => {
    const from = dragged.current;
    dragged.current = null;
    if (!from?.pixels) return;
    const [[x0, y0], [x1, y1]] = [from.pixels[0], place(event)];
    const few = from.pixels.filter((_, number) => number % Math.ceil(from.pixels.length / MOST_CORNERS) === 0);
    const corners = from.tool === "lasso" ? few : [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    brush(corners.length > 2 && Math.abs(x1 - x0) + Math.abs(y1 - y0) + from.pixels.length > LEAST_MOVE ? mapped(corners) : null);
  };
  return {
    onKeyDown: (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      keys[event.key]();
    },
    onDblClick: () => {
      view.value = home;
    },
    onPointerDown: (event) => {
      if (event.button !== 0) return;
      canvas.current.focus({ preventScroll: true });
      canvas.current.setPointerCapture(event.pointerId);
      const used = event.shiftKey ? "rectangle" : tool;
      dragged.current = { tool: used, last: place(event), pixels: used === "move" ? null : [place(event)] };
    },
    onPointerMove: (event) => {
      const from = dragged.current;
      if (!from) return;
      const [x, y] = place(event);
      if (!from.pixels) pan(x - from.last[0], y - from.last[1]);
      else {
        const [[x0, y0], [xl, yl]] = [from.pixels[0], from.pixels.at(-1)];
        if (Math.hypot(x - xl, y - yl) >= LEAST_MOVE) from.pixels.push([x, y]);
        scene.brushed = mapped(from.tool === "lasso" ? from.pixels : [[x0, y0], [x, y0], [x, y], [x0, y]]);
        redraw();
      }
      from.last = [x, y];
    },
    onPointerUp: end,
    onPointerCancel: () => {
      dragged.current = null;
      scene.brushed = null;
      redraw();
    },
  };
}

const within = (part) => Math.min(1, Math.max(-1, part));

/** So near that the film asked about and its neighbours fill the view. */
function toMarks({ query, neighbours }) {
  const reach = Math.max(0.02, ...neighbours.map(({ x, y }) => Math.max(Math.abs(x - query[0]), Math.abs(y - query[1]))));
  view.value = { zoom: Math.min(MOST_ZOOM, Math.max(1, 0.7 / reach)), x: query[0], y: query[1] };
}

/** What the colours mean; each entry can be chosen, and the rest steps back. */
function Legend({ colours, chosen, setChosen }) {
  const { entries, kind, ends } = colours;
  const choose = (number) => setChosen(chosen.includes(number) ? chosen.filter((one) => one !== number) : [...chosen, number]);
  return html`<div class="legend" role="group" aria-label="Legend">
    ${kind === "number" && html`<div class="key"><span class="scale"></span><span class="ends"><span>${brief(ends[0])}</span><span>${brief(ends[1])}</span></span></div>`}
    ${entries.map(
      (entry, number) => html`<button type="button" class="entry" aria-pressed=${chosen.includes(number)} onClick=${() => choose(number)}>
        <${Swatch} colours=${colours} entry=${entry} />
        <span class="entry-name">${entryName(colours, entry)}</span>
        <span class="entry-count">${entry.cases.toLocaleString("en")}</span>
        <span class="entry-agree quiet">${entry.voted && colours.by !== "agreement" ? `${percent(entry.agree / entry.voted)} agree` : ""}</span>
      </button>`,
    )}
    ${chosen.length > 0 && html`<button type="button" onClick=${() => setChosen([])}>Show all</button>`}
  </div>`;
}

const isLabel = ({ by }) => by === "label" || by === "vote";
const entryName = (colours, { name, low }) => (low > 0 && isLabel(colours) ? labelName(name) : name);

/** The colour of an entry; of a part of the scale, that of its middle. */
function Swatch({ colours, entry }) {
  const name = colourOf(colours, entry);
  const style = name === "scale" ? { backgroundPosition: `${(100 * ((entry.low + entry.high) / 2 - 1)) / (SHADES - 1)}% 0` } : {};
  return html`<span class=${`swatch ${name}`} style=${style}></span>`;
}

/** Which colour of the style sheet an entry has. */
function colourOf(colours, { name, low, high }) {
  if (low === 0) return "colour-none";
  if (colours.kind === "number") return "scale";
  if (isLabel(colours) && low <= 12) return `colour-${labelColour(name)}`;
  if (colours.by === "agreement") return name === "agrees" ? "colour-3" : "colour-bad";
  if (colours.kind === "flag") return name === "yes" ? "colour-1" : "colour-0";
  return low === high && low <= 12 ? `colour-${low - 1}` : "colour-other";
}

/** The 256 colours of the codes, RGBA; faint where not chosen. */
function paletteOf(colours, chosen) {
  const palette = new Uint8Array(1024);
  const shades = scaleColours();
  colours.entries.forEach((entry, number) => {
    const name = colourOf(colours, entry);
    for (let code = entry.low; code <= entry.high; code++) {
      const colour = name === "scale" ? shaded(shades, (code - 1) / (SHADES - 1)) : styled(`--${name}`);
      const opacity = chosen.length && !chosen.includes(number) ? FAINT : entry.low === 0 ? 0.45 : 0.85;
      palette.set([...colour, Math.round(255 * opacity)], 4 * code);
    }
  });
  return palette;
}

/** A colour of the style sheet, `#rrggbb`, as numbers. */
function styled(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

const scaleColours = () => [0, 1, 2, 3, 4].map((number) => styled(`--shade-${number}`));

function shaded(shades, share) {
  const at = Math.min(1, Math.max(0, share)) * (shades.length - 1);
  const below = Math.min(Math.floor(at), shades.length - 2);
  return shades[below].map((from, channel) => from + (at - below) * (shades[below + 1][channel] - from));
}

/** The cases of a region, and what is known of them. */
function Region({ map, corners }) {
  const [offset, setOffset] = useState(0);
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => setOffset(0), [corners]);
  useEffect(() => {
    let gone = false;
    api.mapCases(map, { corners, limit: SHOWN, offset }).then(
      (cases) => {
        if (gone) return;
        setFound(cases);
        setProblem(null);
        said.value = `${cases.total} cases in the region`;
      },
      (error) => gone || setProblem(error),
    );
    return () => {
      gone = true;
    };
  }, [map, corners, offset]);
  if (problem) return html`<${Trouble} problem=${problem} title="The region cannot be shown" />`;
  if (!found) return null;
  const { label, source } = found.summary.features;
  const counted = (what) => what && Object.entries(what.counts).slice(0, 5).map(([name, cases]) => `${labelName(name)} ${cases.toLocaleString("en")}`).join(", ");
  return html`<section class="region" aria-label="Cases in the region">
    <h2>${found.total === 1 ? "1 case" : `${found.total.toLocaleString("en")} cases`} in this region</h2>
    <ul class="summary">
      ${label && html`<li>${counted(label)}</li>`}
      ${source && html`<li>source: ${counted(source)}</li>`}
      ${found.total > 0 && found.told.map((line) => html`<li>${line}</li>`)}
    </ul>
    <div class="neighbours"><ol>${found.cases.map((held) => html`<${StoredCase} key=${held.key} held=${held} />`)}</ol></div>
    ${found.total > SHOWN &&
    html`<nav class="pager" aria-label="Pages">
      <button type="button" disabled=${offset === 0} onClick=${() => setOffset(Math.max(0, offset - SHOWN))}>Previous</button>
      <span>${offset + 1} to ${Math.min(offset + SHOWN, found.total)} of ${found.total.toLocaleString("en")}</span>
      <button type="button" disabled=${offset + SHOWN >= found.total} onClick=${() => setOffset(offset + SHOWN)}>Next</button>
    </nav>`}
  </section>`;
}
