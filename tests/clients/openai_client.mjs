// The OpenAI Node client against a running router: node openai_client.mjs URL. Exits non-zero on a failure.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "demo-20m";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const answer = "The capital of France is Paris.";
let passed = 0;
let failed = 0;

async function test(name, fn) {
  try {
    await fn();
    passed++;
  } catch (e) {
    failed++;
    console.error(`FAILED ${name}: ${e.stack}`);
  }
}

await test("models", async () => {
  const list = await client.models.list();
  assert.equal(list.data[0].id, model);
  assert.equal((await client.models.retrieve(model)).id, model);
  await assert.rejects(client.models.retrieve("nothing"), OpenAI.NotFoundError);
});

await test("chat", async () => {
  const r = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(r.choices[0].message.content, answer);
  assert.equal(r.choices[0].finish_reason, "stop");
  assert.equal(r.usage.total_tokens, r.usage.prompt_tokens + r.usage.completion_tokens);
});

await test("chat stream with usage", async () => {
  const s = await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } });
  let text = "";
  let usage = null;
  for await (const c of s) {
    text += c.choices[0]?.delta?.content ?? "";
    usage = c.usage ?? usage;
  }
  assert.equal(text, answer);
  assert.equal(usage.prompt_tokens, 15);
});

await test("stream wrapper", async () => {
  const s = client.chat.completions.stream({ model, messages, temperature: 0 });
  assert.equal((await s.finalChatCompletion()).choices[0].message.content, answer);
});

await test("logprobs, n, stop, seed", async () => {
  const r = await client.chat.completions.create({ model, messages, temperature: 1, seed: 3, n: 2, logprobs: true, top_logprobs: 3, max_completion_tokens: 8 });
  assert.equal(r.choices.length, 2);
  for (const c of r.choices) {
    assert.ok(c.logprobs.content.length > 0);
    assert.equal(c.logprobs.content[0].top_logprobs.length, 3);
  }
  const stop = await client.chat.completions.create({ model, messages, temperature: 0, stop: [" is"] });
  assert.equal(stop.choices[0].message.content, "The capital of France");
});

await test("completions: lists, ids, echo", async () => {
  const prompts = [["The sea", "A king"], [[1, 320, 201], [17, 18]]];
  for (const prompt of prompts) {
    const r = await client.completions.create({ model, prompt, max_tokens: 4, temperature: 0, n: 2 });
    assert.deepEqual(r.choices.map((c) => c.index).sort(), [0, 1, 2, 3]);
    assert.equal(r.choices[0].text, r.choices[1].text);
  }
  const ids = await client.completions.create({ model, prompt: [1, 320, 201], max_tokens: 4, temperature: 0 });
  assert.equal(ids.usage.prompt_tokens, 3);
  const e = await client.completions.create({ model, prompt: "The sea", max_tokens: 4, temperature: 0, echo: true, logprobs: 2 });
  assert.ok(e.choices[0].text.startsWith("The sea"));
  assert.equal(e.choices[0].logprobs.token_logprobs[0], null);
  assert.equal(e.choices[0].logprobs.tokens.length, e.choices[0].logprobs.text_offset.length);
});

await test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ model: "nothing", messages }), (e) => e instanceof OpenAI.NotFoundError && e.code === "model_not_found");
  await assert.rejects(client.chat.completions.create({ model, messages: [] }), (e) => e instanceof OpenAI.BadRequestError && !!e.requestID);
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: 3 }), (e) => e.param === "temperature");
  await assert.rejects(client.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(4000) }] }), (e) => e.code === "context_length_exceeded" && /2048/.test(e.message));
});

await test("abort", async () => {
  const s = await client.completions.create({ model, prompt: "The sea", max_tokens: 1500, temperature: 0, stream: true });
  for await (const _ of s) break;
  s.controller.abort();
});

await test("32 at once", async () => {
  const all = await Promise.all(Array.from({ length: 32 }, () => client.chat.completions.create({ model, messages, temperature: 0 })));
  for (const r of all) assert.equal(r.choices[0].message.content, answer);
});

console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 && passed > 0 ? 0 : 1);
