// A film, the vote over its neighbours, and the neighbours.

import { FilterField, filterOf, settled } from "./clause.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";
import { AnswerTools, CaseTools, shownOf } from "./marks.js";
import { Label, Thumb, Trouble } from "./parts.js";
import { answer, askFile, askFilm, askTurned, asking, failed, nameOf, refreshServer, route, server, settings, showAnswer, toCase } from "./state.js";
import { OverlayTools, Viewer, looking } from "./viewer.js";
import { briefFacts, labelColour, labelName, percent, sentence } from "./words.js";

export function QueryPage() {
  const { id } = route.value;
  useEffect(() => {
    if (id) showAnswer(id);
  }, [id]);
  const found = answer.value;
  if (!found) return html`<${Welcome} />`;
  return html`<main class="query" aria-busy=${asking.value !== null}>
    <${Asked} found=${found} key=${found.film} />
    <section class="found" aria-label="Answer">
      ${failed.value && html`<${Failure} />`}
      <${Verdict} found=${found} />
      <${Questions} />
      <${Balance} found=${found} />
      <${AnswerTools} found=${found} />
      <${Neighbours} found=${found} />
    </section>
  </main>`;
}

/** The film asked about. */
function Asked({ found }) {
  const look = useMemo(looking, []);
  const name = nameOf(found.film, found.film.startsWith("case-") ? `case ${found.film.slice(5, 17)}` : found.image_id);
  return html`<section class="asked" aria-label="The film asked about">
    <${Viewer} film=${found.film} title=${name} look=${look} />
    <${OverlayTools} />
  </section>`;
}

function Verdict({ found }) {
  const { prediction, warnings, ood, timings_ms, told } = found;
  const refused = prediction.label === null;
  return html`<section class="verdict" aria-label="Vote">
    <div>
      <h1>${refused ? "No label" : labelName(prediction.label)}</h1>
      <p class="sentence">${sentence(found)}</p>
      ${!refused && html`<${Trust} prediction=${prediction} error_rate=${found.asked.error_rate} />`}
      <p class="times">
        ${Object.entries(timings_ms).map(([name, ms]) => `${name} ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`).join(" · ")}
      </p>
    </div>
    ${!refused &&
    html`<dl class="bars">
      ${Object.entries(prediction.scores).map(
        ([label, share]) => html`<dt>${labelName(label)}</dt>
          <dd>
            <span class=${`track colour-${labelColour(label)}`}><span style=${{ width: `${100 * share}%` }}></span></span>
            <span class="share">${percent(share)}</span>
          </dd>`,
      )}
    </dl>`}
    ${prediction.findings &&
    html`<p class="findings">
      By finding: ${Object.entries(prediction.findings).map(([name, share]) => `${labelName(name)} ${percent(share)}`).join(", ")}
    </p>`}
    ${(warnings.length > 0 || ood.reason) &&
    html`<ul class="warnings" aria-label="Warnings">
      ${ood.refused && html`<li>not taken for an upright frontal chest film: ${ood.reason}</li>`}
      ${warnings.map((warning) => html`<li>${warning}</li>`)}
    </ul>`}
    <ul class="summary" aria-label="What is known of the neighbours">
      ${told.map((line) => html`<li>${line}</li>`)}
    </ul>
  </section>`;
}

/** How far to trust the vote: the labels that cannot be excluded, and why not to rely on it. */
function Trust({ prediction, error_rate }) {
  const { set, abstained } = prediction;
  return html`<div class="trust">
    ${set && html`<p>At an error rate of ${percent(error_rate)}: ${set.length ? set.map((label) => html`<${Label} label=${label} /> `) : "no label is sure enough"}</p>`}
    ${abstained && html`<p class="abstained"><strong>Do not rely on the label:</strong> ${abstained}</p>`}
  </div>`;
}

/** How the next question is asked. */
export function Questions() {
  const filter = useMemo(() => filterOf(settings.value), []);
  const set = (change) => {
    settings.value = { ...settings.value, ...change };
  };
  const again = async (event) => {
    event.preventDefault();
    if (!(await settled(filter))) return;
    set({ where: filter.where.value, text: filter.text.value });
    const film = failed.value?.film ?? answer.value?.film;
    if (film) askFilm(film, answer.value?.image_id ?? film);
  };
  const { status } = server.value;
  return html`<form class="questions" onSubmit=${again}>
    <${FilterField} filter=${filter} />
    <label class="how-many">
      <span>Cases</span>
      <input
        type="number"
        min="1"
        max=${status?.most_neighbours ?? 100}
        value=${settings.value.top_k ?? 10}
        onChange=${(event) => set({ top_k: Math.max(1, Math.min(status?.most_neighbours ?? 100, Math.round(Number(event.target.value)) || 10)) })}
      />
    </label>
    <details class="more">
      <summary>More</summary>
      <div>
        <label>
          <span>Patient ID, as the manifest had it</span>
          <input type="text" autocomplete="off" value=${settings.value.patient} onInput=${(event) => set({ patient: event.target.value.trim() })} />
        </label>
        <label
          ><input type="checkbox" checked=${settings.value.include_own} onChange=${(event) => set({ include_own: event.target.checked })} />
          Films of the same patient vote, too</label
        >
        <label
          ><input type="checkbox" checked=${!settings.value.gate} onChange=${(event) => set({ gate: !event.target.checked })} />
          Vote even on what looks like no frontal film</label
        >
      </div>
    </details>
    <button type="submit" class="main" disabled=${asking.value !== null || !(answer.value || failed.value?.film)}>Ask again</button>
    <${FileButton} />
  </form>`;
}

