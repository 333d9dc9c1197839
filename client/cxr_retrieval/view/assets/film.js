// A film as the viewer draws it: its own grey values through a window, attention and outline over it. Nothing here knows the page.

const SMALLEST = 300_000; // pixels of the coarsest level
const NEUTRAL = 0.5; // attention with no colour up to there (retrieval/picture.py)
const INFERNO = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

/** A film's values, and the same at a half, a quarter …, so that what is drawn costs what the screen has, not what the film has. */
export function prepared(greys) {
  const levels = [{ width: greys.width, height: greys.height, values: greys.stored }];
  while (levels.at(-1).width * levels.at(-1).height > SMALLEST) levels.push(halved(levels.at(-1)));
  return { ...greys, levels, centre: (greys.low + greys.high) / 2, span: Math.max(greys.high - greys.low, 1e-6) };
}

function halved({ width, height, values }) {
  const w = width >> 1;
  const h = height >> 1;
  const out = new Uint16Array(w * h);
  for (let y = 0, o = 0; y < h; y++) {
    let i = 2 * y * width;
    for (let x = 0; x < w; x++, o++, i += 2) out[o] = (values[i] + values[i + 1] + values[i + width] + values[i + width + 1] + 2) >> 2;
  }
  return { width: w, height: h, values: out };
}

/** A window {shift, factor}, both against the film's own, in the film's own values. */
export const windowOf = (film, window) => ({ centre: film.centre + window.shift * film.span, width: film.span * window.factor });

/** Where the film lies: {scale, left, top} in the units of width and height; `view` {zoom, x, y}: zoom 1 fits, x and y are at the centre. */
export function placed(film, view, width, height) {
  const scale = Math.min(width / film.width, height / film.height) * view.zoom;
  return { scale, left: width / 2 - view.x * film.width * scale, top: height / 2 - view.y * film.height * scale };
}

const scratch = new OffscreenCanvas(1, 1);
const pencil = scratch.getContext("2d");
const shades = new Uint32Array(65536);

/** Draws the film into a canvas of `width` × `height` device pixels. */
export function drawFilm(context, film, view, window, width, height) {
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  const at = placed(film, view, width, height);
  const level = film.levels[Math.min(film.levels.length - 1, Math.max(0, Math.floor(Math.log2(1 / at.scale))))];
  const across = (film.width * at.scale) / level.width; // device pixels of one of the level's
  const down = (film.height * at.scale) / level.height;
  const x0 = Math.max(0, Math.floor(-at.left / across));
  const y0 = Math.max(0, Math.floor(-at.top / down));
  const x1 = Math.min(level.width, Math.ceil((width - at.left) / across));
  const y1 = Math.min(level.height, Math.ceil((height - at.top) / down));
  if (x1 <= x0 || y1 <= y0) return;
  shade(film, window);
  const picture = new ImageData(x1 - x0, y1 - y0);
  const out = new Uint32Array(picture.data.buffer);
  for (let y = y0, o = 0; y < y1; y++) for (let i = y * level.width + x0, end = i + x1 - x0; i < end; ) out[o++] = shades[level.values[i++]];
  scratch.width = picture.width;
  scratch.height = picture.height;
  pencil.putImageData(picture, 0, 0);
  context.drawImage(scratch, at.left + x0 * across, at.top + y0 * down, picture.width * across, picture.height * down);
}

/** Fills `shades`: stored value → opaque grey. */
function shade(film, window) {
  const { centre, width } = windowOf(film, window);
  const per = 255 / width;
  const start = (film.intercept - centre + width / 2) * per;
  const step = film.slope * per;
  for (let value = 0; value < 65536; value++) {
    const grey = Math.min(255, Math.max(0, Math.round(start + value * step)));
    shades[value] = 0xff000000 | ((film.inverted ? 255 - grey : grey) * 0x010101);
  }
}

