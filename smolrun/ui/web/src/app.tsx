// The whole page.

import { useEffect, useState } from "react"
import { Chat } from "./chat"
import { ClusterPanel } from "./cluster"
import { Composer } from "./composer"
import { IconButton } from "./parts"
import { Settings } from "./settings"
import { Sidebar } from "./sidebar"
import { useStore } from "./store"

export function App() {
  const store = useStore()
  const [isOpen, setOpen] = useState(false) // the list of conversations, on a narrow screen
  const [sheet, setSheet] = useState<"settings" | "cluster" | null>(null)
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
          <h1>{store.current.title || (store.config?.model_name ?? "smolrun")}</h1>
          <IconButton name="cluster" label="Machines" disabled={store.connection !== "ready"} onClick={() => setSheet("cluster")} />
          <IconButton name="settings" label="Settings" onClick={() => setSheet("settings")} />
        </header>
        <Banner />
        <Chat />
        <Composer />
      </main>
      {sheet === "settings" && <Settings onClose={() => setSheet(null)} />}
      {sheet === "cluster" && <ClusterPanel onClose={() => setSheet(null)} />}
    </div>
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
