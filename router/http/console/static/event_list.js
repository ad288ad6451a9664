// Events, the first cause of the latest failure, and the nodes.

import { html } from "./markup.js";
import { isoTime, tenths, timeOfDay, whole } from "./numbers.js";

const GIB = 2 ** 30;

export function EventList({ events }) {
  return html`<section class="card" aria-labelledby="events-title">
    <h2 id="events-title">Events</h2>
    <ol class="events" tabindex="0" aria-label="Events, the latest first">
      ${events.toReversed().map((event, index) => html`<li key=${`${event.at}-${index}`}>
        <time datetime=${isoTime(event.at)}>${timeOfDay(event.at)}</time>
        <span class=${`kind ${event.kind}`}>${event.kind}</span>
        <span><strong>${event.who}</strong> ${event.text}${event.by && html`
          <span class="muted"> by ${event.by}</span>`}</span></li>`)}
    </ol></section>`;
}

export function FailureCard({ why }) {
  const failure = why?.failure;
  return html`<section class=${failure ? "card failure" : "card"} aria-labelledby="failure-title">
    <h2 id="failure-title">Latest failure</h2>
    ${failure ? html`
      <p><strong>${failure.who}</strong>
        <span class="muted"> at ${timeOfDay(failure.at)}${Number.isFinite(failure.recovered_s)
          ? `, served again after ${tenths(failure.recovered_s)} s` : ", not recovered yet"}
        </span></p>
      <p class="cause">${failure.cause}</p>
      <details><summary>Evidence</summary>
        <pre tabindex="0">${why.lines.join("\n")}</pre></details>`
    : html`<p class="muted">None is recorded.</p>`}
  </section>`;
}

export function NodeTable({ nodes }) {
  return html`<section class="card" aria-labelledby="nodes-title"><h2 id="nodes-title">Nodes</h2>
    <div class="scroll" tabindex="0" role="group" aria-label="Table of the nodes"><table>
      <thead><tr><th scope="col">Node</th><th scope="col">CPUs free</th>
        <th scope="col">GPUs free</th><th scope="col">Memory</th><th scope="col">Groups</th></tr>
      </thead>
      <tbody>${nodes.map((node) => html`<tr key=${node.id}>
        <th scope="row">${node.hostname || node.address}${node.head && " (head)"}</th>
        <td>${tenths(node.cpus_free)} of ${tenths(node.cpus)}</td>
        <td>${tenths(node.gpus_free)} of ${tenths(node.gpus)}</td>
        <td>${Number(node.memory) ? `${whole(Number(node.memory) / GIB)} GiB` : "–"}</td>
        <td>${!node.alive ? "gone" : node.draining ? "draining" : node.groups.length}</td>
      </tr>`)}</tbody></table></div></section>`;
}