/** What lies over a film: `colours`, a canvas with attention, and `outline`, a path in parts of the film's width and height. */
export function overlaid({ width, height, pixels }) {
  const colours = new OffscreenCanvas(width, height);
  const picture = new ImageData(width, height);
  const lungs = new Float32Array(width * height);
  for (let p = 0; p < lungs.length; p++) {
    lungs[p] = pixels[4 * p + 1] / 255;
    if (pixels[4 * p + 1]) picture.data.set(tint(pixels[4 * p] / 255), 4 * p);
  }
  colours.getContext("2d").putImageData(picture, 0, 0);
  return { colours, outline: outlined(lungs, width, height) };
}

/** Attention as a colour: RGBA, opaque at 1, none up to NEUTRAL. */
export function tint(value) {
  const place = Math.min(value, 1) * (INFERNO.length - 1);
  const below = Math.min(Math.floor(place), INFERNO.length - 2);
  const mixed = INFERNO[below].map((from, channel) => from + (place - below) * (INFERNO[below + 1][channel] - from));
  return [...mixed, 255 * Math.max(0, (value - NEUTRAL) / (1 - NEUTRAL))];
}

export function drawOverlay(context, film, over, view, shown, width, height, thickness) {
  const at = placed(film, view, width, height);
  if (shown.attention) {
    context.save();
    context.globalAlpha = shown.opacity;
    context.drawImage(over.colours, at.left, at.top, film.width * at.scale, film.height * at.scale);
    context.restore();
  }
  if (shown.lungs) {
    const path = new Path2D();
    path.addPath(over.outline, new DOMMatrix([film.width * at.scale, 0, 0, film.height * at.scale, at.left, at.top]));
    context.lineJoin = "round";
    context.lineWidth = thickness * 2.4;
    context.strokeStyle = "rgb(0 0 0 / 0.55)";
    context.stroke(path);
    context.lineWidth = thickness;
    context.strokeStyle = "#40e0d0";
    context.stroke(path);
  }
}

// Marching squares (Lorensen and Cline 1987, in two dimensions) over the mask, softened over 3 × 3 pixels: which edges of a cell the line
// crosses, for each choice of corners (1 top left, 2 top right, 4 bottom right, 8 bottom left) inside.
const CROSSED = [[], [3, 0], [0, 1], [3, 1], [1, 2], [3, 0, 1, 2], [0, 2], [3, 2], [2, 3], [2, 0], [0, 1, 2, 3], [2, 1], [1, 3], [1, 0], [0, 3], []];

function outlined(lungs, width, height) {
  const soft = softened(lungs, width, height);
  const value = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : soft[y * width + x]);
  const path = new Path2D();
  const between = (a, b) => (0.5 - a) / (b - a);
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const [a, b, c, d] = [value(x, y), value(x + 1, y), value(x + 1, y + 1), value(x, y + 1)];
      const crossed = CROSSED[(a > 0.5) | ((b > 0.5) << 1) | ((c > 0.5) << 2) | ((d > 0.5) << 3)];
      if (!crossed.length) continue;
      const edge = [() => [x + between(a, b), y], () => [x + 1, y + between(b, c)], () => [x + between(d, c), y + 1], () => [x, y + between(a, d)]];
      for (let n = 0; n < crossed.length; n += 2) {
        const [from, to] = [edge[crossed[n]](), edge[crossed[n + 1]]()];
        path.moveTo((from[0] + 0.5) / width, (from[1] + 0.5) / height);
        path.lineTo((to[0] + 0.5) / width, (to[1] + 0.5) / height);
      }
    }
  }
  return path;
}

function softened(values, width, height) {
  const out = new Float32Array(values.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let dy = -1; dy <= 1; dy++) {
        for (let dx = -1; dx <= 1; dx++) {
          const near = x + dx >= 0 && y + dy >= 0 && x + dx < width && y + dy < height;
          if (near) sum += values[(y + dy) * width + x + dx];
        }
      }
      out[y * width + x] = sum / 9;
    }
  }
  return out;
}
