"""ComfyUI nodes for a bagel-serving gateway: draw, edit, ask. docs/comfyui.md says how to install them.

One file, for ComfyUI's `custom_nodes` folder; it needs bagel-serving in ComfyUI's own Python, and no GPU there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from bagel.client import Client
from bagel.events import Result, ServiceEvent, StepDone
from bagel.prompts import ImagePart, TextPart

CATEGORY = "bagel"
MAX_SEED = 2**63 - 1
_ENDPOINT = ("STRING", {"default": "127.0.0.1:50051", "tooltip": "the gateway's gRPC host:port"})
_PROMPT = ("STRING", {"multiline": True, "dynamicPrompts": True})
_SEED = ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True})
_STEPS = ("INT", {"default": 50, "min": 2, "max": 1000, "tooltip": "timesteps; n are n - 1 steps"})
_THINK = ("BOOLEAN", {"default": False, "tooltip": "the model thinks first, in words"})
_GUIDED: Mapping[str, Any] = {
    "cfg_text_scale": ("FLOAT", {"default": 4.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "1 is none"}),
    "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
    "think": _THINK,
    "api_key": ("STRING", {"default": "", "tooltip": "where the gateway asks for one"}),
}


class Draw:
    """A picture from a text."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("image", "think_text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        side = ("INT", {"default": 0, "min": 0, "max": 4096, "step": 16, "tooltip": "0: the model's own size"})
        required = {"endpoint": _ENDPOINT, "prompt": _PROMPT, "seed": _SEED, "steps": _STEPS}
        return {"required": required, "optional": {"width": side, "height": side, **_GUIDED}}

    def draw(self, endpoint: str, prompt: str, api_key: str = "", **settings: Any) -> tuple[torch.Tensor, str]:
        """Draw it; a side of 0 is the model's."""
        sides = {name: settings.pop(name, 0) or None for name in ("width", "height")}
        result = _ask(endpoint, api_key, "text2img", [prompt], **settings, **sides)
        return _tensor(result), result.text


class Edit:
    """An image as a text says to change it; a batch of images is one context, in its order."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("image", "think_text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        scale = ("FLOAT", {"default": 1.5, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "how close to the image"})
        required = {"endpoint": _ENDPOINT, "image": ("IMAGE",), "prompt": _PROMPT, "seed": _SEED, "steps": _STEPS}
        return {"required": required, "optional": {"cfg_img_scale": scale, **_GUIDED}}

    def edit(
        self, endpoint: str, image: torch.Tensor, prompt: str, api_key: str = "", **settings: Any
    ) -> tuple[torch.Tensor, str]:
        """Edit it; the picture has the first image's shape."""
        images = [ImagePart(each, for_generation=True) for each in _pictures(image)]
        result = _ask(endpoint, api_key, "img2img", [*images, TextPart(prompt)], **settings)
        return _tensor(result), result.text


class Ask:
    """An answer to a question, about images if there are any."""

    CATEGORY, FUNCTION = CATEGORY, "ask"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("answer",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        limit = ("INT", {"default": 1000, "min": 1, "max": 100_000, "tooltip": "tokens of the answer"})
        required = {"endpoint": _ENDPOINT, "prompt": _PROMPT, "seed": _SEED}
        key = _GUIDED["api_key"]
        return {
            "required": required,
            "optional": {"image": ("IMAGE",), "max_tokens": limit, "think": _THINK, "api_key": key},
        }

    def ask(
        self, endpoint: str, prompt: str, image: torch.Tensor | None = None, api_key: str = "", **settings: Any
    ) -> tuple[str]:
        """Ask it."""
        images = [] if image is None else [ImagePart(each, for_generation=False) for each in _pictures(image)]
        modality = "img2text" if images else "text2text"
        return (_ask(endpoint, api_key, modality, [*images, TextPart(prompt)], **settings).text,)


NODE_CLASS_MAPPINGS: Mapping[str, type] = {"BagelDraw": Draw, "BagelEdit": Edit, "BagelAsk": Ask}
NODE_DISPLAY_NAME_MAPPINGS: Mapping[str, str] = {
    "BagelDraw": "BAGEL: draw",
    "BagelEdit": "BAGEL: edit",
    "BagelAsk": "BAGEL: ask",
}


class _Progress:
    """ComfyUI's bar follows the steps; its Cancel ends the request in every service."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, event: ServiceEvent) -> None:
        """Take one event."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if isinstance(event, StepDone):
            self._bar = self._bar or comfy.utils.ProgressBar(event.steps)
            self._bar.update_absolute(event.step, event.steps)


def _ask(
    endpoint: str, api_key: str, modality: str, prompt: Sequence[str | TextPart | ImagePart], **settings: Any
) -> Result:
    """The result of one request, which the bar follows."""
    with Client(endpoint, api_key=api_key or None) as client:
        return client.generate(prompt, modality=modality, on_event=_Progress(), **settings)


def _pictures(batch: torch.Tensor) -> list[Image.Image]:
    """ComfyUI's images [B, H, W, 3] of 0 to 1 as Pillow's."""
    pixels = (batch.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def _tensor(result: Result) -> torch.Tensor:
    """A picture as ComfyUI has it: [1, H, W, 3] of 0 to 1."""
    assert result.image is not None
    return torch.from_numpy(np.asarray(result.image.convert("RGB"), dtype=np.float32) / 255)[None]
