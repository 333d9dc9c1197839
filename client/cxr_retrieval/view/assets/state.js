// What the page knows. Modules read these signals; the functions below alone change what several of them share.

import * as api from "./api.js";
import { batch, signal } from "./html.js";
import { sentence } from "./words.js";

export const route = signal(parsed(location.hash));
export const server = signal({ status: null, problem: null }); // what answers, or why nothing does
export const signedOut = signal(false);
export const answer = signal(null);
export const asking = signal(null); // what is being asked: {name}
export const failed = signal(null); // why the last question has no answer: {problem, film, name}
export const said = signal(""); // read out by screen readers
export const settings = signal({ top_k: null, where: "", text: "", patient: "", include_own: false, gate: true, balance: null });
export const overlay = signal({ attention: true, lungs: true, opacity: 0.6 });

/** Names of files that were dropped here, by film: the server never hears them. */
const names = new Map();
export const nameOf = (film, otherwise = film) => names.get(film) ?? otherwise;

export const toQuery = (id) => `#/query/${id}`;
export const toCase = (id, rank) => `#/query/${id}/case/${rank}`;

export const toCollection = (id) => `#/collections/${id}`;

/** {page: query | worklist | cases | collections | map, id, rank} */
function parsed(hash) {
  const [page = "", id, , rank] = hash.replace(/^#\/?/, "").split("/");
  if (["worklist", "cases", "map"].includes(page)) return { page };
  if (page === "collections") return { page, id: Number(id) || null };
  return { page: "query", id: Number(id) || null, rank: Number(rank) || null };
}

addEventListener("hashchange", () => {
  route.value = parsed(location.hash);
});

export async function refreshServer() {
  try {
    const status = await api.status();
    batch(() => {
      server.value = { status, problem: null };
      signedOut.value = false;
      if (settings.value.top_k === null) settings.value = { ...settings.value, top_k: status.top_k, balance: status.balance };
    });
  } catch (problem) {
    batch(() => {
      signedOut.value = problem.status === 401;
      server.value = { ...server.value, problem: problem.status === 401 ? null : problem };
    });
  }
}

/** Asks about a file that was dropped or chosen. */
export async function askFile(file) {
  const most = server.value.status?.most_bytes;
  await settled(file.name, null, async () => {
    if (most && file.size > most) {
      const sizes = { expected: `at most ${Math.floor(most / 2 ** 20)} MiB`, got: `${Math.ceil(file.size / 2 ** 20)} MiB` };
      throw api.problem({ kind: "TooLarge", what: "the file is too large", ...sizes, next_step: "choose a single radiograph" }, 413);
    }
    const film = await api.upload(file);
    names.set(film, file.name);
    return film;
  });
}

/** Asks about a film that the server knows: one dropped before, a stored case, a line of results. */
export const askFilm = (film, name) => settled(nameOf(film, name), film, async () => film);

/** Asks what an answer was given to once more, moved by marks. */
export const askMarked = (found, marks) => askAnew(found, () => api.mark(found.id, marks));

/** The same at another balance; questions to come are asked so, too. */
export function askTurned(found, balance) {
  settings.value = { ...settings.value, balance };
  return askAnew(found, () => api.turn(found.id, balance));
}

const askAnew = (found, asks) => settled(nameOf(found.film, found.image_id), found.film, async () => found.film, asks);

function asAsked(film) {
  const { patient, ...rest } = settings.value;
  return api.ask({ film, ...rest, patient: patient || null });
}

async function settled(name, known, finding, asks = asAsked) {
  if (asking.value) return;
  batch(() => {
    asking.value = { name };
    failed.value = null;
    said.value = `Asking about ${name}`;
  });
  let film = known;
  try {
    film = await finding();
    const found = await asks(film);
    batch(() => {
      answer.value = found;
      asking.value = null;
      said.value = sentence(found);
      location.hash = toQuery(found.id);
    });
  } catch (problem) {
    if (problem.status === 401) signedOut.value = true;
    batch(() => {
      failed.value = { problem, film, name };
      asking.value = null;
      said.value = problem.message;
      if (route.value.page !== "query" || route.value.rank) location.hash = answer.value ? toQuery(answer.value.id) : "#/";
    });
  }
}

/** Fetches the answer that the address names, where it is not the one shown. */
export async function showAnswer(id) {
  if (answer.value?.id === id) return;
  try {
    answer.value = await api.answer(id);
    failed.value = null;
  } catch (problem) {
    if (problem.status === 401) signedOut.value = true;
    batch(() => {
      answer.value = null;
      failed.value = { problem, film: null, name: "" };
    });
  }
}
