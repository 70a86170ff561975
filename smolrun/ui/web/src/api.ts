// The server's HTTP API, as this page uses it.

import { createParser } from "eventsource-parser"
import type { Conversation } from "./conversation"
import { recall, remember } from "./memory"

/** Values that a person may set; what is absent is the server's default. */
export interface Sampling {
  temperature?: number
  top_p?: number
  top_k?: number
  max_tokens?: number
  seed?: number
  stop?: string[]
}

export interface ChatRequest extends Sampling {
  messages: { role: string; content: string }[]
  think?: boolean
  continues?: boolean // the last message is an answer, which is continued
  worker_rank?: number // the replica that answers
}

export type AnswerEvent =
  | { kind: "open"; ranks: string | null; isKept: boolean } // kept: it can be resumed after a lost connection
  | { kind: "seen"; number: number } // of the last event, for `resume`
  | { kind: "alive" }
  | { kind: "loading" }
  | { kind: "queued"; before: number }
  | { kind: "prefill"; done: number; total: number }
  | { kind: "recovering"; text: string }
  | { kind: "text"; text: string }
  | { kind: "thoughts"; text: string }
  | { kind: "end"; reason: "stop" | "length" }
  | { kind: "usage"; promptTokens: number; tokens: number; cachedTokens: number }

export interface Config {
  model_name: string
  max_new_tokens: number
  max_sequence_length: number | null
  temperature: number
  top_p: number
  top_k: number
  answers_chats: boolean
  thinks: boolean
  history?: "browser" | "server"
  compare_with?: string[]
  num_replicas?: number
}

export interface Stage {
  rank: number
  host: string
  first_layer: number
  last_layer: number
  weight_bytes: number
  cache_bytes: number
  memory_bytes: number
  compute_s: number
  wait_s: number
  network_s: number
  tokens: number
  sent_bytes: number
}

export interface Cluster {
  status: string
  reason: string
  running: number
  waiting: number
  cache_usage: number
  generated_tokens: number
  stages: Stage[]
  replicas?: { rank: number; step: string | null }[]
}

/** An answer other than success. `retrySeconds`: when the server wants to be asked again. */
export class ServerError extends Error {
  constructor(message: string, readonly status: number, readonly code: string | null, readonly retrySeconds: number | null) {
    super(message)
  }
}

/** The connection broke before the answer was whole. */
export class Interrupted extends Error {}

// From `http://host:port/#key=...`, which `serving.bind=lan` prints: a fragment is not sent to anybody.
export function takeKeyFromAddress(): boolean {
  const key = new URLSearchParams(location.hash.slice(1)).get("key")
  if (!key) return false
  remember("key", key)
  history.replaceState(null, "", location.pathname)
  return true
}

/** Where the key of a server is remembered; this page's own is "". */
export function keyOf(server: string): string {
  return server ? `key.${server}` : "key"
}

export async function ask(path: string, init: RequestInit = {}, server = ""): Promise<Response> {
  const headers = new Headers(init.headers)
  const key = recall(keyOf(server))
  if (key) headers.set("authorization", `Bearer ${key}`)
  if (init.body) headers.set("content-type", "application/json")
  const answer = await fetch(server ? `${server}/${path}` : path, { ...init, headers })
  if (!answer.ok) throw await errorOf(answer)
  return answer
}

async function errorOf(answer: Response): Promise<ServerError> {
  const found = (await answer.json().catch(() => null)) as { error?: { message?: string; code?: string } } | null
  const message = found?.error?.message || `status ${answer.status} ${answer.statusText}`.trim()
  const retry = Number(answer.headers.get("retry-after"))
  return new ServerError(message, answer.status, found?.error?.code ?? null, retry > 0 ? retry : null)
}

export async function config(server = ""): Promise<Config> {
  return (await ask("config", {}, server)).json() as Promise<Config>
}

export async function cluster(server = ""): Promise<Cluster> {
  return (await ask("cluster", {}, server)).json() as Promise<Cluster>
}

/** Which conversations the server keeps, and their versions; null where it is the list of `tag`. */
export async function conversations(tag: string): Promise<{ versions: Map<string, string>; tag: string } | null> {
  try {
    const answer = await ask("v1/conversations", { headers: tag ? { "if-none-match": tag } : {} })
    const { data } = (await answer.json()) as { data: { id: string; version: string }[] }
    return { versions: new Map(data.map(({ id, version }) => [id, version])), tag: answer.headers.get("etag") ?? "" }
  } catch (error) {
    if (error instanceof ServerError && error.status === 304) return null
    throw error
  }
}

/** null where there is none. */
export async function conversation(id: string): Promise<{ text: string; version: string } | null> {
  try {
    const answer = await ask(`v1/conversations/${id}`)
    return { text: await answer.text(), version: (answer.headers.get("etag") ?? "").replaceAll('"', "") }
  } catch (error) {
    if (error instanceof ServerError && error.status === 404) return null
    throw error
  }
}

