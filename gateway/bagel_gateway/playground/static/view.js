// One request on the page: while it runs, and what came of it.
import { announce, byId, copy, duration, element } from "./dom.js";
import { MODES } from "./request.js";
import { noteOf, snippets } from "./snippets.js";

/** Shows an entry in the result area. actions: {again(entry), use(blob, extension, mode), retry(), cancel(), enterKey(), place()}. */
export class Outcome {
  constructor(actions) {
    this.box = byId("outcome");
    this.actions = actions;
    this.urls = [];
    this.ticker = 0;
  }

  /** Show a request that begins. */
  begin(entry) {
    this.#clear(entry);
    this.began = performance.now();
    this.bar = element("progress", { max: 1, "aria-label": "Progress" });
    this.phaseText = element("span", { class: "phase" }, "Waiting for its turn");
    const seconds = element("span", { class: "seconds" }, "0.0 s");
    const here = element("button", { type: "button", class: "quiet here", onclick: () => this.actions.cancel() }, "Cancel"); // where the form's own is out of sight
    this.progress = element("div", { class: "progress" }, element("div", { class: "label-row" }, this.phaseText, seconds, here), this.bar);
    this.ticker = setInterval(() => { seconds.textContent = duration(this.seconds); }, 100);
    if (MODES[entry.mode].makesImage) this.area = element("div", { class: "canvas" }, element("p", { class: "blank" }, "The first preview appears here."));
    else this.area = element("p", { class: "answer live" });
    this.box.append(this.#asked(entry), this.progress, this.area);
    announce("Sent. Waiting for its turn.");
  }

  get seconds() {
    return (performance.now() - this.began) / 1000;
  }

  /** What happens now; share: how much is done, from 0 to 1, if that is known. */
  phase(text, share) {
    this.phaseText.textContent = text;
    if (share === undefined) this.bar.removeAttribute("value");
    else this.bar.value = share;
    const quarter = Math.floor((share ?? 0) * 4) / 4;
    const heard = share ? `${text.split(",")[0]}, ${Math.round(quarter * 100)}%` : text;
    announce(heard);
  }

  think(text) {
    if (!this.thought) {
      this.thought = this.#thought(text, true);
      this.area.before(this.thought);
    }
    const paragraph = this.thought.querySelector("p");
    paragraph.textContent = text;
    paragraph.scrollTop = paragraph.scrollHeight;
  }

  thinkingIsOver() {
    this.thought?.classList.remove("live");
  }

  answer(text) {
    this.area.textContent = text;
  }

  preview(blob, number) {
    const image = this.#image(blob, "The picture under way");
    image.decode().then(() => this.area.replaceChildren(tagged(image, `Preview ${number}`)), () => {});
  }

  /** Show what came of it: a request that has ended now, or an earlier one. */
  end(entry) {
    this.#clear(entry);
    this.box.append(this.#asked(entry));
    if (entry.thought) this.box.append(this.#thought(entry.thought, false));
    if (entry.error) this.box.append(this.#error(entry));
    else if (entry.state === "cancelled") this.box.append(element("p", { class: "note" }, "Cancelled. The server has stopped working on it."));
    if (entry.mode === "ask" || !entry.pictures.length) this.#addInputs(entry);
    if (entry.answer) this.box.append(element("p", { class: "answer" }, entry.answer));
    if (entry.cut) this.box.append(element("p", { class: "note" }, "Cut off at its limit: “Longest answer” under More options raises it."));
    else if (entry.state === "done" && !entry.pictures.length && !entry.answer) this.box.append(element("p", { class: "note" }, "The model answered with nothing. Ask in other words, or let it think first."));
    if (entry.pictures.length) this.box.append(...this.#pictures(entry));
    this.box.append(...this.#about(entry));
  }

  hide() {
    this.#clear();
    this.box.hidden = true;
  }

  #clear(entry) {
    clearInterval(this.ticker);
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.thought = undefined;
    this.entry = entry;
    this.box.replaceChildren();
    this.box.hidden = false;
  }

  #url(blob) {
    const url = URL.createObjectURL(blob);
    this.urls.push(url);
    return url;
  }

  #image(blob, alt) {
    const image = element("img", { alt });
    image.addEventListener("load", () => {
      const small = image.naturalWidth <= 440;
      image.classList.toggle("small", small);
      image.closest(".slider")?.classList.toggle("small", small);
    });
    image.src = this.#url(blob);
    return image;
  }

  #asked(entry) {
    return element("header", { class: "asked" }, element("p", { class: "kind" }, MODES[entry.mode].title), element("h2", {}, entry.prompt));
  }

  #thought(text, live) {
    return element("details", { class: live ? "thought live" : "thought", open: true }, element("summary", {}, "Plan"), element("p", {}, text));
  }

  #addInputs(entry) {
    if (!entry.images.length) return;
    this.box.append(element("div", { class: "given" }, ...entry.images.map(({ blob, name }, i) => element("img", { src: this.#url(blob), alt: `Input ${i + 1}: ${name}` }))));
  }

  #pictures(entry) {
    const alt = `${entry.mode === "edit" ? "Edited picture" : "Picture"}: ${entry.prompt}`;
    if (entry.mode === "edit" && entry.pictures.length === 1 && entry.state === "done") return this.#comparison(entry, alt);
    const shown = entry.pictures.map((blob, i) => {
      const image = this.#image(blob, entry.pictures.length > 1 ? `${alt} (${i + 1})` : alt);
      return element("div", { class: "canvas" }, entry.state === "done" ? image : tagged(image, "Last preview"));
    });
    return [shown.length === 1 ? shown[0] : element("div", { class: "pictures" }, ...shown)];
  }

  #comparison(entry, alt) {
    const [before] = entry.images;
    const [after] = entry.pictures;
    const box = element("div", { class: "canvas" });
    const slide = () => {
      const range = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "How much of the picture before the edit is shown, in percent" });
      const compare = element("div", { class: "compare" }, this.#image(after, alt), element("img", { class: "before", src: this.#url(before.blob), alt: "Before the edit" }), range, element("span", { class: "line" }));
      range.addEventListener("input", () => compare.style.setProperty("--at", `${range.value}%`));
      box.replaceChildren(element("div", { class: "slider" }, element("p", { class: "ends", "aria-hidden": "true" }, element("span", {}, "Before"), element("span", {}, "After")), compare));
    };
    const beside = () => box.replaceChildren(element("div", { class: "beside" },
      element("figure", {}, element("figcaption", {}, "Before"), element("img", { src: this.#url(before.blob), alt: "Before the edit" })),
      element("figure", {}, element("figcaption", {}, "After"), this.#image(after, alt))));
    const choice = (name, show, checked) => element("label", {}, element("input", { type: "radio", name: "view", checked, onchange: show }), element("span", {}, name));
    slide();
    return [box, element("div", { class: "view", role: "radiogroup", "aria-label": "How to compare" }, choice("Slider", slide, true), choice("Side by side", beside, false))];
  }

  #about(entry) {
    const facts = [];
    const fact = (name, value) => value !== undefined && facts.push(element("span", {}, `${name} `, element("b", {}, String(value))));
    if (entry.state === "done") {
      fact("Took", duration(entry.seconds));
      const picture = this.box.querySelector(".canvas img");
      if (picture) {
        const size = element("b", {});
        facts.push(element("span", {}, "Size ", size));
        picture.decode().then(() => { size.textContent = `${picture.naturalWidth} × ${picture.naturalHeight}`; }, () => {});
      }
      fact("Steps", entry.steps);
      fact("Tokens in", entry.usage?.input_tokens ?? entry.usage?.prompt_tokens);
      if (!entry.pictures.length) fact("Tokens out", entry.usage?.completion_tokens);
      fact("Seed", entry.seed);
    }
    return [...(facts.length ? [element("div", { class: "facts" }, ...facts)] : []), this.#actions(entry), this.#code(entry)];
  }

  #actions(entry) {
    const box = element("div", { class: "actions" });
    const add = (text, onclick) => box.append(element("button", { type: "button", onclick }, text));
    if (entry.state === "done") entry.pictures.forEach((blob, i) => {
      const which = entry.pictures.length > 1 ? ` ${i + 1}` : "";
      const extension = blob.type.split("/")[1];
      box.append(element("a", { href: this.#url(blob), download: `bagel-${entry.seed + i}.${extension}` }, `Download${which}`));
      if (entry.pictures.length > 1) return;
      add("Edit it", () => this.actions.use(blob, extension, "edit"));
      add("Ask about it", () => this.actions.use(blob, extension, "ask"));
    });
    if (entry.answer) {
      const button = element("button", { type: "button" }, "Copy the answer");
      button.addEventListener("click", () => copied(button, entry.answer));
      box.append(button);
    }
    const varies = entry.pictures.length || entry.settings.do_sample; // without sampling, an answer is the same for every seed
    if (entry.state === "done" && varies) add("Another, new seed", () => this.actions.again(entry));
    else if (!entry.error) add("Try again", () => this.actions.retry());
    return box;
  }

  #error(entry) {
    const { title, message, remedy, requestId, wantsKey } = entry.error;
    const box = element("div", { class: "error", role: "alert" }, element("h3", {}, title), element("p", {}, message), element("p", {}, remedy));
    if (requestId) box.append(element("p", { class: "help" }, "In the server’s log: ", element("code", {}, requestId)));
    const actions = element("div", { class: "actions" });
    if (wantsKey) actions.append(element("button", { type: "button", onclick: () => this.actions.enterKey() }, "Enter a key"));
    actions.append(element("button", { type: "button", onclick: () => this.actions.retry() }, "Try again"));
    box.append(actions);
    return box;
  }

  #code(entry) {
    const box = element("details", { class: "code" }, element("summary", {}, "This request as code"));
    const codes = Object.entries(snippets(entry, this.actions.place()));
    const note = noteOf(entry);
    const pre = element("pre", { id: "code-text", tabindex: "0", role: "tabpanel" });
    const tabs = codes.map(([name], i) => element("button", { type: "button", role: "tab", id: `code-${name}`, "aria-controls": "code-text", onclick: () => select(i) }, name));
    const button = element("button", { type: "button", class: "quiet copy" }, "Copy");
    let chosen = 0;
    const select = (i) => {
      chosen = i;
      tabs.forEach((tab, j) => { tab.setAttribute("aria-selected", String(i === j)); tab.tabIndex = i === j ? 0 : -1; });
      pre.textContent = codes[i][1];
      pre.setAttribute("aria-labelledby", tabs[i].id);
    };
    const list = element("div", { role: "tablist", "aria-label": "Language" }, ...tabs);
    list.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      select((chosen + move + tabs.length) % tabs.length);
      tabs[chosen].focus();
    });
    button.addEventListener("click", () => copied(button, codes[chosen][1]));
    box.append(element("div", { class: "tabs" }, list, button), ...(note ? [element("p", { class: "help" }, note)] : []), pre);
    select(0);
    return box;
  }
}

function tagged(image, text) {
  return element("figure", { class: "tagged" }, image, element("figcaption", { class: "tag" }, text));
}

async function copied(button, text) {
  const name = button.textContent;
  await copy(text);
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = name; }, 1600);
}
