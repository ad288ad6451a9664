// The conversation: its messages, and what the user does with them. Knows calls; draws nothing.

import { newAnswer, withChunk } from "./answer.js";
import { access, call, readEvents } from "./api.js";
import { readValue, removeValues, writeValue } from "./session.js";
import { requestFields, settings } from "./settings.js";
import { makeStore } from "./store.js";

const DRAW_MS = 50; // least time between two drawings of an answer that arrives

export const conversation = makeStore({
  messages: readValue("messages", []),
  running: false,
  needsKey: false, // the last call was refused for its key
});
let abort = null;

/** Ask the model with a new message of the user. */
export function send(text, images) {
  if (conversation.get().running || (!text.trim() && !images.length)) return;
  addMessages([{ role: "user", id: "", text, images }]);
  answerNow();
}

/** End the answer that arrives; what has arrived stays. */
export function stop() {
  abort?.abort();
}

/** Ask again for the answer at an index; later messages are removed. */
export function regenerate(index) {
  if (conversation.get().running) return;
  conversation.set(({ messages }) => ({ messages: messages.slice(0, index) }));
  answerNow();
}

/** Take back the user's message at an index with all later messages; gives the message. */
export function takeBack(index) {
  stop();
  const { messages } = conversation.get();
  setMessages(messages.slice(0, index));
  return messages[index];
}

/** Start a new conversation. */
export function clear() {
  stop();
  setMessages([]);
  removeValues("messages");
}

/** Note a tool's answer to a call of a message. */
export function setToolAnswer(message, callIndex, text) {
  const toolCalls = message.toolCalls.map((toolCall, index) =>
    index === callIndex ? { ...toolCall, answer: text } : toolCall,
  );
  show({ ...message, toolCalls });
}

/** Send the tools' answers of the last message to the model. */
export function sendToolAnswers() {
  if (!conversation.get().running) answerNow();
}

/** The messages as the API takes them. */
export function apiMessages(system, messages) {
  const list = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "user") list.push({ role: "user", content: userContent(message) });
    else if (message.text || message.toolCalls.length) list.push(...assistantMessages(message));
  }
  return list;
}

function userContent({ text, images }) {
  if (!images?.length) return text;
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return text ? [...parts, { type: "text", text }] : parts;
}

function assistantMessages({ text, toolCalls }) {
  if (!toolCalls.length) return [{ role: "assistant", content: text }];
  const calls = toolCalls.map(({ id, name, arguments: given }) => ({
    id, type: "function", function: { name, arguments: given },
  }));
  const answers = toolCalls.map(({ id, answer }) => ({
    role: "tool", tool_call_id: id, content: answer,
  }));
  return [{ role: "assistant", content: text || null, tool_calls: calls }, ...answers];
}

async function answerNow() {
  const body = {
    ...requestFields(settings.get()),
    messages: apiMessages(settings.get().system, conversation.get().messages),
  };
  abort = new AbortController();
  const { signal } = abort;
  let answer = { ...newAnswer(settings.get().model, performance.now()), id: `answer-${Date.now()}` };
  addMessages([answer]);
  conversation.set({ running: true, needsKey: false });
  let drawnAt = 0;
  try {
    const response = await call("v1/chat/completions", { body, signal, token: access.get().apiKey });
    for await (const chunk of readEvents(response)) {
      const now = performance.now();
      answer = withChunk(answer, chunk, now);
      if (now - drawnAt >= DRAW_MS) {
        drawnAt = now;
        show(answer);
      }
    }
    if (!answer.finishReason && !answer.error) answer = { ...answer, error: "The answer broke off." };
  } catch (error) {
    if (error.name === "AbortError") answer = { ...answer, finishReason: "cancelled" };
    else answer = { ...answer, error: error.message };
    conversation.set({ needsKey: error.status === 401 });
  }
  show({ ...answer, running: false });
  conversation.set({ running: false });
  keep();
}

const addMessages = (added) => setMessages([...conversation.get().messages, ...added]);

function setMessages(messages) {
  conversation.set({ messages });
}

/** Draw an answer; nothing happens where the user has removed the answer meanwhile. */
function show(answer) {
  const { messages } = conversation.get();
  setMessages(messages.map((message) => (message.id === answer.id ? answer : message)));
}

function keep() {
  const { messages } = conversation.get();
  if (!writeValue("messages", messages)) removeValues("messages"); // images may need too much room
}
