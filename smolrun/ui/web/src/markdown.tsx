// Markdown that grows: only the blocks at the end of a text are parsed again.

import { marked } from "marked"
import { memo, useEffect, useRef, useState, type ReactNode } from "react"
import ReactMarkdown, { type Components } from "react-markdown"
import rehypeHighlight from "rehype-highlight"
import remarkGfm from "remark-gfm"
import remend from "remend"
import { languages } from "./languages"
import { CopyButton } from "./parts"

// A paragraph becomes a heading or a table by the line below it, a list continues after an empty line.
const UNSETTLED = 2
const STEP = 8 // blocks that are drawn at once

/** `text` cut into its top-level blocks; those of an earlier text that it begins with are kept. */
export function blocks(text: string, before: readonly string[] = []): string[] {
  const settled = before.slice(0, -UNSETTLED)
  const start = settled.join("")
  const kept = text.startsWith(start) ? settled : []
  const rest = text.slice(kept.length ? start.length : 0)
  // A token's `raw` may lack blank lines at its end, so tokens are looked for.
  const starts: number[] = []
  let at = 0
  for (const { raw } of marked.lexer(rest)) {
    const found = rest.indexOf(raw, at)
    if (found < 0) break
    starts.push(starts.length ? found : 0)
    at = found + raw.length
  }
  return [...kept, ...starts.map((from, index) => rest.slice(from, starts[index + 1]))]
}

export function Markdown({ text, isGrowing }: { text: string; isGrowing: boolean }) {
  const before = useRef<string[]>([])
  before.current = blocks(text.replaceAll("\r\n", "\n"), before.current)
  const all = before.current
  // A long text that comes at once, as from storage, is drawn in steps: the page stays alive.
  const [limit, setLimit] = useState(STEP)
  useEffect(() => {
    if (limit >= all.length) return
    const timer = setTimeout(() => setLimit(limit + STEP))
    return () => clearTimeout(timer)
  }, [limit, all.length])
  return all.slice(0, limit).map((block, at) => <Block key={at} text={block} isGrowing={isGrowing && at === all.length - 1} />)
}

const Block = memo(function Block({ text, isGrowing }: { text: string; isGrowing: boolean }) {
  if (isGrowing && /^ {0,3}(```|~~~)/.test(text)) return <GrowingCode text={text} />
  return (
    <ReactMarkdown
      remarkPlugins={[remarkGfm]}
      rehypePlugins={isGrowing ? [] : [[rehypeHighlight, { languages, detect: false }]]}
      components={components}
    >
      {isGrowing ? remend(text) : text}
    </ReactMarkdown>
  )
})

/** Code whose end has not come: plain text, as parsing all of it for each token would freeze the page. */
function GrowingCode({ text }: { text: string }) {
  const newline = text.indexOf("\n")
  return <Code language={text.slice(0, newline < 0 ? undefined : newline).replace(/^[\s`~]+/, "").trim()}>{newline < 0 ? "" : text.slice(newline + 1)}</Code>
}

function Code({ language, children, source }: { language: string; children: ReactNode; source?: string }) {
  return (
    <figure className="code">
      <figcaption>
        <span>{language || "text"}</span>
        <CopyButton text={source ?? String(children)} />
      </figcaption>
      <pre tabIndex={0}>
        <code>{children}</code>
      </pre>
    </figure>
  )
}

const components: Components = {
  a: ({ href, children }) => (
    <a href={href} target="_blank" rel="noopener noreferrer nofollow">
      {children}
    </a>
  ),
  // A picture is fetched from wherever the model says: that would tell its server who reads this.
  img: ({ src, alt }) => (
    <a href={typeof src === "string" ? src : undefined} target="_blank" rel="noopener noreferrer nofollow">
      {alt || "picture"}
    </a>
  ),
  pre: ({ node, children }) => {
    const code = node?.children[0]
    const names = code?.type === "element" && Array.isArray(code.properties.className) ? code.properties.className.map(String) : []
    const language = names.find(name => name.startsWith("language-"))?.slice("language-".length) ?? ""
    const inner = (children as { props?: { children?: ReactNode } } | null)?.props?.children
    return (
      <Code language={language} source={textOf(code).replace(/\n$/, "")}>
        {inner}
      </Code>
    )
  },
  table: ({ children }) => (
    <div className="wide" tabIndex={0} role="region" aria-label="Table">
      <table>{children}</table>
    </div>
  ),
}

function textOf(node: unknown): string {
  const { value, children } = (node ?? {}) as { value?: string; children?: unknown[] }
  return value ?? children?.map(textOf).join("") ?? ""
}
