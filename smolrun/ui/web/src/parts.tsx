// Small parts that several components use.

import { useEffect, useRef, useState, type ButtonHTMLAttributes, type ReactNode } from "react"

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  new: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  done: "M5 12l5 5 9-10",
  again: "M4 12a8 8 0 1 0 2.5-5.8M4 4v5h5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  before: "M14 6l-6 6 6 6",
  after: "M10 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  settings: "M4 8h10M18 8h2M4 16h2M10 16h10M16 6v4M8 14v4",
  cluster: "M12 3.5a2.5 2.5 0 1 0 .01 0zM5.5 15a2.5 2.5 0 1 0 .01 0zM18.5 15a2.5 2.5 0 1 0 .01 0zM10.8 8.2l-4 6.9M13.2 8.2l4 6.9M8.2 17.5h7.6",
  down: "M12 5v14M6 13l6 6 6-6",
  compare: "M4 5h7v14H4zM14 5h6v14h-6z",
  resume: "M5 12h13M13 6l6 6-6 6",
} as const

export type IconName = keyof typeof PATHS

export function Icon({ name }: { name: IconName }) {
  return (
    <svg className="icon" viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  )
}

/** A button that shows an icon only; `label` is what a screen reader says. */
export function IconButton({ name, label, ...rest }: { name: IconName; label: string } & ButtonHTMLAttributes<HTMLButtonElement>) {
  return (
    <button type="button" className="icon-button" aria-label={label} title={label} {...rest}>
      <Icon name={name} />
    </button>
  )
}

export function CopyButton({ text }: { text: string }) {
  const [isDone, setDone] = useState(false)
  useEffect(() => {
    if (!isDone) return
    const timer = setTimeout(() => setDone(false), 1500)
    return () => clearTimeout(timer)
  }, [isDone])
  return <IconButton name={isDone ? "done" : "copy"} label={isDone ? "Copied" : "Copy"} onClick={() => void copy(text).then(setDone)} />
}

async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    return copyBySelection(text) // a page that comes over plain http has no clipboard
  }
}

function copyBySelection(text: string): boolean {
  const area = document.createElement("textarea")
  area.value = text
  area.readOnly = true
  area.className = "off-screen"
  document.body.append(area)
  area.select()
  const isDone = document.execCommand("copy")
  area.remove()
  return isDone
}

/** A modal panel: Escape and a click beside it close it, focus stays inside and returns. */
export function Sheet({ title, isWide, onClose, children }: { title: string; isWide?: boolean; onClose: () => void; children: ReactNode }) {
  const dialog = useRef<HTMLDialogElement>(null)
  useEffect(() => dialog.current?.showModal(), [])
  return (
    <dialog ref={dialog} className={isWide ? "sheet wide-sheet" : "sheet"} aria-label={title} onClose={onClose} onClick={event => event.target === dialog.current && dialog.current?.close()}>
      <header>
        <h2>{title}</h2>
        <IconButton name="close" label="Close" onClick={() => dialog.current?.close()} />
      </header>
      <div className="sheet-content">{children}</div>
    </dialog>
  )
}

export function download(name: string, text: string, type: string): void {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([text], { type }))
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1000)
}

/** Draws again every so many milliseconds while `isOn`. */
export function useTick(milliseconds: number, isOn: boolean): void {
  const [, tick] = useState(0)
  useEffect(() => {
    if (!isOn) return
    const timer = setInterval(() => tick(count => count + 1), milliseconds)
    return () => clearInterval(timer)
  }, [milliseconds, isOn])
}
