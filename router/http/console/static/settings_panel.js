// System prompt and sampling settings beside the chat.

import { Icon } from "./icons.js";
import { html } from "./markup.js";
import { NUMBERS, resetSampling, setNumber, settings, toolsProblem } from "./settings.js";
import { useStore } from "./store.js";

const TOOLS_EXAMPLE = `[{"type": "function", "function": {
  "name": "weather",
  "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}}]`;

function NumberField({ field, value }) {
  const { name, label, min, max, step, usual } = field;
  return html`<label>${label}
    <input type="number" inputmode="decimal" min=${min} max=${max} step=${step} value=${value}
      placeholder=${usual} onInput=${(event) => setNumber(name, event.target.value)} /></label>`;
}

export function SettingsPanel({ close }) {
  const state = useStore(settings);
  const problem = toolsProblem(state.tools);
  return html`<aside id="settings" class="settings" aria-label="Settings">
    <div class="bar"><h2>Settings</h2><span class="grow"></span>
      <button class="quiet" onClick=${resetSampling}>Defaults</button>
      <button class="quiet round" onClick=${close} aria-label="Close the settings">
        <${Icon} name="close" /></button></div>
    <label>System prompt
      <textarea rows="4" value=${state.system} placeholder="You are a helpful assistant."
        onInput=${(event) => settings.set({ system: event.target.value })}></textarea></label>
    <fieldset><legend>Sampling</legend><div class="numbers">
      ${NUMBERS.map((field) => html`<${NumberField} key=${field.name} field=${field}
        value=${state.numbers[field.name] ?? ""} />`)}</div>
      <label>Stop strings, a line each
        <textarea rows="2" value=${state.stop}
          onInput=${(event) => settings.set({ stop: event.target.value })}></textarea></label>
    </fieldset>
    <label class="check"><input type="checkbox" checked=${state.logprobs}
        onChange=${(event) => settings.set({ logprobs: event.target.checked })} />
      Log-probabilities of the tokens</label>
    <label>Tools, a JSON list
      <textarea rows="5" class="code" spellcheck="false" value=${state.tools}
        placeholder=${TOOLS_EXAMPLE} aria-invalid=${Boolean(problem)}
        onInput=${(event) => settings.set({ tools: event.target.value })}></textarea></label>
    ${problem && html`<p role="alert" class="problem">${problem}</p>`}
  </aside>`;
}
