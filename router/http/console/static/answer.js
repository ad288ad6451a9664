// A model's answer while its chunks arrive. Plain values; knows nothing of the page and of calls.

/** An answer without a chunk yet; times are in milliseconds. */
export function newAnswer(model, startedAt) {
  return {
    role: "assistant",
    model,
    text: "",
    toolCalls: [],
    tokens: [], // with log-probabilities: {token, logprob, top_logprobs}
    finishReason: "",
    usage: null,
    numChunks: 0,
    startedAt,
    firstAt: 0,
    lastAt: 0,
    running: true,
    error: "",
  };
}

/** The answer with a chunk of the stream added; `now` is the time of the chunk. */
export function withChunk(answer, chunk, now) {
  if (chunk.error) return { ...answer, error: chunk.error.message };
  const next = { ...answer };
  if (chunk.usage) next.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return next;
  const { content, tool_calls: calls } = choice.delta ?? {};
  if (content) next.text += content;
  if (calls) next.toolCalls = withCalls(answer.toolCalls, calls);
  if (choice.logprobs?.content) next.tokens = [...answer.tokens, ...choice.logprobs.content];
  if (choice.finish_reason) next.finishReason = choice.finish_reason;
  if (content || calls) {
    next.numChunks += 1;
    next.firstAt ||= now;
    next.lastAt = now;
  }
  return next;
}

function withCalls(known, parts) {
  const calls = known.map((call) => ({ ...call }));
  for (const part of parts) {
    const call = (calls[part.index] ??= { id: "", name: "", arguments: "", answer: "" });
    if (part.id) call.id = part.id;
    if (part.function?.name) call.name = part.function.name;
    call.arguments += part.function?.arguments ?? "";
  }
  return calls;
}

/** Facts about an answer for people: tokens, tokens per second, time to the first token. */
export function answerFacts(answer) {
  const facts = [];
  const exact = answer.usage?.completion_tokens;
  const count = exact ?? (answer.tokens.length || answer.numChunks);
  const about = exact || answer.tokens.length ? "" : "about ";
  if (count) facts.push(`${about}${count} token${count === 1 ? "" : "s"}`);
  const seconds = (answer.lastAt - answer.firstAt) / 1000;
  if (count > 1 && seconds > 0) facts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  if (answer.firstAt) facts.push(`first after ${Math.round(answer.firstAt - answer.startedAt)} ms`);
  const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
  if (answer.usage) {
    const prompt = `prompt ${answer.usage.prompt_tokens}`;
    facts.push(cached ? `${prompt}, ${cached} cached` : prompt);
  }
  if (answer.finishReason && answer.finishReason !== "stop") facts.push(words(answer.finishReason));
  return facts;
}

function words(reason) {
  const known = {
    length: "ended at the most tokens",
    tool_calls: "calls tools",
    cancelled: "stopped",
    content_filter: "cut by a safety policy",
  };
  return known[reason] ?? reason;
}
