// How answers are drawn. An empty field is the server's default, which its placeholder shows.

import type { Sampling } from "./api"
import { Sheet } from "./parts"
import { useStore } from "./store"

type NumberKey = "temperature" | "top_p" | "top_k" | "max_tokens" | "seed"

const FIELDS: { key: NumberKey; label: string; hint: string; min: number; max: number; step: number }[] = [
  { key: "temperature", label: "Temperature", hint: "0 takes the likeliest token; more is more varied", min: 0, max: 2, step: 0.05 },
  { key: "top_p", label: "Top p", hint: "Only the likeliest tokens that together have this probability", min: 0.01, max: 1, step: 0.01 },
  { key: "top_k", label: "Top k", hint: "Only the k likeliest tokens; 0 is all", min: 0, max: 100000, step: 1 },
  { key: "max_tokens", label: "Longest answer", hint: "In tokens", min: 1, max: 1_000_000, step: 1 },
  { key: "seed", label: "Seed", hint: "The same seed and question give the same answer", min: 0, max: 2 ** 31, step: 1 },
]

export function Settings({ onClose }: { onClose: () => void }) {
  const store = useStore()
  const config = store.config
  const defaults: Record<NumberKey, string> = {
    temperature: String(config?.temperature ?? ""),
    top_p: String(config?.top_p ?? ""),
    top_k: String(config?.top_k ?? ""),
    max_tokens: String(config?.max_new_tokens ?? ""),
    seed: "another one each time",
  }
  const set = (change: Partial<Sampling>) => {
    const all = { ...store.sampling, ...change }
    store.setSampling(Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined)) as Sampling)
  }
  return (
    <Sheet title="Settings" onClose={onClose}>
      <label className="field">
        <span>System prompt of this conversation</span>
        <textarea rows={4} value={store.current.system} placeholder="Who the model is, and how it answers" onChange={event => store.setSystem(event.target.value)} />
      </label>
      {FIELDS.map(({ key, label, hint, ...range }) => (
        <label className="field" key={key}>
          <span>{label}</span>
          <input type="number" inputMode="decimal" {...range} value={store.sampling[key] ?? ""} placeholder={defaults[key]} onChange={event => {
            const value = event.target.valueAsNumber
            if (event.target.value === "") set({ [key]: undefined })
            else if (value >= range.min && value <= range.max) set({ [key]: value })
          }} />
          <small>{hint}</small>
        </label>
      ))}
      <label className="field">
        <span>Stop texts</span>
        <textarea rows={2} value={(store.sampling.stop ?? []).join("\n")} placeholder="One a line" onChange={event => {
          const stop = event.target.value.split("\n").slice(0, 16)
          set({ stop: stop.some(line => line) ? stop : undefined })
        }} />
        <small>The answer ends before any of these lines</small>
      </label>
      <div className="row">
        <button type="button" onClick={() => store.setSampling({})}>
          Back to the server's defaults
        </button>
      </div>
      <p className="note">
        Served: {config?.model_name ?? "?"}, {config?.max_sequence_length ?? "?"} tokens of context. <a href="docs">API</a>
      </p>
    </Sheet>
  )
}
