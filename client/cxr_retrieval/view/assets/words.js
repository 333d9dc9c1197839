// How things are called.

const LABELS = { control: "control", covid19: "COVID-19", non_covid_pneumonia: "non-COVID pneumonia" };
const COLOURS = ["control", "covid19", "non_covid_pneumonia"];
const others = new Map();

export const labelName = (label) => LABELS[label] ?? label.replaceAll("_", " ");

/** Which of the six colours a label has: the published three have their own, others as they come. */
export function labelColour(label) {
  if (COLOURS.includes(label)) return COLOURS.indexOf(label);
  if (!others.has(label)) others.set(label, 3 + (others.size % 3));
  return others.get(label);
}

/** The vote as a sentence; of a refused film, why there is none. */
export const sentence = ({ prediction, sentence }) =>
  prediction.label === null ? `No label: ${sentence}. The nearest cases are shown for information; they did not vote.` : `${sentence}.`;

export const percent = (share) => `${Math.round(100 * share)} %`;

/** A number in few digits, as a film's grey values are told. */
export const brief = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? Math.round(value).toString() : value.toPrecision(3));

const BRIEF = [
  ["age", "sex", "SpO2"],
  ["ICU", "intubated", "survived"],
];
const ALONE = ["age", "sex"]; // which say themselves what they are

/** The facts that a card has room for: a line about the patient, and one about what became of them. */
export function briefFacts(facts) {
  const told = (name) => (ALONE.includes(name) ? facts[name] : `${name} ${facts[name]}`);
  return BRIEF.map((names) => names.filter((name) => name in facts).map(told).join(", ")).filter(Boolean);
}
