// The page: its form, its requests, and what is shown of them.
import { ApiError, apiKey, send, server } from "./api.js";
import { announce, byId, element } from "./dom.js";
import { examplesOf } from "./examples.js";
import { failureOf } from "./failures.js";
import { History } from "./history.js";
import { Images } from "./images.js";
import { OptionForm, Problem } from "./options.js";
import { MODES } from "./request.js";
import { Outcome } from "./view.js";

const CHECK_EVERY_MS = 8000;
const state = { mode: "draw", model: undefined, running: undefined };

const form = byId("composer");
const prompt = byId("prompt");
const think = byId("think");
const options = new OptionForm({ quick: byId("quick"), groups: byId("groups"), badge: byId("changed"), think });
const images = new Images({ onGiven: switchToImages, onChange: () => {} });
const outcome = new Outcome({ again, use, cancel, place, retry: () => form.requestSubmit(), enterKey });
const history = new History({ onRestore: restore, onForget: showWelcome });

// Modes -------------------------------------------------------------------------------------------------------------

function setMode(mode) {
  state.mode = mode;
  const { help, placeholder, verb, readsImage, makesImage } = MODES[mode];
  form.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
  byId("mode-help").textContent = help;
  byId("inputs").hidden = !readsImage;
  byId("generate-text").textContent = verb;
  byId("think-help").textContent = `The model writes down a plan before it ${makesImage ? "draws" : "answers"}.`;
  prompt.placeholder = placeholder;
  options.show(mode);
  say("");
  if (byId("outcome").hidden) showWelcome();
}

/** Images were given where the mode takes none: the mode next to it does. */
function switchToImages() {
  if (MODES[state.mode].readsImage) return;
  setMode(MODES[state.mode].makesImage ? "edit" : "ask");
  announce(`Switched to ${MODES[state.mode].title}, which takes images.`);
}

function showWelcome() {
  outcome.hide();
  byId("welcome").hidden = false;
  const { title, text, prompts, scene } = examplesOf(state.mode, state.model);
  byId("welcome-title").textContent = title;
  byId("welcome-text").textContent = text;
  const picture = () => scene && element("img", { src: scene, alt: "" });
  byId("examples").replaceChildren(...prompts.map((each) => element("li", {}, element("button", { type: "button", onclick: () => tryExample(each, scene) }, picture(), element("span", {}, each)))));
}

async function tryExample(text, scene) {
  prompt.value = text;
  if (scene && !images.items.length) {
    const blob = await (await fetch(scene)).blob();
    images.set([{ blob, name: "scene.png" }]);
  }
  form.requestSubmit();
}

// Requests ----------------------------------------------------------------------------------------------------------

/** What the form asks for, or undefined: then it says why not. */
function readForm() {
  say("");
  images.say("");
  form.querySelectorAll("[aria-invalid]").forEach((input) => input.removeAttribute("aria-invalid"));
  const mode = MODES[state.mode];
  try {
    if (!prompt.value.trim()) throw new Problem("Write what you want first.", prompt);
    if (mode.readsImage && !images.items.length) {
      images.say("Add an image first: choose one, drop it here, or paste it.");
      byId("file").focus();
      return undefined;
    }
    const { seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1, ...settings } = options.read();
    const given = mode.readsImage ? images.items.map(({ blob, name }) => ({ blob, name })) : [];
    return { mode: state.mode, prompt: prompt.value.trim(), think: think.checked, seed, settings, images: given, model: state.model };
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    blame(problem.input, problem.message);
    return undefined;
  }
}

function say(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = text === "";
}

/** Say what is wrong with an input, and go there. */
function blame(input, message) {
  say(message);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", "problem");
  input.closest("details")?.setAttribute("open", "");
  input.focus();
}

