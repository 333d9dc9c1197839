// When a key is meant for the page.

/** Whether something is being typed or chosen, or a sheet lies over the page. */
export const isElsewhere = (event) =>
  event.ctrlKey ||
  event.metaKey ||
  event.altKey ||
  event.target.matches("input:not([type=range], [type=checkbox]), textarea, select") ||
  document.querySelector("dialog[open]") !== null;
