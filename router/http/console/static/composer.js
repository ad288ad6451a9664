// The field for the next message, with its images and the buttons Send and Stop.

import { conversation, send, stop } from "./conversation.js";
import { Icon } from "./icons.js";
import { ACCEPTED, filesOf, readImages } from "./images.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./markup.js";

const MOST_HEIGHT_PX = 220;

/** Grow a field with its text. */
function useHeight(field, text) {
  useLayoutEffect(() => {
    field.current.style.height = "auto";
    field.current.style.height = `${Math.min(field.current.scrollHeight, MOST_HEIGHT_PX)}px`;
  }, [text]);
}

/** Take images that are dropped anywhere on the page; gives whether a drag is over the page. */
function useDrops(take) {
  const [over, setOver] = useState(false);
  const latest = useRef(take);
  latest.current = take;
  useEffect(() => {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const onOver = (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const onLeave = (event) => {
      if (!event.relatedTarget) setOver(false);
    };
    const onDrop = (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(false);
      latest.current(filesOf(event.dataTransfer));
    };
    addEventListener("dragover", onOver);
    addEventListener("dragleave", onLeave);
    addEventListener("drop", onDrop);
    return () => {
      removeEventListener("dragover", onOver);
      removeEventListener("dragleave", onLeave);
      removeEventListener("drop", onDrop);
    };
  }, []);
  return over;
}

function Thumbnail({ image, remove }) {
  return html`<li><img src=${image.url} alt=${image.name} />
    <button onClick=${remove} aria-label=${`Remove ${image.name}`}><${Icon} name="close" /></button></li>`;
}

export function Composer({ draft, setDraft, running }) {
  const field = useRef(null);
  const picker = useRef(null);
  const [problems, setProblems] = useState([]);
  useHeight(field, draft.text);
  useEffect(() => field.current.focus(), []);
  const take = async (files) => {
    if (!files.length) return;
    const before = conversation.get().messages.reduce(
      (sum, { images }) => sum + (images?.length ?? 0), draft.images.length);
    const read = await readImages(files, before);
    setProblems(read.problems);
    setDraft((last) => ({ ...last, images: [...last.images, ...read.images] }));
  };
  const over = useDrops(take);
  const submit = () => {
    if (running || (!draft.text.trim() && !draft.images.length)) return;
    send(draft.text, draft.images);
    setDraft({ text: "", images: [] });
    setProblems([]);
  };
  const onKey = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  };
  const onPaste = (event) => {
    const files = filesOf(event.clipboardData);
    if (files.length) event.preventDefault();
    take(files);
  };
  const remove = (index) =>
    setDraft((last) => ({ ...last, images: last.images.filter((_, other) => other !== index) }));
  return html`<div class=${over ? "composer over" : "composer"}>
    ${problems.map((problem) => html`<p key=${problem} role="alert" class="problem">${problem}</p>`)}
    ${draft.images.length > 0 && html`<ul class="thumbnails" aria-label="Images to send">
      ${draft.images.map((image, index) => html`<${Thumbnail} key=${index} image=${image}
        remove=${() => remove(index)} />`)}</ul>`}
    <div class="entry">
      <button class="quiet round" onClick=${() => picker.current.click()} aria-label="Add images"
        title="Add images"><${Icon} name="image" /></button>
      <input ref=${picker} type="file" accept=${ACCEPTED} multiple hidden tabindex="-1"
        aria-label="Image files" onChange=${(event) => {
          take([...event.target.files]);
          event.target.value = "";
        }} />
      <textarea id="prompt" ref=${field} rows="1" placeholder=${over ? "Drop the images" : "Message"}
        aria-label="Message" value=${draft.text} onKeyDown=${onKey} onPaste=${onPaste}
        onInput=${(event) => setDraft({ ...draft, text: event.target.value })}></textarea>
      ${running
        ? html`<button class="primary stop" onClick=${stop} title="Escape">Stop</button>`
        : html`<button class="primary" onClick=${submit}
            disabled=${!draft.text.trim() && !draft.images.length}>Send</button>`}
    </div>
  </div>`;
}
