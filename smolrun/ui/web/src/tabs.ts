// Which tab reads an answer: the server ends all connections to it but the newest.

const REPLY_MS = 300

export class Tabs {
  private readonly channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("smolrun.answers") : null
  private readonly asked = new Map<string, () => void>()

  /** `reads`: whether this tab reads the answer of a message. */
  constructor(reads: (message: string) => boolean) {
    if (!this.channel) return
    this.channel.onmessage = ({ data }) => {
      const { question, reply } = data as { question?: string; reply?: string }
      if (question && reads(question)) this.channel!.postMessage({ reply: question })
      if (reply) this.asked.get(reply)?.()
    }
  }

  /** Whether another tab reads it; one that is frozen does not. */
  async isElsewhere(message: string): Promise<boolean> {
    if (!this.channel) return false
    const reply = new Promise<boolean>(resolve => {
      this.asked.set(message, () => resolve(true))
      setTimeout(() => resolve(false), REPLY_MS)
    })
    this.channel.postMessage({ question: message })
    const found = await reply
    this.asked.delete(message)
    return found
  }
}
