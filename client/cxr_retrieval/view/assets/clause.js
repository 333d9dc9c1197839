// A filter as it is typed: conditions that stand are chips; what may come next is suggested, with counts; how many cases meet it.

import * as api from "./api.js";
import { batch, html, signal, useEffect, useRef, useState } from "./html.js";

/** A filter: `where` (conditions that stand) and `text` (words of notes) as they are asked; `typed`, one more condition. */
export const filterOf = ({ where, text }) => ({
  where: signal(where),
  text: signal(text),
  typed: signal(""),
  told: signal(null), // what the server last said of it (POST /api/clause), and of what that was `typed`
  wrong: signal(null), // why it could not be settled
  turn: 0,
});

/** Makes what is typed a condition that stands; false if it cannot be meant, and then it says why. */
export async function settled(filter) {
  const told = await look(filter, null);
  filter.wrong.value = told.wrong;
  if (told.wrong) return false;
  batch(() => {
    filter.where.value = told.conditions.join(" and ");
    filter.typed.value = "";
  });
  return true;
}

async function look(filter, at) {
  const turn = ++filter.turn;
  const typed = filter.typed.value;
  const told = await api.clause({ where: filter.where.value, text: filter.text.value, typed, at: at ?? typed.length });
  if (turn === filter.turn) filter.told.value = { ...told, typed };
  return told;
}

export function FilterField({ filter }) {
  const input = useRef(null);
  const [open, setOpen] = useState(false);
  const [active, setActive] = useState(-1);
  const { completion, cases, meet, standing } = filter.told.value ?? {};
  const chips = standing ?? [];
  const fresh = filter.told.value?.typed === filter.typed.value; // else more was typed meanwhile
  const suggestions = open && fresh ? (completion?.suggestions ?? []) : [];
  const wrong = filter.wrong.value;

  const ask = (at) => look(filter, at).catch(() => {}); // who asks a question is told what is amiss
  useEffect(() => {
    ask();
  }, [filter.where.value]);
  useEffect(() => {
    if (cases !== null) return undefined;
    const later = setTimeout(ask, 1000); // the gallery is being read
    return () => clearTimeout(later);
  }, [filter.told.value]);

  const type = (value) => {
    batch(() => {
      filter.typed.value = value;
      filter.wrong.value = null;
    });
    setOpen(true);
    setActive(-1);
    ask(input.current.selectionStart);
  };
  const take = ({ text }) => {
    const { start, end } = completion;
    const before = filter.typed.value.slice(0, start) + text + (text.endsWith("[") ? "" : " ");
    const whole = before + filter.typed.value.slice(end).trimStart();
    input.current.value = whole;
    input.current.setSelectionRange(before.length, before.length);
    input.current.focus();
    type(whole);
  };
  const only = (kept) => {
    filter.where.value = kept.join(" and ");
    input.current.focus();
  };
  const edit = (place) => {
    only(chips.filter((_, other) => other !== place));
    type(chips[place]);
  };
  const key = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && suggestions.length > 0) setActive((active + step + suggestions.length + 1) % (suggestions.length + 1));
    else if (step) type(filter.typed.value);
    else if (event.key === "Enter" && active >= 0 && active < suggestions.length) take(suggestions[active]);
    else if (event.key === "Escape" && open) setOpen(false);
    else if (event.key === "Backspace" && filter.typed.value === "" && chips.length > 0) edit(chips.length - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  return html`<div class="filter">
    <div class="where">
      <label for="where">Only cases with</label>
      <div class="conditions">
        ${chips.map(
          (condition, place) => html`<span class="chip" key=${condition}>
            <button type="button" class="says" title="Change it" onClick=${() => edit(place)}>${condition}</button
            ><button type="button" class="gone" aria-label=${`Without ${condition}`} onClick=${() => only(chips.filter((_, other) => other !== place))}>×</button>
          </span>`,
        )}
        <input
          ref=${input}
          id="where"
          type="text"
          role="combobox"
          value=${filter.typed.value}
          placeholder=${chips.length ? "and …" : 'age >= 60 and sex == "F"'}
          spellcheck=${false}
          autocomplete="off"
          aria-autocomplete="list"
          aria-expanded=${suggestions.length > 0}
          aria-controls="where-list"
          aria-activedescendant=${active >= 0 && active < suggestions.length ? `where-${active}` : undefined}
          aria-invalid=${wrong !== null && wrong.of !== "text"}
          aria-describedby=${wrong ? "where-wrong" : "where-meet"}
          onInput=${(event) => type(event.target.value)}
          onFocus=${() => setOpen(true)}
          onBlur=${() => setOpen(false)}
          onKeyDown=${key}
        />
      </div>
      <ul id="where-list" role="listbox" aria-label="What may be written" hidden=${suggestions.length === 0}>
        ${suggestions.map(
          (one, place) => html`<li
            key=${one.text}
            id=${`where-${place}`}
            role="option"
            aria-selected=${place === active}
            onMouseDown=${(event) => {
              event.preventDefault();
              take(one);
            }}
          >
            <code>${one.text}</code> <span class="quiet">${one.about}</span>
            <span class="count">${one.cases === null ? "" : one.cases.toLocaleString("en")}</span>
          </li>`,
        )}
      </ul>
    </div>
    <label class="words">
      <span>Words in notes</span>
      <input
        type="text"
        value=${filter.text.value}
        placeholder='effusion -tube'
        spellcheck=${false}
        autocomplete="off"
        aria-invalid=${wrong !== null && wrong.of === "text"}
        aria-describedby=${wrong ? "where-wrong" : undefined}
        onInput=${(event) => {
          batch(() => {
            filter.text.value = event.target.value;
            filter.wrong.value = null;
          });
          ask();
        }}
      />
    </label>
    <p id="where-meet" class="meet" role="status">
      ${cases == null ? "counting the gallery …" : meet === cases ? `all ${cases.toLocaleString("en")} cases` : `${meet.toLocaleString("en")} of ${cases.toLocaleString("en")} cases`}
    </p>
    ${wrong && html`<p id="where-wrong" class="wrong" role="alert">${wrong.message}</p>`}
  </div>`;
}
