// Tool calls through the OpenAI Node client: node openai_tools.mjs URL. Exits non-zero on a failure.
//
// The demo model cannot call tools by itself. The router reads calls as ChatGLM3 writes them, a named choice
// begins the call in the prompt, and a bias lets the model write the one token that ends it: ")".
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const close = process.argv[3];
const model = "demo-20m";
const tools = [{ type: "function", function: { name: "now", description: "The time.", parameters: { type: "object", properties: {} } } }];
const messages = [{ role: "user", content: "What time is it?" }];
const ask = { model, messages, tools, tool_choice: { type: "function", function: { name: "now" } }, temperature: 0, logit_bias: { [close]: 100 }, max_completion_tokens: 8 };
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

function check(choice) {
  assert.equal(choice.finish_reason, "tool_calls");
  assert.equal(choice.message.content, null);
  assert.equal(choice.message.tool_calls.length, 1);
  const call = choice.message.tool_calls[0];
  assert.match(call.id, /^call_[0-9a-f]{24}$/);
  assert.equal(call.type, "function");
  assert.equal(call.function.name, "now");
  assert.deepEqual(JSON.parse(call.function.arguments), {});
  return call;
}

await test("a call and its result", async () => {
  const r = await client.chat.completions.create(ask);
  const call = check(r.choices[0]);
  assert.equal(r.usage.completion_tokens, 1);
  const next = await client.chat.completions.create({ model, tools, temperature: 0, max_completion_tokens: 8,
    messages: [...messages, r.choices[0].message, { role: "tool", tool_call_id: call.id, content: "noon" }] });
  assert.equal(next.choices[0].message.role, "assistant");
  assert.ok(next.usage.prompt_tokens > r.usage.prompt_tokens);
});

await test("raw stream", async () => {
  const deltas = [];
  let finish = null;
  for await (const c of await client.chat.completions.create({ ...ask, stream: true })) {
    for (const call of c.choices[0]?.delta?.tool_calls ?? []) deltas.push(call);
    finish = c.choices[0]?.finish_reason ?? finish;
  }
  assert.equal(finish, "tool_calls");
  assert.equal(deltas[0].index, 0);
  assert.equal(deltas[0].function.name, "now");
  assert.equal(deltas[0].function.arguments, "");
  assert.equal(deltas.slice(1).map((d) => d.function.arguments).join(""), "{}");
  assert.ok(deltas.slice(1).every((d) => d.index === 0 && d.id === undefined));
});

await test("stream wrapper", async () => {
  const s = client.chat.completions.stream(ask);
  const seen = [];
  s.on("tool_calls.function.arguments.done", (e) => seen.push(e));
  const r = await s.finalChatCompletion();
  const call = r.choices[0].message.tool_calls[0];
  assert.equal(call.function.name, "now");
  assert.equal(call.function.arguments, "{}");
  assert.equal(r.choices[0].finish_reason, "tool_calls");
  assert.equal(seen.length, 1);
});

await test("errors name the field", async () => {
  await assert.rejects(client.chat.completions.create({ ...ask, tool_choice: { type: "function", function: { name: "x" } } }), (e) => e instanceof OpenAI.BadRequestError && e.param === "tool_choice");
  await assert.rejects(client.chat.completions.create({ ...ask, tools: [{ type: "function", function: {} }] }), (e) => e.param === "tools[0].function.name");
});

console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 && passed > 0 ? 0 : 1);
