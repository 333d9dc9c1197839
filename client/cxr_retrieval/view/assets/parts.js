// Small pieces that several pages use.

import { thumbnail, whyNoThumbnail } from "./api.js";
import { html, useState } from "./html.js";
import { labelColour, labelName } from "./words.js";

export const Label = ({ label }) =>
  label === null || label === undefined
    ? html`<span class="label none">no label</span>`
    : html`<span class=${`label colour-${labelColour(label)}`}>${labelName(label)}</span>`;

/** What could not be done, in its parts; `children`: what can be done about it. */
export function Trouble({ problem, title, children }) {
  const { what, expected, got, next_step } = problem.parts ?? { what: problem.message };
  return html`<section class="trouble" role="alert">
    <h2>${title}</h2>
    <p class="what">${sentenced(what)}</p>
    <dl>
      ${expected && html`<dt>expected</dt><dd>${expected}</dd>`}
      ${got && html`<dt>got</dt><dd>${got}</dd>`}
      ${next_step && html`<dt>next</dt><dd>${next_step}</dd>`}
    </dl>
    ${children && html`<p class="actions">${children}</p>`}
  </section>`;
}

const sentenced = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.$/, "") + ".";

/** A film's small picture, or why there is none. */
export function Thumb({ film, alt }) {
  const [why, setWhy] = useState(null);
  const [loaded, setLoaded] = useState(false);
  if (why !== null) return html`<span class="thumb none"><span>${why}</span></span>`;
  return html`<span class=${loaded ? "thumb" : "thumb waiting"}>
    <img
      src=${thumbnail(film)}
      alt=${alt}
      loading="lazy"
      decoding="async"
      onLoad=${() => setLoaded(true)}
      onError=${async () => setWhy(await whyNoThumbnail(film))}
    />
  </span>`;
}

/** All facts of a case, under the names that readers know. */
export const Facts = ({ facts }) => html`<dl class="facts">
  ${Object.entries(facts).map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}
</dl>`;