/** The version that it is now. ServerError 412 where the server has another one than it was made from. */
export async function putConversation(one: Conversation): Promise<string> {
  const { version, isChanged, ...body } = one
  const headers: Record<string, string> = version ? { "if-match": `"${version}"` } : { "if-none-match": "*" }
  const answer = await ask(`v1/conversations/${one.id}`, { method: "PUT", headers, body: JSON.stringify(body) })
  return ((await answer.json()) as { version: string }).version
}

export async function removeConversation(id: string): Promise<void> {
  await ask(`v1/conversations/${id}`, { method: "DELETE" }).catch((error: unknown) => {
    if (!(error instanceof ServerError && error.status === 404)) throw error
  })
}

const STREAM = "x-smolrun-stream"

/** Ask for an answer, kept under the id `stream`; its events end with `end`. Throws ServerError, Interrupted, or AbortError by `signal`. */
export async function* answer(request: ChatRequest, stream: string, signal: AbortSignal, server = ""): AsyncGenerator<AnswerEvent> {
  const { think, continues, ...body } = request
  const response = await ask("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { [STREAM]: stream },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      ...(think !== undefined && { chat_template_kwargs: { enable_thinking: think } }),
      ...(continues && { continue_final_message: true }),
    }),
  }, server)
  yield* events(response)
}

/** The events of a kept answer after number `seen`. Throws as `answer`. */
export async function* resume(stream: string, seen: number, signal: AbortSignal, server = ""): AsyncGenerator<AnswerEvent> {
  const response = await ask(`v1/streams/${stream}`, { signal, headers: { "last-event-id": String(seen) } }, server)
  if (response.status !== 204) yield* events(response) // else there are none: it has ended
}

/** Cancel a kept answer. */
export async function stop(stream: string, server = ""): Promise<void> {
  await ask(`v1/streams/${stream}`, { method: "DELETE" }, server)
}

const MOST_BUSY_MS = 20

async function* events(response: Response): AsyncGenerator<AnswerEvent> {
  yield { kind: "open", ranks: response.headers.get("x-smolrun-rank"), isKept: response.headers.has(STREAM) }
  const ready: AnswerEvent[] = []
  let isWhole = false
  let failure: Error | null = null
  const parser = createParser({
    onComment: comment => ready.push(ofComment(comment)),
    onEvent: event => {
      if (event.data === "[DONE]") isWhole = true
      else if (!failure) failure = take(event.data, ready)
      if (event.id) ready.push({ kind: "seen", number: Number(event.id) })
    },
  })
  let busySince = performance.now()
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
  try {
    while (!isWhole) {
      const { value, done } = await reader.read().catch(error => {
        if ((error as Error).name === "AbortError") throw error
        throw new Interrupted("the connection broke before the answer was whole")
      })
      if (done) throw new Interrupted("the connection ended before the answer did")
      parser.feed(value)
      yield* ready.splice(0)
      if (failure) throw failure
      if (performance.now() - busySince > MOST_BUSY_MS) {
        // What is there already is read without a break, and the page would stand still.
        await new Promise(resolve => setTimeout(resolve))
        busySince = performance.now()
      }
    }
  } finally {
    reader.cancel().catch(() => undefined)
  }
}

function ofComment(comment: string): AnswerEvent {
  const [word, rest = ""] = [comment.trim().split(" ")[0], comment.trim().split(" ").slice(1).join(" ")]
  const [done, total] = rest.split("/").map(Number)
  if (word === "prefill" && total) return { kind: "prefill", done: done ?? 0, total }
  if (word === "queued") return { kind: "queued", before: Number(rest) || 0 }
  if (word === "loading") return { kind: "loading" }
  if (word === "recovering") return { kind: "recovering", text: rest }
  return { kind: "alive" }
}

interface Chunk {
  error?: { message: string; code?: string }
  choices?: { delta?: { content?: string; reasoning_content?: string }; finish_reason?: string | null }[]
  usage?: { prompt_tokens: number; completion_tokens: number; prompt_tokens_details?: { cached_tokens?: number } } | null
}

/** Append what a chunk says; returns the error that it is. */
function take(data: string, ready: AnswerEvent[]): Error | null {
  let chunk: Chunk
  try {
    chunk = JSON.parse(data) as Chunk
  } catch {
    return new Interrupted("the server sent something that is no answer")
  }
  if (chunk.error) return new ServerError(chunk.error.message, 200, chunk.error.code ?? null, null)
  const choice = chunk.choices?.[0]
  if (choice?.delta?.reasoning_content) ready.push({ kind: "thoughts", text: choice.delta.reasoning_content })
  if (choice?.delta?.content) ready.push({ kind: "text", text: choice.delta.content })
  if (choice?.finish_reason) ready.push({ kind: "end", reason: choice.finish_reason === "length" ? "length" : "stop" })
  if (chunk.usage) {
    const { prompt_tokens, completion_tokens, prompt_tokens_details } = chunk.usage
    ready.push({ kind: "usage", promptTokens: prompt_tokens, tokens: completion_tokens, cachedTokens: prompt_tokens_details?.cached_tokens ?? 0 })
  }
  return null
}
