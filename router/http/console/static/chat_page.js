// The chat: model, messages, composer, settings. The work is in `conversation.js`.

import { access, listModels } from "./api.js";
import { Composer } from "./composer.js";
import { clear, conversation, regenerate, stop, takeBack } from "./conversation.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./markup.js";
import { MessageView } from "./message_view.js";
import { settings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { useStore } from "./store.js";

const NEAR_END_PX = 80;
const IDEAS = [
  "Explain how a KV cache makes decoding fast.",
  "Write a Python function that merges two sorted lists.",
  "Plan a walk of three days in the Andes, as a table.",
];

function useModels() {
  const { apiKey } = useStore(access);
  const [state, setState] = useState({ models: [], problem: "", needsKey: false });
  const load = async () => {
    try {
      const models = await listModels();
      setState({ models, problem: "", needsKey: false });
      const { model } = settings.get();
      if (!models.some(({ id }) => id === model)) settings.set({ model: models[0]?.id ?? "" });
    } catch (error) {
      setState({ models: [], problem: error.message, needsKey: error.status === 401 });
    }
  };
  useEffect(() => void load(), [apiKey]);
  return { ...state, load };
}

function ModelPicker({ models, load }) {
  const { model } = useStore(settings);
  const chosen = models.find(({ id }) => id === model);
  return html`<label class="picker"><span class="hidden">Model</span>
    <select value=${model} onFocus=${load} disabled=${!models.length}
      onChange=${(event) => settings.set({ model: event.target.value })}>
      ${!models.length && html`<option value="">no model</option>`}
      ${models.map(({ id, parent }) => html`<option key=${id} value=${id}>
        ${parent ? `${id} (adapter of ${parent})` : id}</option>`)}
    </select></label>
    ${chosen && html`<span class="muted wide">context ${chosen.max_model_len} tokens</span>`}`;
}

function Welcome({ useIdea, openAccess, problem, needsKey }) {
  return html`<div class="welcome">
    <img src="console/icon.svg" alt="" width="56" height="56" />
    <h2 class="title">Ask the model</h2>
    ${problem ? html`<p role="alert" class="problem">${problem}
        ${needsKey && html` <button onClick=${openAccess}>Enter a key</button>`}</p>`
      : html`<p class="muted">Enter sends, Shift+Enter starts a line, Escape stops.
          Drop or paste images where the model reads them.</p>
        <div class="ideas">${IDEAS.map((idea) => html`
          <button key=${idea} onClick=${() => useIdea(idea)}>${idea}</button>`)}</div>`}
  </div>`;
}

/** Keep the end of the conversation in sight, unless the user has scrolled up. */
function useFollowEnd(list, messages) {
  const follows = useRef(true);
  const onScroll = ({ target }) => {
    follows.current = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_END_PX;
  };
  useLayoutEffect(() => {
    if (follows.current) list.current.scrollTop = list.current.scrollHeight;
  }, [messages]);
  return onScroll;
}

export function ChatPage({ openAccess }) {
  const { messages, running, needsKey } = useStore(conversation);
  const { models, problem, needsKey: listNeedsKey, load } = useModels();
  const [showSettings, setShowSettings] = useState(innerWidth >= 1100);
  const [draft, setDraft] = useState({ text: "", images: [] });
  const list = useRef(null);
  const onScroll = useFollowEnd(list, messages);
  useEffect(() => {
    const onKey = (event) => {
      if (event.key === "Escape" && conversation.get().running) stop();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const edit = (index) => {
    const { text, images } = takeBack(index);
    setDraft({ text, images });
    document.getElementById("prompt").focus();
  };
  return html`
    <section class="talk" aria-labelledby="chat-title">
      <h1 id="chat-title" class="hidden">Chat</h1>
      <div class="bar">
        <${ModelPicker} models=${models} load=${load} />
        <span class="grow"></span>
        <button class="quiet" onClick=${clear} disabled=${!messages.length}>New chat</button>
        <button class="quiet" aria-expanded=${showSettings} aria-controls="settings"
          onClick=${() => setShowSettings(!showSettings)}>Settings</button>
      </div>
      <div class="messages" ref=${list} onScroll=${onScroll} role="log" aria-label="Messages"
        aria-busy=${running} tabindex="0">
        ${!messages.length && html`<${Welcome} problem=${problem} needsKey=${listNeedsKey}
          openAccess=${openAccess} useIdea=${(text) => {
            setDraft({ ...draft, text });
            document.getElementById("prompt").focus();
          }} />`}
        ${messages.map((message, index) => html`<${MessageView} key=${message.id || index}
          message=${message} running=${running} isLast=${index === messages.length - 1}
          edit=${() => edit(index)} regenerate=${() => regenerate(index)} />`)}
        ${needsKey && html`<p class="notice"><button class="primary" onClick=${openAccess}>
          Enter an API key</button></p>`}
      </div>
      <p class="hidden" role="status">${running ? "The model answers." : ""}</p>
      <${Composer} draft=${draft} setDraft=${setDraft} running=${running} />
    </section>
    ${showSettings && html`<${SettingsPanel} close=${() => setShowSettings(false)} />`}`;
}
