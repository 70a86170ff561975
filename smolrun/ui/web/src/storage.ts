// Conversations in this browser's IndexedDB. Where it is forbidden, they last as long as the tab.

import { openDB, type IDBPDatabase } from "idb"
import type { Conversation } from "./conversation"

const TABLE = "conversations"

export class Storage {
  private database: IDBPDatabase | null = null
  private readonly channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("smolrun") : null
  /** Why nothing is kept; empty while all is well. */
  failure = ""

  /** `onChange`: another tab has written or deleted this conversation. */
  constructor(private readonly onChange: (id: string) => void) {
    if (this.channel) this.channel.onmessage = ({ data }) => this.onChange(String(data))
  }

  async open(): Promise<Conversation[]> {
    try {
      this.database = await openDB("smolrun", 1, {
        upgrade: database => void database.createObjectStore(TABLE, { keyPath: "id" }),
      })
      return (await this.database.getAll(TABLE)) as Conversation[]
    } catch {
      this.failure = "This browser keeps no data for this page (a private window?): conversations end with this tab."
      return []
    }
  }

  async read(id: string): Promise<Conversation | undefined> {
    return (await this.database?.get(TABLE, id).catch(() => undefined)) as Conversation | undefined
  }

  async write(conversation: Conversation): Promise<void> {
    if (!this.database) return
    try {
      await this.database.put(TABLE, conversation)
      this.failure = ""
    } catch {
      this.failure = "This browser's storage is full: what comes from now on is not kept. Export and delete some conversations."
      return
    }
    this.channel?.postMessage(conversation.id)
  }

  async remove(id: string): Promise<void> {
    await this.database?.delete(TABLE, id).catch(() => undefined)
    this.channel?.postMessage(id)
  }
}
