// Starts the console: header, tabs, theme, access. Chat and cluster are pages of their own.

import { AccessDialog } from "./access_dialog.js";
import { access } from "./api.js";
import { ChatPage } from "./chat_page.js";
import { ClusterPage } from "./cluster_page.js";
import { Icon } from "./icons.js";
import { html, render, useEffect, useState } from "./markup.js";
import { useStore } from "./store.js";
import { nextTheme, setTheme, theme } from "./theme.js";

const PAGES = [
  { id: "chat", label: "Chat", Page: ChatPage },
  { id: "cluster", label: "Cluster", Page: ClusterPage },
];

function usePageName() {
  const read = () => PAGES.find(({ id }) => `#${id}` === location.hash)?.id ?? PAGES[0].id;
  const [name, setName] = useState(read());
  useEffect(() => {
    const follow = () => setName(read());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return name;
}

function ThemeButton() {
  const { chosen } = useStore(theme);
  const next = nextTheme(chosen);
  return html`<button class="quiet round" onClick=${() => setTheme(next)} title="Theme: ${chosen}"
      aria-label="Theme: ${chosen}. Switch to ${next}.">
    <${Icon} name=${chosen} /></button>`;
}

function App() {
  const name = usePageName();
  const [showAccess, setShowAccess] = useState(false);
  const { apiKey, adminToken } = useStore(access);
  const page = PAGES.find(({ id }) => id === name);
  useEffect(() => {
    document.title = `${page.label} · arriero console`;
  }, [name]);
  const openAccess = () => setShowAccess(true);
  const skip = (event) => {
    event.preventDefault(); // the hash names the page
    document.getElementById("main").focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header class="top">
      <a class="brand" href="#chat"><img src="console/icon.svg" alt="" width="24" height="24" />
        arriero</a>
      <nav aria-label="Pages">${PAGES.map(({ id, label }) => html`
        <a key=${id} href=${`#${id}`} aria-current=${id === name ? "page" : undefined}>
          ${label}</a>`)}
      </nav>
      <span class="grow"></span>
      <button class="quiet" onClick=${openAccess}>
        <span class=${apiKey || adminToken ? "dot on" : "dot"} aria-hidden="true"></span>
        Access</button>
      <${ThemeButton} />
    </header>
    <main id="main" tabindex="-1" class=${`page ${name}`}>
      <${page.Page} openAccess=${openAccess} />
    </main>
    ${showAccess && html`<${AccessDialog} close=${() => setShowAccess(false)} />`}`;
}

setTheme(theme.get().chosen);
render(html`<${App} />`, document.getElementById("app"));
