// What the page knows, and what a person can do. Components read it by `useStore`.

import { useSyncExternalStore } from "react"
import { Answering } from "./answering"
import * as api from "./api"
import {
  asRequest, choose, fromExport, isId, isOpen, newConversation, newId, thread, withChange, withMessage,
  type Conversation, type Message,
} from "./conversation"
import { History } from "./history"
import { recall, remember } from "./memory"
import { Storage } from "./storage"
import { Tabs } from "./tabs"

/** A server that answers, one that wants a key, and one that is away or not ready yet. */
export type Connection = "ready" | "locked" | "away"

const SHOW_MS = 50 // tokens that come within are drawn at once
const SAVE_MS = 1000
const QUIET_MS = 15_000 // another device that reads an answer tells the server more often
const ASK_MS = 2000 // whether the server is back, or another tab still reads an answer

export class Store {
  conversations = new Map<string, Conversation>()
  current: Conversation = newConversation(Date.now(), recall("system"))
  answering = new Map<string, Answering>() // by the id of the message
  connection: Connection = "away"
  reason = "" // why it is away
  config: api.Config | null = null
  sampling: api.Sampling = parsed(recall("sampling"))
  thinks = recall("think") !== "no"
  private readonly storage = new Storage(id => void this.reread(id))
  private readonly tabs = new Tabs(message => this.answering.has(message))
  private readonly distant = new Set<string>() // open answers that others read
  private readonly taken = new Set<string>() // answers that another device took from this one
  private readonly heard = new Map<string, number>() // when the server had something new of a conversation
  private readonly device = recall("device") || newId()
  private readonly listeners = new Set<() => void>()
  private version = 0
  private drawing: ReturnType<typeof setTimeout> | null = null
  private saving = new Map<string, ReturnType<typeof setTimeout>>()

  async start(): Promise<void> {
    api.takeKeyFromAddress()
    remember("device", this.device)
    for (const one of await this.storage.open()) this.conversations.set(one.id, interrupted(one))
    for (const one of this.conversations.values()) this.takeUpOpen(one)
    this.follow()
    addEventListener("hashchange", () => void (api.takeKeyFromAddress() ? this.connect() : this.follow()))
    addEventListener("pagehide", () => this.saveAll())
    addEventListener("online", () => void this.connect())
    await this.connect()
  }

  // --- components ------------------------------------------------------------------------------

  subscribe = (listener: () => void): (() => void) => {
    this.listeners.add(listener)
    return () => this.listeners.delete(listener)
  }

  snapshot = (): number => this.version

  get storageFailure(): string {
    return this.history.isOn ? this.history.failure : this.storage.failure
  }

  /** Whether conversations are those of all devices. */
  get isShared(): boolean {
    return this.history.isOn
  }

  /** Whether there is more than one model, checkpoint or replica to ask. */
  get canCompare(): boolean {
    return this.connection === "ready" && ((this.config?.num_replicas ?? 1) > 1 || Boolean(this.config?.compare_with?.length))
  }

  /** Newest first. */
  listed(): Conversation[] {
    return [...this.conversations.values()].sort((a, b) => b.changed - a.changed)
  }

  /** The answer that is coming in the conversation that is shown. */
  running(): Answering | undefined {
    const leaf = thread(this.current).at(-1)
    const one = leaf && this.answering.get(leaf.id)
    return one?.isRunning ? one : undefined
  }

  /** Whether an answer comes, in this tab or another one. */
  isBusy(): boolean {
    return isOpen(thread(this.current).at(-1))
  }

  private draw(): void {
    this.version += 1
    for (const listener of this.listeners) listener()
  }

  private drawSoon(): void {
    this.drawing ??= setTimeout(() => {
      this.drawing = null
      this.draw()
    }, SHOW_MS)
  }

  // --- the server ------------------------------------------------------------------------------

  async connect(): Promise<void> {
    try {
      await api.ask("readyz")
      this.config = await api.config()
      this.connection = "ready"
      this.history.setOn(this.config.history === "server")
    } catch (error) {
      const status = error instanceof api.ServerError ? error.status : 0
      this.connection = status === 401 || status === 403 ? "locked" : "away"
      this.reason = status ? (error as Error).message : navigator.onLine ? "the server cannot be reached" : "this device is offline"
      if (this.connection === "away") setTimeout(() => void this.connect(), ASK_MS)
    }
    this.draw()
  }

  async unlock(key: string): Promise<void> {
    remember("key", key.trim())
    await this.connect()
  }

