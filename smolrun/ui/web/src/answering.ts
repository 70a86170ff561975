// One answer while it comes: what the status line shows, and how it ended.

import { answer, Interrupted, ServerError, type AnswerEvent, type ChatRequest } from "./api"
import type { End, Figures } from "./conversation"

export type Phase = "sent" | "queued" | "prefill" | "thinking" | "writing" | "recovering" | "waiting"

const RATE_WINDOW_MS = 2000
const RATE_STEP_MS = 100
const MOST_RETRIES = 5

/** Changes in place; `changed` is called after each change. */
export class Answering {
  phase: Phase = "sent"
  text = ""
  thoughts = ""
  position = 0 // in the queue
  prefill = { done: 0, total: 0 }
  recovering = ""
  retryAt = 0 // while waiting: when the server is asked again
  error = ""
  end: End | null = null
  ranks = ""
  readonly startedAt = performance.now()
  lastByteAt = this.startedAt
  private firstTokenAt: number | null = null
  private lastTokenAt = this.startedAt
  private counts: { at: number; tokens: number }[] = [] // how many had come, every 100 ms of the last seconds
  private tokens = 0
  private reason: End = "stop"
  private usage: { promptTokens: number; tokens: number; cachedTokens: number } | null = null
  private readonly controller = new AbortController()

  constructor(private readonly request: ChatRequest, private readonly changed: () => void) {}

  stop(): void {
    this.controller.abort()
  }

  get isRunning(): boolean {
    return this.end === null
  }

  /** Tokens a second over the last two seconds. */
  rate(now = performance.now()): number | null {
    const first = this.counts.find(({ at }) => now - at <= RATE_WINDOW_MS)
    if (!first || now - first.at < 2 * RATE_STEP_MS) return null
    return (1000 * (this.tokens - first.tokens)) / (now - first.at)
  }

  figures(): Figures {
    return {
      firstTokenSeconds: this.firstTokenAt === null ? null : (this.firstTokenAt - this.startedAt) / 1000,
      seconds: (this.lastTokenAt - this.startedAt) / 1000,
      tokens: this.usage?.tokens ?? this.tokens,
      promptTokens: this.usage?.promptTokens ?? null,
      cachedTokens: this.usage?.cachedTokens ?? null,
    }
  }

  /** Until the answer has ended, in whatever way. Never throws. */
  async run(): Promise<void> {
    for (let retries = 0; this.isRunning; retries += 1) {
      try {
        for await (const event of answer(this.request, this.controller.signal)) this.take(event)
        this.finish(this.reason)
      } catch (error) {
        await this.failed(error as Error, retries)
      }
    }
  }

  private async failed(error: Error, retries: number): Promise<void> {
    if (this.controller.signal.aborted) return this.finish("stopped")
    const isBusy = error instanceof ServerError && (error.status === 429 || error.status === 503)
    if (isBusy && retries < MOST_RETRIES && !this.text) return this.wait(error.retrySeconds ?? 5)
    this.error = error instanceof ServerError || error instanceof Interrupted ? error.message : "the server cannot be reached"
    this.finish("failed")
  }

  private async wait(seconds: number): Promise<void> {
    this.phase = "waiting"
    this.retryAt = performance.now() + 1000 * seconds
    this.changed()
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, 1000 * seconds)
      this.controller.signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true })
    })
    if (this.controller.signal.aborted) this.finish("stopped")
  }

  private finish(end: End): void {
    this.end ??= end
    this.changed()
  }

  private take(event: AnswerEvent): void {
    this.lastByteAt = performance.now()
    switch (event.kind) {
      case "open":
        this.ranks = event.ranks ?? ""
        break
      case "queued":
        this.phase = "queued"
        this.position = event.position
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
