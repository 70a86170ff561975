// The machines behind the answers: their layers, memory, and where the time goes.

import { useEffect, useState } from "react"
import { cluster, type Cluster, type Stage } from "./api"
import { Sheet } from "./parts"

const ASK_MS = 1000

/** Two reports, the newer first: shares and rates are of the time between. */
interface Reports {
  now: Cluster
  before: Cluster | null
  seconds: number
}

export function ClusterPanel({ onClose }: { onClose: () => void }) {
  const { reports, failure } = useReports()
  return (
    <Sheet title="Machines" onClose={onClose}>
      {failure && <p className="refusal">{failure}</p>}
      {reports && <Overview {...reports} />}
      {!reports && !failure && <p className="note">Asking the server…</p>}
      <p className="note">
        All figures for Prometheus: <a href="metrics">/metrics</a>
      </p>
    </Sheet>
  )
}

function useReports(): { reports: Reports | null; failure: string } {
  const [reports, setReports] = useState<Reports | null>(null)
  const [failure, setFailure] = useState("")
  useEffect(() => {
    let last: { report: Cluster; at: number } | null = null
    let timer: ReturnType<typeof setTimeout>
    let isOver = false
    const poll = async () => {
      try {
        const report = await cluster()
        const at = performance.now()
        setReports({ now: report, before: last?.report ?? null, seconds: last ? (at - last.at) / 1000 : 0 })
        setFailure("")
        last = { report, at }
      } catch (error) {
        setFailure((error as Error).message)
      }
      if (!isOver) timer = setTimeout(() => void poll(), ASK_MS)
    }
    void poll()
    return () => {
      isOver = true
      clearTimeout(timer)
    }
  }, [])
  return { reports, failure }
}

function Overview({ now, before, seconds }: Reports) {
  const rate = before && seconds ? Math.max(0, now.generated_tokens - before.generated_tokens) / seconds : null
  return (
    <>
      {now.status !== "ready" && <p className="refusal">{now.reason || now.status}</p>}
      <dl className="totals">
        <Total label="running" value={String(now.running)} />
        <Total label="waiting" value={String(now.waiting)} />
        <Total label="tokens/s" value={rate === null ? "…" : rate.toFixed(1)} />
        <Total label="cache used" value={`${Math.round(100 * now.cache_usage)} %`} />
      </dl>
      <ol className="stages">
        {now.stages.map(stage => (
          <StageCard key={stage.rank} stage={stage} before={before?.stages.find(other => other.rank === stage.rank)} seconds={seconds} />
        ))}
      </ol>
      <p className="legend">
        <i className="compute" /> computes <i className="network" /> receives <i className="wait" /> waits
      </p>
    </>
  )
}

function Total({ label, value }: { label: string; value: string }) {
  return (
    <div>
      <dd>{value}</dd>
      <dt>{label}</dt>
    </div>
  )
}

function StageCard({ stage, before, seconds }: { stage: Stage; before?: Stage; seconds: number }) {
  const spent = (key: "compute_s" | "network_s") => (before && seconds ? Math.min(1, Math.max(0, stage[key] - before[key]) / seconds) : 0)
  const compute = spent("compute_s")
  const network = Math.min(1 - compute, spent("network_s"))
  const sent = before && seconds ? (stage.sent_bytes - before.sent_bytes) / seconds : 0
  const label = `${percent(compute)} computing, ${percent(network)} receiving`
  return (
    <li>
      <h3>
        {stage.host} <span>rank {stage.rank}</span>
      </h3>
      <p>
        layers {stage.first_layer} to {stage.last_layer} · weights {bytes(stage.weight_bytes)} · cache {bytes(stage.cache_bytes)} · process {bytes(stage.memory_bytes)}
      </p>
      <meter className="off-screen" min={0} max={1} value={compute} aria-label={label} />
      <svg className="share" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
        <rect className="wait" width="100" height="6" />
        <rect className="compute" width={100 * compute} height="6" />
        <rect className="network" x={100 * compute} width={100 * network} height="6" />
      </svg>
      <p>
        {label} · sends {bytes(sent)}/s
      </p>
    </li>
  )
}

function percent(share: number): string {
  return `${Math.round(100 * share)} %`
}

function bytes(count: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"]
  const power = Math.min(units.length - 1, count < 1000 ? 0 : Math.floor(Math.log10(count) / 3))
  const value = count / 1000 ** power
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`
}
