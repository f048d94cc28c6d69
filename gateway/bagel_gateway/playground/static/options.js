// The options of a request: what they mean, their defaults by mode, and the form made of them.
import { element } from "./dom.js";

const PICTURES = ["draw", "edit"];
const TEXTS = ["ask", "write"];
const whole = (min, max) => ({ kind: "number", min, max, step: 1 });
const real = (min, max, step) => ({ kind: "number", min, max, step });
const ALL = [...PICTURES, ...TEXTS];
const worded = (get, mode) => TEXTS.includes(mode) || get("think", false);
const sampled = (get, mode) => worded(get, mode) && get("do_sample", false);
const chosen = (get, mode) => sampled(get, mode) && get("text_temperature", 0.3) > 0 && get("top_k", 0) !== 1;
const guided = (get) => get("cfg_text_scale", 4) > 1;

/** name: as in the API. modes: where it has an effect. fallback: the default, or one by mode. on: when it has an effect. */
export const OPTIONS = [
  { name: "size", label: "Size", group: "quick", kind: "size", modes: PICTURES, help: "Width × height in pixels; empty: the model’s own size, of an edit the input’s." },
  { name: "num_inference_steps", label: "Steps", group: "quick", ...whole(2, 1000), modes: PICTURES, fallback: 50, help: "More steps draw more carefully, and take longer." },
  { name: "seed", label: "Seed", group: "quick", ...whole(0, Number.MAX_SAFE_INTEGER), modes: ALL, fallback: "random", help: "The same seed and options give the same result." },

  { name: "negative_prompt", label: "Negative prompt", group: "Guidance", kind: "text", modes: PICTURES, fallback: "none", wide: true, on: guided, help: "What to steer away from." },
  { name: "cfg_text_scale", label: "Text guidance", group: "Guidance", ...real(0, 100, 0.1), modes: PICTURES, fallback: "4.0", help: "How closely to follow the prompt; 1 and below is no guidance at all." },
  { name: "cfg_img_scale", label: "Image guidance", group: "Guidance", ...real(0, 100, 0.1), modes: PICTURES, fallback: { draw: "1.0", edit: "1.5" }, on: guided, help: "How closely to keep to the input images; 1 and below is none." },
  { name: "cfg_interval", label: "Guidance interval", group: "Guidance", kind: "interval", modes: PICTURES, wide: true, fallback: { draw: ["0.4", "1.0"], edit: ["0.0", "1.0"] }, on: guided, help: "When guidance is on: from 1 (noise) down to 0 (picture)." },
  { name: "cfg_renorm_type", label: "Renormalise", group: "Guidance", kind: "choice", choices: ["global", "text_channel", "channel"], modes: PICTURES, fallback: { draw: "global", edit: "text_channel" }, on: (get) => guided(get) && get("cfg_renorm_min", 0) < 1, help: "Over what a guided step keeps the strength of the unguided one." },
  { name: "cfg_renorm_min", label: "Renormalise, least", group: "Guidance", ...real(0, 1, 0.05), modes: PICTURES, fallback: "0.0", on: guided, help: "Lower bound of that factor, from 0 to 1; 1 is no renormalising." },
  { name: "timestep_shift", label: "Timestep shift", group: "Guidance", ...real(0.001, 100, 0.1), modes: PICTURES, fallback: "3.0", on: (get) => get("num_inference_steps", 50) > 2, help: "Above 1 spends more of the steps on the overall composition." },

  { name: "posterior", label: "Input noise", group: "Guidance", kind: "choice", choices: ["content", "seed", "mean"], modes: ["edit"], fallback: "content", help: "Where the noise of the encoded input comes from: its pixels, the seed, or none (mean)." },

  { name: "max_tokens", label: "Longest answer", group: "Text", ...whole(1, 100000), modes: TEXTS, fallback: 1000, help: "Limit of the answer, in tokens." },
  { name: "max_think_tokens", label: "Longest plan", group: "Text", ...whole(1, 100000), modes: ALL, fallback: 1000, on: (get) => get("think", false), help: "Limit of the think text, in tokens." },
  { name: "do_sample", label: "Sample", group: "Text", kind: "switch", modes: ALL, on: worded, help: "Draw words at random instead of taking the likeliest." },
  { name: "text_temperature", label: "Temperature", group: "Text", ...real(0, 10, 0.1), modes: ALL, fallback: "0.3", on: sampled, help: "Higher is more varied; 0 takes the likeliest word." },
  { name: "top_p", label: "Top p", group: "Text", ...real(0.01, 1, 0.05), modes: ALL, fallback: "1.0", on: chosen, help: "Sample from the likeliest words that together have this probability." },
  { name: "top_k", label: "Top k", group: "Text", ...whole(0, 100000), modes: ALL, fallback: "0, all", on: (get, mode) => sampled(get, mode) && get("text_temperature", 0.3) > 0, help: "Sample from this many likeliest words." },
  { name: "repetition_penalty", label: "Repetition penalty", group: "Text", ...real(0.1, 10, 0.05), modes: ALL, fallback: "1.0", on: worded, help: "Above 1, words that were there already become less likely." },

  { name: "n", label: "Pictures", group: "Output", ...whole(1, 4), modes: PICTURES, fallback: 1, help: "Several of one prompt, with rising seeds." },
  { name: "partial_images", label: "Previews", group: "Output", ...whole(0, 3), modes: PICTURES, fallback: 3, on: (get) => get("num_inference_steps", 50) > 2, help: "Pictures of the picture under way." },
  { name: "output_format", label: "Format", group: "Output", kind: "choice", choices: ["png", "jpeg", "webp"], modes: PICTURES, fallback: "png", help: "PNG is lossless and carries its settings." },
  { name: "output_compression", label: "Quality", group: "Output", ...whole(0, 100), modes: PICTURES, fallback: 95, on: (get) => get("output_format", "png") !== "png", help: "Of JPEG and WebP, from 0 to 100." },
];

