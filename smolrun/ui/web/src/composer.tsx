// Where a question is written.

import { useEffect, useRef, useState, type ClipboardEvent, type DragEvent, type KeyboardEvent } from "react"
import { recall, remember } from "./memory"
import { Icon } from "./parts"
import { useStore } from "./store"

const MOST_FILE_BYTES = 200_000

export function Composer() {
  const store = useStore()
  const draft = `draft.${store.conversations.has(store.current.id) ? store.current.id : "new"}`
  const [text, setText] = useState(() => recall(draft))
  const [refusal, setRefusal] = useState("")
  const area = useRef<HTMLTextAreaElement>(null)
  const running = store.running()

  useEffect(() => {
    setText(recall(draft))
    if (matchMedia("(pointer: fine)").matches) area.current?.focus()
  }, [draft])

  useEffect(() => {
    const element = area.current
    if (!element) return
    element.style.height = "auto" // `field-sizing` is not everywhere yet
    element.style.height = `${element.scrollHeight}px`
  }, [text])

  const change = (value: string) => {
    setText(value)
    remember(draft, value)
  }
  const send = () => {
    if (!text.trim() || store.isBusy()) return
    store.send(text.trim())
    remember(draft, "")
    setText("")
  }
  const onKeyDown = (event: KeyboardEvent) => {
    // On a touch screen Enter is a new line, as there is no Shift at hand.
    const sends = event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing && matchMedia("(pointer: fine)").matches
    if (sends) event.preventDefault()
    if (sends) send()
    if (event.key === "Escape") running?.stop()
  }
  const add = async (files: FileList) => {
    setRefusal("")
    for (const file of files) {
      const content = file.size <= MOST_FILE_BYTES ? await file.text() : ""
      if (!content || content.includes("\0")) setRefusal(`${file.name}: only text files of up to 200 kB can be added`)
      else change(`${text && `${text}\n\n`}${file.name}:\n\`\`\`\n${content.trimEnd()}\n\`\`\`\n`)
    }
  }
  const onPaste = (event: ClipboardEvent) => {
    if (!event.clipboardData.files.length) return
    event.preventDefault()
    void add(event.clipboardData.files)
  }
  const onDrop = (event: DragEvent) => {
    if (!event.dataTransfer.files.length) return
    event.preventDefault()
    void add(event.dataTransfer.files)
  }

  return (
    <form className="composer" onSubmit={event => (event.preventDefault(), send())} onDrop={onDrop} onDragOver={event => event.preventDefault()}>
      {refusal && <p className="refusal" role="alert">{refusal}</p>}
      <div className="composer-box">
        <textarea ref={area} rows={1} value={text} aria-label="Message" placeholder="Ask something" enterKeyHint="enter" onChange={event => change(event.target.value)} onKeyDown={onKeyDown} onPaste={onPaste} />
        {running ? (
          <button type="button" className="round" aria-label="Stop" title="Stop (Esc)" onClick={() => running.stop()}>
            <Icon name="stop" />
          </button>
        ) : (
          <button className="round" aria-label="Send" title="Send" disabled={!text.trim() || store.connection !== "ready" || store.isBusy()}>
            <Icon name="send" />
          </button>
        )}
      </div>
      <div className="composer-foot">
        {store.config?.thinks && (
          <label className="switch">
            <input type="checkbox" checked={store.thinks} onChange={event => store.setThinks(event.target.checked)} />
            <span>Think before answering</span>
          </label>
        )}
        <span className="hint">{store.config?.answers_chats === false ? "A base model: it continues your text" : "Enter sends, Shift+Enter is a new line"}</span>
      </div>
    </form>
  )
}
