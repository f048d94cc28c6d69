// Errors in a person's words: what happened, and what to do about it.
import { ApiError } from "./api.js";

const KINDS = {
  down: ["The server does not answer", "See that it runs (`bagel serve`) and that this computer reaches it, then try again."],
  invalid: ["This cannot be done as asked", "Change that and try again; your prompt and options are still in the form."],
  key: ["This server wants an API key", "Enter one at the top of this page; whoever runs the server has it for you."],
  size: ["That is too much to send", "Make the images smaller, or send fewer of them, and try again."],
  busy: ["The server is busy", "Others are being served; try again in a moment."],
  unready: ["The model is not ready", "A service is starting, or has stopped. Wait a few seconds and try again; if it stays so, the server’s log says why."],
  broken: ["The connection broke", "The server may have been stopped or restarted, so the result is lost. Try again; the same seed gives the same result."],
  failed: ["The server could not do this", "Try again; if it happens again, the server’s log says more."],
};

/** {title, message, remedy, …} of what went wrong, plain enough to be kept. */
export function failureOf(error, origin) {
  if (!(error instanceof ApiError)) {
    console.error(error);
    return { title: "The page made a mistake", message: `${error.name}: ${error.message}`, remedy: `Load ${origin} again; the browser’s console has the details.` };
  }
  const [title, usual] = KINDS[error.kind];
  const remedy = error.retryAfter ? `Try again in ${error.retryAfter} s.` : usual;
  return { title, message: sentence(error.message), remedy, requestId: error.requestId, wantsKey: error.kind === "key" };
}

/** Messages of the server are one line without a capital or a full stop. */
function sentence(message) {
  const text = message.trim();
  const begun = /^[a-z]+ [a-z]/.test(text) && !text.includes("_") ? text[0].toUpperCase() + text.slice(1) : text;
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}
