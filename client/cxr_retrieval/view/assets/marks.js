// A reader's marks on the cases of an answer, and what can be kept of it. Marks count once the answer is ranked anew: the server has them then.

import * as api from "./api.js";
import { pinning } from "./collections.js";
import { html, signal, useEffect } from "./html.js";
import { isElsewhere } from "./keys.js";
import { answer, askMarked, asking, route, said } from "./state.js";
import { labelName } from "./words.js";

/** Marks that are made and not yet sent: {id: of the answer, marks: {key: relevant}, steps: what they were before each change}. */
const draft = signal({ id: null, marks: {}, steps: [] });

const sent = (found) => Object.fromEntries(found.marked.map((hit) => [hit.key, hit.relevant]));
const now = (found) => (draft.value.id === found.id ? draft.value : { id: found.id, marks: sent(found), steps: [] });
const isNew = (found) => {
  const [had, has] = [sent(found), now(found).marks];
  return Object.keys({ ...had, ...has }).some((key) => had[key] !== has[key]);
};

function change(found, marks) {
  const { marks: before, steps } = now(found);
  draft.value = { id: found.id, marks, steps: [...steps, before] };
}

/** Marks a case, or takes just this mark back. */
function mark(found, key, relevant) {
  const { [key]: before, ...others } = now(found).marks;
  change(found, before === relevant ? others : { ...others, [key]: relevant });
  said.value = before === relevant ? "mark taken back" : relevant ? "marked relevant" : "marked not relevant";
}

function undo(found) {
  const { steps } = now(found);
  if (steps.length) draft.value = { id: found.id, marks: steps.at(-1), steps: steps.slice(0, -1) };
}

function rank(found) {
  const { marks } = now(found);
  askMarked(found, Object.entries(marks).map(([key, relevant]) => ({ key, relevant })));
}

/** Every case that an answer shows, as they follow each other: {kind, hit}; own: of this patient; aside: marked, and no longer near; went. */
export function shownOf(found) {
  const near = new Set([...found.neighbours, ...found.earlier_films].map((hit) => hit.key));
  return Object.entries({
    near: found.neighbours,
    own: found.earlier_films,
    aside: found.marked.filter((hit) => !near.has(hit.key)),
    went: found.went,
  }).flatMap(([kind, hits]) => hits.map((hit) => ({ kind, hit })));
}

/** What is done with one case. */
export function CaseTools({ found, hit, kind }) {
  const marked = now(found).marks[hit.key];
  const name = `case ${hit.key.slice(0, 12)}, ${labelName(hit.label)}`;
  const toggle = (relevant, sign, words, key) => html`<button
    type="button"
    class=${`mark ${relevant ? "yes" : "no"}`}
    aria-pressed=${marked === relevant}
    aria-label=${`${words}: ${name}`}
    title=${`${words} (${key})`}
    disabled=${asking.value !== null}
    onClick=${() => mark(found, hit.key, relevant)}
  >
    ${sign}
  </button>`;
  return html`<span class="case-tools">
    ${kind !== "own" && html`${toggle(true, "✓", "Relevant", "Y")} ${toggle(false, "✗", "Not relevant", "X")}`}
    <button type="button" class="pin" aria-label=${`Pin ${name}`} title="Pin into a collection (B)" onClick=${() => pinCase(hit)}>Pin</button>
    ${found.came.includes(hit.key) && html`<span class="came">new</span>`}
  </span>`;
}

const pinCase = (hit) => {
  pinning.value = { what: { film: hit.film }, name: `case ${hit.key.slice(0, 12)}` };
};
const pinAnswer = (found) => {
  pinning.value = { what: { answer: found.id }, name: "this film with its answer" };
};

/** What is done with the answer. */
export function AnswerTools({ found }) {
  const { marks, steps } = now(found);
  const all = Object.values(marks);
  const relevant = all.filter(Boolean).length;
  const busy = asking.value !== null;
  return html`<section class="answer-tools" aria-label="Marks, and what to keep">
    <p class="on-paper">${found.image_id}, model ${found.model_version}</p>
    <p role="status">
      ${(found.round > 0 || found.came.length > 0 || found.went.length > 0) &&
      html`<strong>${`${found.round > 0 ? `Round ${found.round}: ` : ""}${found.came.length} came, ${found.went.length} went.`}</strong> `}
      ${all.length ? `${relevant} marked relevant, ${all.length - relevant} not.` : "Mark cases ✓ or ✗, then rank anew."}
    </p>
    ${(isNew(found) || all.length > 0) &&
    html`<button type="button" class="main" disabled=${busy || !isNew(found)} onClick=${() => rank(found)} title="A">Re-rank</button>
      <button type="button" disabled=${busy || !steps.length} onClick=${() => undo(found)} title="U">Undo</button>
      <button type="button" disabled=${busy || !all.length} onClick=${() => change(found, {})}>Clear marks</button>`}
    <span class="keep">
      <button type="button" onClick=${() => pinAnswer(found)} title="B">Pin this film …</button>
      <a class="button" href=${api.pageOf(found.id)} download>Save as HTML</a>
      <button type="button" onClick=${() => print()}>Print or PDF</button>
    </span>
  </section>`;
}

/** Keys for the case that has the focus, or that lies beside the film. */
export function useMarkKeys() {
  useEffect(() => {
    const key = (event) => {
      const found = answer.value;
      if (isElsewhere(event) || !found || route.value.page !== "query" || asking.value) return;
      const focused = document.activeElement?.closest("[data-case]")?.dataset.case;
      const shown = shownOf(found);
      const at = route.value.rank ? shown[route.value.rank - 1] : shown.find(({ hit }) => hit.key === focused);
      if ("yx".includes(event.key) && at && at.kind !== "own") mark(found, at.hit.key, event.key === "y");
      else if (event.key === "a" && isNew(found)) rank(found);
      else if (event.key === "u") undo(found);
      else if (event.key === "b") at ? pinCase(at.hit) : pinAnswer(found);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);
}
