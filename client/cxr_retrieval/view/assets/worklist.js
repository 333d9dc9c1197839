// What has been asked, and the lines of a batch's results, to choose from.

import * as api from "./api.js";
import { html, useEffect, useState } from "./html.js";
import { Label, Trouble } from "./parts.js";
import { askFilm, asking, nameOf, toQuery } from "./state.js";

const ROWS = 50;
const COLUMNS = [
  ["order", "Film"],
  ["status", "Status"],
  ["label", "Label"],
  ["confidence", "Share"],
  ["warnings", "Warnings"],
];

export function WorklistPage() {
  const [asked, setAsked] = useState({ list: "recent", sort: "order", descending: 1, offset: 0 });
  const [page, setPage] = useState(null);
  const [problem, setProblem] = useState(null);

  useEffect(() => {
    let gone = false;
    let later;
    const load = async () => {
      try {
        const found = await api.worklist({ ...asked, limit: ROWS });
        if (gone) return;
        setPage(found);
        setProblem(null);
        if (!found.whole) later = setTimeout(load, 1000);
      } catch (error) {
        if (!gone) setProblem(error);
      }
    };
    load();
    return () => {
      gone = true;
      clearTimeout(later);
    };
  }, [asked, asking.value]);

  const sort = (by) => setAsked({ ...asked, sort: by, descending: asked.sort === by ? 1 - asked.descending : 0, offset: 0 });
  const lists = page?.lists ?? [{ id: "recent", name: "Recent queries" }];
  return html`<main class="worklist">
    <div class="list-bar">
      <h1>Worklist</h1>
      <div class="tabs" role="group" aria-label="Which list">
        ${lists.map(
          ({ id, name }) => html`<button
            type="button"
            aria-pressed=${asked.list === id}
            onClick=${() => setAsked({ list: id, sort: "order", descending: id === "recent" ? 1 : 0, offset: 0 })}
          >
            ${name}
          </button>`,
        )}
      </div>
      <span class="count" role="status">${page ? `${page.total.toLocaleString("en")} films${page.whole ? "" : ", more being read"}` : ""}</span>
    </div>
    ${problem && html`<${Trouble} problem=${problem} title="This list cannot be shown" />`}
    ${page && page.total === 0 && html`<p class="nothing">Nothing yet. Drop a film, or start the page with <code>--results results.jsonl</code>.</p>`}
    ${page &&
    page.total > 0 &&
    html`<div class="table" tabindex="0" role="region" aria-label="Films">
      <table>
        <thead>
          <tr>
            ${COLUMNS.map(
              ([by, name]) => html`<th scope="col" class=${`of-${by}`} aria-sort=${asked.sort === by ? (asked.descending ? "descending" : "ascending") : undefined}>
                <button type="button" onClick=${() => sort(by)}>${name}<span aria-hidden="true">${arrow(asked, by)}</span></button>
              </th>`,
            )}
          </tr>
        </thead>
        <tbody>
          ${page.rows.map((row) => html`<${Row} key=${row.answer ?? row.film} row=${row} />`)}
        </tbody>
      </table>
    </div>`}
    ${page &&
    page.total > ROWS &&
    html`<nav class="pager" aria-label="Pages">
      <button type="button" disabled=${asked.offset === 0} onClick=${() => setAsked({ ...asked, offset: Math.max(0, asked.offset - ROWS) })}>Previous</button>
      <span>${asked.offset + 1} to ${Math.min(asked.offset + ROWS, page.total)} of ${page.total.toLocaleString("en")}</span>
      <button type="button" disabled=${asked.offset + ROWS >= page.total} onClick=${() => setAsked({ ...asked, offset: asked.offset + ROWS })}>Next</button>
    </nav>`}
  </main>`;
}

const arrow = (asked, by) => (asked.sort !== by ? "" : asked.descending ? " ▾" : " ▴");

function Row({ row }) {
  const name = row.answer ? nameOf(row.film, row.image_id) : row.name;
  const told = [row.reason, row.abstained && `do not rely on the label: ${row.abstained}`, ...row.warnings].filter(Boolean);
  return html`<tr>
    <td class="of-order">
      ${row.answer
        ? html`<a href=${toQuery(row.answer)}>${name}</a>`
        : html`<button type="button" class="link" disabled=${asking.value !== null} onClick=${() => askFilm(row.film, name)}>${name}</button>`}
      ${row.image_id && row.image_id !== name && html`<span class="quiet"> ${row.image_id}</span>`}
    </td>
    <td class="of-status"><span class=${`status ${row.status}`}>${row.status}</span></td>
    <td class="of-label">${row.status === "answered" ? html`<${Label} label=${row.label} />` : ""}</td>
    <td class="of-confidence">
      ${row.status === "answered" && html`<span class="meter"><span style=${{ width: `${100 * row.confidence}%` }}></span></span> ${row.confidence.toFixed(2)}`}
    </td>
    <td class="of-warnings">${told.length > 0 && html`<span class="first-warning">${told[0]}</span>${told.length > 1 ? html`<span class="quiet"> and ${told.length - 1} more</span>` : ""}`}</td>
  </tr>`;
}
