// The first state of each mode: what to try. bagel-nano knows coloured shapes, and is asked for them.

const SCENE = "playground/scene.png";

const NANO = {
  draw: ["a red circle to the left of a blue square on a white background", "three yellow stars on a navy background", "a large purple heart on a beige background", "a green triangle above an orange diamond, black background"],
  edit: ["make the circle green", "add a small yellow star in the top right corner", "change the background to navy", "remove the square"],
  ask: ["describe the image", "how many objects are there?", "what colour is the square?", "what is to the left of the square?"],
  write: ["what colour do you get when you mix red and yellow?", "what is 3 plus 4?", "what is 9 minus 5?", "what colour do you get when you mix blue and yellow?"],
};

const LARGE = {
  draw: ["a corgi on a surfboard, oil painting", "a paper lantern festival at dusk, seen from a bridge", "a bowl of ramen, studio light, steam rising", "an isometric cutaway of a tiny library"],
  edit: ["make the circle green", "paint it as a watercolour", "change the background to a night sky", "make everything out of wood"],
  ask: ["Describe the image.", "How many objects are there?", "What is to the left of the square?", "Write a title for this picture."],
  write: ["Why is the sky blue?", "Write a haiku about the first snow.", "Explain diffusion models to a child.", "Name three uses for a paperclip."],
};

const WORDS = {
  draw: ["What shall we draw?", "Write what the picture should show, or start with one of these."],
  edit: ["What shall we change?", "Add an image and say what to change, or try it on this one."],
  ask: ["What would you like to know?", "Add an image and ask about it, or try it on this one."],
  write: ["What is on your mind?", "Ask or tell the model something, or start with one of these."],
};

/** {title, text, prompts, scene}: scene is the image that the prompts are about, where they are about one. */
export function examplesOf(mode, model) {
  const [title, text] = WORDS[mode];
  const prompts = (model ?? "nano").includes("nano") ? NANO : LARGE;
  return { title, text, prompts: prompts[mode], scene: mode === "edit" || mode === "ask" ? SCENE : undefined };
}
