import { createHash } from "node:crypto"
import { readdirSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import react from "@vitejs/plugin-react"
import { defineConfig, type Plugin } from "vite"

const BUILT = "../../serving/page"
const SOURCES = ["index.html", "package.json", "package-lock.json", "public", "src", "tsconfig.json", "vite.config.ts"]

// Beside the built page stands what it was built from: a test compares it with the source.
const sourceHash: Plugin = {
  name: "source-hash",
  closeBundle() {
    const names = SOURCES.flatMap(name => (name.includes(".") ? [name] : readdirSync(name).map(file => `${name}/${file}`)))
    const hash = createHash("sha256")
    for (const name of names.sort()) {
      const content = readFileSync(name)
      const isText = !name.endsWith(".png")
      hash.update(`${name}\n`).update(isText ? content.toString().replaceAll("\r\n", "\n") : content)
    }
    writeFileSync(join(BUILT, "source.sha256"), `${hash.digest("hex")}\n`)
  },
}

// The built page is part of the Python package, so that an installation needs no Node.
export default defineConfig({
  plugins: [react(), sourceHash],
  base: "./",
  build: {
    rolldownOptions: {
      // Without hashes in the names: the server answers by a tag of the content.
      output: { entryFileNames: "assets/[name].js", chunkFileNames: "assets/[name].js", assetFileNames: "assets/[name][extname]" },
    },
    outDir: BUILT,
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 900,
    assetsInlineLimit: 0,
  },
  server: { proxy: Object.fromEntries(["/v1", "/config", "/readyz", "/cluster"].map(path => [path, "http://127.0.0.1:7665"])) },
})