async function start() {
  if (state.running) return;
  const asked = readForm();
  if (!asked) return;
  const controller = new AbortController();
  const entry = { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), when: Date.now(), state: "running", thought: "", answer: "", pictures: [], ...asked };
  setRunning({ controller, entry });
  byId("welcome").hidden = true;
  outcome.begin(entry);
  if (matchMedia("(max-width: 860px)").matches) byId("result").scrollIntoView({ behavior: "smooth" });
  let refusedInput;
  try {
    await follow(entry, controller.signal);
    entry.state = "done";
    announce(entry.answer ? `Done. ${entry.answer.slice(0, 300)}` : `Done after ${Math.round(outcome.seconds)} seconds.`);
  } catch (error) {
    refusedInput = failed(entry, error);
  }
  entry.seconds = outcome.seconds;
  entry.pictures = entry.pictures.filter(Boolean);
  setRunning(undefined);
  outcome.end(entry);
  history.keep(entry);
  if (refusedInput) blame(refusedInput, entry.error.message);
}

async function follow(entry, signal) {
  const count = entry.settings.n ?? 1;
  const steps = Array(count).fill(0);
  for await (const event of send(entry, signal)) {
    if (event.type === "think") {
      if (event.index > 0) continue; // of several pictures, one plan is enough to read
      entry.thought = (entry.thought + event.text).trimStart();
      outcome.think(entry.thought);
      outcome.phase("Thinking");
    } else if (event.type === "text") {
      outcome.thinkingIsOver();
      entry.answer = (entry.answer + event.text).trimStart();
      outcome.answer(entry.answer);
      outcome.phase("Writing");
    } else if (event.type === "step") {
      outcome.thinkingIsOver();
      entry.steps = event.steps + 1; // as asked: n timesteps are n - 1 steps
      steps[event.index] = event.step;
      const share = steps.reduce((sum, step) => sum + step, 0) / (event.steps * count);
      outcome.phase(count > 1 ? `Drawing ${count} pictures` : `Drawing, step ${event.step + 1} of ${entry.steps}`, share);
    } else if (event.type === "preview") {
      outcome.thinkingIsOver();
      entry.pictures[event.index] = event.blob;
      outcome.preview(event.blob, event.number + 1);
    } else if (event.type === "picture") entry.pictures[event.index] = event.blob;
    else if (event.type === "usage") entry.usage = event.usage;
    else if (event.type === "end") entry.cut = event.reason === "length";
  }
}

function cancel() {
  state.running?.controller.abort();
}

/** Note why a request ended early; the input that the server has refused, if it is one of the form. */
function failed(entry, error) {
  if (error.name === "AbortError") {
    entry.state = "cancelled";
    announce("Cancelled.");
    return undefined;
  }
  entry.state = "failed";
  entry.error = failureOf(error, location.origin);
  check();
  if (!(error instanceof ApiError) || !error.param) return undefined;
  return error.param === "prompt" ? prompt : options.inputOf(error.param);
}

function setRunning(running) {
  const focused = [byId("generate"), byId("cancel")].includes(document.activeElement);
  state.running = running;
  byId("generate").hidden = Boolean(running);
  byId("cancel").hidden = !running;
  byId("result").setAttribute("aria-busy", String(Boolean(running)));
  if (focused) (running ? byId("cancel") : byId("generate")).focus({ preventScroll: true });
}

// What can be done with a result ------------------------------------------------------------------------------------

function fill(entry) {
  prompt.value = entry.prompt;
  think.checked = Boolean(entry.think);
  setMode(entry.mode);
  options.write({ ...entry.settings, seed: entry.seed });
  if (MODES[entry.mode].readsImage) images.set(entry.images);
}

function restore(entry) {
  if (state.running) return;
  fill(entry);
  byId("welcome").hidden = true;
  outcome.end(entry);
  announce(`Restored: ${entry.prompt}`);
}

function again(entry) {
  fill(entry);
  options.write(entry.settings);
  form.requestSubmit();
}

function use(blob, extension, mode) {
  images.set([{ blob, name: `picture.${extension}` }]);
  prompt.value = "";
  setMode(mode);
  prompt.focus();
  announce(`The picture is the input of ${MODES[mode].title}.`);
}

