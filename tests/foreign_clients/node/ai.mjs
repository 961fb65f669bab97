// The AI SDK: `@ai-sdk/openai` with its default model (Responses) and its chats, `@ai-sdk/openai-compatible`.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { strict as assert } from "node:assert";
import { z } from "zod";
import { run } from "./checks.mjs";

const City = z.object({ name: z.enum(["Oslo", "Rome"]), hills: z.boolean() });
const maxOutputTokens = 96, prompt = "What is the weather in Rome?";
const weather = tool({
  description: "Look up the weather.",
  inputSchema: jsonSchema({
    type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"], additionalProperties: false,
  }),
  execute: async ({ city }) => `It rains in ${city}.`,
});

run((url, name) => {
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
  const compatible = createOpenAICompatible({
    name: "imprint", baseURL: `${url}/v1`, apiKey: "none", supportsStructuredOutputs: true,
  });
  const models = { "the default model": openai(name), "a chat": openai.chat(name), compatible: compatible(name) };
  const checks = {
    "vectors": async () => {
      const { embeddings } = await embedMany({ model: openai.embedding(name), values: ["A cat.", "A dog."] });
      assert.equal(embeddings.length, 2);
    },
  };
  for (const [kind, model] of Object.entries(models)) {
    checks[`text and a stream by ${kind}`] = async () => {
      assert((await generateText({ model, prompt, maxOutputTokens })).text);
      let text = "";
      for await (const part of streamText({ model, prompt, maxOutputTokens }).textStream) text += part;
      assert(text);
    };
    checks[`generateObject by ${kind}`] = async () => {
      City.parse((await generateObject({ model, schema: City, prompt: "Name a city.", maxOutputTokens })).object);
    };
    checks[`a tool's round by ${kind}`] = async () => {
      let step = 0;
      const { steps } = await generateText({
        model, prompt, maxOutputTokens, tools: { weather }, stopWhen: stepCountIs(2),
        prepareStep: () => ({ toolChoice: step++ ? "none" : "required" }),
      });
      assert(steps[0].toolCalls.length && steps[0].toolResults.length && steps.length === 2);
    };
  }
  return checks;
});
