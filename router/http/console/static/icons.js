// Icons as drawings: the fonts of a machine may lack a sign.

import { html } from "./markup.js";

const PATHS = {
  image: "M4 5.5h16v13H4zM4 15l4.5-4.5 4 4 2.5-2.5 5 5M15.5 9.2h.01",
  close: "M6 6l12 12M18 6L6 18",
  auto: "M12 3.5a8.5 8.5 0 1 0 0 17zM12 3.5a8.5 8.5 0 0 1 0 17",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2.5M12 19.5V22M2 12h2.5M19.5 12H22M5 5l1.7 1.7M17.3 17.3L19 19M19 5l-1.7 1.7M6.7 17.3L5 19",
  dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  tool: "M14.5 6.5a3.8 3.8 0 0 0-5 5L4 17l3 3 5.5-5.5a3.8 3.8 0 0 0 5-5L15 12l-3-3z",
};

export function Icon({ name }) {
  return html`<svg class=${`icon ${name}`} viewBox="0 0 24 24" width="20" height="20" fill="none"
    stroke="currentColor" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"
    aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}
