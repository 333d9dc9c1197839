// The film asked about beside one of its neighbours.

import { html, useEffect, useMemo, useState } from "./html.js";
import { isElsewhere } from "./keys.js";
import { CaseTools, shownOf } from "./marks.js";
import { Facts, Label } from "./parts.js";
import { answer, askFilm, nameOf, route, showAnswer, toCase, toQuery } from "./state.js";
import { OverlayTools, Viewer, looking, reset } from "./viewer.js";
import { labelName } from "./words.js";

export function ComparePage() {
  const { id, rank } = route.value;
  useEffect(() => {
    showAnswer(id);
  }, [id]);
  const found = answer.value;
  const hits = found ? shownOf(found) : [];
  const { hit, kind } = hits[rank - 1] ?? {};
  const [linked, setLinked] = useState(true);
  const mine = useMemo(looking, []);
  const theirs = useMemo(looking, []);

  useEffect(() => {
    const key = (event) => {
      if (isElsewhere(event)) return;
      const { id, rank } = route.value; // a key may come before what it is to change is drawn
      if (event.key === "Escape") location.hash = toQuery(id);
      else if (event.key === "n" && rank < hits.length) location.hash = toCase(id, rank + 1);
      else if (event.key === "p" && rank > 1) location.hash = toCase(id, rank - 1);
      else if (event.key === "l") setLinked((now) => !now);
      else if (event.key === "r") [mine, theirs].forEach(reset);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, [hits.length]);

  if (!hit) {
    return html`<main class="welcome"><section class="drop">
      <h1>This case is no longer shown</h1>
      <p class="actions"><a class="button" href=${found ? toQuery(found.id) : "#/"}>Back</a></p>
    </section></main>`;
  }
  const own = kind === "own";
  const link = (to, enabled, text, key) =>
    enabled ? html`<a class="button" href=${to} title=${key}>${text}</a>` : html`<span class="button off" aria-disabled="true">${text}</span>`;
  return html`<main class="compare">
    <nav class="compare-bar" aria-label="Comparison">
      <a class="button" href=${toQuery(id)} title="Escape">← All neighbours</a>
      ${link(toCase(id, rank - 1), rank > 1, "Previous", "P")} ${link(toCase(id, rank + 1), rank < hits.length, "Next", "N")}
      <span class="where-in">${PLACES[kind] ?? `case ${rank} of ${found.neighbours.length}`}</span>
      <label><input type="checkbox" checked=${linked} onChange=${(event) => setLinked(event.target.checked)} /> Move both together</label>
    </nav>
    <${Viewer} film=${found.film} title=${`Asked: ${nameOf(found.film, found.image_id)}`} look=${mine} />
    <${Viewer}
      key=${hit.film}
      film=${hit.film}
      title=${`${own ? "Own film" : `Case ${rank}`}: ${labelName(hit.label)}`}
      look=${linked ? mine : theirs}
    />
    <aside class="about" aria-label="About this case">
      <h1><${Label} label=${hit.label} /></h1>
      <p>
        Similarity <strong>${hit.similarity.toFixed(4)}</strong>
        <span class="quiet"> learnt ${hit.semantic.toFixed(2)}, looks ${hit.visual.toFixed(2)}</span><br />
        <span class="quiet">Case ${hit.key.slice(0, 12)}${hit.image_id === hit.key ? "" : `, here known as ${hit.image_id}`}</span>
      </p>
      <${Facts} facts=${{ source: hit.source ?? "unknown", ...withoutNotes(hit.facts) }} />
      ${hit.facts.notes && html`<h2>Clinical notes</h2><p class="notes">${hit.facts.notes}</p>`}
      <${CaseTools} found=${found} hit=${hit} kind=${kind} />
      <p><button type="button" onClick=${() => askFilm(hit.film, `case ${hit.key.slice(0, 12)}`)}>Ask about this case</button></p>
      <${OverlayTools} />
    </aside>
  </main>`;
}

const PLACES = { own: "a film of this patient, not in the vote", aside: "marked, and no longer among the nearest", went: "went by the last change" };

const withoutNotes = ({ notes, ...rest }) => rest;
