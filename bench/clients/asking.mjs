// A conversation that an SDK has with a server: node asking.mjs SDK URL MODEL QUESTION ANSWER, as asking.py.
import { strictEqual as same } from "node:assert";
import { createRequire } from "node:module";

// Modules are found where this process runs, which is not where this file is.
const require = createRequire(process.cwd() + "/");
const [sdk, url, model, question, answer] = process.argv.slice(2);
const messages = [{ role: "user", content: question }];
const CLIENTS = 8;

async function askOpenai() {
  const OpenAI = require("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
  const { data } = await client.models.list();
  same(data[0].id, model);
  const asked = { model, messages, temperature: 0 };
  const whole = await client.chat.completions.create(asked);
  same(whole.choices[0].message.content, answer);
  let text = "", last;
  for await (last of await client.chat.completions.create({ ...asked, stream: true }))
    text += last.choices[0].delta.content ?? "";
  same(text, answer);
  same(last.system_fingerprint, whole.system_fingerprint);
  same(await client.chat.completions.stream(asked).finalContent(), answer);
  for (const one of await Promise.all(Array.from({ length: CLIENTS }, () => client.chat.completions.create(asked))))
    same(one.choices[0].message.content, answer);
  same((await client.responses.create({ model, input: question, temperature: 0 })).output_text, answer);
  return "models, chat, stream, responses, all at once";
}

async function askAnthropic() {
  const { Anthropic } = require("@anthropic-ai/sdk");
  const client = new Anthropic({ baseURL: url, apiKey: "none" });
  const asked = { model, messages, max_tokens: 80 };
  const greedy = { body: { ...asked, temperature: 0 } };
  same((await client.messages.create(asked, greedy)).content[0].text, answer);
  same(await client.messages.stream({ ...asked, temperature: 0 }).finalText(), answer);
  const counted = await client.messages.countTokens({ model, messages });
  same(counted.input_tokens > 0, true);
  return "message, stream, count_tokens";
}

async function askAi() {
  const { generateText, generateObject, jsonSchema, streamText, tool } = require("ai");
  const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({ name: "baton", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
  const asked = { model: provider(model), messages, temperature: 0 };
  same((await generateText(asked)).text, answer);
  same(await streamText(asked).text, answer);
  const shape = jsonSchema({ type: "object", properties: { is_right: { type: "boolean" } }, required: ["is_right"], additionalProperties: false });
  same(typeof (await generateObject({ ...asked, schema: shape })).object.is_right, "boolean");
  same((await generateText({ ...asked, tools: { weather: tool({ inputSchema: shape }) } })).text, answer);
  return "text, stream, object, tools";
}

const SDKS = { "openai-node": askOpenai, "anthropic-node": askAnthropic, "ai": askAi };
console.log(await SDKS[sdk]());
