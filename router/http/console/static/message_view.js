// One message of the conversation, with what can be done with it.

import { answerFacts } from "./answer.js";
import { sendToolAnswers, setToolAnswer } from "./conversation.js";
import { Icon } from "./icons.js";
import { toFragment } from "./markdown.js";
import { html, useLayoutEffect, useRef, useState } from "./markup.js";
import { TokenView } from "./token_view.js";

const COPIED_MS = 1500;

/** A model's text as safe HTML. */
function Markdown({ text }) {
  const box = useRef(null);
  useLayoutEffect(() => box.current.replaceChildren(toFragment(text)), [text]);
  return html`<div class="text" ref=${box}></div>`;
}

function CopyButton({ text }) {
  const [copied, setCopied] = useState(false);
  if (!navigator.clipboard) return null; // browsers give it to https and to localhost alone
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), COPIED_MS);
  };
  return html`<button class="quiet small" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`;
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // cut off, or no JSON
  }
}

function ToolCalls({ message, open }) {
  const { toolCalls } = message;
  return html`<div class="calls">
    ${toolCalls.map((toolCall, index) => html`<section class="call" key=${index}
        aria-label=${`Call of ${toolCall.name}`}>
      <h3><${Icon} name="tool" /> ${toolCall.name || "…"}</h3>
      <pre tabindex="0">${indented(toolCall.arguments)}</pre>
      ${open && html`<label>Answer of the tool
        <textarea rows="2" value=${toolCall.answer} onInput=${(event) =>
          setToolAnswer(message, index, event.target.value)}></textarea></label>`}
      ${!open && toolCall.answer && html`<p class="muted">Answer of the tool</p>
        <pre tabindex="0">${toolCall.answer}</pre>`}
    </section>`)}
    ${open && html`<button onClick=${sendToolAnswers}
      disabled=${toolCalls.some(({ answer }) => !answer)}>Send the tools' answers</button>`}
  </div>`;
}

function UserMessage({ message, edit, running }) {
  return html`<article class="message user" aria-label="Your message">
    ${message.images?.length > 0 && html`<div class="pictures">${message.images.map(
      (image, index) => html`<img key=${index} src=${image.url} alt=${image.name} />`)}</div>`}
    ${message.text && html`<div class="text plain">${message.text}</div>`}
    <div class="actions"><button class="quiet small" onClick=${edit} disabled=${running}>
      Edit</button></div>
  </article>`;
}

function AssistantMessage({ message, isLast, running, regenerate }) {
  const [showTokens, setShowTokens] = useState(false);
  const hasTokens = message.tokens.length > 0;
  const waits = message.running && !message.text && !message.toolCalls.length;
  return html`<article class="message assistant" aria-label="Answer of the model">
    <h2>${message.model || "model"}</h2>
    ${waits && html`<p class="waits"><span class="hidden">The model thinks</span><i></i><i></i><i></i>
      </p>`}
    ${showTokens && hasTokens ? html`<${TokenView} tokens=${message.tokens} />`
      : message.text && html`<${Markdown} text=${message.text} />`}
    ${message.toolCalls.length > 0 && html`<${ToolCalls} message=${message}
      open=${isLast && !message.running} />`}
    ${message.error && html`<p role="alert" class="problem">${message.error}</p>`}
    <div class="actions">
      <span class="facts">${answerFacts(message).join(" · ")}</span>
      ${hasTokens && html`<button class="quiet small" aria-pressed=${showTokens}
        onClick=${() => setShowTokens(!showTokens)}>Tokens</button>`}
      ${!message.running && html`
        ${message.text && html`<${CopyButton} text=${message.text} />`}
        <button class="quiet small" onClick=${regenerate} disabled=${running}>Regenerate</button>`}
    </div>
  </article>`;
}

export function MessageView(props) {
  return props.message.role === "user"
    ? html`<${UserMessage} ...${props} />`
    : html`<${AssistantMessage} ...${props} />`;
}
