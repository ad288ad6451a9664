// The tokens of each expert as a map: a row for each layer, a column for each expert.

import { html, useEffect, useMemo, useRef, useState } from "./markup.js";
import { tenths, whole } from "./numbers.js";
import { useStore } from "./store.js";
import { colour, theme } from "./theme.js";

const ROW_PX = 14;
const FULL = 3; // times the layer's mean that has the full colour

/** Rows of {layer, tokens, mean}, with numbers. */
function rowsOf(group) {
  return group.expert_loads.map(({ layer, tokens }) => {
    const counts = tokens.map(Number);
    const mean = counts.reduce((total, count) => total + count, 0) / Math.max(1, counts.length);
    return { layer, tokens: counts, mean };
  });
}

const times = (row, expert) => (row.mean ? row.tokens[expert] / row.mean : 0);

function hottest(rows) {
  const cells = rows.flatMap((row) => row.tokens.map((count, expert) => ({
    layer: row.layer, expert, count, times: times(row, expert),
  })));
  return cells.filter(({ count }) => count).sort((a, b) => b.times - a.times).slice(0, 3);
}

function draw(canvas, rows, cursor) {
  const width = canvas.clientWidth;
  const height = rows.length * ROW_PX;
  const scale = devicePixelRatio;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const most = Math.max(...rows.map(({ tokens }) => tokens.length));
  const cell = width / most;
  const gap = cell > 4 ? 1 : 0;
  context.fillStyle = colour("--accent");
  rows.forEach((row, y) => row.tokens.forEach((_, expert) => {
    context.globalAlpha = 0.06 + 0.94 * Math.min(1, times(row, expert) / FULL);
    context.fillRect(expert * cell, y * ROW_PX, cell - gap, ROW_PX - 1);
  }));
  context.globalAlpha = 1;
  if (!cursor) return;
  context.strokeStyle = colour("--ink");
  context.lineWidth = 2;
  context.strokeRect(cursor.expert * cell, cursor.row * ROW_PX, cell, ROW_PX - 1);
}

function Picker({ groups, group, choose }) {
  if (groups.length < 2) return null;
  return html`<label class="picker"><span class="hidden">Group</span>
    <select value=${group.seat} onChange=${(event) => choose(event.target.value)}>
      ${groups.map(({ seat, id }) => html`<option key=${seat} value=${seat}>${id}</option>`)}
    </select></label>`;
}

export function ExpertMap({ groups }) {
  const [seat, setSeat] = useState(groups[0].seat);
  const group = groups.find((other) => other.seat === seat) ?? groups[0];
  const rows = useMemo(() => rowsOf(group), [group]);
  const [cursor, setCursor] = useState(null); // {row, expert}
  const canvas = useRef(null);
  const { chosen } = useStore(theme);
  useEffect(() => {
    const redraw = () => draw(canvas.current, rows, cursor);
    const observer = new ResizeObserver(redraw);
    observer.observe(canvas.current);
    redraw();
    return () => observer.disconnect();
  }, [rows, cursor, chosen]);
  const move = (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!step[event.key]) return;
    event.preventDefault();
    const [down, right] = step[event.key];
    const row = Math.min(rows.length - 1, Math.max(0, (cursor?.row ?? 0) + down));
    const most = rows[row].tokens.length - 1;
    setCursor({ row, expert: Math.min(most, Math.max(0, (cursor?.expert ?? 0) + right)) });
  };
  const point = ({ offsetX, offsetY }) => {
    const row = Math.min(rows.length - 1, Math.max(0, Math.floor(offsetY / ROW_PX)));
    const { tokens } = rows[row];
    const expert = Math.floor((offsetX / canvas.current.clientWidth) * tokens.length);
    setCursor({ row, expert: Math.min(tokens.length - 1, Math.max(0, expert)) });
  };
  const at = cursor && rows[cursor.row];
  const top = hottest(rows);
  return html`<section class="card" aria-labelledby="experts-title">
    <div class="bar"><h2 id="experts-title">Experts</h2><span class="grow"></span>
      <${Picker} groups=${groups} group=${group} choose=${setSeat} /></div>
    <p class="muted">A row for each layer, a column for each expert; a full colour means
      ${" "}${FULL} times the layer's mean, or more.</p>
    <canvas ref=${canvas} class="map" style=${{ height: `${rows.length * ROW_PX}px` }} tabindex="0"
      role="img" aria-label="Map of the experts' tokens; the arrow keys go from cell to cell"
      onKeyDown=${move} onPointerMove=${point} onPointerLeave=${() => setCursor(null)}></canvas>
    <p role="status" class="under-map">${at
      ? `Layer ${at.layer}, expert ${cursor.expert}: ${whole(at.tokens[cursor.expert])} tokens, ${
          tenths(times(at, cursor.expert))} times the mean`
      : `Busiest: ${top.map(({ layer, expert, times: ratio }) =>
          `layer ${layer} expert ${expert} (${tenths(ratio)}×)`).join(", ") || "no tokens yet"}`}</p>
  </section>`;
}
