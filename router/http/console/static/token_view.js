// The tokens of an answer, tinted by their probability; details of a token on hover, tap or focus.

import { html, useMemo, useRef, useState } from "./markup.js";
import { Meter } from "./meter.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1];

/** 0 for a likely token, up to 4 for an unlikely one. */
const level = (logprob) => {
  const probability = Math.exp(logprob);
  const index = LEVELS.findIndex((least) => probability >= least);
  return index < 0 ? LEVELS.length : index;
};

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

/** The text of each token; a token that ends inside a character has a dot in its place. */
function textsOf(tokens) {
  const decoder = new TextDecoder();
  return tokens.map(({ token, bytes }) =>
    (bytes ? decoder.decode(new Uint8Array(bytes), { stream: true }) || "·" : token));
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";

function Details({ token, place }) {
  return html`<div class="details" role="status" style=${place}>
    <p><code>${visible(token.token)}</code> ${percent(token.logprob)}
      <span class="muted"> log ${token.logprob.toFixed(3)}</span></p>
    <ol>${(token.top_logprobs ?? []).map((other, index) => html`<li key=${index}>
      <code>${visible(other.token)}</code>
      <${Meter} value=${Math.exp(other.logprob)} most=${1}
        label=${`Probability of ${visible(other.token)}`} />
      <span>${percent(other.logprob)}</span></li>`)}</ol>
  </div>`;
}

export function TokenView({ tokens }) {
  const texts = useMemo(() => textsOf(tokens), [tokens]);
  const box = useRef(null);
  const [current, setCurrent] = useState(-1);
  const [place, setPlace] = useState({});
  const show = (index) => {
    const target = box.current.querySelector(`[data-index="${index}"]`);
    if (!target) return;
    const { left, bottom } = target.getBoundingClientRect();
    const outer = box.current.getBoundingClientRect();
    const most = Math.max(0, outer.width - 250);
    setPlace({
      left: `${Math.min(Math.max(0, left - outer.left), most)}px`,
      top: `${bottom - outer.top + 4}px`,
    });
    setCurrent(index);
  };
  const onKey = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(tokens.length - 1, Math.max(0, current + step)));
  };
  const onPoint = ({ target }) => {
    if (target.dataset.index !== undefined) show(Number(target.dataset.index));
  };
  return html`<div class="tokens" ref=${box} tabindex="0" role="group"
      aria-label="Tokens with probabilities; the arrow keys go from token to token"
      onKeyDown=${onKey} onFocus=${() => current < 0 && show(0)} onBlur=${() => setCurrent(-1)}
      onPointerOver=${onPoint} onPointerLeave=${() => setCurrent(-1)} onClick=${onPoint}>
    ${tokens.map((token, index) => html`<span key=${index} data-index=${index}
      class=${`token level${level(token.logprob)}${index === current ? " current" : ""}`}>
      ${texts[index]}</span>`)}
    ${current >= 0 && tokens[current] && html`<${Details} token=${tokens[current]}
      place=${place} />`}
  </div>`;
}
