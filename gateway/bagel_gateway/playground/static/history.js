// What was asked in this session: kept by the browser until its tab is closed, restorable.
import { byId, element } from "./dom.js";
import { MODES } from "./request.js";

const STORE = "entries";
const DAY = 24 * 3600e3;
const LIMIT = 60;

/** The strip of earlier results. onRestore is called with an entry. */
export class History {
  constructor({ onRestore, onForget }) {
    this.entries = [];
    this.current = undefined;
    this.onRestore = onRestore;
    this.list = byId("entries");
    this.urls = new Map();
    this.session = sessionStorage.getItem("bagel-session") ?? crypto.getRandomValues(new Uint32Array(3)).join("-");
    sessionStorage.setItem("bagel-session", this.session);
    byId("forget").addEventListener("click", () => this.#forget().then(onForget));
  }

  /** Read what this tab had before it was loaded again. A browser that keeps nothing keeps it in memory alone. */
  async open() {
    try {
      this.database = await opened();
      const all = await done(this.#store("readonly").getAll());
      const old = all.filter((entry) => entry.session !== this.session && Date.now() - entry.when > DAY);
      for (const entry of old) this.#store("readwrite").delete(entry.id);
      this.entries = all.filter((entry) => entry.session === this.session).sort((one, other) => other.when - one.when);
    } catch (error) {
      console.warn("this browser keeps no history over a reload:", error);
    }
    this.show();
  }

  /** Add an entry, the newest; or keep it as it is now. */
  keep(entry) {
    if (!this.entries.includes(entry)) this.entries.unshift(entry);
    for (const old of this.entries.splice(LIMIT)) this.#store("readwrite")?.delete(old.id);
    this.#store("readwrite")?.put({ ...entry, session: this.session });
    this.current = entry;
    this.show();
  }

  show() {
    byId("history").hidden = this.entries.length === 0;
    for (const [id, url] of this.urls) if (!this.entries.some((entry) => entry.id === id)) { URL.revokeObjectURL(url); this.urls.delete(id); }
    this.list.replaceChildren(...this.entries.map((entry) => element("li", {}, this.#button(entry))));
  }

  #button(entry) {
    const { title } = MODES[entry.mode];
    const name = `${title}: ${entry.prompt}${entry.state === "done" ? "" : `, ${entry.state}`}`;
    return element("button", { type: "button", "aria-label": name, title: entry.prompt, "aria-current": entry === this.current && "true", onclick: () => this.#restore(entry) }, this.#picture(entry), element("span", { class: "name" }, entry.prompt));
  }

  #picture(entry) {
    const blob = entry.pictures[0];
    if (!blob) return element("p", { class: "pic" }, entry.answer || { failed: "Failed", cancelled: "Cancelled" }[entry.state] || "…");
    if (!this.urls.has(entry.id)) this.urls.set(entry.id, URL.createObjectURL(blob));
    return element("img", { class: "pic", src: this.urls.get(entry.id), alt: "" });
  }

  #restore(entry) {
    this.current = entry;
    const at = this.entries.indexOf(entry);
    this.show();
    this.list.querySelectorAll("button")[at].focus();
    this.onRestore(entry);
  }

  // Out of sight only once it is deleted: a tab that is loaded again before that would show it again.
  async #forget() {
    const forgotten = [...this.entries], store = this.#store("readwrite");
    for (const entry of forgotten) store?.delete(entry.id);
    if (store) await committed(store.transaction);
    this.entries = this.entries.filter((entry) => !forgotten.includes(entry));
    this.current = undefined;
    this.show();
  }

  #store(access) {
    return this.database?.transaction(STORE, access).objectStore(STORE);
  }
}

function opened() {
  const asked = indexedDB.open("bagel-playground", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
  return done(asked);
}

function done(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

function committed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
}