  // --- conversations ---------------------------------------------------------------------------

  private follow(): void {
    const known = this.conversations.get(this.shownId())
    this.current = known ?? newConversation(Date.now(), recall("system"))
    this.draw()
  }

  private shownId(): string {
    return new URLSearchParams(location.hash.slice(1)).get("c") ?? ""
  }

  show(id: string | null): void {
    const hash = id ? `#c=${id}` : "#"
    if (location.hash === hash || (!id && !location.hash)) this.follow()
    else location.hash = hash
  }

  private put(given: Conversation, isShown = given.id === this.current.id): void {
    const conversation = this.history.isOn ? { ...given, isChanged: true } : given
    if (conversation.messages.length) this.conversations.set(conversation.id, conversation)
    if (isShown) this.current = conversation
    if (conversation.messages.length) this.saveSoon(conversation.id)
    this.draw()
  }

  rename(id: string, title: string): void {
    const one = this.conversations.get(id)
    if (one) this.put({ ...one, title: title.trim() || one.title })
  }

  remove(id: string): void {
    for (const message of this.conversations.get(id)?.messages ?? []) this.answering.get(message.id)?.stop()
    this.conversations.delete(id)
    void this.storage.remove(id)
    this.history.remove(id)
    if (this.current.id === id) this.show(null)
    this.draw()
  }

  private forget(id: string): void {
    this.conversations.delete(id)
    void this.storage.remove(id)
    if (this.current.id === id) this.show(null)
    this.draw()
  }

  /** Of the server. */
  private async take(conversation: Conversation): Promise<void> {
    const { id } = conversation
    const old = this.conversations.get(id)
    this.conversations.set(id, conversation)
    if (this.current.id === id) this.current = conversation
    if (old?.messages !== conversation.messages) {
      this.heard.set(id, performance.now())
      if (!old && this.shownId() === id) this.follow()
      this.takeUpOpen(conversation)
      this.draw()
    }
    await this.storage.write(this.upToDate(conversation))
  }

  setSystem(system: string): void {
    remember("system", system)
    this.put({ ...this.current, system })
  }

  /** How many conversations were taken from an exported file. Throws where it is none. */
  import(text: string): number {
    const found = fromExport(text)
    for (const one of found) this.put(this.conversations.has(one.id) || !isId(one.id) ? { ...one, id: newId() } : one, false)
    return found.length
  }

  private async reread(id: string): Promise<void> {
    if (this.conversations.get(id)?.messages.some(message => this.answering.get(message.id)?.isRunning)) return
    const found = await this.storage.read(id)
    if (found) this.conversations.set(id, found)
    else this.conversations.delete(id)
    if (found && this.current.id === id) this.current = found
    if (found) this.takeUpOpen(found)
    this.draw()
  }

  private saveSoon(id: string): void {
    if (this.saving.has(id)) return
    this.saving.set(id, setTimeout(() => void this.save(id), SAVE_MS))
  }

  private async save(id: string): Promise<void> {
    clearTimeout(this.saving.get(id))
    this.saving.delete(id)
    const one = this.conversations.get(id)
    const before = this.storage.failure
    if (one) await this.storage.write(this.upToDate(one))
    if (before !== this.storage.failure) this.draw()
    if (one?.isChanged) void this.history.sync()
  }

  /** Conversations as those of the server are kept beside them. */
  private readonly history = new History({
    all: () => [...this.conversations.values()],
    find: id => this.conversations.get(id),
    upToDate: one => this.upToDate(one),
    isRunning: one => one.messages.some(({ id }) => this.answering.get(id)?.isRunning),
    take: one => this.take(one),
    forget: id => this.forget(id),
    failed: status => void ([401, 404].includes(status) && this.connect()),
    draw: () => this.draw(),
  })

  private saveAll(): void {
    for (const id of this.saving.keys()) void this.save(id)
  }

  /** With what has come of the answers that still run. */
  private upToDate(conversation: Conversation): Conversation {
    let one = conversation
    for (const { id } of conversation.messages) {
      const running = this.answering.get(id)
      if (running?.isRunning) one = withChange(one, id, running.progress())
    }
    return one
  }

  // --- questions and answers -------------------------------------------------------------------

  setSampling(sampling: api.Sampling): void {
    this.sampling = sampling
    remember("sampling", JSON.stringify(sampling))
    this.draw()
  }

  setThinks(thinks: boolean): void {
    this.thinks = thinks
    remember("think", thinks ? "" : "no")
    this.draw()
  }

