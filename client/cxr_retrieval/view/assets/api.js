// The server's HTTP interface (view/web.py), and what it says when something cannot be done.

/** What could not be done: `parts` {kind, what, expected, got, next_step, message, may_pass}. */
export class Problem extends Error {
  constructor(parts, status) {
    super(parts.message);
    this.parts = parts;
    this.status = status;
  }
}

const GONE = {
  kind: "Gone",
  what: "the page's server does not answer",
  expected: "`cxr view` running",
  got: "",
  next_step: "start it again; then reload this page",
  may_pass: true,
};

export const status = async () => (await request("/api/status")).json();
export const answer = async (id) => (await request(`/api/queries/${id}`)).json();
export const cases = async (asked) => (await request("/api/cases", { method: "POST", body: JSON.stringify(asked) })).json();
export const clause = async (typed) => (await request("/api/clause", { method: "POST", body: JSON.stringify(typed) })).json();
export const map = async () => (await request("/api/map")).json();
export const mapAgain = (asked) => request("/api/map", { method: "POST", body: JSON.stringify(asked) });
export const mapPoints = async (id) => new Float32Array(await (await request(`/api/map/${id}/points`)).arrayBuffer());
export const mapMarks = async (id, query) => (await request(`/api/map/${id}/queries/${query}`)).json();
export const mapCases = async (id, asked) => (await request(`/api/map/${id}/cases`, { method: "POST", body: JSON.stringify(asked) })).json();
export const worklist = async (asked) => (await request(`/api/worklist?${new URLSearchParams(asked)}`)).json();
export const ask = async (question) => (await request("/api/queries", { method: "POST", body: JSON.stringify(question) })).json();
export const turn = async (id, balance) => (await request(`/api/queries/${id}/balance`, { method: "POST", body: JSON.stringify({ balance }) })).json();
export const mark = async (id, marks) => (await request(`/api/queries/${id}/marks`, { method: "POST", body: JSON.stringify({ marks }) })).json();
export const pageOf = (id) => `/api/queries/${id}/page`;
export const collections = async () => (await (await request("/api/collections")).json()).collections;
export const collection = async (id) => (await request(`/api/collections/${id}`)).json();
export const newCollection = async (name) => (await request("/api/collections", { method: "POST", body: JSON.stringify({ name }) })).json();
export const renameCollection = async (id, name) => (await request(`/api/collections/${id}`, { method: "POST", body: JSON.stringify({ name }) })).json();
export const removeCollection = (id) => request(`/api/collections/${id}`, { method: "DELETE" });
export const alike = (asked) => request("/api/alike", { method: "POST", body: JSON.stringify(asked) }).then((response) => response.json());
export const pin = (id, pinned) => request(`/api/collections/${id}/pins`, { method: "POST", body: JSON.stringify(pinned) });
export const unpin = (id, film) => request(`/api/collections/${id}/pins/${film}`, { method: "DELETE" });
export const tableOf = (id) => `/api/collections/${id}/table`;
export const signIn = (token) => request("/api/session", { method: "POST", headers: { authorization: `Bearer ${token}` } });

/** Sends a file as it is; its name stays here. Returns the film's name. */
export async function upload(file) {
  return (await (await request("/api/films", { method: "POST", body: file })).json()).film;
}

/** A film's own values: {stored: Uint16Array, width, height, intercept, slope, low, high, inverted, shrunk}. */
export async function greys(film, signal) {
  const response = await request(`/api/films/${film}/greys`, { signal });
  return { ...JSON.parse(response.headers.get("x-cxr-film")), stored: new Uint16Array(await response.arrayBuffer()) };
}

/** Lungs and attention over a film: {width, height, pixels: RGBA}, red attention, green lungs. */
export async function explanation(film, signal) {
  const response = await request(`/api/films/${film}/explanation`, { signal });
  const picture = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = picture;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return { width, height, pixels: context.getImageData(0, 0, width, height).data };
}

/** A map's colours by a field: {codes: Uint8Array, kind, ends, entries}. */
export async function mapColours(id, field) {
  const response = await request(`/api/map/${id}/colours?${new URLSearchParams({ field })}`);
  return { ...JSON.parse(response.headers.get("x-cxr-legend")), codes: new Uint8Array(await response.arrayBuffer()) };
}

export const thumbnail = (film) => `/api/films/${film}/thumbnail`;

/** Why there is no thumbnail. */
export async function whyNoThumbnail(film) {
  try {
    await request(thumbnail(film));
    return "";
  } catch (problem) {
    return problem.message;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(options.method ? { "x-cxr-view": "1" } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw problem(GONE, 0);
  }
  if (response.ok) return response;
  let parts;
  try {
    parts = (await response.json()).error;
  } catch {
    parts = { ...GONE, what: `the page's server answered with ${response.status}`, may_pass: false };
  }
  throw problem(parts, response.status);
}

/** A problem; one found here has no message yet. */
export function problem(parts, status) {
  const expected = parts.expected ? `; expected ${parts.expected}` : "";
  const got = parts.got ? `; got ${parts.got}` : "";
  const next = parts.next_step ? ` Next: ${parts.next_step}.` : "";
  return new Problem({ message: `${parts.what}${expected}${got}.${next}`, ...parts }, status);
}
