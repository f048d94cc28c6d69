// The same request as code to copy: curl, Python with the openai package, grpcurl.
import { contentOf, fieldsOf, MODES } from "./request.js";

const OPENAI = { images: ["model", "prompt", "size", "n", "output_format", "output_compression"], chat: ["model", "max_tokens", "seed", "top_p"] };
const RENORM = { global: "RENORM_TYPE_GLOBAL", text_channel: "RENORM_TYPE_TEXT_CHANNEL", channel: "RENORM_TYPE_CHANNEL" };

/** {curl, python, grpcurl} of a request; key: whether the server wants one; grpc: its gRPC {address, plaintext}. */
export function snippets(asked, { base, grpc, key }) {
  const settings = { ...asked.settings };
  delete settings.partial_images; // code waits for the result
  const wanted = { ...asked, settings };
  return { curl: curl(wanted, base, key), Python: python(wanted, base, key), grpcurl: grpcurl(wanted, grpc, key) };
}

/** What to know before the code is run, or "". */
export function noteOf(asked) {
  return asked.images.length ? `Save the input as ${asked.images.map(({ name }) => name).join(", ")} first.` : "";
}

function curl(asked, base, key) {
  const mode = MODES[asked.mode];
  const lines = [`curl -sS ${quoted(base + mode.path)}`];
  if (key) lines.push('-H "Authorization: Bearer $BAGEL_API_KEY"');
  const save = mode.makesImage ? saved(asked, "jq -r '.data[].b64_json'") : "jq -r '.choices[0].message.content'";
  if (mode.makesImage && mode.readsImage) {
    for (const [name, value] of Object.entries(fieldsOf(asked))) {
      for (const each of [value].flat()) lines.push(`--form-string ${quoted(`${name}${Array.isArray(value) ? "[]" : ""}=${each}`)}`);
    }
    lines.push(...asked.images.map(({ name }) => `-F ${quoted(`image[]=@${name}`)}`));
    return `${lines.join(" \\\n  ")} \\\n  | ${save}`;
  }
  lines.push("-H 'Content-Type: application/json' -d @-");
  return withDocument(lines.join(" \\\n  "), save, mode.makesImage ? fieldsOf(asked) : chatOf(asked), asked.images);
}

function grpcurl(asked, { address, plaintext }, key) {
  const { makesImage } = MODES[asked.mode];
  const secure = plaintext ? "-plaintext " : "";
  const header = key ? '-H "authorization: Bearer $BAGEL_API_KEY" ' : "";
  const command = `grpcurl ${secure}-max-msg-sz 67108864 ${header}-d @ ${address} bagel.v1.GatewayService/Generate`;
  const save = makesImage ? saved({ ...asked, settings: { ...asked.settings, n: 1 } }, "jq -r '.picture.data // empty'") : "jq -rj '.text.text // empty'";
  return withDocument(command, save, grpcOf(asked), asked.images);
}

