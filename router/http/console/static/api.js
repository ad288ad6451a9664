// Calls of the gateway that serves this page. Knows paths, keys and errors; nothing of components.

import { makeStore } from "./store.js";
import { readValue, removeValues, writeValue } from "./session.js";

/** Address of the gateway: this file is `console/api.js` below it, behind a proxy too. */
const ROOT = new URL("../", import.meta.url);

export const access = makeStore({
  apiKey: readValue("apiKey", ""),
  adminToken: readValue("adminToken", ""),
});

/** Keep credentials for this tab; an empty value forgets one. */
export function setAccess(apiKey, adminToken) {
  for (const [name, value] of [["apiKey", apiKey], ["adminToken", adminToken]]) {
    if (value) writeValue(name, value);
    else removeValues(name);
  }
  access.set({ apiKey, adminToken });
}

/** An answer with an error status, or no answer. */
export class CallError extends Error {
  /**
   * @param {string} message text for people.
   * @param {number} status HTTP status; 0 for no answer.
   * @param {string} code the error's code in the answer.
   */
  constructor(message, status, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The answer to a call; throws CallError for an error status. */
export async function call(path, { body, token = "", signal } = {}) {
  const headers = {};
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The gateway does not answer.", 0);
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new CallError(error.message, response.status, error.code ?? "");
  } catch {
    return new CallError(`The gateway answered with status ${response.status}.`, response.status);
  }
}

/** The models that the key may use. */
export async function listModels() {
  const response = await call("v1/models", { token: access.get().apiKey });
  return (await response.json()).data;
}

/** Health of the gateway; a bad state comes with status 503 and the same JSON. */
export async function readHealth() {
  try {
    const { apiKey } = access.get();
    const headers = apiKey ? { authorization: `Bearer ${apiKey}` } : {};
    const response = await fetch(new URL("health", ROOT), { headers, cache: "no-store" });
    return await response.json();
  } catch {
    throw new CallError("The gateway does not answer.", 0);
  }
}

/** The state of the cluster, for holders of an admin token. */
export async function readCluster() {
  const response = await call("console/cluster.json", { token: access.get().adminToken });
  return response.json();
}

/** The server-sent events of an answer, parsed from JSON, until `[DONE]` or the end. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection alive
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
