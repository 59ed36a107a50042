// Elements, sliders, errors. Text reaches the page only as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function showError(error) {
  const place = byId("error");
  place.textContent = error ? String(error.message ?? error) : "";
  place.hidden = !error;
}

// Shows a slider's value beside it, and calls `changed` with it at every move.
export function slider(id, changed = () => {}) {
  const input = byId(id);
  const output = byId(`${id}-value`);
  const read = () => Number(input.value);
  const show = () => { output.textContent = input.value; changed(read()); };
  input.addEventListener("input", show);
  return {
    get value() { return read(); },
    set(value) { input.value = value; show(); },
    range(most) { input.max = most; show(); },
    // A mark below the track, whose text stays within the track.
    mark(id, value, text) {
      const mark = byId(id);
      const share = (value - input.min) / (input.max - input.min);
      mark.hidden = share < 0 || share > 1;
      mark.textContent = text;
      mark.style.left = `calc(8px + ${share} * (100% - 16px))`;
      mark.style.setProperty("--share", `${100 * share}%`);
    },
  };
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

// How a token is written in tables: spaces and line breaks are made visible.
export function visible(text) {
  return text === "" ? "\u2205" : text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u2192");
}