const fallback = (option, mode) => option.fallback?.[mode] ?? (typeof option.fallback === "object" ? "" : option.fallback ?? "");

/** The form's options: build(), show(mode), read() and write(values). */
export class OptionForm {
  constructor({ quick, groups, badge, think, onChange }) {
    this.badge = badge;
    this.think = think;
    this.mode = "draw";
    this.rows = new Map();
    const sections = new Map([["quick", quick]]);
    for (const option of OPTIONS) {
      if (!sections.has(option.group)) sections.set(option.group, section(groups, option.group));
      const row = makeRow(option);
      this.rows.set(option.name, { option, ...row });
      sections.get(option.group).append(row.box);
    }
    for (const place of [quick, groups]) place.addEventListener("input", () => { this.refresh(); onChange?.(); });
    this.sections = [...groups.children];
  }

  /** Show what has an effect in this mode, with its defaults. */
  show(mode) {
    this.mode = mode;
    for (const { option, inputs } of this.rows.values()) {
      const value = fallback(option, mode);
      inputs.forEach((input, i) => {
        const shown = Array.isArray(value) ? value[i] : value;
        if (option.kind === "choice") input.options[0].textContent = `${shown} (default)`;
        else if (option.kind === "size") input.placeholder = "auto";
        else if (option.kind !== "switch") input.placeholder = shown;
      });
    }
    this.refresh();
  }

  refresh() {
    const values = this.values();
    const get = (name, otherwise) => (name === "think" ? this.think.checked : values[name] ?? otherwise);
    let changed = 0;
    for (const { option, box, inputs } of this.rows.values()) {
      box.hidden = !option.modes.includes(this.mode) || (option.on && !option.on(get, this.mode));
      const set = inputs.some((input) => (input.type === "checkbox" ? input.checked : input.value !== ""));
      box.classList.toggle("changed", set);
      if (set && !box.hidden && option.group !== "quick") changed += 1;
    }
    for (const each of this.sections) each.hidden = [...each.querySelectorAll(".option")].every((box) => box.hidden);
    this.badge.hidden = changed === 0;
    this.badge.textContent = `${changed} changed`;
  }

  /** What was set and has an effect, by the API's names. Throws a Problem for what is no valid value. */
  read() {
    const values = {};
    for (const { option, box, inputs } of this.rows.values()) {
      if (box.hidden) continue;
      check(option, inputs);
      const value = valueOf(option, inputs);
      if (value !== undefined) values[option.name] = value;
    }
    return values;
  }

  /** Everything that was set, also what has no effect here. */
  values() {
    const found = {};
    for (const { option, inputs } of this.rows.values()) {
      const value = valueOf(option, inputs);
      if (value !== undefined) found[option.name] = value;
    }
    return found;
  }

