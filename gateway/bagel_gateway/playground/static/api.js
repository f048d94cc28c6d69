// Talks to the gateway: one request as a stream of what happens, and whether it is ready.
import { contentOf, fieldsOf, MODES } from "./request.js";
import { dataUrl } from "./dom.js";

const STATUS = { invalid_request_error: 400, not_found_error: 404, rate_limit_error: 429, server_error: 500 };
const KEY = "bagel-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/** An answer that is none, with what can be done about it. kind: down, invalid, key, size, busy, unready, broken, failed. */
export class ApiError extends Error {
  constructor(kind, message, { param, retryAfter, requestId } = {}) {
    super(message);
    Object.assign(this, { kind, param, retryAfter, requestId });
  }
}

/**
 * Send a request; yields {type, …}: think and text {text}, step {step, steps}, preview and picture {index, blob},
 * usage {usage}, end {reason}. Throws ApiError, or an AbortError once signal says so.
 */
export async function* send(asked, signal) {
  const read = MODES[asked.mode].makesImage ? pictureReader() : answerReader();
  const response = await post(MODES[asked.mode].path, await bodyOf(asked), signal);
  let complete = false;
  for await (const data of serverSentEvents(response, signal)) {
    if (data === "[DONE]") { complete = true; continue; }
    const event = JSON.parse(data);
    if (event.error) throw failed(STATUS[event.error.type] ?? 500, event.error, response);
    for (const each of read(event)) {
      complete ||= each.type === "picture" || each.type === "end";
      yield each;
    }
  }
  if (!complete) throw new ApiError("broken", "The answer ended before it was complete.");
}

/** {ready, models: [names]}; throws ApiError if nobody answers, or not without a key. */
export async function server() {
  if (!(await get("readyz")).ok) return { ready: false, models: [] }; // asked for its models, it would wait for one
  const models = await get("v1/models");
  if (models.status === 401 || models.status === 403) throw failed(models.status, {}, models);
  return { ready: true, models: models.ok ? (await models.json()).data.map((model) => model.id) : [] };
}

async function get(path) {
  try {
    return await fetch(path, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(8000) });
  } catch {
    throw down();
  }
}

async function post(path, body, signal) {
  let response;
  try {
    const json = typeof body === "string" ? { "Content-Type": "application/json" } : {};
    response = await fetch(path, { method: "POST", body, signal, headers: { ...headers(), ...json } });
  } catch (error) {
    throw error.name === "AbortError" ? error : down();
  }
  if (response.ok) return response;
  const text = await response.text();
  let error = {};
  try {
    const said = JSON.parse(text);
    error = said.error ?? { message: said.detail };
  } catch {
    error = { message: text.slice(0, 300) };
  }
  throw failed(response.status, error, response);
}

function headers() {
  const key = apiKey.get();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function down() {
  return new ApiError("down", `Nothing answers at ${location.origin}.`);
}

function failed(status, error, response) {
  const kinds = { 400: "invalid", 404: "invalid", 422: "invalid", 401: "key", 403: "key", 413: "size", 429: "busy", 503: "unready" };
  const message = typeof error.message === "string" && error.message ? error.message : `The server said ${status} and no more.`;
  const retryAfter = Number(response.headers.get("retry-after")) || undefined;
  return new ApiError(kinds[status] ?? "failed", message, { param: error.param, retryAfter, requestId: response.headers.get("x-request-id") ?? undefined });
}

async function bodyOf(asked) {
  const mode = MODES[asked.mode];
  const fields = { ...fieldsOf(asked), stream: true };
  if (!mode.makesImage) {
    const urls = await Promise.all(asked.images.map(({ blob }) => dataUrl(blob)));
    const messages = [{ role: "user", content: contentOf(asked.prompt, urls) }];
    return JSON.stringify({ ...fields, messages, modalities: ["text"], stream_options: { include_usage: true } });
  }
  Object.assign(fields, { partial_images: fields.partial_images ?? (fields.num_inference_steps === 2 ? 0 : 3), progress: true });
  if (!mode.readsImage) return JSON.stringify(fields);
  return formOf(fields, asked.images);
}

/** A multipart body with every text as it is: FormData would turn line ends into CRLF, and so change the prompt. */
function formOf(fields, images) {
  const boundary = `bagel-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
  const pieces = [];
  const add = (name, value, about = "") => pieces.push(`--${boundary}\r\nContent-Disposition: form-data; name="${name}"${about}\r\n\r\n`, value, "\r\n");
  for (const [name, value] of Object.entries(fields)) {
    for (const each of [value].flat()) add(Array.isArray(value) ? `${name}[]` : name, String(each));
  }
  for (const { blob, name } of images) {
    const filename = name.replace(/[\r\n"]/g, encodeURIComponent);
    add("image[]", blob, `; filename="${filename}"\r\nContent-Type: ${blob.type || "application/octet-stream"}`);
  }
  return new Blob([...pieces, `--${boundary}--\r\n`], { type: `multipart/form-data; boundary=${boundary}` });
}

/** Reads the events of pictures. Their texts are plans, with the model's own marks around them. */
function pictureReader() {
  const splits = new Map();
  return function* read(event) {
    const index = event.index ?? 0;
    const kind = event.type.replace(/^image_(generation|edit)\./, "");
    if (kind === "partial_image") yield { type: "preview", index, number: event.partial_image_index, blob: blobOf(event) };
    else if (kind === "progress") yield { type: "step", index, step: event.step, steps: event.steps };
    else if (kind === "think_text.delta") {
      if (!splits.has(index)) splits.set(index, markSplitter());
      for (const { text } of splits.get(index)(event.delta, false)) yield { type: "think", index, text };
    } else if (kind === "completed") {
      yield { type: "picture", index, blob: blobOf(event) };
      if (event.usage) yield { type: "usage", usage: event.usage };
    }
  };
}

/** Reads chat chunks; what the model wrote between its think marks is its plan, the rest its answer. */
function answerReader() {
  const split = markSplitter();
  return function* read(event) {
    const [choice] = event.choices ?? [];
    yield* split(choice?.delta?.content ?? "", Boolean(choice?.finish_reason));
    if (event.usage) yield { type: "usage", usage: event.usage };
    if (choice?.finish_reason) yield { type: "end", reason: choice.finish_reason };
  };
}

/** A text that comes in pieces as {type: think or text, text}, without the marks, which may come in pieces too. */
function markSplitter() {
  let pending = "";
  let type = "text";
  return function* split(more, last) {
    pending += more;
    for (;;) {
      const mark = type === "text" ? "<think>" : "</think>";
      const at = pending.indexOf(mark);
      const upTo = at >= 0 ? at : last ? pending.length : pending.length - partOf(mark, pending);
      if (upTo > 0) yield { type, text: pending.slice(0, upTo) };
      pending = pending.slice(at >= 0 ? at + mark.length : upTo);
      if (at < 0) return;
      type = type === "text" ? "think" : "text";
    }
  };
}

/** How much of a text's end may be the beginning of a mark. */
function partOf(mark, text) {
  for (let length = Math.min(mark.length - 1, text.length); length > 0; length -= 1) if (text.endsWith(mark.slice(0, length))) return length;
  return 0;
}

function blobOf({ b64_json: encoded, output_format: format = "png" }) {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

/** The data of each event of a text/event-stream. */
async function* serverSentEvents(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) throw new DOMException("cancelled", "AbortError");
    throw new ApiError("broken", "The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
