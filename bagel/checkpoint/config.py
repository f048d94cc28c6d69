"""The model's shape. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from bagel.errors import CheckpointError
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform

NORM_GROUPS = 32
"""Groups of the autoencoder's group norms."""


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise CheckpointError(f"{name} {value} is not divisible by {by_name} {by}")


@dataclass(frozen=True)
class LlmConfig:
    """The decoder: Qwen2 with norms of queries and keys, and two experts in every layer."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        _divides("hidden_size / num_attention_heads", self.head_dim, "rotary embedding's", 2)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VitConfig:
    """The SigLIP encoder. num_hidden_layers counts the layers that run, one less than the file says (reference)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int = 14
    num_channels: int = 3
    image_size: int = 980
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _divides("vit hidden_size", self.hidden_size, "vit num_attention_heads", self.num_attention_heads)
        if self.patch_size > self.image_size:
            raise CheckpointError(f"vit patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def patch_features(self) -> int:
        return self.num_channels * self.patch_size**2

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class VaeConfig:
    """The FLUX autoencoder; the defaults are the values that the reference hard-codes."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        for mult in self.ch_mult:
            _divides(f"vae_config: ch x {mult} of ch_mult", self.ch * mult, "its norms' number of groups", NORM_GROUPS)

    @property
    def downsample(self) -> int:
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network and its inputs.

    max_latent_size: rows and columns of the latent position table. The weights override config.json here
    (`Checkpoint.config`), since the published file had a wrong value.
    """

    llm: LlmConfig
    vit: VitConfig
    vae: VaeConfig = field(default_factory=VaeConfig)
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    vae_transform: ImageTransform = VAE_TRANSFORM
    vit_transform: ImageTransform = VIT_TRANSFORM
    default_image_size: tuple[int, int] = (1024, 1024)

    def __post_init__(self) -> None:
        _divides("the VAE transform's stride", self.vae_transform.stride, "a latent token's", self.latent_stride)
        _divides("the ViT transform's stride", self.vit_transform.stride, "patch_size", self.vit.patch_size)

    @property
    def latent_features(self) -> int:
        """Features of one latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @property
    def latent_stride(self) -> int:
        """Side of one latent token, in pixels."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def max_image_size(self) -> int:
        """The longest side that the latent position table covers, in pixels."""
        return self.max_latent_size * self.latent_stride


BAGEL_7B_MOT = ModelConfig(
    llm=LlmConfig(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    ),
    vit=VitConfig(hidden_size=1152, num_hidden_layers=26, num_attention_heads=16, intermediate_size=4304),
)
"""The public ByteDance-Seed/BAGEL-7B-MoT."""
