"""BAGEL for vLLM: vLLM's Qwen2 as the understanding expert, our image encoders, and the generation expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from bagel.checkpoint.files import AE, EMA, Checkpoint
from bagel.errors import CheckpointError, NotSupported
from bagel.model.layers import Rotary
from bagel.model.weights import check_known
from bagel_thinker.vllm.experts import GenerationLayer, run_both
from bagel_thinker.vllm.images import VAE, VIT, embed_all, empty_encoder, load_encoder
from bagel_thinker.vllm.settings import largest_blocks, read_hf_config
from bagel_thinker.vllm.spans import placed_positions

# vLLM fuses these projections: (part of the checkpoint's name, of the parameter's name, the shard within it).
_STACKED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)
_LAYERS = "language_model.model.layers."


class Info(BaseProcessingInfo):
    """The sizes of images, with which vLLM plans its memory."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {VIT: None, VAE: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        config, _ = read_hf_config(self.get_hf_config().bagel)
        vae, vit = largest_blocks(config)
        return {VIT: vit, VAE: vae}


class Dummies(BaseDummyInputsBuilder[Info]):
    """No dummy inputs, since vLLM does not profile the image encoders."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any = None) -> Any:
        return {}


class Processor(BaseMultiModalProcessor[Info]):
    """A processor that vLLM requires but never calls: requests reach its core with their images prepared."""

    requires_tokenizer = False

    def __init__(self, info: Info, dummy_inputs: Dummies, *, cache: Any = None) -> None:
        self.info, self.dummy_inputs, self.cache = info, dummy_inputs, cache

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        raise NotSupported("images are prepared by the Thinker, not by vLLM's processors")

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        raise NotSupported("images are prepared by the Thinker, not by vLLM's processors")


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class BagelThinker(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """Reads text and images, writes text, and leaves the K/V of both in vLLM's paged cache.

    An image block is one span of delimiters and tokens on one rope position, which the attention backend attends in
    full. The latents of a VAE block take the generation expert; a step with latents has a forward of its own, which is
    never compiled or captured. All other steps run vLLM's Qwen2 unchanged.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        hf = model.hf_config
        self.config = hf
        self.bagel, self.role = read_hf_config(hf.bagel)
        self.folder = Path(model.model)
        self.dtype = model.dtype
        self.delimiter_ids = tuple(hf.delimiter_ids)
        self.latent_id, self.overflow_id = int(hf.latent_id), int(hf.overflow_id)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=hf.llm_config,
            prefix=maybe_prefix(prefix, "language_model"),
            architectures=["Qwen2ForCausalLM"],
        )
        layers = range(self.bagel.llm.num_hidden_layers if self.role.parts.generation else 0)
        self.generation = nn.ModuleList(
            GenerationLayer(self.bagel.llm, vllm_config.quant_config, maybe_prefix(prefix, f"generation.{i}"))
            for i in layers
        )
        device = vllm_config.device_config.device
        assert device is not None
        self.images = empty_encoder(self.bagel, self.role, dtype=self.dtype, device=torch.device(device))
        self.rotary = Rotary(self.bagel.llm.head_dim, self.bagel.llm.rope_theta).to(device)
        self._latents: Tensor | None = None
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)

    # Positions and embeddings

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, tokens], three equal rows, and the offset from a later token's place to its position."""
        spans = [(f.mm_position.offset, f.mm_position.length) for f in mm_features]
        positions = placed_positions(len(input_tokens), spans)
        following = positions[-1] + 1 if positions else 0
        return torch.tensor(positions).expand(3, -1).contiguous(), following - len(input_tokens)

    def embed_multimodal(self, **fields: Any) -> list[Tensor]:
        """Embeddings of image blocks of one kind, [tokens, hidden] each."""
        table = self.language_model.model.embed_tokens
        delimiters = table(torch.tensor(self.delimiter_ids, device=self.images.device))
        return embed_all(self.images, delimiters, self.dtype, **fields)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [tokens, hidden] of a step, image tokens included; notes the places of latents for `forward`."""
        embedded: Tensor = self.language_model.model.embed_tokens(input_ids)
        self._latents = None
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return embedded
        assert is_multimodal is not None
        mask = is_multimodal.to(embedded.device)
        embedded.masked_scatter_(mask[:, None], torch.cat(tuple(multimodal_embeddings)).to(embedded.dtype))
        latents = ((input_ids == self.latent_id) & mask).nonzero()[:, 0]
        self._latents = latents if len(latents) else None
        return embedded

    # Forward

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Hidden states [tokens, hidden] of one step."""
        rope = positions[0] if positions.ndim == 2 else positions
        latents, self._latents = self._latents, None
        if latents is None:
            return self.language_model.model(input_ids, rope, intermediate_tensors, inputs_embeds)
        assert inputs_embeds is not None
        return run_both(self.language_model.model, self.generation, inputs_embeds, self.rotary(rope), latents)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """hidden_states [rows, hidden] -> logits [rows, vocab]; a row that is not finite allows only `overflow_id`."""
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        if logits is None or self.overflow_id < 0:
            return logits
        # A NaN becomes the extreme of its row and fails both comparisons, so that no mask as large as the logits is
        # needed. The count stays on the device: reading it here would make the host wait in every step.
        lowest, highest = logits.aminmax(dim=-1)
        overflowed = ~((lowest > float("-inf")) & (highest < float("inf")))
        self.overflows += overflowed.sum()
        logits.masked_fill_(overflowed[:, None], float("-inf"))
        logits[:, self.overflow_id].masked_fill_(overflowed, 0.0)
        return logits

    # Weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights that the role needs from BAGEL's own files."""
        # `weights` stays unused: vLLM's reader would read every tensor.
        checkpoint = Checkpoint(self.folder)
        check_known({file: checkpoint.tensors(file) for file in (EMA, AE)}, checkpoint.config, str(self.folder))
        parameters = dict(self.named_parameters())
        left = {name for name in parameters if not name.startswith("images.")}
        for name, tensor in self._tensors(checkpoint):
            target, shard = _target(name)
            parameter = parameters[target]
            load: Any = getattr(parameter, "weight_loader", _copy)
            load(parameter, tensor, *([] if shard is None else [shard]))
            left.discard(target)
        if left:
            raise CheckpointError(f"{self.folder} / {EMA} lacks weights of {', '.join(sorted(left)[:5])}")
        load_encoder(self.images, checkpoint)
        return set(parameters)

    def _tensors(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """Yield the decoder's tensors that the role needs, with their names in the checkpoint."""
        with safe_open(checkpoint.path(EMA), framework="pt") as file:
            for name in checkpoint.tensors(EMA):
                if name.startswith("language_model.") and self._needs(name):
                    yield name, file.get_tensor(name)

    def _needs(self, name: str) -> bool:
        # Of the generation expert only the layers: its last norm serves only to draw pictures.
        return "_moe_gen" not in name or (self.role.parts.generation and name.startswith(_LAYERS))


def _target(name: str) -> tuple[str, str | int | None]:
    """Map a name in the checkpoint to the parameter's name, and to the shard if several tensors share the parameter."""
    if "_moe_gen" in name:
        name = name.replace("_moe_gen", "").replace(_LAYERS, "generation.").replace(".self_attn.", ".")
    for part, whole, shard in _STACKED:
        if part in name:
            return name.replace(part, whole), shard
    return name, None


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.data.copy_(tensor)
