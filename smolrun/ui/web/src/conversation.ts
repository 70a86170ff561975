// A conversation is a tree of messages; what is seen is the path from its root to one leaf.
// Pure: every function returns a new conversation.

export type Role = "user" | "assistant"

/** Why an answer ended. `length`: it may be continued. `stopped`: by the person at the page. */
export type End = "stop" | "length" | "stopped" | "failed"

/** Of an answer. Seconds; the tokens of the prompt and those found in the cache are null unless the server says. */
export interface Figures {
  firstTokenSeconds: number | null
  seconds: number
  tokens: number
  promptTokens: number | null
  cachedTokens: number | null
}

export interface Message {
  id: string
  parent: string | null
  role: Role
  text: string
  thoughts?: string
  created: number // milliseconds since 1970
  end?: End // of an answer; absent while it runs
  error?: string
  figures?: Figures
  ranks?: string // which ranks computed it
  stream?: string // while it runs: where the server keeps it
  seen?: number // the last of its events that is in the text
  device?: string // which browser reads it
}

export interface Conversation {
  id: string
  title: string
  created: number
  changed: number
  system: string
  messages: Message[] // in order of their creation
  leaf: string | null
  version?: string // of the server's copy that it was made from, where the server keeps conversations
  isChanged?: boolean // since then
}

export function newId(): string {
  // crypto.randomUUID is missing where a page comes over plain http.
  const bytes = crypto.getRandomValues(new Uint8Array(12))
  return Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("")
}

/** As `newId` makes them, which the server can keep. */
export function isId(id: string): boolean {
  return /^[0-9a-f]{24}$/.test(id)
}

/** An answer that has not ended. */
export function isOpen(message: Message | undefined): boolean {
  return message?.role === "assistant" && !message.end
}

export function newConversation(now: number, system = ""): Conversation {
  return { id: newId(), title: "", created: now, changed: now, system, messages: [], leaf: null }
}

/** From the first message to the leaf. */
export function thread(conversation: Conversation): Message[] {
  const byId = new Map(conversation.messages.map(message => [message.id, message]))
  const path: Message[] = []
  for (let at = byId.get(conversation.leaf ?? ""); at; at = byId.get(at.parent ?? "")) path.push(at)
  return path.reverse()
}

/** Messages in the same place: edits of a question, or answers to the same one. */
export function siblings(conversation: Conversation, message: Message): Message[] {
  return conversation.messages.filter(other => other.parent === message.parent && other.role === message.role)
}

/** Show another sibling, with the newest messages below it. */
export function choose(conversation: Conversation, id: string): Conversation {
  let leaf = id
  for (;;) {
    const child = conversation.messages.findLast(message => message.parent === leaf)
    if (!child) return { ...conversation, leaf }
    leaf = child.id
  }
}

/** Append a message below `parent`; it is the leaf then. */
export function withMessage(conversation: Conversation, message: Message): Conversation {
  const title = conversation.title || (message.role === "user" ? titleOf(message.text) : "")
  return { ...conversation, title, changed: message.created, messages: [...conversation.messages, message], leaf: message.id }
}

export function withChange(conversation: Conversation, id: string, change: Partial<Message>): Conversation {
  const messages = conversation.messages.map(message => (message.id === id ? { ...message, ...change } : message))
  return { ...conversation, messages }
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0]?.trim() ?? ""
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "Untitled"
}

/** What the model gets: thoughts of earlier answers are left out. */
export function asRequest(conversation: Conversation, messages: Message[]): { role: string; content: string }[] {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : []
  return [...system, ...messages.map(({ role, text }) => ({ role: role as string, content: text }))]
}

export function asMarkdown(conversation: Conversation): string {
  const parts = thread(conversation).map(({ role, text }) => `## ${role === "user" ? "You" : "Answer"}\n\n${text.trim()}\n`)
  const system = conversation.system.trim() ? `> ${conversation.system.trim().replaceAll("\n", "\n> ")}\n\n` : ""
  return `# ${conversation.title}\n\n${system}${parts.join("\n")}`
}

export function matches(conversation: Conversation, words: string): boolean {
  const text = [conversation.title, ...conversation.messages.map(message => message.text)].join("\n").toLowerCase()
  return words.toLowerCase().split(/\s+/).every(word => text.includes(word))
}

