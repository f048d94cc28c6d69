// Input images: chosen, dropped or pasted, checked before they are sent.
import { announce, byId, element } from "./dom.js";

export const MAX_IMAGES = 7;
const MAX_PIXELS = 64e6;
const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff"];
const READABLE_HERE = new Set(TYPES.slice(0, 5)); // browsers show no TIFF

/** The list of input images: [{blob, name, url}]. onGiven is called before files are added that came from anywhere. */
export class Images {
  constructor({ onGiven, onChange }) {
    this.items = [];
    this.list = byId("thumbs");
    this.problem = byId("images-problem");
    this.onGiven = onGiven;
    this.onChange = onChange;
    const file = byId("file");
    file.addEventListener("change", () => { this.add([...file.files]); file.value = ""; });
    document.addEventListener("paste", (event) => this.#given(event, event.clipboardData));
    this.#listenToDrops();
  }

  /** Add files, as many as may be; says what is wrong with the others. */
  async add(files) {
    const problems = [];
    for (const file of files) {
      if (this.items.length >= MAX_IMAGES) {
        problems.push(`At most ${MAX_IMAGES} images go into one request; remove one to add another.`);
        break;
      }
      const problem = await refused(file);
      if (problem) problems.push(problem);
      else this.items.push({ blob: file, name: file.name || "pasted.png", url: URL.createObjectURL(file) });
    }
    this.say(problems.join(" "));
    this.#show();
    if (!problems.length) announce(`${this.items.length} of ${MAX_IMAGES} images`);
  }

  /** Take these instead: [{blob, name}]. */
  set(items) {
    for (const item of this.items) URL.revokeObjectURL(item.url);
    this.items = items.map(({ blob, name }) => ({ blob, name, url: URL.createObjectURL(blob) }));
    this.say("");
    this.#show();
  }

  say(text) {
    this.problem.textContent = text;
    this.problem.hidden = text === "";
  }

  #remove(item) {
    const at = this.items.indexOf(item);
    this.items.splice(at, 1);
    URL.revokeObjectURL(item.url);
    this.say("");
    this.#show();
    announce(`${item.name} removed`);
    (this.list.querySelectorAll("button")[Math.min(at, this.items.length - 1)] ?? byId("file")).focus();
  }

  #show() {
    this.list.replaceChildren(...this.items.map((item, i) => {
      const name = `Remove image ${i + 1}, ${item.name}`;
      const button = element("button", { type: "button", "aria-label": name, title: "Remove", onclick: () => this.#remove(item) });
      button.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M5 5l14 14M19 5 5 19"/></svg>';
      return element("li", {}, element("img", { src: item.url, alt: `Image ${i + 1}: ${item.name}` }), button);
    }));
    byId("images-count").textContent = this.items.length ? `${this.items.length} of ${MAX_IMAGES}` : `up to ${MAX_IMAGES}`;
    byId("drop").hidden = this.items.length >= MAX_IMAGES;
    byId("drop-text").textContent = this.items.length ? "Add another image" : "Choose an image";
    this.onChange();
  }

  #given(event, transfer) {
    const files = [...(transfer?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.onGiven();
    this.add(files);
  }

  #listenToDrops() {
    const veil = byId("veil");
    const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) veil.hidden = true; });
    addEventListener("drop", (event) => {
      veil.hidden = true;
      if (holdsFiles(event)) this.#given(event, event.dataTransfer);
    });
  }
}

/** Why a file cannot be an input, or "". The server checks again. */
async function refused(file) {
  const name = file.name || "This image";
  if (!TYPES.includes(file.type)) return `${name} is no image that can be read here; use PNG, JPEG, WebP, GIF, BMP or TIFF.`;
  if (!READABLE_HERE.has(file.type)) return "";
  try {
    const bitmap = await createImageBitmap(file);
    const pixels = bitmap.width * bitmap.height;
    bitmap.close();
    if (pixels > MAX_PIXELS) return `${name} has ${Math.round(pixels / 1e6)} megapixels; 64 are the most. Make it smaller and try again.`;
  } catch {
    return `${name} is damaged or no image; open it in another program, save it as PNG and try again.`;
  }
  return "";
}
