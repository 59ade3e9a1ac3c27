// Calls of clients for Node, told as told.py does: a JSON line each, [name, answered, value or what is shown].
//   node calls.mjs FOLDER_OF_NODE_MODULES
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.argv[2]}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)));

const { BASE, API_KEY, CHAT_MODEL, MODEL, PICTURE } = process.env;
const TEXTS = ["a cat purrs", "rain"];
const V1 = `${BASE}/v1`;

async function tell(name, call) {
  try {
    console.log(JSON.stringify([name, true, await call()]));
  } catch (error) {
    console.log(JSON.stringify([name, false, String(error)]));
  }
}

globalThis.AI_SDK_LOG_WARNINGS = false;
const { default: OpenAI } = await load("openai");
const { embed, embedMany } = await load("ai");
const { createJina } = await load("jina-ai-provider");
const openai = new OpenAI({ baseURL: V1, apiKey: API_KEY, maxRetries: 0 });
const jina = createJina({ baseURL: V1, apiKey: API_KEY });

const vectors = (answer) => answer.data.map((each) => each.embedding);
await tell("node openai embed", async () => vectors(await openai.embeddings.create({ model: MODEL, input: TEXTS })));
await tell("node openai refused", () => openai.embeddings.create({ model: "nope", input: TEXTS }));
const ask = (more) => openai.chat.completions.create({ model: CHAT_MODEL, messages: [{ role: "user", content: [
  { type: "text", text: "hello" },
  { type: "image_url", image_url: { url: `data:image/png;base64,${readFileSync(PICTURE).toString("base64")}` } },
] }], ...more });
await tell("node openai answer", async () => (await ask({})).choices[0].message.content);
await tell("node openai stream", async () => {
  let text = "";
  for await (const chunk of await ask({ stream: true })) text += chunk.choices[0].delta.content ?? "";
  return text;
});
await tell("node openai answer refused", () => ask({ temperature: 3 }));
await tell("node openai stream refused", () => ask({ temperature: 3, stream: true }));
await tell("ai-sdk embed", async () => {
  const { embeddings } = await embedMany({ model: jina.textEmbeddingModel(MODEL), values: TEXTS });
  return embeddings;
});
await tell("ai-sdk refused", () => embed({ model: jina.textEmbeddingModel("nope"), value: "a", maxRetries: 0 }));
