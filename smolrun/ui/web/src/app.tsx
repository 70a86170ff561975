// The whole page.

import { useEffect, useState } from "react"
import { Chat } from "./chat"
import { ClusterPanel } from "./cluster"
import { Compare } from "./compare"
import { Composer } from "./composer"
import { thread } from "./conversation"
import { IconButton } from "./parts"
import { Settings } from "./settings"
import { Sidebar } from "./sidebar"
import { useStore } from "./store"

export function App() {
  const store = useStore()
  const [isOpen, setOpen] = useState(false) // the list of conversations, on a narrow screen
  const [sheet, setSheet] = useState<"settings" | "cluster" | "compare" | null>(null)
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
        event.preventDefault()
        store.show(null)
      }
      if (event.key === "Escape" && isOpen) setOpen(false)
    }
    addEventListener("keydown", onKey)
    return () => removeEventListener("keydown", onKey)
  }, [store, isOpen])
  return (
    <div className={isOpen ? "app open" : "app"}>
      <Sidebar onChosen={() => setOpen(false)} />
      <button type="button" className="scrim" aria-label="Close the list" tabIndex={isOpen ? 0 : -1} onClick={() => setOpen(false)} />
      <main>
        <header className="top">
          <IconButton name="menu" label="Conversations" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)} />
          <Title />
          {store.canCompare && <IconButton name="compare" label="Compare" onClick={() => setSheet("compare")} />}
          <IconButton name="cluster" label="Machines" disabled={store.connection !== "ready"} onClick={() => setSheet("cluster")} />
          <IconButton name="settings" label="Settings" onClick={() => setSheet("settings")} />
        </header>
        <Banner />
        <Chat />
        <Composer />
      </main>
      {sheet === "settings" && <Settings onClose={() => setSheet(null)} />}
      {sheet === "compare" && <Compare onClose={() => setSheet(null)} />}
      {sheet === "cluster" && <ClusterPanel onClose={() => setSheet(null)} />}
    </div>
  )
}

/** Of the conversation, and below it the model and how much of its context is used. */
function Title() {
  const store = useStore()
  const { config, current } = store
  const last = thread(current).findLast(message => message.figures?.promptTokens)?.figures
  const used = last ? last.promptTokens! + last.tokens : 0
  const size = config?.max_sequence_length ? ` · ${used} of ${config.max_sequence_length}` : ""
  return (
    <h1>
      {current.title || "smolrun"}
      {current.title && config && <small title="Tokens of context used">{`${config.model_name}${size}`}</small>}
    </h1>
  )
}

function Banner() {
  const store = useStore()
  const [key, setKey] = useState("")
  if (store.connection === "locked") {
    return (
      <form className="banner" onSubmit={event => (event.preventDefault(), void store.unlock(key))}>
        <label>
          <span>This server wants its API key</span>
          <input type="password" autoComplete="current-password" value={key} onChange={event => setKey(event.target.value)} />
        </label>
        <button className="primary" disabled={!key.trim()}>
          Unlock
        </button>
      </form>
    )
  }
  if (store.connection === "away" && store.reason) {
    return (
      <p className="banner" role="status">
        Not ready: {store.reason}. Asking again…
      </p>
    )
  }
  return null
}
