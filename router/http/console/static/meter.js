// A bar that shows a part of a whole; the same in every browser.

import { html } from "./markup.js";

export function Meter({ value, most, label }) {
  const percent = most > 0 ? Math.min(100, (100 * value) / most) : 0;
  return html`<span class="meter" role="meter" aria-label=${label} aria-valuemin="0"
    aria-valuemax="100" aria-valuenow=${Math.round(percent)}>
    <span style=${{ width: `${percent}%` }}></span></span>`;
}
