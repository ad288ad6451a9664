// Settings of the requests: kept for the tab, turned into fields of `/v1/chat/completions`.

import { readValue, writeValue } from "./session.js";
import { makeStore } from "./store.js";

/** Fields with numbers: name in the request, label, limits, default of the gateway. */
export const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 100, step: 0.1, usual: "1" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05, usual: "1" },
  { name: "top_k", label: "Top k", min: 0, step: 1, usual: "off" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, usual: "0" },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1, usual: "room left" },
  { name: "seed", label: "Seed", step: 1, usual: "random" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0, max: 2, step: 0.05, usual: "1" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, usual: "0" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, usual: "0" },
];

const INITIAL = { model: "", system: "", numbers: {}, stop: "", logprobs: false, tools: "" };

export const settings = makeStore({ ...INITIAL, ...readValue("settings", {}) });
settings.follow((state) => writeValue("settings", state));

/** Set one number; an empty text leaves the field to the gateway. */
export function setNumber(name, text) {
  settings.set(({ numbers }) => ({ numbers: { ...numbers, [name]: text } }));
}

/** Go back to the gateway's defaults; model and system prompt stay. */
export function resetSampling() {
  settings.set({ numbers: {}, stop: "", logprobs: false, tools: "" });
}

/** Why the text of the tools cannot be used; "" for a usable or empty text. */
export function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "Write a JSON list of tools: [ … ].";
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}

/** The fields of a request, without messages. */
export function requestFields(state) {
  const fields = { stream: true, stream_options: { include_usage: true } };
  if (state.model) fields.model = state.model;
  for (const { name } of NUMBERS) {
    const text = state.numbers[name] ?? "";
    if (text !== "" && Number.isFinite(Number(text))) fields[name] = Number(text);
  }
  const stops = state.stop.split("\n").filter((line) => line !== "");
  if (stops.length) fields.stop = stops;
  if (state.logprobs) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  if (state.tools.trim() && !toolsProblem(state.tools)) fields.tools = JSON.parse(state.tools);
  return fields;
}
