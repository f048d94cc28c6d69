"""What the network computes inside, seen through module hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bagel.model.bagel import Bagel


class Recorder:
    """Inputs and outputs of the network's modules while it is entered, by name, one list entry a call.

    Meanwhile no forward is replayed from a CUDA graph, as a replay calls no module.

    Names: `<module>.in`, `<module>.out`, where a module's several inputs or outputs are a tuple. `decoder` has an entry
    for each block of tokens: (und, gen, rows, slab), and (und, gen).
    """

    def __init__(self, model: Bagel) -> None:
        self.model = model
        self.calls: dict[str, list[Any]] = {}
        self._handles: list[Any] = []
        self._backend = model.language_model.backend

    def __enter__(self) -> Recorder:
        self.model.language_model.backend = replace(self._backend, captures=False)
        self._handles.append(self.model.language_model.layers.register_forward_hook(self._decoder))
        for name, module in _watched(self.model).items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.language_model.backend = self._backend
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.calls.setdefault(f"{name}.in", []).append(inputs[0] if len(inputs) == 1 else inputs)
            self.calls.setdefault(f"{name}.out", []).append(outputs)

        return hook

    def _decoder(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        blocks, slab = inputs[:2]
        blocks_in = [(block.und, block.gen, block.rows, slab) for block in blocks]
        self.calls.setdefault("decoder.in", []).extend(blocks_in)
        self.calls.setdefault("decoder.out", []).extend(outputs)

    def last(self, name: str) -> Any:
        return self.calls[name][-1]

    def all(self, name: str) -> list[Any]:
        return self.calls[name]

    def decoder_inputs(self) -> Tensor:
        """LLM inputs of the last forward's first row, in the order of its K/V, [tokens, hidden]."""
        und, gen = self.last("decoder.in")[:2]
        return in_order(und, gen)

    def decoder_layer(self, layer: int) -> Tensor:
        """Hidden states after a decoder layer, as decoder_inputs."""
        und, gen = self.last(f"decoder.{layer}.out")
        return in_order(und.sum(), None if gen is None else gen.sum())

    def decoder_hidden(self) -> Tensor:
        """Hidden states after the last norm, each expert's own, as decoder_inputs."""
        und, gen = self.last("decoder.out")
        llm = self.model.language_model
        assert llm.norm is not None and llm.norm_moe_gen is not None
        with torch.inference_mode():
            return in_order(llm.norm(und), None if gen is None else llm.norm_moe_gen(gen))


def in_order(und: Tensor, gen: Tensor | None) -> Tensor:
    """First row's tokens in the order of their K/V: latents stand between the two delimiters."""
    return und[0] if gen is None else torch.cat((und[0, :1], gen[0], und[0, 1:]))


def _watched(model: Bagel) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module | None] = {
        "rotary": model.language_model.rotary,
        "lm_head": model.language_model.lm_head,
        "vit": model.vit_model,
        "connector": model.connector,
        "vae2llm": model.vae2llm,
        "latent_pos_embed": model.latent_pos_embed,
        "time_embedder": model.time_embedder,
        "encoder": model.vae.autoencoder.encoder if model.vae else None,
    }
    modules |= {f"decoder.{i}": layer for i, layer in enumerate(model.language_model.layers)}
    if model.vit_model is not None:
        modules["vit.embeddings"] = model.vit_model.embeddings
        modules |= {f"vit.{i}": layer for i, layer in enumerate(model.vit_model.layers)}
    # A role may lack some of them.
    return {name: module for name, module in modules.items() if module is not None}