function python(asked, base, key) {
  const mode = MODES[asked.mode];
  const known = OPENAI[mode.makesImage ? "images" : "chat"];
  const all = Object.entries(fieldsOf(asked));
  const named = all.filter(([name]) => known.includes(name)).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = Object.fromEntries(all.filter(([name]) => !known.includes(name)));
  if (Object.keys(extra).length) named.push(`    extra_body=${literal(extra)},`);
  const file = (name) => `open(${literal(name)}, "rb")`;
  const setup = [
    ...(mode.makesImage || asked.images.length ? ["import base64"] : []), ...(key ? ["import os"] : []),
    ...(mode.makesImage || asked.images.length || key ? [""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${literal(`${base}v1`)}, api_key=${key ? 'os.environ["BAGEL_API_KEY"]' : '"none"'})`,
  ];
  if (mode.makesImage) {
    const images = mode.readsImage ? [`    image=[${asked.images.map(({ name }) => file(name)).join(", ")}],`] : [];
    const extension = asked.settings.output_format ?? "png";
    return [
      ...setup, `result = client.images.${mode.readsImage ? "edit" : "generate"}(`, ...images, ...named, ")",
      "for number, picture in enumerate(result.data, 1):",
      `    with open(f"picture-{number}.${extension}", "wb") as file:`, "        file.write(base64.b64decode(picture.b64_json))", "",
    ].join("\n");
  }
  const content = asked.images.length
    ? [`[`, ...asked.images.map(({ name, blob }) => `        {"type": "image_url", "image_url": {"url": ${literal(`data:${blob.type};base64,`)} + base64.b64encode(${file(name)}.read()).decode()}},`), `        {"type": "text", "text": ${literal(asked.prompt)}},`, "    ]"].join("\n")
    : literal(asked.prompt);
  const model = named.some((line) => line.startsWith("    model=")) ? [] : ['    model="bagel",'];
  return [...setup, "answer = client.chat.completions.create(", ...model, ...named, `    messages=[{"role": "user", "content": ${content}}],`, '    modalities=["text"],', ")", "print(answer.choices[0].message.content)", ""].join("\n");
}

function chatOf(asked) {
  const urls = asked.images.map(({ blob }, i) => `data:${blob.type};base64,${placeholder(i)}`);
  return { ...fieldsOf(asked), messages: [{ role: "user", content: contentOf(asked.prompt, urls) }], modalities: ["text"] };
}

function grpcOf(asked) {
  const { settings: given, mode } = asked;
  const drop = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
  const [width, height] = given.size?.split("x").map(Number) ?? [];
  const image = drop({
    steps: given.num_inference_steps, timestep_shift: given.timestep_shift, cfg_text_scale: given.cfg_text_scale, cfg_img_scale: given.cfg_img_scale,
    cfg_interval: given.cfg_interval && { lo: given.cfg_interval[0], hi: given.cfg_interval[1] },
    cfg_renorm_type: RENORM[given.cfg_renorm_type], cfg_renorm_min: given.cfg_renorm_min, height, width,
  });
  const text = drop({ do_sample: given.do_sample, temperature: given.text_temperature, top_p: given.top_p, top_k: given.top_k, repetition_penalty: given.repetition_penalty, max_tokens: given.max_tokens });
  const images = asked.images.map((_, i) => ({ image: { data: placeholder(i), for_generation: mode === "edit" } }));
  return drop({
    request: drop({
      modality: MODES[mode].modality, prompt: [...images, { text: { text: asked.prompt } }], seed: asked.seed, think: asked.think,
      max_think_tokens: given.max_think_tokens, negative_prompt: given.negative_prompt, posterior: given.posterior && `POSTERIOR_MODE_${given.posterior.toUpperCase()}`,
      text: Object.keys(text).length ? text : undefined, image: Object.keys(image).length ? image : undefined,
    }),
    output_format: given.output_format && `IMAGE_FORMAT_${given.output_format.toUpperCase()}`, output_compression: given.output_compression,
  });
}

// What stands in JSON where the shell puts the file in; no user's text holds a NUL.
const placeholder = (i) => `\u0000${i}`;

/** A command that reads a JSON document from the lines after it; images' bytes are put in by the shell. */
function withDocument(command, save, document, images) {
  let text = JSON.stringify(document, null, 2);
  if (!images.length) return `${command} <<'JSON' \\\n  | ${save}\n${text}\nJSON`.replace("<<'JSON' \\\n  |", "<<'JSON' |");
  text = text.replace(/[\\$`]/g, "\\$&").replace(/\\\\u0000(\d)/g, (_, i) => `$(base64 < ${quoted(images[i].name)} | tr -d '\\n')`);
  return `${command} <<JSON | ${save}\n${text}\nJSON`;
}

function saved(asked, pick) {
  const extension = asked.settings.output_format ?? "png";
  const { n = 1 } = asked.settings;
  if (n === 1) return `${pick} | base64 -d > picture.${extension}`;
  return `${pick} | { i=0; while read -r line; do i=$((i + 1)); echo "$line" | base64 -d > "picture-$i.${extension}"; done; }`;
}

const quoted = (text) => (/^[\w./:=[\]@-]+$/.test(text) && !text.includes("[") ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A value as Python writes it. */
function literal(value) {
  if (value === true || value === false) return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${literal(name)}: ${literal(each)}`).join(", ")}}`;
  return JSON.stringify(value);
}
