// Stored cases, to ask with; found by a filter, or by words that say what their films show.

import * as api from "./api.js";
import { FilterField, filterOf, settled } from "./clause.js";
import { html, useEffect, useMemo, useState } from "./html.js";
import { Label, Thumb, Trouble } from "./parts.js";
import { askFilm, asking, server } from "./state.js";
import { briefFacts, labelName } from "./words.js";

const SHOWN = 60;

export function CasesPage() {
  const filter = useMemo(() => filterOf({ where: "", text: "" }), []);
  const [asked, setAsked] = useState({ where: "", text: "", offset: 0 });
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  const [like, setLike] = useState("");
  const [shares, setShares] = useState(null);

  useEffect(() => {
    let gone = false;
    const finding = asked.like ? api.alike({ text: asked.like, where: asked.where, limit: SHOWN }) : api.cases({ where: asked.where, text: asked.text, offset: asked.offset, limit: SHOWN });
    finding.then(
      ({ cases, shares }) => {
        if (gone) return;
        setFound(cases);
        setShares(shares ?? null);
        setProblem(null);
      },
      (error) => gone || setProblem(error),
    );
    return () => {
      gone = true;
    };
  }, [asked]);

  const show = async (event) => {
    event.preventDefault();
    if (await settled(filter)) setAsked({ where: filter.where.value, text: filter.text.value, like: like.trim(), offset: 0 });
  };
  return html`<main class="cases">
    <form class="questions" onSubmit=${show}>
      <h1>Stored cases</h1>
      ${server.value.status?.words &&
      html`<label class="words like">
        <span>Films like these words</span>
        <input type="text" value=${like} maxlength="2000" placeholder="bilateral ground glass, no effusion" onInput=${(event) => setLike(event.target.value)} />
      </label>`}
      <${FilterField} filter=${filter} />
      <button type="submit" class="main">Show</button>
    </form>
    ${problem && html`<${Trouble} problem=${problem} title="The gallery cannot be shown" />`}
    ${found?.length === 0 && !problem && html`<p class="nothing">No case ${asked.where || asked.text ? "meets this" : "is in the gallery yet: fill it with `cxr ingest`"}.</p>`}
    ${shares && !problem && html`<p class="shares" role="status">${Object.entries(shares).map(([name, share]) => `${labelName(name)} ${Math.round(100 * share)} %`).join(", ")}, by weight of similarity. How often such a share is right has not been measured.</p>`}
    <section class="neighbours">
      <ol>
        ${(found ?? []).map((held) => html`<${StoredCase} key=${held.key} held=${held} />`)}
      </ol>
    </section>
    ${!asked.like && (asked.offset > 0 || found?.length === SHOWN) &&
    html`<nav class="pager" aria-label="Pages">
      <button type="button" disabled=${asked.offset === 0} onClick=${() => setAsked({ ...asked, offset: Math.max(0, asked.offset - SHOWN) })}>Previous</button>
      <span>${asked.offset + 1} to ${asked.offset + (found?.length ?? 0)}</span>
      <button type="button" disabled=${(found?.length ?? 0) < SHOWN} onClick=${() => setAsked({ ...asked, offset: asked.offset + SHOWN })}>Next</button>
    </nav>`}
  </main>`;
}

/** A case, to ask about. */
export function StoredCase({ held }) {
  const name = `case ${held.key.slice(0, 12)}`;
  return html`<li>
    <button type="button" class="card" disabled=${asking.value !== null} onClick=${() => askFilm(held.film, name)} aria-label=${`Ask about ${name}: ${labelName(held.label)}`}>
      <${Thumb} film=${held.film} alt="" />
      <span class="text">
        <span class="line"><${Label} label=${held.label} /></span>
        ${briefFacts(held.facts).map((line) => html`<span class="fact">${line}</span>`)}
        <span class="fact quiet">${held.source ?? "source unknown"}</span>
        ${held.similarity !== undefined && html`<span class="fact quiet">similarity ${held.similarity.toFixed(3)}</span>`}
      </span>
    </button>
  </li>`;
}
