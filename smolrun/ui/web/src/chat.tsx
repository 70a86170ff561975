// The messages of a conversation, and what is shown before the first.

import { useEffect, useRef, useState } from "react"
import { siblings, thread } from "./conversation"
import { Answer, Question } from "./message"
import { Icon } from "./parts"
import { useStore } from "./store"

const EXAMPLES = [
  "Explain gradient descent as you would to a child.",
  "Write a short poem about three small computers.",
  "What can I cook with rice, an onion and two eggs?",
  "Give me five questions that test whether I understand recursion.",
]
const NEAR_END_PX = 60
const INPUTS = ["wheel", "touchmove", "pointerdown", "keydown"] // that may scroll
const TOUCH_MS = 1000
const MOST_READ = 5000 // characters: the whole answer can be read in its place

export function Chat() {
  const store = useStore()
  const messages = thread(store.current)
  const { log, isAtEnd, toEnd } = useFollow(store.current.id, messages.length)
  const running = store.running()
  const last = messages.at(-1)
  return (
    <div className="log-frame">
      <div className="log" ref={log} role="log" aria-label="Conversation" aria-live="off" tabIndex={0}>
        <div className="column">
          {messages.length === 0 && <Welcome />}
          {messages.map(message => {
            const shared = { message, others: siblings(store.current, message), canChange: !store.isBusy() }
            if (message.role === "user") return <Question key={message.id} {...shared} />
            const answering = store.answering.get(message.id)
            return <Answer key={message.id} {...shared} answering={answering} version={answering ? store.snapshot() : 0} />
          })}
        </div>
      </div>
      {!isAtEnd && (
        <button type="button" className="round to-end" aria-label="Jump to the latest" title="Jump to the latest" onClick={toEnd}>
          <Icon name="down" />
        </button>
      )}
      {/* A screen reader reads an answer once, when it is whole. */}
      <div className="off-screen" aria-live="polite">
        {running ? "An answer is coming." : last?.role === "assistant" ? (last.error ?? last.text.slice(0, MOST_READ)) : ""}
      </div>
    </div>
  )
}

function Welcome() {
  const store = useStore()
  const isBase = store.config?.answers_chats === false
  return (
    <section className="welcome">
      <img src="./icon.svg" width="56" height="56" alt="" />
      <h1>{store.config?.model_name ?? "smolrun"}</h1>
      <p>{isBase ? "A base model: it continues what you write." : "It runs on your own machines. What you write here stays there."}</p>
      {!isBase && (
        <ul>
          {EXAMPLES.map(text => (
            <li key={text}>
              <button type="button" disabled={store.connection !== "ready"} onClick={() => store.send(text)}>
                {text}
              </button>
            </li>
          ))}
        </ul>
      )}
    </section>
  )
}

/** Keeps the end in sight while text comes, until a person scrolls up; again once they are back at the end. */
function useFollow(conversation: string, numMessages: number) {
  const log = useRef<HTMLDivElement>(null)
  const follows = useRef(true)
  const [isAtEnd, setAtEnd] = useState(true)
  const toEnd = () => {
    follows.current = true
    log.current?.scrollTo({ top: log.current.scrollHeight })
  }
  useEffect(() => {
    const element = log.current!
    let lastTop = element.scrollTop
    let touchedAt = -Infinity
    const onTouch = () => (touchedAt = performance.now())
    const onScroll = () => {
      const left = element.scrollHeight - element.scrollTop - element.clientHeight
      // Content that grows makes `left` larger too, and content whose real height is less than was
      // guessed moves all upwards: only a move upwards right after an input is a person's.
      const isPerson = performance.now() - touchedAt < TOUCH_MS
      if (isPerson && element.scrollTop < lastTop - 1) follows.current = left < NEAR_END_PX / 10
      else if (left < NEAR_END_PX) follows.current = true
      lastTop = element.scrollTop
      setAtEnd(left < NEAR_END_PX || follows.current)
    }
    element.addEventListener("scroll", onScroll, { passive: true })
    for (const name of INPUTS) element.addEventListener(name, onTouch, { passive: true })
    return () => {
      element.removeEventListener("scroll", onScroll)
      for (const name of INPUTS) element.removeEventListener(name, onTouch)
    }
  }, [])
  useEffect(() => {
    const observer = new ResizeObserver(() => follows.current && toEnd())
    observer.observe(log.current!.firstElementChild!)
    return () => observer.disconnect()
  }, [])
  useEffect(toEnd, [conversation, numMessages])
  return { log, isAtEnd, toEnd }
}
