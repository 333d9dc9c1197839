// Named collections of cases and of films with their answers; kept on the server's machine.

import * as api from "./api.js";
import { html, signal, useEffect, useRef, useState } from "./html.js";
import { Label, Thumb, Trouble } from "./parts.js";
import { askFilm, asking, nameOf, route, said, toCollection } from "./state.js";
import { briefFacts, percent } from "./words.js";

const MOST_NAME = 80;
const MOST_NOTE = 500;

export const pinning = signal(null); // what is to be pinned: {what: as the server takes it, name}

/** Asks into which collection something goes. */
export function PinSheet() {
  const dialog = useRef(null);
  const asked = pinning.value;
  useEffect(() => {
    if (asked) dialog.current.showModal();
  }, [asked]);
  if (!asked) return null;
  return html`<dialog
    ref=${dialog}
    class="sheet pin-sheet"
    aria-labelledby="pin-title"
    onClose=${() => {
      pinning.value = null;
    }}
  >
    <${PinForm} asked=${asked} done=${() => dialog.current.close()} />
  </dialog>`;
}

function PinForm({ asked, done }) {
  const [all, setAll] = useState(null);
  const [into, setInto] = useState("");
  const [name, setName] = useState("");
  const [note, setNote] = useState("");
  const [wrong, setWrong] = useState("");
  useEffect(() => {
    api.collections().then((found) => {
      setAll(found);
      setInto(found.length ? String(found[0].id) : "");
    }, (problem) => setWrong(problem.message));
  }, []);
  const pin = async (event) => {
    event.preventDefault();
    try {
      let number = Number(into);
      if (into === "") {
        const made = await api.newCollection(name);
        number = made.id;
        setAll([...all, made]);
        setInto(String(number));
      }
      await api.pin(number, { ...asked.what, note });
      said.value = `pinned ${asked.name}`;
      done();
    } catch (problem) {
      setWrong(problem.message);
    }
  };
  return html`<form onSubmit=${pin}>
    <h1 id="pin-title">Pin ${asked.name}</h1>
    <label>
      <span>Into</span>
      <select value=${into} onChange=${(event) => setInto(event.target.value)}>
        ${(all ?? []).map((one) => html`<option value=${String(one.id)} selected=${into === String(one.id)}>${one.name}</option>`)}
        <option value="" selected=${into === ""}>A new collection …</option>
      </select>
    </label>
    ${all !== null &&
    into === "" &&
    html`<label><span>Its name</span><input type="text" required maxlength=${MOST_NAME} value=${name} onInput=${(event) => setName(event.target.value)} /></label>`}
    <label><span>Note; name no patient</span><textarea rows="3" maxlength=${MOST_NOTE} value=${note} onInput=${(event) => setNote(event.target.value)}></textarea></label>
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    <p class="actions"><button type="submit" class="main" disabled=${all === null}>Pin</button> <button type="button" onClick=${done}>Cancel</button></p>
  </form>`;
}

