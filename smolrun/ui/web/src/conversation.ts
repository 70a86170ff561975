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
}

export interface Conversation {
  id: string
  title: string
  created: number
  changed: number
  system: string
  messages: Message[] // in order of their creation
  leaf: string | null
}

export function newId(): string {
  // crypto.randomUUID is missing where a page comes over plain http.
  const bytes = crypto.getRandomValues(new Uint8Array(12))
  return Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("")
}

/** An answer that has not ended. */
export function isOpen(message: Message | undefined): boolean {
  return message?.role === "assistant" && !message.end
}

export function newConversation(now: number, system = ""): Conversation {
  return { id: newId(), title: "", created: now, changed: now, system, messages: [], leaf: null }
}

export function find(conversation: Conversation, id: string | null): Message | undefined {
  return conversation.messages.find(message => message.id === id)
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

/** Without a message and all below it. The leaf becomes the newest message beside or above it. */
export function without(conversation: Conversation, id: string): Conversation {
  const gone = new Set([id])
  for (const message of conversation.messages) if (message.parent && gone.has(message.parent)) gone.add(message.id)
  const messages = conversation.messages.filter(message => !gone.has(message.id))
  const left = { ...conversation, messages }
  if (!conversation.leaf || !gone.has(conversation.leaf)) return left
  const parent = find(conversation, id)?.parent ?? null
  const beside = messages.findLast(message => message.parent === parent)
  return beside ? choose(left, beside.id) : { ...left, leaf: parent }
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

/** Conversations of an exported file; what is malformed is left out. Throws where it is no export. */
export function fromExport(text: string): Conversation[] {
  const found: unknown = JSON.parse(text)
  const list = (found as { conversations?: unknown })?.conversations
  if (!Array.isArray(list)) throw new Error("this is no export of smolrun")
  return list.filter(isConversation).map(repaired)
}

function isConversation(value: unknown): value is Conversation {
  const one = value as Conversation
  return typeof one?.id === "string" && typeof one.title === "string" && Array.isArray(one.messages) && one.messages.every(isMessage)
}

function isMessage(value: unknown): value is Message {
  const one = value as Message
  return typeof one?.id === "string" && typeof one.text === "string" && (one.role === "user" || one.role === "assistant")
}

/** A parent stands before its child, so no file can make a loop. */
function repaired(given: Conversation): Conversation {
  const known = new Set<string>()
  const messages: Message[] = []
  for (const { id, parent, role, text, thoughts, created, end, figures } of given.messages) {
    if (known.has(id)) continue
    messages.push({
      id,
      parent: typeof parent === "string" && known.has(parent) ? parent : null,
      role,
      text,
      created: Number(created) || 0,
      ...(typeof thoughts === "string" && { thoughts }),
      ...(role === "assistant" && { end: end ?? "stop", figures: figures && typeof figures === "object" ? figures : undefined }),
    })
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
  if (given.leaf && known.has(given.leaf)) return { ...conversation, leaf: given.leaf }
  const last = messages.at(-1)
  return last ? choose(conversation, last.id) : conversation
}