  write(values) {
    for (const { option, inputs } of this.rows.values()) {
      const value = values[option.name];
      if (option.kind === "switch") inputs[0].checked = Boolean(value);
      else if (option.kind === "size") [inputs[0].value, inputs[1].value] = value ? value.split("x") : ["", ""];
      else if (option.kind === "interval") [inputs[0].value, inputs[1].value] = value ?? ["", ""];
      else inputs[0].value = value ?? "";
      for (const input of inputs) input.removeAttribute("aria-invalid");
    }
    this.refresh();
  }

  /** The input of an option that the server has refused, if the form has one. */
  inputOf(name) {
    const row = this.rows.get(name) ?? this.rows.get({ steps: "num_inference_steps", height: "size", width: "size", temperature: "text_temperature" }[name]);
    return row && !row.box.hidden ? row.inputs[0] : undefined;
  }
}

/** A value that the form itself refuses. */
export class Problem extends Error {
  constructor(message, input) {
    super(message);
    this.input = input;
  }
}

function section(groups, title) {
  const box = element("div", { class: "options" });
  groups.append(element("section", { "aria-label": title }, element("h3", {}, title), box));
  return box;
}

function makeRow(option) {
  const id = `option-${option.name}`;
  const help = element("p", { class: "help", id: `${id}-help` }, option.help);
  const shared = { id, "aria-describedby": help.id };
  if (option.kind === "switch") {
    const input = element("input", { ...shared, type: "checkbox", role: "switch" });
    help.classList.add("block");
    const box = element("div", { class: "option switch" }, element("div", {}, element("label", { class: "label", for: id }, option.label), help), input);
    return { box, inputs: [input] };
  }
  if (option.kind === "size" || option.kind === "interval") return makePair(option, id, help);
  const input = makeInput(option, shared);
  const box = element("div", { class: option.wide ? "option wide" : "option" }, element("label", { class: "label", for: id }, option.label), input, help);
  return { box, inputs: [input] };
}

function makeInput(option, shared) {
  if (option.kind === "text") return element("input", { ...shared, type: "text", autocomplete: "off" });
  if (option.kind === "number") return element("input", { ...shared, type: "number", min: option.min, max: option.max, step: option.step === 1 ? 1 : "any", inputmode: option.step === 1 ? "numeric" : "decimal" });
  return element("select", shared, element("option", { value: "" }), ...option.choices.map((choice) => element("option", { value: choice }, choice)));
}

function makePair(option, id, help) {
  const size = option.kind === "size";
  const make = (which, suffix) => element("input", {
    id: suffix ? `${id}-${suffix}` : id, type: "number", "aria-label": `${option.label}: ${which}`, "aria-describedby": help.id,
    ...(size ? { min: 16, step: 16, inputmode: "numeric" } : { min: 0, max: 1, step: "any", inputmode: "decimal" }),
  });
  const inputs = size ? [make("width"), make("height", "height")] : [make("lower end"), make("upper end", "high")];
  const pair = element("div", { class: "pair" }, inputs[0], element("span", { "aria-hidden": "true" }, size ? "×" : "to"), inputs[1]);
  const box = element("div", { class: "option wide", role: "group", "aria-label": option.label }, element("span", { class: "label" }, option.label), pair, help);
  return { box, inputs };
}

function valueOf(option, inputs) {
  const given = inputs.map((input) => (input.type === "checkbox" ? input.checked : input.value.trim()));
  if (option.kind === "switch") return given[0] || undefined;
  if (given.some((value) => value === "")) return undefined;
  if (option.kind === "size") return given.join("x");
  if (option.kind === "interval") return given.map(Number);
  return option.kind === "number" ? Number(given[0]) : given[0];
}

function check(option, inputs) {
  const empty = inputs.filter((input) => input.type !== "checkbox" && input.value.trim() === "" && !input.validity.badInput);
  if (empty.length === 1 && inputs.length === 2) throw new Problem(`${option.label}: fill in both fields, or neither.`, empty[0]);
  for (const input of inputs) {
    if (input.type !== "number" || (input.value === "" && !input.validity.badInput)) continue;
    const { badInput, rangeUnderflow, rangeOverflow } = input.validity;
    const broken = option.step === 1 && !Number.isInteger(Number(input.value));
    if (badInput || rangeUnderflow || rangeOverflow || broken) {
      const kind = option.step === 1 ? "a whole number" : "a number";
      const range = input.max ? `${kind} from ${input.min} to ${input.max}` : `${kind}, at least ${input.min}`;
      throw new Problem(`${option.label} must be ${range}.`, input);
    }
  }
}
