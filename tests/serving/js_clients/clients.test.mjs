// Conversations of the openai client and the AI SDK with the server at SMOLRUN_URL, whose model is
// the script of tests/serving/test_js_clients.py. Run by `node --test`.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const baseURL = `${process.env.SMOLRUN_URL}/v1`;
const apiKey = "sk-test";
const SAYS = "Grüße aus dem Keller €";
const ANSWER = "Bonn has 12 degrees, Köln 12 degrees.";
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const provider = createOpenAICompatible({
  name: "smolrun",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("fake");
const messages = [{ role: "user", content: "Hello?" }];
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const PLACE = z.object({ city: z.string(), degrees: z.number() });

test("openai: models", async () => {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  assert.deepEqual(ids, ["fake"]);
  assert.equal((await client.models.retrieve("fake")).owned_by, "smolrun");
});

test("openai: an answer, whole and as a stream", async () => {
  const whole = await client.chat.completions.create({ model: "fake", messages });
  assert.equal(whole.choices[0].message.content, SAYS);
  const stream = client.chat.completions.stream({
    model: "fake",
    messages,
    stream_options: { include_usage: true },
  });
  const deltas = [];
  stream.on("content", (delta) => deltas.push(delta));
  assert.equal(await stream.finalContent(), SAYS);
  assert.ok(deltas.length > 5 && deltas.join("") === SAYS);
  assert.equal((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);
});

test("openai: stop strings, and a stream that is left", async () => {
  const stopped = await client.chat.completions.create({ model: "fake", messages, stop: [" dem"] });
  assert.equal(stopped.choices[0].message.content, "Grüße aus");
  assert.equal(stopped.choices[0].finish_reason, "stop");
  const stream = await client.chat.completions.create({ model: "fake", messages, stream: true });
  for await (const chunk of stream) if (chunk.choices[0].delta.content) break; // this aborts it
  assert.ok(stream.controller.signal.aborted);
});

test("openai: runTools calls two functions at once and answers with their results", async () => {
  const asked = [];
  const weather = (given) => {
    asked.push(given.city);
    return "12 degrees";
  };
  const runner = client.chat.completions.runTools({
    model: "fake",
    stream: true,
    messages: [{ role: "user", content: "Weather?" }],
    tools: [
      {
        type: "function",
        function: { name: "weather", parse: JSON.parse, function: weather, parameters: city },
      },
    ],
  });
  assert.equal(await runner.finalContent(), ANSWER);
  assert.deepEqual(asked, ["Bonn", "Köln"]);
});

test("openai: an answer of a schema, parsed", async () => {
  const schema = { ...city, properties: { ...city.properties, degrees: { type: "number" } } };
  const parsed = await client.chat.completions.parse({
    model: "fake",
    messages,
    response_format: { type: "json_schema", json_schema: { name: "place", strict: true, schema } },
  });
  assert.deepEqual(parsed.choices[0].message.parsed, { city: "Bonn", degrees: 12 });
});

test("openai: errors have the classes of OpenAI's API", async () => {
  const create = (fields) =>
    client.chat.completions.create({ model: "fake", messages, ...fields });
  await assert.rejects(create({ model: "gpt-4o" }), (error) => {
    return error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
  });
  await assert.rejects(create({ temperature: -1 }), (error) => {
    return error instanceof OpenAI.BadRequestError && error.param === "temperature";
  });
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

const weatherTool = (asked) =>
  tool({
    description: "The weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async (given) => {
      asked.push(given.city);
      return "12 degrees";
    },
  });

test("AI SDK: text, whole and as a stream with its usage", async () => {
  const whole = await generateText({ model, prompt: "Hello?" });
  assert.equal(whole.text, SAYS);
  const stream = streamText({ model, system: "Be short.", prompt: "Hello?" });
  const parts = [];
  for await (const part of stream.textStream) parts.push(part);
  assert.ok(parts.length > 5 && parts.join("") === SAYS);
  assert.equal(await stream.finishReason, "stop");
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test("AI SDK: tools in several steps, whole and as a stream", async () => {
  for (const run of [generateText, streamText]) {
    const asked = [];
    const tools = { weather: weatherTool(asked) };
    const done = run({ model, prompt: "Weather?", tools, stopWhen: stepCountIs(3) });
    const result = run === streamText ? done : await done;
    if (run === streamText) await result.consumeStream();
    assert.equal(await result.text, ANSWER);
    assert.deepEqual(asked, ["Bonn", "Köln"]);
    const reasons = (await result.steps).map((step) => step.finishReason);
    assert.deepEqual(reasons, ["tool-calls", "stop"]);
  }
});

test("AI SDK: objects of a schema, whole and as a stream", async () => {
  const { object } = await generateObject({ model, schema: PLACE, prompt: "Where?" });
  assert.deepEqual(object, { city: "Bonn", degrees: 12 });
  const stream = streamObject({ model, schema: PLACE, prompt: "Where?" });
  const parts = [];
  for await (const part of stream.partialObjectStream) parts.push(part);
  assert.ok(parts.length > 1);
  assert.deepEqual(await stream.object, { city: "Bonn", degrees: 12 });
});

test("AI SDK: a stream that is aborted, and an error with its status", async () => {
  const leaving = new AbortController();
  const stream = streamText({ model, prompt: "Hello?", abortSignal: leaving.signal });
  for await (const part of stream.textStream) if (part) leaving.abort();
  const wrong = generateText({ model: provider("gpt-4o"), prompt: "Hello?", maxRetries: 0 });
  await assert.rejects(wrong, (error) => APICallError.isInstance(error) && error.statusCode === 404);
});

test("openai: responses as a stream, continued by their id", async () => {
  const stream = client.responses.stream({ model: "fake", input: "Hello?" });
  const deltas = [];
  stream.on("response.output_text.delta", (event) => deltas.push(event.delta));
  const final = await stream.finalResponse();
  assert.ok(deltas.length > 5 && deltas.join("") === SAYS && final.output_text === SAYS);
  const tools = [{ type: "function", name: "weather", parameters: city, strict: false }];
  const first = await client.responses.create({ model: "fake", input: "Weather?", tools });
  const results = first.output
    .filter((item) => item.type === "function_call")
    .map(({ call_id }) => ({ type: "function_call_output", call_id, output: "12 degrees" }));
  assert.equal(results.length, 2);
  const more = { model: "fake", previous_response_id: first.id, input: results, tools };
  assert.equal((await client.responses.create(more)).output_text, ANSWER);
});

test("AI SDK: its provider for OpenAI, which uses /v1/responses", async () => {
  const openai = createOpenAI({ baseURL, apiKey });
  for (const store of [true, false]) {
    const providerOptions = { openai: { store } };
    const asked = [];
    const stream = streamText({
      model: openai("fake"),
      prompt: "Weather?",
      tools: { weather: weatherTool(asked) },
      stopWhen: stepCountIs(3),
      providerOptions,
    });
    await stream.consumeStream();
    assert.equal(await stream.text, ANSWER);
    assert.deepEqual(asked, ["Bonn", "Köln"]);
    const whole = await generateText({ model: openai("fake"), prompt: "Hello?", providerOptions });
    assert.equal(whole.text, SAYS);
    assert.equal(whole.finishReason, "stop");
    assert.ok(whole.usage.inputTokens > 0 && whole.usage.outputTokens > 0);
  }
  const { object } = await generateObject({ model: openai("fake"), schema: PLACE, prompt: "Where?" });
  assert.deepEqual(object, { city: "Bonn", degrees: 12 });
});
