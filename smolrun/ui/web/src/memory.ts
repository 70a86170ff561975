// Small values that this browser keeps, and in a private window at least this tab.

const here = new Map<string, string>()

export function recall(name: string): string {
  try {
    return localStorage.getItem(`smolrun.${name}`) ?? here.get(name) ?? ""
  } catch {
    return here.get(name) ?? "" // storage is forbidden
  }
}

export function remember(name: string, value: string): void {
  here.set(name, value)
  try {
    if (value) localStorage.setItem(`smolrun.${name}`, value)
    else localStorage.removeItem(`smolrun.${name}`)
  } catch {
    // forbidden or full
  }
}
