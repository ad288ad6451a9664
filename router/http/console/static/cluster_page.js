// The cluster at a glance: rates, groups, caches, experts, events, the latest failure.

import { Chart } from "./chart.js";
import { sum, useCluster } from "./cluster_data.js";
import { EventList, FailureCard, NodeTable } from "./event_list.js";
import { ExpertMap } from "./expert_map.js";
import { GroupCard } from "./group_card.js";
import { html } from "./markup.js";
import { rounded, share, tenths, whole } from "./numbers.js";

function Tile({ label, value, unit = "" }) {
  return html`<div class="tile"><dt>${label}${unit && html` <small>${unit}</small>`}</dt>
    <dd>${value}</dd></div>`;
}

function Tiles({ state, points }) {
  const { groups, models } = state.status;
  const last = points.at(-1);
  const rate = (value) => (value === undefined ? "…" : rounded(value));
  return html`<dl class="tiles">
    <${Tile} label="Output" value=${rate(last?.output)} unit="tokens/s" />
    <${Tile} label="Prompts" value=${rate(last?.prompt)} unit="tokens/s" />
    <${Tile} label="Running" value=${whole(sum(groups, "running"))} />
    <${Tile} label="Waiting" value=${whole(sum(groups, "waiting") + sum(models, "queued"))} />
    <${Tile} label="KV in use" value=${share(sum(groups, "blocks_used"), sum(groups, "blocks_total"))} />
    <${Tile} label="Prefix hits" value=${share(sum(groups, "cached_tokens"), sum(groups, "prompt_tokens"))} />
  </dl>`;
}

function ModelTable({ models }) {
  return html`<section class="card" aria-labelledby="models-title"><h2 id="models-title">Models</h2>
    <div class="scroll" tabindex="0" role="group" aria-label="Table of the models"><table>
      <thead><tr><th scope="col">Model</th><th scope="col">Groups</th><th scope="col">Revision</th>
        <th scope="col">Queue</th><th scope="col">State</th></tr></thead>
      <tbody>${models.map((model) => html`<tr key=${model.model}>
        <th scope="row">${model.model}</th>
        <td>${model.serving} of ${model.groups}${
          model.spares > 0 && `, ${model.standing_by} of ${model.spares} spares`}</td>
        <td>${model.revision}</td>
        <td>${model.queued}${model.queued > 0 && `, ${tenths(model.wait_s)} s`}</td>
        <td>${model.rolled_back || (model.paused ? "paused"
          : model.settled ? "as desired" : "changing")}</td>
      </tr>`)}</tbody></table></div></section>`;
}

function HealthView({ health, openAccess }) {
  const groups = Object.entries(health.groups ?? {});
  return html`<section class="card narrow">
    <h2>The gateway is ${health.status === "ok" ? "well" : "without a lively group"}</h2>
    <ul class="plain-list">${groups.map(([name, group]) => html`<li key=${name}>
      <strong>${name}</strong> serves ${group.model}: ${group.running} running,
      ${" "}${group.waiting} waiting${group.stalled_s > 5 && `, stalled for ${group.stalled_s} s`}
    </li>`)}</ul>
    <p class="muted">Slices, caches, experts, events and failures need an admin token with the
      role view.</p>
    <button class="primary" onClick=${openAccess}>Enter an admin token</button>
  </section>`;
}

function ProblemView({ problem, openAccess }) {
  const refused = problem.status === 401 || problem.status === 403;
  return html`<p role="alert" class="problem">${problem.message}
    ${refused && html` <button onClick=${openAccess}>Change the admin token</button>`}</p>`;
}

export function ClusterPage({ openAccess }) {
  const { state, rates, points, health, problem } = useCluster();
  const caches = new Map((state?.kv ?? []).map((cache) => [cache.group, cache]));
  const groups = state?.status.groups ?? [];
  const withExperts = groups.filter(({ expert_loads: loads }) => loads.length > 0);
  return html`
    <h1 class="hidden">Cluster</h1>
    ${problem && html`<${ProblemView} problem=${problem} openAccess=${openAccess} />`}
    ${health && html`<${HealthView} health=${health} openAccess=${openAccess} />`}
    ${!state && !health && !problem && html`<p class="muted" role="status">Reading …</p>`}
    ${state && html`
      <${Tiles} state=${state} points=${points} />
      <div class="columns">
        <div>
          <section class="card" aria-labelledby="rates-title">
            <h2 id="rates-title">Tokens per second</h2><${Chart} points=${points} /></section>
          <section aria-labelledby="groups-title"><h2 id="groups-title">Groups</h2>
            <div class="groups">${groups.map((group) => html`<${GroupCard} key=${group.seat}
              group=${group} rates=${rates.get(group.id)} cache=${caches.get(group.id)} />`)}
              ${!groups.length && html`<p class="muted">No group.</p>`}</div></section>
          ${withExperts.length > 0 && html`<${ExpertMap} groups=${withExperts} />`}
        </div>
        <div>
          <${FailureCard} why=${state.why} />
          <${ModelTable} models=${state.status.models} />
          <${NodeTable} nodes=${state.status.nodes} />
          <${EventList} events=${state.events} />
        </div>
      </div>`}`;
}
