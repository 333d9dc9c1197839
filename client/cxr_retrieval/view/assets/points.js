// Many points as one picture: by WebGL in one call, or pixel by pixel where there is no graphics card, for there the latter is several
// times faster. Nothing here knows the page.

const VERTEX = `#version 300 es
in vec2 place;
in float code;
uniform vec2 middle, scale;
uniform float size;
uniform sampler2D palette;
out vec4 colour;
void main() {
  colour = texelFetch(palette, ivec2(int(code + 0.5), 0), 0);
  gl_Position = vec4((place - middle) * scale, 0.0, 1.0);
  gl_PointSize = colour.a == 0.0 ? 0.0 : size;
}`;

const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 colour;
out vec4 shown;
void main() {
  vec2 off = gl_PointCoord - 0.5;
  if (dot(off, off) > 0.25) discard;
  shown = vec4(colour.rgb * colour.a, colour.a);
}`;

export const home = { zoom: 1, x: 0, y: 0 };

/** Pixels for 1 of the map, whose coordinates go from −1 to 1; at zoom 1 all of it is seen. */
export const scaleOf = (view, width, height) => 0.47 * Math.min(width, height) * view.zoom;

/** A point of the map in pixels, and back. */
export function toPixels(view, width, height, [x, y]) {
  const scale = scaleOf(view, width, height);
  return [width / 2 + (x - view.x) * scale, height / 2 - (y - view.y) * scale];
}

export function toMap(view, width, height, [px, py]) {
  const scale = scaleOf(view, width, height);
  return [view.x + (px - width / 2) / scale, view.y - (py - height / 2) / scale];
}

/**
 * Who draws on this canvas: {kind, put, draw}. `put({points, codes, palette, ground})`: x and y of each point, the place of its colour in the
 * palette, 256 colours as RGBA, and the colour behind all, of which any may be left out to keep the former one. `draw(view, dot)`: with dots
 * so many pixels wide.
 */
export function painter(canvas) {
  const gl = hasCard() && canvas.getContext("webgl2", { alpha: false, antialias: false, depth: false, preserveDrawingBuffer: true });
  return gl ? onCard(gl, canvas) : onPaper(canvas);
}

/** Whether WebGL is not the work of this machine's processor. */
function hasCard() {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2", { failIfMajorPerformanceCaveat: true });
  const about = gl?.getExtension("WEBGL_debug_renderer_info");
  return gl && !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(gl.getParameter(about ? about.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
}

function onCard(gl, canvas) {
  const program = gl.createProgram();
  for (const [kind, text] of [
    [gl.VERTEX_SHADER, VERTEX],
    [gl.FRAGMENT_SHADER, FRAGMENT],
  ]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  const uniform = (name) => gl.getUniformLocation(program, name);
  const [middle, scale, size] = ["middle", "scale", "size"].map(uniform);
  const buffer = (name, parts, kind) => {
    const made = gl.createBuffer();
    const place = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, made);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, parts, kind, false, 0, 0);
    return made;
  };
  const [places, coded] = [buffer("place", 2, gl.FLOAT), buffer("code", 1, gl.UNSIGNED_BYTE)];
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  let count = 0;
  const fill = (into, data) => {
    gl.bindBuffer(gl.ARRAY_BUFFER, into);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
  };
  return {
    kind: "WebGL",
    put({ points, codes, palette, ground }) {
      if (ground) gl.clearColor(...ground.map((part) => part / 255), 1);
      if (points) fill(places, points);
      if (codes) fill(coded, codes);
      if (codes) count = codes.length;
      if (palette) gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, palette);
    },
    draw(view, dot) {
      const { width, height } = canvas;
      const by = scaleOf(view, width, height);
      gl.viewport(0, 0, width, height);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.uniform2f(middle, view.x, view.y);
      gl.uniform2f(scale, (2 * by) / width, (2 * by) / height);
      gl.uniform1f(size, dot);
      gl.drawArrays(gl.POINTS, 0, count);
    },
  };
}

function onPaper(canvas) {
  const context = canvas.getContext("2d", { alpha: false });
  const held = { points: new Float32Array(), codes: new Uint8Array(), palette: new Uint8Array(1024), ground: [0, 0, 0] };
  let picture = new ImageData(1, 1);
  return {
    kind: "2-D canvas",
    put(given) {
      Object.assign(held, given);
    },
    draw(view, dot) {
      const { width, height } = canvas;
      if (picture.width !== width || picture.height !== height) picture = new ImageData(width, height);
      const pixels = new Uint32Array(picture.data.buffer);
      pixels.fill(packed(held.ground));
      for (const faint of [true, false]) drawDots(pixels, held, view, dot, width, height, faint);
      context.putImageData(picture, 0, 0);
    },
  };
}

const packed = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;

/** Those that are faint, or the others, mixed with what lies below them; two channels at a time. */
function drawDots(pixels, { points, codes, palette }, view, dot, width, height, faint) {
  const disc = discOf(dot, width);
  const by = scaleOf(view, width, height);
  const [left, top] = [width / 2 - view.x * by, height / 2 + view.y * by];
  for (let i = 0; i < codes.length; i++) {
    const at = 4 * codes[i];
    const opacity = palette[at + 3];
    if (!opacity || opacity < 128 !== faint) continue;
    const x = Math.round(left + points[2 * i] * by);
    const y = Math.round(top - points[2 * i + 1] * by);
    if (x < disc.reach || y < disc.reach || x >= width - disc.reach || y >= height - disc.reach) continue;
    const [redBlue, green, middle] = [palette[at] | (palette[at + 2] << 16), palette[at + 1] << 8, y * width + x];
    for (let n = 0; n < disc.offsets.length; n++) {
      const place = middle + disc.offsets[n];
      const share = (disc.shares[n] * opacity) >> 8;
      const under = pixels[place];
      const mixedRedBlue = ((redBlue * share + (under & 0xff00ff) * (256 - share)) >>> 8) & 0xff00ff;
      const mixedGreen = ((green * share + (under & 0xff00) * (256 - share)) >>> 8) & 0xff00;
      pixels[place] = 0xff000000 | mixedRedBlue | mixedGreen;
    }
  }
}

/** Which pixels around its middle a dot covers: `offsets` in a picture so wide, and how much of each is covered, of 256. */
function discOf(dot, width) {
  const reach = Math.ceil(dot / 2);
  const [offsets, shares] = [[], []];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const share = Math.min(1, Math.max(0, dot / 2 + 0.5 - Math.hypot(x, y)));
      if (share > 0.05) {
        offsets.push(y * width + x);
        shares.push(Math.round(256 * share));
      }
    }
  }
  return { reach, offsets, shares };
}
