// Conversations that the server keeps for all devices. What changed here is put there, and what
// changed there is taken; this browser has a copy of all.

import * as api from "./api"
import { isId, merged, received, type Conversation } from "./conversation"
import { recall, remember } from "./memory"

const ASK_MS = 5000 // while the page is seen
const MOST_CONFLICTS = 5
const REFUSED = [400, 413, 507] // the same again would be refused again

export interface Copies {
  all(): Conversation[]
  find(id: string): Conversation | undefined
  /** With what has come of the answers that run here. */
  upToDate(conversation: Conversation): Conversation
  isRunning(conversation: Conversation): boolean
  /** Of the server, and what is added to it here. */
  take(conversation: Conversation): Promise<void>
  forget(id: string): void
  /** A request failed; `status` 0: the server was not reached. */
  failed(status: number): void
  draw(): void
}

export class History {
  isOn = recall("history") === "server"
  /** Why the server does not have what is here; empty while all is well. */
  failure = ""
  private tag = "" // of the list whose conversations are all here
  private isReady = false // what this browser has is known
  private isBusy = false
  private isAsked = false
  private timer: ReturnType<typeof setTimeout> | undefined
  private readonly refused = new Map<string, { sent: Conversation; failure: string }>()

  constructor(private readonly copies: Copies) {
    document.addEventListener("visibilitychange", () => void this.sync())
  }

  /** What the server says: whether it keeps conversations. */
  setOn(isOn: boolean): void {
    this.isOn = isOn
    this.isReady = true
    this.failure = ""
    remember("history", isOn ? "server" : "")
    void this.sync()
  }

  remove(id: string): void {
    if (!this.isOn) return
    remember("removed", [...removed(), id].join(" "))
    this.refused.clear() // there is more room now
    void this.sync()
  }

  /** Until both have the same. Never throws. */
  async sync(): Promise<void> {
    clearTimeout(this.timer)
    if (!this.isOn || !this.isReady) return
    this.isAsked = true
    if (this.isBusy) return
    this.isBusy = true
    let failure = ""
    try {
      while (this.isAsked) {
        this.isAsked = false
        await this.remind()
        await this.pull()
        failure = ""
        for (const one of this.copies.all()) if (one.isChanged || this.copies.isRunning(one)) failure = (await this.push(one)) || failure
      }
    } catch (error) {
      const status = error instanceof api.ServerError ? error.status : 0
      failure = status ? `The server does not keep conversations now: ${(error as Error).message}` : "The server cannot be reached. What is new stays in this browser until it can."
      this.copies.failed(status)
    }
    this.isBusy = false
    this.timer = setTimeout(() => document.visibilityState === "visible" && void this.sync(), ASK_MS)
    if (failure === this.failure) return
    this.failure = failure
    this.copies.draw()
  }

  /** Of what was deleted here. */
  private async remind(): Promise<void> {
    for (const id of removed()) {
      await api.removeConversation(id)
      remember("removed", removed().filter(other => other !== id).join(" "))
    }
  }

  private async pull(): Promise<void> {
    const found = await api.conversations(this.tag)
    if (!found) return
    for (const one of this.copies.all()) {
      if (!one.version || found.versions.has(one.id)) continue
      if (one.isChanged || this.copies.isRunning(one)) await this.copies.take({ ...one, version: undefined, isChanged: true })
      else this.copies.forget(one.id)
    }
    for (const [id, version] of found.versions) {
      if (this.copies.find(id)?.version !== version && !removed().includes(id)) await this.fetch(id)
    }
    this.tag = found.tag
  }

  private async fetch(id: string): Promise<void> {
    const there = await api.conversation(id)
    const here = this.copies.find(id)
    if (!there) return void (here && (await this.copies.take({ ...here, version: undefined, isChanged: true })))
    const read = received(there.text)
    if (!read || read.id !== id) return // of a newer page, or damaged
    const isNewHere = here && (here.isChanged || this.copies.isRunning(here))
    const one = isNewHere ? { ...merged(this.copies.upToDate(here), read), isChanged: true } : read
    await this.copies.take({ ...one, version: there.version })
  }

  /** Returns why the server refuses it. */
  private async push(one: Conversation): Promise<string> {
    for (let left = MOST_CONFLICTS; left; left -= 1) {
      const sent = this.copies.find(one.id)
      if (!sent || !isId(sent.id)) return ""
      const refusal = this.refused.get(one.id)
      if (refusal?.sent === sent) return refusal.failure
      try {
        const version = await api.putConversation(this.copies.upToDate(sent))
        const now = this.copies.find(one.id)
        if (now) await this.copies.take({ ...now, version, isChanged: now !== sent || undefined })
        return ""
      } catch (error) {
        const status = error instanceof api.ServerError ? error.status : 0
        if (REFUSED.includes(status)) {
          const failure = `The server does not keep “${sent.title}”: ${(error as Error).message}`
          this.refused.set(one.id, { sent, failure })
          return failure
        }
        if (status !== 412) throw error
        await this.fetch(one.id)
      }
    }
    return `The server has another version of “${one.title}”, which this page cannot read.`
  }
}

/** Deleted here, while the server may still have them. */
function removed(): string[] {
  return recall("removed").split(" ").filter(Boolean)
}
