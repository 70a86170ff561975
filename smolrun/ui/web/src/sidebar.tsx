// All conversations: find, rename, delete, export and import them.

import { useRef, useState } from "react"
import { asMarkdown, matches, type Conversation } from "./conversation"
import { download, Icon, IconButton } from "./parts"
import { useStore } from "./store"

export function Sidebar({ onChosen }: { onChosen: () => void }) {
  const store = useStore()
  const [words, setWords] = useState("")
  const listed = store.listed().filter(one => !words.trim() || matches(one, words.trim()))
  return (
    <nav className="sidebar" aria-label="Conversations">
      <p className="brand">
        <img src="./icon.svg" width="26" height="26" alt="" /> smolrun
      </p>
      <button type="button" className="new" onClick={() => (store.show(null), onChosen())}>
        <Icon name="new" /> New conversation
      </button>
      <input type="search" placeholder="Search" aria-label="Search conversations" value={words} onChange={event => setWords(event.target.value)} />
      <ul>
        {listed.map(one => (
          <Entry key={one.id} conversation={one} isShown={one.id === store.current.id} onChosen={onChosen} />
        ))}
        {listed.length === 0 && <li className="none">{words ? "Nothing found" : "No conversations yet"}</li>}
      </ul>
      {store.isShared && !store.storageFailure && <p className="kept">Kept by the server, for all devices</p>}
      {store.storageFailure && <p className="refusal">{store.storageFailure}</p>}
      <Files />
    </nav>
  )
}

function Entry({ conversation, isShown, onChosen }: { conversation: Conversation; isShown: boolean; onChosen: () => void }) {
  const store = useStore()
  const [isRenamed, setRenamed] = useState(false)
  if (isRenamed) {
    const done = (title: string) => (store.rename(conversation.id, title), setRenamed(false))
    return (
      <li>
        <input autoFocus aria-label="Name" defaultValue={conversation.title} onBlur={event => done(event.target.value)} onKeyDown={event => {
          if (event.key === "Enter") done(event.currentTarget.value)
          if (event.key === "Escape") setRenamed(false)
        }} />
      </li>
    )
  }
  return (
    <li className={isShown ? "shown" : undefined}>
      <button type="button" className="title" aria-current={isShown ? "page" : undefined} onClick={() => (store.show(conversation.id), onChosen())}>
        {conversation.title}
      </button>
      <span className="entry-actions">
        <IconButton name="edit" label={`Rename ${conversation.title}`} onClick={() => setRenamed(true)} />
        <IconButton name="remove" label={`Delete ${conversation.title}`} onClick={() => confirm(`Delete “${conversation.title}”${store.isShared ? " on all devices" : ""}? This cannot be undone.`) && store.remove(conversation.id)} />
      </span>
    </li>
  )
}

function Files() {
  const store = useStore()
  const picker = useRef<HTMLInputElement>(null)
  const [note, setNote] = useState("")
  const read = async (file: File | undefined) => {
    if (!file) return
    try {
      setNote(`${store.import(await file.text())} conversations imported`)
    } catch (error) {
      setNote(`${file.name} cannot be imported: ${(error as Error).message}`)
    }
  }
  return (
    <div className="files">
      <div className="row">
        <button type="button" className="quiet" disabled={!store.conversations.size} onClick={() => download("smolrun-conversations.json", JSON.stringify({ conversations: store.listed() }, null, 1), "application/json")}>
          Export
        </button>
        <button type="button" className="quiet" disabled={!store.current.messages.length} onClick={() => download("conversation.md", asMarkdown(store.current), "text/markdown")}>
          As text
        </button>
        <button type="button" className="quiet" onClick={() => picker.current?.click()}>
          Import
        </button>
      </div>
      <input ref={picker} type="file" accept=".json,application/json" hidden aria-label="File to import" onChange={event => (void read(event.target.files?.[0]), (event.target.value = ""))} />
      {note && <p role="status">{note}</p>}
    </div>
  )
}
