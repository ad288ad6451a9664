// Dark or light: the choice of the system, unless the user chooses. Only this choice outlives a tab.

import { makeStore } from "./store.js";

const NAME = "arriero.theme";
const THEMES = ["auto", "light", "dark"];

function stored() {
  try {
    const value = localStorage.getItem(NAME);
    return THEMES.includes(value) ? value : "auto";
  } catch {
    return "auto";
  }
}

export const theme = makeStore({ chosen: stored() });

export const nextTheme = (chosen) => THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];

/** Choose a theme. */
export function setTheme(chosen) {
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem(NAME, chosen);
  } catch {
    // a browser without storage shows the theme of the system next time
  }
  theme.set({ chosen });
}

/** The colour that a CSS variable such as `--accent` has now, for drawings. */
export function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
