// The state of the cluster: asked for every two seconds while the page is in sight, with rates.

import { access, readCluster, readHealth } from "./api.js";
import { useEffect, useState } from "./markup.js";
import { useStore } from "./store.js";

const PERIOD_MS = 2000;
const MOST_POINTS = 150; // five minutes

/** The sum of a field over a list; Admin's large numbers come as text. */
export const sum = (list, field) =>
  list.reduce((total, item) => total + Number(item[field] ?? 0), 0);

/** Counters per second by group, from two states. */
function ratesOf(before, now) {
  const rates = new Map();
  if (!before) return rates;
  const seconds = now.at - before.at;
  const old = new Map(before.status.groups.map((group) => [group.id, group]));
  for (const group of now.status.groups) {
    const last = old.get(group.id);
    if (!last || !group.id || seconds <= 0) continue;
    const rate = (field) => Math.max(0, Number(group[field]) - Number(last[field])) / seconds;
    rates.set(group.id, {
      output: rate("output_tokens"),
      prompt: rate("prompt_tokens"),
      steps: rate("steps"),
    });
  }
  return rates;
}

/** A point of the chart. */
function pointOf(state, rates) {
  const values = [...rates.values()];
  return {
    at: state.at,
    output: sum(values, "output"),
    prompt: sum(values, "prompt"),
    running: sum(state.status.groups, "running"),
    waiting: sum(state.status.groups, "waiting") + sum(state.status.models, "queued"),
  };
}

function withState(view, state) {
  if (view.state && state.at === view.state.at) return { ...view, problem: null };
  const rates = ratesOf(view.state, state);
  const points = view.state ? [...view.points, pointOf(state, rates)] : [];
  return { state, rates, points: points.slice(-MOST_POINTS), health: null, problem: null };
}

const EMPTY = { state: null, rates: new Map(), points: [], health: null, problem: null };

/**
 * The state of the cluster, its rates and the points of the last minutes.
 *
 * Without an admin token `health` says what the API key may see.
 */
export function useCluster() {
  const { adminToken, apiKey } = useStore(access);
  const [view, setView] = useState(EMPTY);
  useEffect(() => {
    let ended = false;
    let timer = 0;
    const read = async () => {
      try {
        if (adminToken) {
          const state = await readCluster();
          if (!ended) setView((last) => withState(last, state));
        } else {
          const health = await readHealth();
          if (!ended) setView({ ...EMPTY, health });
        }
      } catch (problem) {
        if (!ended) setView((last) => ({ ...last, problem }));
      }
    };
    const loop = async () => {
      if (!document.hidden) await read();
      if (!ended) timer = setTimeout(loop, PERIOD_MS);
    };
    setView(EMPTY);
    loop();
    return () => {
      ended = true;
      clearTimeout(timer);
    };
  }, [adminToken, apiKey]);
  return view;
}
