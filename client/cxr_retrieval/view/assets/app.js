// The page: its bar, its pages, its keys; what is dropped on it is asked about.

import * as api from "./api.js";
import { CasesPage } from "./cases.js";
import { CollectionsPage, PinSheet } from "./collections.js";
import { ComparePage } from "./compare.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import { isElsewhere } from "./keys.js";
import { MapPage } from "./map.js";
import { useMarkKeys } from "./marks.js";
import { QueryPage } from "./query.js";
import { answer, askFile, asking, overlay, refreshServer, route, said, server, signedOut, toCase, toQuery } from "./state.js";
import { WorklistPage } from "./worklist.js";

const PAGES = { worklist: WorklistPage, cases: CasesPage, collections: CollectionsPage, map: MapPage };
const THEMES = ["dark", "light", "system"];

const KEYS = [
  ["Anywhere", [["1 … 9, 0", "open neighbour 1 … 9, 10"], ["/", "to the filter"], ["O", "attention on and off"], ["C", "lung outline on and off"], ["G then Q, W, S, C, M", "query, worklist, stored cases, collections, map"], ["?", "this sheet"]]],
  ["On a film", [["Arrows", "pan; so does dragging"], ["+ and −", "zoom; so does the wheel"], ["0", "fit"], ["Shift + arrows", "level (up, down) and width (left, right)"], ["Right drag", "the same; so does W while dragging"], ["R", "reset; so does a double click"]]],
  ["Marks and pins", [["Y and X", "the case that has the focus, or lies beside the film, is relevant or not"], ["A", "ask anew with the marks"], ["U", "undo the last mark"], ["B", "pin that case, else the film"]]],
  ["On the map", [["Arrows", "pan; so does dragging"], ["+ and −", "zoom; so does the wheel"], ["0", "all of it"], ["Enter", "the cases inside the dashed frame"], ["Shift while dragging", "the cases inside a rectangle"], ["Escape", "no region"]]],
  ["Comparing", [["N and P", "next and previous case"], ["L", "move both together, or each alone"], ["Escape", "back to all neighbours"]]],
];

function App() {
  const [theme, setTheme] = useState(() => localStorage.getItem("theme") ?? "dark");
  const sheet = useRef(null);
  const [dragging, setDragging] = useState(false);
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("theme", theme);
  }, [theme]);
  useEffect(() => {
    refreshServer();
  }, []);
  useKeys(sheet);
  useDrop(setDragging);
  useMarkKeys();

  if (signedOut.value) return html`<${SignIn} />`;
  const { page, rank } = route.value;
  return html`
    <header class="bar">
      <a class="name" href=${answer.value ? toQuery(answer.value.id) : "#/"}><img src="/assets/icon.svg" alt="" width="22" height="22" /> cxr</a>
      <nav aria-label="Pages">
        ${link("query", answer.value ? toQuery(answer.value.id) : "#/", "Query", page)} ${link("worklist", "#/worklist", "Worklist", page)}
        ${link("cases", "#/cases", "Stored cases", page)} ${link("collections", "#/collections", "Collections", page)}
        ${link("map", "#/map", "Map", page)}
      </nav>
      <strong class="disclaimer">Research use only. Not for diagnosis.</strong>
      <${Server} />
      <button type="button" onClick=${() => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])} title="Dark, light, or as the system has it">
        <span aria-hidden="true">◐ </span><span class="unseen">Colours: </span>${theme}
      </button>
      <button type="button" class="round" onClick=${() => sheet.current.showModal()} aria-label="Keys" title="?">?</button>
    </header>
    <p class="unseen" role="status" aria-live="polite">${said.value}</p>
    ${asking.value && html`<p class="asking"><span>Asking about ${asking.value.name} …</span></p>`}
    <${PAGES[page] ?? (rank ? ComparePage : QueryPage)} />
    ${dragging && html`<div class="dropping"><p>Drop the film to ask about it</p></div>`}
    <${Sheet} dialog=${sheet} />
    <${PinSheet} />
  `;
}