export function CollectionsPage() {
  const { id } = route.value;
  const [all, setAll] = useState(null);
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  const [turn, setTurn] = useState(0);
  const again = () => setTurn((last) => last + 1);
  useEffect(() => {
    let gone = false;
    const load = async () => {
      try {
        const every = await api.collections();
        if (!gone) setAll(every);
        const one = id ? await api.collection(id) : null;
        if (gone) return;
        setFound(one);
        setProblem(null);
      } catch (error) {
        if (gone) return;
        setFound(null);
        setProblem(error);
      }
    };
    load();
    return () => {
      gone = true;
    };
  }, [id, turn]);
  /** Does something, then goes where it says, or shows what has become of this. */
  const doing = async (act) => {
    try {
      const to = await act();
      if (typeof to === "string") location.hash = to;
      else again();
    } catch (error) {
      setProblem(error);
    }
  };
  return html`<main class="collections">
    <aside aria-label="All collections">
      <h1>Collections</h1>
      <ul>
        ${(all ?? []).map(
          (one) => html`<li key=${one.id}>
            <a href=${toCollection(one.id)} aria-current=${one.id === id ? "true" : undefined}><span>${one.name}</span> <span class="count">${one.pins}</span></a>
          </li>`,
        )}
      </ul>
      ${all?.length === 0 && html`<p class="nothing">None yet. Pin a case or a film, or begin one here.</p>`}
      <${Naming}
        label="A new collection"
        action="Create"
        onName=${(name) => doing(async () => toCollection((await api.newCollection(name)).id))}
      />
    </aside>
    <section class="collection" aria-label="Collection">
      ${problem && html`<${Trouble} problem=${problem} title="That cannot be done"><button type="button" onClick=${again}>Look again</button><//>`}
      ${found && html`<${Held} key=${found.id} found=${found} doing=${doing} />`}
    </section>
  </main>`;
}

function Held({ found, doing }) {
  const [renaming, setRenaming] = useState(false);
  const [sure, setSure] = useState(false);
  const rename = (name) => {
    setRenaming(false);
    doing(() => api.renameCollection(found.id, name));
  };
  const remove = () =>
    doing(async () => {
      await api.removeCollection(found.id);
      return toCollection("");
    });
  return html`<div class="list-bar">
      <h2>${found.name}</h2>
      ${renaming
        ? html`<${Naming} label="Its new name" action="Rename" first=${found.name} onName=${rename} />`
        : html`<button type="button" onClick=${() => setRenaming(true)}>Rename …</button>`}
      <a class="button" href=${api.tableOf(found.id)} download>Export as CSV</a>
      ${sure
        ? html`<button type="button" class="bad" onClick=${remove}>Really delete it, with ${found.pins} pinned</button>
            <button type="button" onClick=${() => setSure(false)}>Keep it</button>`
        : html`<button type="button" onClick=${() => setSure(true)}>Delete …</button>`}
    </div>
    ${found.held.length === 0 && html`<p class="nothing">Nothing is pinned here yet: press B on a case or an answer.</p>`}
    <div class="neighbours">
      <ol>
        ${found.held.map((one) => html`<${Pinned} key=${one.film} one=${one} onRemove=${() => doing(() => api.unpin(found.id, one.film))} />`)}
      </ol>
    </div>`;
}

function Pinned({ one, onRemove }) {
  const { film, note, added, answer, case: held } = one;
  const isCase = film.startsWith("case-");
  const name = isCase ? `case ${film.slice(5, 17)}` : nameOf(film);
  const gone = isCase && held === null;
  return html`<li>
    <button type="button" class="card" disabled=${asking.value !== null || gone} onClick=${() => askFilm(film, name)} aria-label=${gone ? `${name}, no longer in the gallery` : `Ask about ${name}`}>
      ${gone ? html`<span class="thumb none"><span>no longer in the gallery</span></span>` : html`<${Thumb} film=${film} alt="" />`}
      <span class="text">
        <span class="line"><span>${name}</span></span>
        ${held && html`<${Label} label=${held.label} />`}
        ${answer && html`<span class="fact">voted <${Label} label=${answer.label ?? null} />${answer.confidence ? `, share ${percent(answer.confidence)}` : ""}</span>`}
        ${held && briefFacts(held.facts).map((line) => html`<span class="fact">${line}</span>`)}
        ${held && html`<span class="fact quiet">${held.source ?? "source unknown"}</span>`}
        ${note && html`<span class="note">${note}</span>`}
        <span class="fact quiet">pinned ${added.slice(0, 10)}</span>
      </span>
    </button>
    <span class="case-tools"><button type="button" onClick=${onRemove} aria-label=${`Take ${name} out`}>Take out</button></span>
  </li>`;
}

function Naming({ label, action, first = "", onName }) {
  const [name, setName] = useState(first);
  return html`<form
    class="naming"
    onSubmit=${(event) => {
      event.preventDefault();
      setName("");
      onName(name);
    }}
  >
    <label><span class="quiet">${label}</span><input type="text" required maxlength=${MOST_NAME} value=${name} onInput=${(event) => setName(event.target.value)} /></label>
    <button type="submit">${action}</button>
  </form>`;
}
