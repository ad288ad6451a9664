// One group: phase, slices, load, rates, and the blocks of its KV cache by tier.

import { html } from "./markup.js";
import { Meter } from "./meter.js";
import { compact, rounded, share, tenths, whole } from "./numbers.js";

const TIERS = { device: "device", host: "host memory", disk: "disk", shared: "store" };

function Tier({ tier, used, total }) {
  const label = TIERS[tier] ?? tier;
  const bounded = Number(total) > 0;
  return html`<li><span>${label}</span>
    ${bounded ? html`<${Meter} value=${Number(used)} most=${Number(total)}
        label=${`KV blocks in use: ${label}`} />` : html`<span></span>`}
    <span class="count">${compact(used)}${bounded && ` of ${compact(total)}`}</span></li>`;
}

function Tiers({ group, cache }) {
  const device = { tier: "device", used: group.blocks_used, total: group.blocks_total };
  const others = (cache?.tiers ?? []).filter(({ tier }) => tier !== "device");
  return html`<ul class="tiers" aria-label="KV blocks by tier">
    ${[device, ...others].map((entry) => html`<${Tier} key=${entry.tier} ...${entry} />`)}</ul>`;
}

function Slices({ group }) {
  const nodes = group.slice_nodes ?? [];
  return html`<details><summary>${nodes.length} slice${nodes.length === 1 ? "" : "s"}
      ${group.layout && html` <span class="muted">${group.layout}</span>`}</summary>
    <ol class="slices" start="0">${nodes.map((node, rank) => html`<li key=${rank}>
      ${node} <span class="muted">pid ${group.slice_pids[rank]}</span></li>`)}</ol>
    <p class="muted">leader ${group.node}, pid ${group.pid}; ${whole(group.preemptions)} requests
      pre-empted</p></details>`;
}

function Fact({ label, value }) {
  return html`<div><dt>${label}</dt><dd>${value}</dd></div>`;
}

export function GroupCard({ group, rates, cache }) {
  const rate = (name) => (rates ? rounded(rates[name]) : "…");
  return html`<article class="card group" aria-label=${`Group ${group.id || group.seat}`}>
    <header><h3>${group.id || group.seat}</h3>
      <span class=${`phase ${group.phase}`}>${group.phase}</span></header>
    ${group.text && html`<p class="muted">${group.text}</p>`}
    ${group.id && html`
      <dl class="facts-grid">
        <${Fact} label="tokens/s" value=${rate("output")} />
        <${Fact} label="prompt/s" value=${rate("prompt")} />
        <${Fact} label="steps/s" value=${rate("steps")} />
        <${Fact} label="running" value=${group.running} />
        <${Fact} label="waiting" value=${group.waiting} />
        <${Fact} label="prefix hits" value=${share(group.cached_tokens, group.prompt_tokens)} />
        ${Number(group.drafts) > 0 && html`<${Fact} label="drafts right"
          value=${share(group.accepted_tokens, group.drafted_tokens)} />`}
        ${group.expert_imbalance > 0 && html`<${Fact} label="expert skew"
          value=${`${tenths(group.expert_imbalance)}×`} />`}
      </dl>
      <${Tiers} group=${group} cache=${cache} />
      <${Slices} group=${group} />`}
  </article>`;
}
