// What an SDK raises, for each case: node raising.mjs SDK < CASES, as raising.py.
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

// Modules are found where this process runs, which is not where this file is.
const require = createRequire(process.cwd() + "/");
const messages = [{ role: "user", content: "Hello" }];

async function askOpenai(url, stream) {
  const OpenAI = require("openai");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
  const answer = await client.chat.completions.create({ model: "m", messages, stream });
  if (stream) for await (const _ of answer);
}

async function askAi(url, stream) {
  const { generateText, streamText } = require("ai");
  const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
  const model = createOpenAICompatible({ name: "baton", baseURL: `${url}/v1` })("m");
  if (!stream) return generateText({ model, messages });
  for await (const part of streamText({ model, messages, onError() {} }).fullStream)
    if (part.type === "error") throw part.error;
}

const SDKS = { "openai-node": askOpenai, "ai": askAi };

async function raised(ask, [url, stream]) {
  try {
    await ask(url, stream);
    return "nothing";
  } catch (error) {
    if (!(error instanceof Error)) return "error part";
    const own = error.constructor.name;
    return own.startsWith("_") ? error.name.replace(/^AI_/, "") : own;
  }
}

const ask = SDKS[process.argv[2]];
const cases = JSON.parse(await text(process.stdin));
console.log(JSON.stringify(await Promise.all(cases.map((one) => raised(ask, one)))));
