// npm's `openai`: chats, streams, tools, parsed output, Responses, embeddings.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { strict as assert } from "node:assert";
import { run } from "./checks.mjs";

const City = z.object({ name: z.enum(["Oslo", "Rome"]), hills: z.boolean() });
const messages = [{ role: "user", content: "What is the weather in Rome?" }];
const parameters = {
  type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"], additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", description: "Look up.", parameters, strict: true } }];

run((url, model) => {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const ask = (fields) => client.chat.completions.create({ model, messages, max_completion_tokens: 64, ...fields });
  return {
    "a chat and a stream": async () => {
      assert((await ask({})).choices[0].message.content);
      let text = "", usage = null;
      for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
        text += chunk.choices[0]?.delta?.content ?? "";
        usage = chunk.usage ?? usage;
      }
      assert(text && usage.completion_tokens);
    },
    "a round of a tool": async () => {
      const { message, finish_reason } = (await ask({ tools, tool_choice: "required", parallel_tool_calls: false })).choices[0];
      assert.equal(finish_reason, "tool_calls");
      const results = message.tool_calls.map((call) => {
        assert(["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).city));
        return { role: "tool", tool_call_id: call.id, content: "It rains." };
      });
      const after = await ask({ messages: [...messages, message, ...results], tools, tool_choice: "none" });
      assert(after.choices[0].message.content);
    },
    "a streamed call, put together by the package": async () => {
      const stream = client.chat.completions.stream({
        model, messages, tools, tool_choice: { type: "function", function: { name: "weather" } }, max_tokens: 64,
      });
      const [call] = (await stream.finalMessage()).tool_calls;
      assert.equal(call.function.name, "weather");
    },
    "parsed output": async () => {
      const parsed = await client.chat.completions.parse({
        model, messages, response_format: zodResponseFormat(City, "city"), max_tokens: 96,
      });
      City.parse(parsed.choices[0].message.parsed);
    },
    "responses, one after the other, and streamed": async () => {
      const first = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 16 });
      assert(first.output_text);
      const stream = await client.responses.create({
        model, input: "Again.", previous_response_id: first.id, max_output_tokens: 16, stream: true,
      });
      let last;
      for await (const event of stream) last = event;
      assert(["response.completed", "response.incomplete"].includes(last.type));
      const listed = await client.responses.inputItems.list(first.id);
      assert.equal(listed.data[0].content[0].text, "Say hello.");
    },
    "a conversation": async () => {
      const items = [{ type: "message", role: "user", content: "My cat is called Miso." }];
      const { id } = await client.conversations.create({ items, metadata: { topic: "cats" } });
      await client.responses.create({ model, conversation: id, input: "Say hello.", max_output_tokens: 16 });
      assert.equal((await client.conversations.items.list(id)).data.length, 3);
      assert((await client.conversations.delete(id)).deleted);
    },
    "embeddings and models": async () => {
      const found = await client.embeddings.create({ model, input: ["A cat.", "A dog."] });
      assert.equal(found.data.length, 2);
      assert.equal((await client.models.list()).data[0].id, model);
    },
  };
});
