// The chart of the last five minutes, drawn by uPlot.

import uPlot from "uplot";
import { html, useEffect, useRef } from "./markup.js";
import { rounded, timeOfDay } from "./numbers.js";
import { useStore } from "./store.js";
import { colour, theme } from "./theme.js";

const HEIGHT_PX = 190;

function options(width) {
  const text = colour("--muted");
  const line = colour("--line");
  const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
  return {
    width,
    height: HEIGHT_PX,
    legend: { show: false },
    cursor: { show: false },
    scales: { y: { range: (_, __, most) => [0, Math.max(1, most * 1.1)] } },
    axes: [{ ...axis, space: 90, size: 32, values: (_, times) => times.map(timeOfDay) }, { ...axis, size: 56 }],
    series: [
      {},
      { stroke: colour("--accent"), width: 2, points: { show: false } },
      { stroke: colour("--second"), width: 2, dash: [6, 4], points: { show: false } },
    ],
  };
}

const columns = (points) => [
  points.map(({ at }) => at),
  points.map(({ output }) => output),
  points.map(({ prompt }) => prompt),
];

/** Output and prompt tokens per second. */
export function Chart({ points }) {
  const box = useRef(null);
  const plot = useRef(null);
  const { chosen } = useStore(theme);
  useEffect(() => {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(options(box.current.clientWidth), columns(points), box.current);
    };
    const observer = new ResizeObserver(() =>
      plot.current?.setSize({ width: box.current.clientWidth, height: HEIGHT_PX }));
    draw();
    observer.observe(box.current);
    dark.addEventListener("change", draw);
    return () => {
      observer.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [chosen]);
  useEffect(() => plot.current?.setData(columns(points)), [points]);
  const last = points.at(-1);
  const summary = last
    ? `Now ${rounded(last.output)} output and ${rounded(last.prompt)} prompt tokens per second`
    : "No rates yet";
  return html`<p class="legend"><span class="key output"></span>output
      <span class="key prompt"></span>prompts</p>
    <div class="chart" ref=${box} role="img" aria-label=${summary}></div>`;
}