/** Where a key is given; shown once the server has asked for one. */
function enterKey() {
  byId("key").hidden = false;
  byId("api-key").focus();
}

async function useKey() {
  const field = byId("api-key");
  const key = field.value.trim();
  if (/[^!-~]/.test(key)) return complainOfKey("That is no key: it has no spaces, and plain letters, digits and signs alone.");
  apiKey.set(key);
  await check();
  if (!byId("key").hidden) field.focus();
}

/** Ask for a key, or no more. A page that is opened by a link sends none, so the API's own has no link then. */
function askForKey(wanted) {
  if (!wanted && !byId("key").hidden) takeKey();
  byId("key").hidden = !wanted;
  byId("api").hidden = wanted || apiKey.get() !== "";
  complainOfKey(wanted && apiKey.get() ? "The server does not know this key, or no longer." : "");
}

/** The key that was given works. A server that reads its keys again may say so only in a later check. */
function takeKey() {
  const field = byId("api-key");
  field.value = "";
  // A hidden field would lose the focus to nothing.
  if (byId("key").contains(document.activeElement)) prompt.focus();
  announce("The key is accepted.");
}

function complainOfKey(text) {
  byId("key-problem").textContent = text;
  byId("key-problem").hidden = text === "";
  byId("api-key").setAttribute("aria-invalid", String(text !== ""));
}

/** Where the API is, for code. */
function place() {
  const base = new URL("./", location.href).href;
  const [port, security] = document.querySelector('meta[name="grpc"]').content.split(" ");
  return { base, grpc: { address: `${location.hostname}:${port}`, plaintext: security === "plaintext" }, key: apiKey.get() !== "" };
}

// The server --------------------------------------------------------------------------------------------------------

async function check() {
  const told = (name, text) => {
    if (byId("server-text").textContent === text) return;
    byId("server").dataset.state = name;
    byId("server-text").textContent = text;
  };
  const key = apiKey.get();
  try {
    const { ready, models } = await server();
    if (ready) askForKey(false);
    const before = state.model;
    state.model = models[0] ?? state.model;
    if (ready) told("ready", `${state.model ?? "The model"} is ready`);
    else told("asking", "The model is not ready yet");
    if (state.model !== before && byId("outcome").hidden) showWelcome();
  } catch (error) {
    // An answer to a key that has been replaced meanwhile says nothing of the new one.
    if (error.kind === "key" && apiKey.get() !== key) return;
    if (error.kind === "key") askForKey(true);
    told("down", error.kind === "key" ? "An API key is needed" : "The server does not answer");
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", theme === "dark" ? "Use the light theme" : "Use the dark theme");
}

// Start -------------------------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => { event.preventDefault(); start(); });
form.addEventListener("change", (event) => { if (event.target.name === "mode") setMode(event.target.value); });
byId("cancel").addEventListener("click", cancel);
byId("key").addEventListener("submit", (event) => { event.preventDefault(); useKey(); });
byId("reset").addEventListener("click", () => { options.write({}); announce("All options are back at their defaults."); });
think.addEventListener("change", () => options.refresh());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  if (event.key === "Escape") cancel();
});
byId("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("bagel-theme", theme);
  setTheme(theme);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) check(); });
setInterval(() => { if (!document.hidden) check(); }, CHECK_EVERY_MS);

const system = matchMedia("(prefers-color-scheme: dark)");
const followSystem = () => { if (!localStorage.getItem("bagel-theme")) setTheme(system.matches ? "dark" : "light"); };
setTheme(document.documentElement.dataset.theme ?? "light");
followSystem();
system.addEventListener("change", followSystem);
if (/Mac|iPhone|iPad/.test(navigator.platform)) form.querySelector("#generate kbd").textContent = "⌘ ↵";
images.set([]);
setMode("draw");
history.open();
check();
