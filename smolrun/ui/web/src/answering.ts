// One answer while it comes: what the status line shows, and how it ended.

import { answer, Interrupted, resume, ServerError, stop, type AnswerEvent, type ChatRequest } from "./api"
import type { End, Figures, Message } from "./conversation"

export type Phase = "sent" | "queued" | "loading" | "prefill" | "thinking" | "writing" | "recovering" | "waiting" | "reconnecting"

export const SILENT_MS = 20_000 // the server sends a sign of life every 15 s
const RATE_WINDOW_MS = 2000
const RATE_STEP_MS = 100
const MOST_RETRIES = 5
const KEPT_MS = 120_000 // by the server, without a connection
const UNSENT_MS = 20_000 // a question that does not reach the server
const PAUSE_MS = 2000 // between attempts to reconnect

/** Changes in place; `changed` is called after each change. */
export class Answering {
  phase: Phase = "sent"
  text: string
  thoughts: string
  before = 0 // in the queue
  prefill = { done: 0, total: 0 }
  recovering = ""
  retryAt = 0 // while waiting: when the server is asked again
  lostAt = 0 // while reconnecting: when the connection broke
  error = ""
  /** `elsewhere`: another tab reads it on. */
  end: End | "elsewhere" | null = null
  ranks = ""
  readonly startedAt: number
  lastByteAt = performance.now()
  private firstTokenAt: number | null = null
  private lastTokenAt: number
  private counts: { at: number; tokens: number }[] = [] // how many had come, every 100 ms of the last seconds
  private tokens: number
  private reason: End = "stop"
  private isEnding = false
  private usage: { promptTokens: number; tokens: number; cachedTokens: number } | null = null
  private readonly stream: string
  private seen: number
  private isSent: boolean // the server may have the question
  private isOpen: boolean // it has
  private isKept: boolean // and can be asked for the rest of the answer
  private wasCut: boolean // so that its times say nothing of the server
  private isStopped = false
  private connection = new AbortController()

  /** `message` is an open answer; without a request, one that the server had begun before this page was loaded. */
  constructor(private readonly request: ChatRequest | null, message: Message, private readonly changed: () => void, private readonly server = "") {
    this.text = message.text
    this.thoughts = message.thoughts ?? ""
    this.stream = message.stream ?? ""
    this.seen = message.seen ?? 0
    this.tokens = message.figures?.tokens ?? 0
    this.isSent = this.isOpen = this.isKept = this.wasCut = request === null
    this.startedAt = this.lastTokenAt = performance.now() - (request ? 0 : Date.now() - message.created)
    const first = message.figures?.firstTokenSeconds
    if (typeof first === "number") this.firstTokenAt = this.startedAt + 1000 * first
  }

  stop(): void {
    this.isStopped = true
    this.connection.abort()
    if (this.isSent) void this.cancel()
  }

  /** Until the server has heard it, or would not keep the answer any longer. */
  private async cancel(): Promise<void> {
    const begun = performance.now()
    while (performance.now() - begun < KEPT_MS) {
      try {
        return await stop(this.stream, this.server)
      } catch (error) {
        if (error instanceof ServerError) return
        await nap(PAUSE_MS)
      }
    }
  }

  get isRunning(): boolean {
    return this.end === null
  }

  /** So far. */
  get numTokens(): number {
    return this.tokens
  }

  /** Tokens a second over the last two seconds. */
  rate(now = performance.now()): number | null {
    const first = this.counts.find(({ at }) => now - at <= RATE_WINDOW_MS)
    if (!first || now - first.at < 2 * RATE_STEP_MS) return null
    return (1000 * (this.tokens - first.tokens)) / (now - first.at)
  }

  /** What is kept of it in its message. */
  progress(): Partial<Message> {
    return { text: this.text, thoughts: this.thoughts, seen: this.seen, figures: this.figures() }
  }

  private figures(): Figures {
    return {
      firstTokenSeconds: this.firstTokenAt === null ? null : (this.firstTokenAt - this.startedAt) / 1000,
      seconds: this.wasCut ? 0 : (this.lastTokenAt - this.startedAt) / 1000,
      tokens: this.usage?.tokens ?? this.tokens,
      promptTokens: this.usage?.promptTokens ?? null,
      cachedTokens: this.usage?.cachedTokens ?? null,
    }
  }

  /** Until the answer has ended, in whatever way. Never throws. */
  async run(): Promise<void> {
    const watch = setInterval(() => this.watch(), 1000)
    for (let retries = 0; this.isRunning; retries += 1) {
      this.connection = new AbortController()
      this.lastByteAt = performance.now()
      try {
        for await (const event of this.events()) this.take(event)
        this.finish(this.reason)
      } catch (error) {
        await this.failed(error as Error, retries)
      }
    }
    clearInterval(watch)
  }

