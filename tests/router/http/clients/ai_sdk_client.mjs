// Vercel's AI SDK: text, a stream, a tool loop and an object, over chat and over responses.
// Usage: node ai_sdk_client.mjs BASE_URL; prints what came as JSON.
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";

const baseURL = process.argv[2];
const prompt = "How is the weather in La Paz?";
const schema = jsonSchema({
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
});
const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: schema,
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};
const chat = createOpenAICompatible({
  name: "arriero",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const responses = createOpenAI({ baseURL, apiKey: "none" });
const models = { chat: chat("tiny"), responses: responses.responses("tiny") };
const told = {};
for (const [name, model] of Object.entries(models)) {
  const given = { model, prompt, tools, stopWhen: stepCountIs(3), maxRetries: 0 };
  const loop = await generateText(given);
  const stream = streamText(given);
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  told[name] = {
    loop: loop.text,
    calls: loop.steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input])),
    streamed,
    usage: (await stream.totalUsage).inputTokens > 0,
  };
}
console.log(JSON.stringify(told));
