// The line below an answer: what happens now, and its figures in the end.

import type { Answering } from "./answering"
import type { Message } from "./conversation"
import { useTick } from "./parts"

const SILENT_MS = 20_000 // the server sends a sign of life every 15 s

export function RunningStatus({ answering }: { answering: Answering }) {
  useTick(500, true)
  const now = performance.now()
  const silentMs = now - answering.lastByteAt
  const words = silentMs > SILENT_MS && answering.phase !== "waiting" ? `no word from the server for ${Math.round(silentMs / 1000)} s` : phaseWords(answering, now)
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
  const speed = rate === null ? "" : ` · ${rate.toFixed(1)} tokens/s`
  switch (answering.phase) {
    case "sent":
      return `sent ${seconds((now - answering.startedAt) / 1000)} ago`
    case "queued":
      return answering.position ? `waiting, number ${answering.position} in the queue` : "waiting in the queue"
    case "prefill":
      return `reading the prompt: ${answering.prefill.done} of ${answering.prefill.total} tokens`
    case "thinking":
      return `thinking${speed}`
    case "writing":
      return `writing${speed}`
    case "recovering":
      return `recovering: ${answering.recovering || "a stage was lost, its layers are loaded elsewhere"}`
    case "waiting":
      return `the server is busy; asking again in ${Math.max(0, Math.ceil((answering.retryAt - now) / 1000))} s`
  }
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