  private events(): AsyncGenerator<AnswerEvent> {
    const { signal } = this.connection
    if (this.isSent || !this.request) return resume(this.stream, this.seen, signal, this.server)
    this.isSent = true
    return answer(this.request, this.stream, signal, this.server)
  }

  /** A connection may be dead without a sign, as after a locked screen. */
  private watch(): void {
    const canResume = this.isKept || !this.isOpen
    if (canResume && this.phase !== "waiting" && performance.now() - this.lastByteAt > SILENT_MS) this.connection.abort()
  }

  private async failed(error: Error, retries: number): Promise<void> {
    if (this.isStopped) return this.finish("stopped")
    if (!(error instanceof ServerError)) return this.lost(error)
    const { status, code } = error
    if (code === "taken_over") return this.finish("elsewhere")
    if (code === "stopped") return this.finish("stopped")
    if (code === "stream_exists") return // the question had arrived
    if (code === "stream_not_found" && !this.isOpen) {
      this.isSent = false // it had not
      return
    }
    if (code === "stream_not_found" && !this.request) return this.finish("stopped")
    const isBusy = status === 429 || status === 503
    if (isBusy && retries < MOST_RETRIES && !this.text) {
      this.isSent = false
      return this.wait(error.retrySeconds ?? 5)
    }
    this.fail(error.message)
  }

  private async lost(error: Error): Promise<void> {
    if (this.isOpen && !this.isKept) return this.fail(error instanceof Interrupted ? error.message : "the connection broke before the answer was whole")
    const now = performance.now()
    if (this.phase !== "reconnecting") this.lostAt = now
    if (now - this.lostAt > (this.isOpen ? KEPT_MS : UNSENT_MS)) return this.fail("the connection was lost, and the server cannot be reached")
    const isFirst = this.phase !== "reconnecting"
    this.phase = "reconnecting"
    this.wasCut = true
    this.changed()
    await nap(isFirst ? PAUSE_MS / 8 : PAUSE_MS, this.connection.signal)
    if (this.isStopped) this.finish("stopped")
  }

  private async wait(seconds: number): Promise<void> {
    this.phase = "waiting"
    this.retryAt = performance.now() + 1000 * seconds
    this.changed()
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, 1000 * seconds)
      this.connection.signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true })
    })
    this.phase = "sent"
    if (this.isStopped) this.finish("stopped")
  }

  private fail(message: string): void {
    this.error = message
    this.finish("failed")
  }

  private finish(end: End | "elsewhere"): void {
    this.end ??= end
    this.changed()
  }

  private take(event: AnswerEvent): void {
    this.lastByteAt = performance.now()
    switch (event.kind) {
      case "open":
        this.ranks = event.ranks ?? ""
        this.isOpen = true
        this.isKept = event.isKept
        if (this.phase === "reconnecting") this.phase = this.text ? "writing" : "sent"
        break
      case "seen":
        if (!this.isEnding) this.seen = event.number // else the end would be missing if it is resumed
        break
      case "queued":
        this.phase = "queued"
        this.before = event.before
        break
      case "loading":
        this.phase = "loading"
        break
      case "prefill":
        this.phase = "prefill"
        this.prefill = { done: event.done, total: event.total }
        break
      case "recovering":
        this.phase = "recovering"
        this.recovering = event.text
        break
      case "thoughts":
        this.phase = "thinking"
        this.thoughts += event.text
        this.arrived()
        break
      case "text":
        this.phase = "writing"
        this.text += event.text
        this.arrived()
        break
      case "end":
        this.reason = event.reason // the usage is yet to come
        this.isEnding = true
        break
      case "usage":
        this.usage = event
        break
    }
    this.changed()
  }

  private arrived(): void {
    const now = performance.now()
    this.firstTokenAt ??= now
    this.lastTokenAt = now
    this.tokens += 1
    if (now - (this.counts.at(-1)?.at ?? 0) < RATE_STEP_MS) return
    this.counts.push({ at: now, tokens: this.tokens })
    if (now - this.counts[0]!.at > 2 * RATE_WINDOW_MS) this.counts.shift()
  }
}

/** Until the time is over, the network is back, the page is seen again, or `signal`. */
function nap(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise(resolve => {
    const ended = new AbortController()
    const end = () => {
      clearTimeout(timer)
      ended.abort()
      resolve()
    }
    const timer = setTimeout(end, ms)
    const options = { once: true, signal: ended.signal }
    addEventListener("online", end, options)
    document.addEventListener("visibilitychange", end, options)
    signal?.addEventListener("abort", end, options)
  })
}