const link = (name, to, text, page) => html`<a href=${to} aria-current=${page === name ? "page" : undefined}>${text}</a>`;

function Server() {
  const { status, problem } = server.value;
  if (problem) return html`<button type="button" class="server down" onClick=${refreshServer} title=${problem.message}>servers away: try again</button>`;
  if (!status) return html`<span class="server">connecting …</span>`;
  return html`<span class="server" title="Model version, and cases in its gallery">
    <span class="quiet">model</span> ${status.model_version} <span class="quiet">cases</span> ${status.gallery.cases.toLocaleString("en")}
  </span>`;
}

function Sheet({ dialog }) {
  return html`<dialog ref=${dialog} class="sheet" aria-labelledby="sheet-title" onClick=${(event) => event.target === dialog.current && dialog.current.close()}>
    <h1 id="sheet-title">Keys</h1>
    <div class="columns">
      ${KEYS.map(
        ([where, keys]) => html`<section>
          <h2>${where}</h2>
          <dl>${keys.map(([key, what]) => html`<dt><kbd>${key}</kbd></dt><dd>${what}</dd>`)}</dl>
        </section>`,
      )}
    </div>
    <form method="dialog"><button autofocus>Close</button></form>
  </dialog>`;
}

function SignIn() {
  const [wrong, setWrong] = useState("");
  const token = useRef(null);
  const enter = async (event) => {
    event.preventDefault();
    try {
      await api.signIn(token.current.value.trim());
      await refreshServer();
    } catch (problem) {
      setWrong(problem.message);
    }
  };
  return html`<main class="welcome">
    <section class="drop">
      <h1>Sign in</h1>
      <form class="sign-in" onSubmit=${enter}>
        <label><span>Token of this page</span><input ref=${token} type="password" autocomplete="current-password" aria-describedby="token-wrong" /></label>
        <button type="submit" class="main">Enter</button>
        <p id="token-wrong" class="wrong" role="alert">${wrong}</p>
      </form>
      <p class="disclaimer">Research use only. Not for diagnosis.</p>
    </section>
  </main>`;
}

/** Keys that work wherever one is, unless something is being typed. */
function useKeys(sheet) {
  useEffect(() => {
    let going = 0;
    const pages = { q: answer.value ? toQuery(answer.value.id) : "#/", w: "#/worklist", s: "#/cases", c: "#/collections", m: "#/map" };
    const key = (event) => {
      if (isElsewhere(event) || signedOut.value) return;
      const found = answer.value;
      const set = (change) => {
        overlay.value = { ...overlay.value, ...change };
      };
      const digit = event.key === "0" ? 10 : Number(event.key);
      if (Date.now() < going && pages[event.key]) location.hash = pages[event.key];
      else if (event.key === "g") going = Date.now() + 1500;
      else if (event.key === "?") sheet.current.showModal();
      else if (event.key === "/") document.querySelector("#where")?.focus();
      else if (event.key === "o") set({ attention: !overlay.value.attention });
      else if (event.key === "c") set({ lungs: !overlay.value.lungs });
      else if (digit >= 1 && found && route.value.page === "query" && digit <= found.neighbours.length) location.hash = toCase(found.id, digit);
      else return;
      if (event.key !== "g") going = 0;
      event.preventDefault();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, [answer.value?.id]);
}

/** A film may be dropped anywhere. */
function useDrop(setDragging) {
  useEffect(() => {
    const holds = (event) => event.dataTransfer?.types.includes("Files");
    const over = (event) => {
      if (!holds(event)) return;
      event.preventDefault();
      setDragging(true);
    };
    const leave = (event) => event.relatedTarget === null && setDragging(false);
    const drop = (event) => {
      if (!holds(event)) return;
      event.preventDefault();
      setDragging(false);
      if (event.dataTransfer.files[0]) askFile(event.dataTransfer.files[0]);
    };
    const all = { dragover: over, dragleave: leave, drop };
    for (const [name, listener] of Object.entries(all)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(all)) removeEventListener(name, listener);
    };
  }, []);
}

document.querySelector("#page").textContent = "";
render(html`<${App} />`, document.querySelector("#page"));
