// One question to two models, checkpoints or replicas; nothing of it is kept.

import { useEffect, useReducer, useRef, useState } from "react"
import { Answering } from "./answering"
import * as api from "./api"
import { newId, type Message } from "./conversation"
import { Markdown } from "./markdown"
import { remember } from "./memory"
import { Sheet } from "./parts"
import { FinalStatus, RunningStatus } from "./status"
import { store } from "./store"

/** Who can be asked. `failure`: why a server cannot. */
interface Target {
  server: string // "" is this page's own
  rank: number | null
  label: string
  thinks: boolean
  needsKey: boolean
  failure: string
}

const SHOW_MS = 100

async function targetsOf(server: string): Promise<Target[]> {
  const where = server && server.replace(/^https?:\/\//, "")
  const none = { server, rank: null, thinks: false, needsKey: false, failure: "" }
  try {
    const [config, cluster] = await Promise.all([api.config(server), api.cluster(server)])
    const replicas = cluster.replicas ?? []
    const named = { ...none, thinks: config.thinks }
    const name = [config.model_name, where].filter(Boolean)
    if (replicas.length < 2) return [{ ...named, label: [...name, stepOf(replicas[0]?.step)].filter(Boolean).join(" · ") }]
    return replicas.map(({ rank, step }) => {
      const host = cluster.stages.find(stage => stage.rank === rank)?.host
      return { ...named, rank, label: [...name, `rank ${rank}${host ? ` on ${host}` : ""}`, stepOf(step)].filter(Boolean).join(" · ") }
    })
  } catch (error) {
    const needsKey = error instanceof api.ServerError && error.status === 401
    const isReached = error instanceof api.ServerError
    const failure = isReached ? (error as Error).message : `It cannot be reached, or its serving.cors_origins lacks ${location.origin}`
    return [{ ...none, label: where || "this server", needsKey, failure }]
  }
}

function stepOf(step: string | null | undefined): string {
  return step ? `step ${step}` : ""
}

export function Compare({ onClose }: { onClose: () => void }) {
  const [targets, setTargets] = useState<Target[]>([])
  const [chosen, setChosen] = useState([0, 1])
  const [text, setText] = useState("")
  const [asked, setAsked] = useState("")
  const [answers, setAnswers] = useState<Answering[]>([])
  const draw = useDrawSoon()
  const find = async () => setTargets((await Promise.all(["", ...(store.config?.compare_with ?? [])].map(targetsOf))).flat())
  const isRunning = answers.some(one => one.isRunning)
  const running = useRef<Answering[]>([])
  running.current = answers
  useEffect(() => {
    void find()
    return () => running.current.forEach(one => one.isRunning && one.stop())
  }, [])
  const both = chosen.map(at => targets[Math.min(at, targets.length - 1)])
  const canAsk = !isRunning && text.trim() && both.every(one => one && !one.failure)
  const send = () => {
    if (!canAsk) return
    const begun = both.map(target => begin(target!, text.trim(), draw))
    setAsked(text.trim())
    setAnswers(begun)
    for (const one of begun) void one.run()
  }
  return (
    <Sheet title="Compare" isWide onClose={onClose}>
      <form className="compare-form" onSubmit={event => (event.preventDefault(), send())}>
        <textarea autoFocus rows={2} aria-label="Question to both" placeholder="Ask both the same" value={text} onChange={event => setText(event.target.value)} onKeyDown={event => {
          if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing || !matchMedia("(pointer: fine)").matches) return
          event.preventDefault()
          send()
        }} />
        {isRunning ? (
          <button type="button" onClick={() => answers.forEach(one => one.stop())}>Stop both</button>
        ) : (
          <button className="primary" disabled={!canAsk}>Ask both</button>
        )}
      </form>
      {asked && asked !== text.trim() && <p className="asked">{asked}</p>}
      <div className="columns">
        {both.map((target, at) => (
          <section key={at} aria-label={`Answer ${at + 1}`}>
            <select aria-label={`Model ${at + 1}`} value={Math.min(chosen[at]!, targets.length - 1)} disabled={isRunning} onChange={event => {
              setChosen(chosen.map((old, other) => (other === at ? Number(event.target.value) : old)))
              setAnswers([])
              setAsked("")
            }}>
              {targets.map((one, number) => <option key={number} value={number}>{one.label}</option>)}
            </select>
            {target?.failure && <Refusal target={target} onKey={() => void find()} />}
            {answers[at] && <Column answering={answers[at]!} />}
          </section>
        ))}
      </div>
      <p className="note">With the parameters of Settings. Without a seed, each answer is drawn at random.</p>
    </Sheet>
  )
}

function begin(target: Target, text: string, changed: () => void): Answering {
  const message: Message = { id: newId(), parent: null, role: "assistant", text: "", created: Date.now(), stream: newId() }
  const system = store.current.system.trim() ? [{ role: "system", content: store.current.system }] : []
  const request: api.ChatRequest = {
    ...store.sampling,
    messages: [...system, { role: "user", content: text }],
    ...(target.thinks && { think: store.thinks }),
    ...(target.rank !== null && { worker_rank: target.rank }),
  }
  return new Answering(request, message, changed, target.server)
}

function Column({ answering }: { answering: Answering }) {
  const { text, thoughts, isRunning, end, error, ranks } = answering
  const message: Message = { id: "", parent: null, role: "assistant", created: 0, ...answering.progress(), text, end: end === "elsewhere" ? "stopped" : (end ?? undefined), ranks }
  return (
    <div className="answer" aria-busy={isRunning}>
      {thoughts && <details className="thoughts"><summary>Thoughts</summary><div>{thoughts.trim()}</div></details>}
      <div className="prose">
        <Markdown text={text} isGrowing={isRunning} />
      </div>
      {error && <p className="refusal" role="alert">{error}</p>}
      {isRunning ? <RunningStatus answering={answering} /> : <FinalStatus message={message} />}
    </div>
  )
}

function Refusal({ target, onKey }: { target: Target; onKey: () => void }) {
  const [key, setKey] = useState("")
  if (!target.needsKey) return <p className="refusal">{target.failure}</p>
  return (
    <form className="field" onSubmit={event => (event.preventDefault(), remember(api.keyOf(target.server), key.trim()), onKey())}>
      <span>{target.label} wants its API key</span>
      <input type="password" aria-label={`API key of ${target.label}`} value={key} onChange={event => setKey(event.target.value)} />
      <button disabled={!key.trim()}>Unlock</button>
    </form>
  )
}

/** Draws soon after it is called, at most every 100 ms. */
function useDrawSoon(): () => void {
  const [, draw] = useReducer((count: number) => count + 1, 0)
  const timer = useRef<ReturnType<typeof setTimeout> | null>(null)
  return useRef(() => {
    timer.current ??= setTimeout(() => {
      timer.current = null
      draw()
    }, SHOW_MS)
  }).current
}
