"""Words that users bring from elsewhere, and what to write here: control marks of prompts, and names of other APIs.

The names are those of vllm-omni, diffusers and OpenAI. Standard library alone, for the command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from bagel.errors import InvalidRequest, together

CONTROL_MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Every added token of the Qwen2 family's tokenizers whose form no plain text has."""
_MARK = re.compile("|".join(map(re.escape, CONTROL_MARKS)))


def control_marks_in(text: str) -> list[str]:
    """The control marks in a text, each once, in their order."""
    return list(dict.fromkeys(_MARK.findall(text)))


def control_mark_problems(field: str, texts: Iterable[str], where: str | None = None) -> list[InvalidRequest]:
    """An error for texts of a user with control marks. where: the texts' place, if it is not the field.

    They would be read letter by letter, as no user's text may end a segment; the model was never trained on that.
    """
    marks = list(dict.fromkeys(mark for text in texts for mark in control_marks_in(text)))
    if not marks:
        return []
    several = len(marks) > 1
    problem = f"{where or field} has the control mark{'s' * several} {', '.join(marks)}"
    problem = f"{problem}; leave {'them' if several else 'it'} out, as the marks of a prompt are added here. "
    about = marks[0].replace("<|", "< |")
    return [InvalidRequest(field, f"{problem}In a text about marks write them otherwise, like {about}")]


def _named(rows: Mapping[str, str]) -> Mapping[str, str]:
    """The table by single names, of rows that have several."""
    return {name: instead for names, instead in rows.items() for name in names.split()}


_DRAWN_FROM = "send files as image to /v1/images/edits; of a chat, image_url parts of a message"
WRAPPERS = ("extra_body", "extra_args", "extra_params", "sampling_params", "sampling_params_list")
"""Objects that clients put parameters into, which stand at the top of a body here."""
_START_ONE = "start one stage with python -m bagel_thinker or python -m bagel_dit"
_IN_DEPLOY = "it is a key of the deploy file of --deploy-config"
_BY_PIPELINE = "the pipeline says what each stage does; leave it out"
_NOTHING = "there is nothing to set; leave it out"

REST_INSTEAD = _named(
    {
        "height width resolution aspect_ratio image_size": 'send size: "WIDTHxHEIGHT"',
        "guidance_scale true_cfg_scale cfg_scale guidance": "send cfg_text_scale",
        "image_guidance_scale img_cfg_scale guidance_scale_2": "send cfg_img_scale",
        "strength denoising_strength": "send cfg_img_scale, which says how close an edit keeps to its input",
        "guidance_rescale cfg_renorm": "send cfg_renorm_type and cfg_renorm_min",
        "num_outputs_per_prompt num_images_per_prompt num_images batch_size best_of": "send n",
        "steps num_steps num_timesteps inference_steps sampling_steps": "send num_inference_steps",
        "generator generator_device random_seed manual_seed noise_seed": "send seed",
        "negative negative_prompts uncond_prompt": "send negative_prompt",
        "shift flow_shift time_shift mu": "send timestep_shift",
        "scheduler sampler sampler_name sigmas timesteps": "send num_inference_steps and timestep_shift",
        "output_type format image_format": "send output_format",
        "max_new_tokens max_length": "send max_tokens; before a picture max_think_tokens",
        "enable_thinking thinking chat_template_kwargs reasoning": "send think",
        "modalities modality task": "/v1/chat/completions has modalities; leave it out",
        "max_tokens max_completion_tokens": "send max_think_tokens, which bounds the text before a picture",
        "temperature": "send text_temperature, with think and do_sample",
        "stop": "send stop_token_ids, with think",
        "bot_task": "modalities and the messages say what is wanted; leave it out",
        "system_prompt use_system_prompt system": "write it into the prompt; of a chat, into a system message",
        "text query input inputs": "send prompt; of a chat, messages",
        "prompt prompts": "send messages",
        "messages": "send prompt, or ask /v1/chat/completions",
        "image images image_url image_urls url init_images input_reference reference_images": _DRAWN_FROM,
        " ".join(WRAPPERS): "send its fields at the top level",
        "guidance_interval cfg_range": "send cfg_interval",
        "prompt_2 negative_prompt_2": "there is one prompt; leave it out",
        "mm_processor_kwargs media_io_kwargs": "images are resized by the model's own rule; leave it out",
        "chat_template add_generation_prompt continue_final_message": "roles are not rendered; leave it out",
        "guided_json guided_choice guided_regex structured_outputs": "answers are plain text; leave it out",
        "type sys_type infer_align_image_size return_stage_metrics": _NOTHING,
        "request_id": "send the header X-Request-ID",
        "ignore_eos min_tokens min_p length_penalty use_beam_search": "send do_sample, top_p or top_k, or leave it out",
        "skip_special_tokens spaces_between_special_tokens detokenize echo": "answers are plain text; leave it out",
        "vae_use_tiling vae_use_slicing enable_cpu_offload cfg_parallel_size": "leave it out: the deploy file has it",
        "lora loras adapter": "there are no adapters; serve a checkpoint that they are merged into",
        "num_frames fps seconds layers": "pictures are single and still; leave it out",
    }
)
"""Parameters of a body: what to do instead."""

