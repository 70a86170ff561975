// One message, and what can be done with it.

import { memo, useState } from "react"
import type { Answering } from "./answering"
import { isOpen, type Message } from "./conversation"
import { Markdown } from "./markdown"
import { CopyButton, Icon, IconButton } from "./parts"
import { DistantStatus, FinalStatus, RunningStatus } from "./status"
import { store } from "./store"

interface Props {
  message: Message
  others: Message[] // siblings, itself among them
  canChange: boolean // no answer is coming
}

export const Question = memo(function Question({ message, others, canChange }: Props) {
  const [isEdited, setEdited] = useState(false)
  if (isEdited) return <Editor message={message} onDone={() => setEdited(false)} />
  return (
    <article className="question" aria-label="You">
      <div className="bubble">{message.text}</div>
      <div className="actions">
        <Branches message={message} others={others} canChange={canChange} />
        <CopyButton text={message.text} />
        <IconButton name="edit" label="Edit and ask again" disabled={!canChange} onClick={() => setEdited(true)} />
      </div>
    </article>
  )
})

function Editor({ message, onDone }: { message: Message; onDone: () => void }) {
  const [text, setText] = useState(message.text)
  const send = () => {
    onDone()
    if (text.trim()) store.send(text.trim(), message)
  }
  return (
    <form className="editor" onSubmit={event => (event.preventDefault(), send())}>
      <textarea autoFocus aria-label="Edited message" value={text} rows={4} onChange={event => setText(event.target.value)} onKeyDown={event => event.key === "Escape" && onDone()} />
      <div className="row end">
        <button type="button" onClick={onDone}>
          Cancel
        </button>
        <button className="primary">Ask again</button>
      </div>
    </form>
  )
}

/** `answering` is there while the answer comes. */
export const Answer = memo(function Answer({ message, others, canChange, answering }: Props & { answering?: Answering; version: number }) {
  const text = answering?.text ?? message.text
  const thoughts = answering?.thoughts ?? message.thoughts ?? ""
  const isElsewhere = !answering && isOpen(message)
  return (
    <article className="answer" aria-label="Answer" aria-busy={isOpen(message)}>
      {thoughts && <Thoughts text={thoughts} isOpen={answering !== undefined && !text} />}
      <div className="prose">
        <Markdown text={text} isGrowing={answering !== undefined} />
      </div>
      {message.error && !answering && <Failure message={message} canChange={canChange} />}
      {answering ? <RunningStatus answering={answering} /> : isElsewhere ? <DistantStatus /> : <FinalStatus message={message} />}
      {!answering && !isElsewhere && (
        <div className="actions">
          <Branches message={message} others={others} canChange={canChange} />
          <CopyButton text={text} />
          <IconButton name="again" label="Another answer" disabled={!canChange} onClick={() => store.regenerate(message)} />
          {message.end !== "stop" && text && (
            <button type="button" className="quiet" disabled={!canChange} onClick={() => store.resume(message)}>
              <Icon name="resume" /> Continue
            </button>
          )}
        </div>
      )}
    </article>
  )
})

function Thoughts({ text, isOpen }: { text: string; isOpen: boolean }) {
  return (
    <details className="thoughts" open={isOpen || undefined}>
      <summary>{isOpen ? "Thinking" : "Thought before the answer"}</summary>
      <div>{text.trim()}</div>
    </details>
  )
}

function Failure({ message, canChange }: { message: Message; canChange: boolean }) {
  return (
    <div className="failure" role="alert">
      <span>{message.error}</span>
      <button type="button" disabled={!canChange} onClick={() => store.regenerate(message)}>
        Try again
      </button>
    </div>
  )
}

function Branches({ message, others, canChange }: Props) {
  if (others.length < 2) return null
  const at = others.findIndex(other => other.id === message.id)
  const go = (step: number) => {
    const other = others[at + step]
    if (other) store.choose(other)
  }
  return (
    <span className="branches">
      <IconButton name="before" label="The one before" disabled={!canChange || at === 0} onClick={() => go(-1)} />
      <span aria-label={`Number ${at + 1} of ${others.length}`}>
        {at + 1}/{others.length}
      </span>
      <IconButton name="after" label="The next one" disabled={!canChange || at === others.length - 1} onClick={() => go(1)} />
    </span>
  )
}
