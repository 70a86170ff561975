import { createRoot } from "react-dom/client"
import { App } from "./app"
import { store } from "./store"
import "./style.css"

// Safari lays its keyboard over the page instead of making it smaller.
function followKeyboard(): void {
  const view = window.visualViewport
  if (!view) return
  const fit = () => document.documentElement.style.setProperty("--height", `${view.height}px`)
  view.addEventListener("resize", fit)
  fit()
}

followKeyboard()
void store.start()
createRoot(document.getElementById("root")!).render(<App />)