PART_INSTEAD = _named(
    {
        "image image_base64 input_image": '{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}',
        "text input_text": '{"type": "text", "text": "…"}',
    }
)
"""Parts of a message's content, by their type or, where they have none, by their key: how they are written here."""

FLAG_INSTEAD = _named(
    {
        "--stage-configs-path": "give --deploy-config",
        "--num-inference-steps": "give --steps",
        "--guidance-scale --true-cfg-scale --cfg-scale": "give --cfg-text-scale",
        "--image-guidance-scale": "give --cfg-img-scale",
        "--image --images --input-image": "give --image-path",
        "--size --resolution": "give --width and --height",
        "--num-outputs-per-prompt --num-images-per-prompt --n": "give the prompt several times, without --seed",
        "--temperature": "give --text-temperature",
        "--max-new-tokens": "give --max-tokens",
        "--flow-shift": "give --timestep-shift",
        "--model-path": "give --model",
        "--omni": "bagel serve serves all stages by itself; leave it out",
        "--vae-use-tiling --vae-use-slicing --vae-patch-parallel-size --tensor-parallel-size": _IN_DEPLOY,
        "--gpu-memory-utilization --enforce-eager --max-model-len --max-num-seqs": _IN_DEPLOY,
        "--prompt-type --init-sleep-seconds --shm-threshold-bytes --output-modality": _NOTHING,
        "--api-key": "give --api-keys, a file of bagel keys new",
        "--ssl-certfile": "give --tls-certificate",
        "--ssl-keyfile": "give --tls-key",
        "--ssl-ca-certs": "give --tls-ca",
        "--allowed-origins": "give --allow-origin",
        "--uvicorn-log-level": "give --log-level",
        "--limit-mm-per-prompt": "give --max-images",
        "--enable-chunked-prefill --hf-overrides --no-async-chunk": _NOTHING,
        "--trust-remote-code": "no remote code is ever run; leave it out",
        "--stage-id --headless --omni-master-address --omni-master-port": _START_ONE,
    }
)
"""Flags: what to do instead."""

OPTION_INSTEAD = _named(
    {
        "num_inference_steps num_steps num_timesteps": "give steps",
        "guidance_scale true_cfg_scale cfg_scale": "give cfg_text_scale",
        "image_guidance_scale guidance_scale_2": "give cfg_img_scale",
        "size resolution": "give width and height",
        "n num_outputs_per_prompt num_images_per_prompt": "give the prompt several times, without a seed",
        "generator manual_seed": "give seed",
        "text_temperature": "give temperature",
        "max_new_tokens": "give max_tokens",
        "flow_shift shift": "give timestep_shift",
        "modalities": "give modality",
        "images": "give image",
        "extra_args extra_body sampling_params sampling_params_list": "give its settings as options of their own",
    }
)
"""Options in Python: what to do instead."""

DEPLOY_INSTEAD = _named(
    {
        "stage_args": "write its stages under stages, each with a stage_id",
        "engine_args": "write its keys beside stage_id",
        "runtime": "write devices beside stage_id",
        "model": "give --model",
        "model_arch": "say pipeline: bagel",
        "model_stage stage_type worker_type scheduler_cls": _BY_PIPELINE,
        "engine_input_source engine_output_type final_output final_output_type is_comprehension": _BY_PIPELINE,
        "distributed_executor_backend": _NOTHING,
        "omni_kv_config prompt_expand_func cfg_kv_collect_func": _BY_PIPELINE,
    }
)
"""Keys of a deploy file: what to do instead."""


def refuse_unknown_options(given: Iterable[str], known: Collection[str]) -> None:
    """Raise InvalidRequest for options in Python that there are not."""
    problems = []
    for name in given:
        if name not in known:
            instead = instead_of(name, OPTION_INSTEAD, known) or f"known: {', '.join(sorted(known))}"
            problems.append(InvalidRequest(name, f"unknown option {name!r}; {instead}"))
    if problems:
        raise together(problems)


def instead_of(name: str, table: Mapping[str, str], known: Collection[str] = ()) -> str | None:
    """What to do instead of a name that is not known here: what the table says, else the nearest name that is known."""
    word = name.removesuffix("[]")
    if word in table:
        return table[word]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else None