  /** A new question at the end, or in the place of `instead`. */
  send(text: string, instead?: Message): void {
    const parent = instead ? instead.parent : (thread(this.current).at(-1)?.id ?? null)
    const question: Message = { id: newId(), parent, role: "user", text, created: Date.now() }
    this.put(withMessage(this.current, question))
    if (!location.hash.includes(this.current.id)) history.replaceState(null, "", `#c=${this.current.id}`)
    this.answer(question.id)
  }

  /** Another answer beside this one. */
  regenerate(message: Message): void {
    if (message.parent) this.answer(message.parent)
  }

  choose(message: Message): void {
    this.put(choose(this.current, message.id))
  }

  private answer(question: string): void {
    const message: Message = { id: newId(), parent: question, role: "assistant", text: "", created: Date.now() }
    this.put(withMessage(this.current, message))
    this.begin(this.current.id, message, "")
  }

  /** Continue an answer that was cut. */
  resume(message: Message): void {
    this.begin(this.current.id, message, message.text)
  }

  private begin(conversation: string, message: Message, text: string): void {
    const messages = thread(this.current).slice(0, text ? undefined : -1)
    const request: api.ChatRequest = {
      ...this.sampling,
      messages: asRequest(this.current, messages),
      continues: text !== "",
      ...(this.config?.thinks && { think: this.thinks && !text }),
    }
    const opened = { ...message, text, end: undefined, error: undefined, figures: undefined, stream: newId(), seen: 0, device: this.device }
    this.put(withChange(this.current, message.id, opened))
    void this.save(conversation) // so that the page knows the stream if it is loaded again
    this.read(conversation, opened, request)
  }

  private read(conversation: string, message: Message, request: api.ChatRequest | null): void {
    const answering = new Answering(request, message, () => this.changed(conversation, message.id))
    this.answering.set(message.id, answering)
    void answering.run()
    this.draw()
  }

  /** Read the open answers of a stored conversation on, once no other tab does. */
  private takeUpOpen(conversation: Conversation): void {
    for (const message of conversation.messages) if (isOpen(message)) void this.takeUp(conversation.id, message.id)
  }

  private async takeUp(conversation: string, id: string): Promise<void> {
    if (this.distant.has(id)) return
    this.distant.add(id)
    const since = performance.now()
    const found = () => this.conversations.get(conversation)?.messages.find(one => one.id === id)
    const isOthers = async (message: Message) => {
      const isOfDevice = (message.device ?? this.device) === this.device && !this.taken.has(id)
      const quietMs = performance.now() - Math.max(since, this.heard.get(conversation) ?? 0)
      return (!isOfDevice && quietMs < QUIET_MS) || this.tabs.isElsewhere(id)
    }
    for (let message = found(); !this.answering.has(id) && isOpen(message) && (await isOthers(message!)); message = found()) await new Promise(resolve => setTimeout(resolve, ASK_MS))
    this.distant.delete(id)
    const message = found()
    if (message && isOpen(message) && !this.answering.has(id)) this.read(conversation, message, null)
  }

  private changed(id: string, message: string): void {
    const conversation = this.conversations.get(id)
    const one = this.answering.get(message)
    if (!conversation || !one) return
    const { end, error, ranks } = one
    if (one.isRunning) {
      this.saveSoon(id)
      return this.drawSoon()
    }
    this.answering.delete(message)
    if (end === "elsewhere") {
      if (this.history.isOn) this.taken.add(message)
      clearTimeout(this.saving.get(id)) // the other tab's is newer
      this.saving.delete(id)
      return void this.reread(id)
    }
    this.put(withChange(conversation, message, { ...one.progress(), end: end!, error, ranks, stream: undefined, seen: undefined, device: undefined }))
    void this.save(id)
    if (end === "failed") void this.connect()
  }
}

/** As it was read: answers that the server does not keep have ended with the page that read them. */
function interrupted(conversation: Conversation): Conversation {
  const open = conversation.messages.filter(message => isOpen(message) && !message.stream)
  return open.reduce((one, { id }) => withChange(one, id, { end: "stopped" }), conversation)
}

function parsed(text: string): api.Sampling {
  try {
    return text ? (JSON.parse(text) as api.Sampling) : {}
  } catch {
    return {}
  }
}

export const store = new Store()

/** The store; the component is drawn again after each change. */
export function useStore(): Store {
  useSyncExternalStore(store.subscribe, store.snapshot)
  return store
}