/**
 * Both of `here` and `there`: messages of both, of one in both the longer text, as answers only grow.
 * Title, system prompt and branch are those of `here`.
 */
export function merged(here: Conversation, there: Conversation): Conversation {
  const ours = new Map(here.messages.map(message => [message.id, message]))
  const theirs = new Set(there.messages.map(message => message.id))
  const both = there.messages.map(message => {
    const own = ours.get(message.id)
    return own && isFurther(own, message) ? own : message
  })
  const messages = [...both, ...here.messages.filter(message => !theirs.has(message.id))]
  const whole = { ...here, messages, changed: Math.max(here.changed, there.changed) }
  const leaf = here.leaf ?? there.leaf
  return leaf ? choose(whole, leaf) : whole // what was added below it is seen
}

function isFurther(one: Message, other: Message): boolean {
  const sizes = [one, other].map(({ text, thoughts }) => text.length + (thoughts?.length ?? 0))
  return sizes[0] === sizes[1] ? Boolean(one.end) : sizes[0]! > sizes[1]!
}

/** A conversation of the server; null where it is malformed. */
export function received(text: string): Conversation | null {
  try {
    const found: unknown = JSON.parse(text)
    return isConversation(found) ? repaired(found, true) : null
  } catch {
    return null
  }
}

/** Conversations of an exported file; what is malformed is left out. Throws where it is no export. */
export function fromExport(text: string): Conversation[] {
  const found: unknown = JSON.parse(text)
  const list = (found as { conversations?: unknown })?.conversations
  if (!Array.isArray(list)) throw new Error("this is no export of smolrun")
  return list.filter(isConversation).map(one => repaired(one, false))
}

function isConversation(value: unknown): value is Conversation {
  const one = value as Conversation
  return typeof one?.id === "string" && typeof one.title === "string" && Array.isArray(one.messages) && one.messages.every(isMessage)
}

function isMessage(value: unknown): value is Message {
  const one = value as Message
  return typeof one?.id === "string" && typeof one.text === "string" && (one.role === "user" || one.role === "assistant")
}

/** A parent stands before its child, so no file can make a loop. `keepsOpen`: answers may still come. */
function repaired(given: Conversation, keepsOpen: boolean): Conversation {
  const known = new Set<string>()
  const messages: Message[] = []
  for (const one of given.messages) {
    if (known.has(one.id)) continue
    const parent = typeof one.parent === "string" && known.has(one.parent) ? one.parent : null
    const { id, role, text } = one
    messages.push({ id, parent, role, text, created: Number(one.created) || 0, ...(role === "assistant" && ofAnswer(one, keepsOpen)) })
    known.add(id)
  }
  const conversation: Conversation = {
    id: given.id,
    title: given.title,
    created: Number(given.created) || 0,
    changed: Number(given.changed) || 0,
    system: typeof given.system === "string" ? given.system : "",
    messages,
    leaf: null,
  }
  if (typeof given.leaf === "string" && known.has(given.leaf)) return { ...conversation, leaf: given.leaf }
  const last = messages.at(-1)
  return last ? choose(conversation, last.id) : conversation
}

const ENDS: unknown[] = ["stop", "length", "stopped", "failed"]

function ofAnswer(given: Message, keepsOpen: boolean): Partial<Message> {
  const isStillOpen = keepsOpen && !given.end && typeof given.stream === "string"
  const found: Partial<Message> = isStillOpen
    ? { stream: given.stream, seen: Number(given.seen) || 0 }
    : { end: ENDS.includes(given.end) ? given.end : "stop", figures: figuresOf(given.figures) }
  for (const key of ["thoughts", "error", "ranks", "device"] as const) if (typeof given[key] === "string") found[key] = given[key]
  return found
}

function figuresOf(given: unknown): Figures | undefined {
  if (!given || typeof given !== "object") return undefined
  const all = given as Partial<Record<keyof Figures, unknown>>
  const number = (key: keyof Figures) => (Number.isFinite(all[key]) ? (all[key] as number) : null)
  return {
    firstTokenSeconds: number("firstTokenSeconds"),
    seconds: number("seconds") ?? 0,
    tokens: number("tokens") ?? 0,
    promptTokens: number("promptTokens"),
    cachedTokens: number("cachedTokens"),
  }
}
