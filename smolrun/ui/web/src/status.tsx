// The line below an answer: what happens now, and its figures in the end.

import { SILENT_MS, type Answering } from "./answering"
import type { Message } from "./conversation"
import { useTick } from "./parts"

export function RunningStatus({ answering }: { answering: Answering }) {
  useTick(500, true)
  const now = performance.now()
  const silentMs = now - answering.lastByteAt
  const isAway = answering.phase === "waiting" || answering.phase === "reconnecting"
  const words = silentMs > SILENT_MS && !isAway ? `no word from the server for ${Math.round(silentMs / 1000)} s` : phaseWords(answering, now)
  const share = answering.phase === "prefill" ? answering.prefill.done / answering.prefill.total : null
  return (
    <p className={`status ${answering.phase}`}>
      <span className="pulse" aria-hidden="true" />
      <span>{words}</span>
      {share !== null && <progress value={share} aria-label="Reading the prompt" />}
    </p>
  )
}

function phaseWords(answering: Answering, now: number): string {
  const rate = answering.rate(now)
  const count = answering.numTokens
  const speed = rate === null ? "" : ` · ${count} ${count === 1 ? "token" : "tokens"} · ${rate.toFixed(1)} tokens/s`
  switch (answering.phase) {
    case "sent":
      return `sent ${seconds((now - answering.startedAt) / 1000)} ago`
    case "queued":
      return answering.before ? `queued, ${answering.before} before you` : "queued, you are next"
    case "loading":
      return "loading the model, which had been idle"
    case "prefill":
      return `reading the prompt: ${answering.prefill.done} of ${answering.prefill.total} tokens`
    case "thinking":
      return `thinking${speed}`
    case "writing":
      return `writing${speed}`
    case "recovering":
      return `recovering: ${answering.recovering || "a stage was lost, its layers are loaded elsewhere"}`
    case "reconnecting":
      return `connection lost ${seconds((now - answering.lostAt) / 1000)} ago, reconnecting`
    case "waiting":
      return `the server is busy; asking again in ${Math.max(0, Math.ceil((answering.retryAt - now) / 1000))} s`
  }
}

/** Below an answer that this tab does not read. */
export function DistantStatus() {
  return (
    <p className="status">
      <span className="pulse" aria-hidden="true" />
      <span>being written; another tab or device shows it as it comes</span>
    </p>
  )
}

export function FinalStatus({ message }: { message: Message }) {
  const { figures, end, ranks } = message
  const parts: string[] = []
  if (end === "length") parts.push("cut: longest answer reached")
  if (end === "stopped") parts.push("stopped")
  if (figures?.tokens) {
    parts.push(`${figures.tokens} tokens`)
    const writing = figures.seconds - (figures.firstTokenSeconds ?? 0)
    if (figures.tokens > 1 && writing > 0) parts.push(`${((figures.tokens - 1) / writing).toFixed(1)} tokens/s`)
    if (figures.firstTokenSeconds !== null) parts.push(`first after ${seconds(figures.firstTokenSeconds)}`)
    if (figures.promptTokens !== null) parts.push(`prompt ${figures.promptTokens}${figures.cachedTokens ? `, ${figures.cachedTokens} of them remembered` : ""}`)
  }
  if (ranks) parts.push(`by rank ${ranks}`)
  return parts.length ? <p className="status">{parts.join(" · ")}</p> : null
}

function seconds(value: number): string {
  return value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`
}