/** What neighbours are to be alike in; asked anew once the slider is let go. */
function Balance({ found }) {
  const usual = server.value.status?.balance ?? found.balance;
  const [shown, setShown] = useState(found.balance);
  useEffect(() => setShown(found.balance), [found.id]);
  const turn = (balance) => {
    setShown(balance);
    if (balance !== found.balance) askTurned(found, balance);
  };
  return html`<div class="balance" role="group" aria-label="Alike in what">
    <label>
      <span>Alike in what was learnt</span>
      <input
        type="range"
        min="0"
        max="1"
        step="0.05"
        value=${shown}
        aria-label="Balance of what was learnt (0) and what lungs look like (1)"
        disabled=${asking.value !== null}
        onInput=${(event) => setShown(Number(event.target.value))}
        onChange=${(event) => turn(Number(event.target.value))}
      />
      <span>in what lungs look like</span>
    </label>
    <output>${shown.toFixed(2)}</output>
    <button type="button" disabled=${asking.value !== null || shown === usual} onClick=${() => turn(usual)}>${`As measured, ${usual}`}</button>
  </div>`;
}

export function FileButton({ text = "Another film …", main = false }) {
  const input = useRef(null);
  return html`<span class="file">
    <button type="button" class=${main ? "main" : ""} onClick=${() => input.current.click()} disabled=${asking.value !== null}>${text}</button>
    <input
      ref=${input}
      type="file"
      class="unseen"
      tabindex="-1"
      aria-label="A radiograph as DICOM, PNG, JPEG or TIFF"
      onChange=${(event) => {
        if (event.target.files[0]) askFile(event.target.files[0]);
        event.target.value = "";
      }}
    />
  </span>`;
}

const KINDS = {
  near: null,
  own: "Of this patient, or this very picture: not in the vote",
  aside: "Marked, and no longer among the nearest",
  went: "Went by the last change",
};

function Neighbours({ found }) {
  const shown = shownOf(found).map((one, place) => ({ ...one, rank: place + 1 }));
  return html`<section class="neighbours" aria-label="Nearest cases">
    ${Object.entries(KINDS).map(([kind, title]) => {
      const these = shown.filter((one) => one.kind === kind);
      return (
        these.length > 0 &&
        html`${title && html`<h2>${title}</h2>`}
          <ol>
            ${these.map((one) => html`<${Neighbour} key=${one.hit.key} found=${found} ...${one} />`)}
          </ol>`
      );
    })}
  </section>`;
}

function Neighbour({ found, hit, rank, kind }) {
  const own = kind === "own";
  return html`<li data-case=${hit.key} class=${kind}>
    <a class="card" href=${toCase(found.id, rank)} aria-label=${`${own ? "Own film" : `Case ${rank}`}: ${labelName(hit.label)}, similarity ${hit.similarity.toFixed(3)}`}>
      <${Thumb} film=${hit.film} alt="" />
      <span class="text">
        <span class="line"><span>${own ? "own" : rank}</span><span class="similarity">${hit.similarity.toFixed(3)}</span></span>
        <${Label} label=${hit.label} />
        ${briefFacts(hit.facts).map((line) => html`<span class="fact">${line}</span>`)}
        <span class="fact quiet">${hit.source ?? "source unknown"}</span>
      </span>
    </a>
    <${CaseTools} found=${found} hit=${hit} kind=${kind} />
  </li>`;
}

/** Before the first answer. */
function Welcome() {
  const { status, problem } = server.value;
  const empty = status?.gallery.cases === 0;
  return html`<main class="welcome">
    ${problem && html`<${Trouble} problem=${problem} title="Nothing can be asked now"><button type="button" onClick=${refreshServer}>Try again</button><//>`}
    ${failed.value && html`<${Failure} />`}
    ${empty &&
    html`<section class="trouble" role="alert">
      <h2>The gallery is empty</h2>
      <p>There is no confirmed case to compare with yet. Fill it: <code>cxr ingest --manifest cases/manifest.csv</code>, then reload this page.</p>
    </section>`}
    <section class="drop">
      <svg viewBox="0 0 48 48" width="64" height="64" aria-hidden="true">
        <path d="M20 9c-6 0-12 12-12 24 0 4 2.5 5 6.5 4s5.5-2.5 5.5-6.5zM28 9c6 0 12 12 12 24 0 4-2.5 5-6.5 4s-5.5-2.5-5.5-6.5z" />
      </svg>
      <h1>${asking.value ? "Asking …" : "Drop a chest radiograph here"}</h1>
      <p>
        DICOM, PNG, JPEG or TIFF. It is read on this server, kept in memory alone, and gone when the server stops. What looks most like it among
        ${status ? ` ${status.gallery.cases.toLocaleString("en")}` : ""} confirmed cases comes back, with what became of them.
      </p>
      <p class="actions">
        <${FileButton} text="Choose a film …" main />
        <a class="button" href="#/cases">Pick a stored case</a>
        <a class="button" href="#/worklist">Worklist</a>
      </p>
    </section>
    ${failed.value?.film && html`<${Questions} />`}
  </main>`;
}

function Failure() {
  const { problem, film, name } = failed.value;
  const title = name ? `No answer about ${name}` : "No such answer";
  return html`<${Trouble} problem=${problem} title=${title}>
    ${film && html`<button type="button" onClick=${() => askFilm(film, name)}>Ask again</button> `}
    <${FileButton} />
  <//>`;
}
