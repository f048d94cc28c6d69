// What a request says, apart from how it is sent or shown: one description for fetch, curl, Python and grpcurl.

export const MODES = {
  draw: { modality: "MODALITY_TEXT2IMG", path: "v1/images/generations", makesImage: true, readsImage: false, verb: "Draw", title: "Text to image", help: "Words in, a picture out.", placeholder: "What should the picture show?" },
  edit: { modality: "MODALITY_IMG2IMG", path: "v1/images/edits", makesImage: true, readsImage: true, verb: "Edit", title: "Image edit", help: "Pictures and words in, a changed picture out.", placeholder: "What should change?" },
  ask: { modality: "MODALITY_IMG2TEXT", path: "v1/chat/completions", makesImage: false, readsImage: true, verb: "Ask", title: "Image to text", help: "Pictures and a question in, an answer out.", placeholder: "What do you want to know about the image?" },
  write: { modality: "MODALITY_TEXT2TEXT", path: "v1/chat/completions", makesImage: false, readsImage: false, verb: "Write", title: "Text", help: "Words in, words out.", placeholder: "Ask anything" },
};

/** The request's fields by the API's names, without images; `settings` is what the form says. */
export function fieldsOf({ mode, prompt, think, seed, settings, model }) {
  const fields = { ...(model ? { model } : {}), ...(MODES[mode].makesImage ? { prompt } : {}), ...settings, seed };
  if (think !== undefined) fields.think = think;
  return fields;
}

/** Content of the message of a chat request; urls are those of its images. */
export function contentOf(prompt, urls) {
  const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return images.length ? [...images, { type: "text", text: prompt }] : prompt;
}
