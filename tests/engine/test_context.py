"""Contexts: nothing is computed twice, K/V is handed over as it is computed, digests tell contents apart."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.context import JOINED_TOKENS, ContextBuilder, SegmentCache
from bagel.engine.local import BagelEngine
from bagel.engine.segments import Chain, ChainPlanner, Segment
from bagel.errors import InvalidImage
from bagel.images import ImageTransform
from bagel.kv.digests import SegmentKind
from bagel.model.pixels import to_pixels
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.vae import Vae
from bagel.model.weights import load_model
from bagel.prompts import ImagePart, TextPart, expand_cfg_prompts
from bagel.request import PosteriorMode
from tests.helpers import sketch, small_images


@pytest.fixture
def builder(engine: BagelEngine) -> ContextBuilder:
    return ContextBuilder(engine.model)


def edit_chain(
    engine: BagelEngine, image: Image.Image, text: str, *, mode: PosteriorMode = PosteriorMode.CONTENT, seed: int = 0
) -> Chain:
    prompt = (ImagePart(image, for_generation=True), TextPart(text))
    return engine.planner.chain(prompt, engine.planner.prepare_images(prompt, mode, seed))


def test_a_second_edit_of_one_image_computes_only_its_text(engine: BagelEngine, builder: ContextBuilder) -> None:
    engine = small_images(engine)
    builder.build(edit_chain(engine, sketch(), "make it snow", seed=1))
    assert builder.segments_computed == 3
    builder.build(edit_chain(engine, sketch(), "make it rain", seed=2))
    assert builder.segments_computed == 4


def test_guidance_branches_share_their_prefix(engine: BagelEngine, builder: ContextBuilder) -> None:
    engine = small_images(engine)
    prompt = (ImagePart(sketch(), for_generation=True), TextPart("make it snow"))
    images = engine.planner.prepare_images(prompt, PosteriorMode.CONTENT, 0)
    for branch in expand_cfg_prompts(prompt):
        builder.build(engine.planner.chain(branch.parts, images))
    assert builder.segments_computed == 4  # VAE, ViT and text of gen, and cfg_img's text; cfg_text is a prefix


@pytest.mark.parametrize(
    ("mode", "seed", "same"),
    [
        (PosteriorMode.CONTENT, 8, True),
        (PosteriorMode.MEAN, 7, False),
        (PosteriorMode.SEED, 7, False),
    ],
)
def test_digests_cover_the_posterior_noise(engine: BagelEngine, mode: PosteriorMode, seed: int, same: bool) -> None:
    engine = small_images(engine)
    first = edit_chain(engine, sketch(), "x", seed=7)
    assert (edit_chain(engine, sketch(), "x", mode=mode, seed=seed).digest == first.digest) is same


def test_in_mode_seed_another_seed_is_another_image(engine: BagelEngine) -> None:
    engine = small_images(engine)
    chains = [edit_chain(engine, sketch(), "x", mode=PosteriorMode.SEED, seed=seed) for seed in (1, 2)]
    assert chains[0].segments[0].digest != chains[1].segments[0].digest


def test_each_layer_is_handed_over_before_the_next_is_computed(engine: BagelEngine, builder: ContextBuilder) -> None:
    engine = small_images(engine)
    chain = edit_chain(engine, sketch(), "make it snow")
    seen: list[tuple[SegmentKind, int]] = []
    pages: dict[tuple[bytes, int], tuple[torch.Tensor, torch.Tensor]] = {}
    computed: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: computed.append(i))
        for i, layer in enumerate(engine.model.language_model.layers)
    ]

    def on_kv(segment: Segment, layers: range, k: torch.Tensor, v: torch.Tensor) -> None:
        (layer,) = layers
        assert computed[-1] == layer
        seen.append((segment.kind, layer))
        pages[segment.digest, layer] = (k[0].clone(), v[0].clone())

    context = builder.build(chain, on_kv)
    for hook in hooks:
        hook.remove()
    layers = range(engine.model.config.llm.num_hidden_layers)
    assert seen == [(s.kind, i) for i in layers for s in chain.segments]
    for segment, kv in zip(chain.segments, context.kv, strict=True):
        for i in layers:
            assert pages[segment.digest, i][0].equal(kv.k[i])
            assert pages[segment.digest, i][1].equal(kv.v[i])


def test_an_image_is_computed_with_the_text_behind_it_and_other_texts_alone(
    engine: BagelEngine, builder: ContextBuilder
) -> None:
    """What comes between two units waits no longer than for an image and a prompt."""
    engine = small_images(engine)
    image = ImagePart(sketch(), for_generation=True)
    prompt = (TextPart("first"), image, TextPart("snow"), image, TextPart("long " * JOINED_TOKENS), TextPart("last"))
    chain = engine.planner.chain(prompt, engine.planner.prepare_images(prompt, PosteriorMode.CONTENT, 0))
    steps, seen = builder.steps(chain, lambda segment, *_: seen.append(segment.kind)), list[SegmentKind]()
    of_each: list[list[SegmentKind]] = []
    for _ in steps:
        of_each.append(list(dict.fromkeys(seen)))
        seen.clear()
    of_each.append(list(dict.fromkeys(seen)))
    text, vae, vit = SegmentKind.TEXT, SegmentKind.VAE, SegmentKind.VIT
    assert of_each == [[], [text], [vae, vit, text], [vae, vit], [text], [text]]


def test_an_image_that_was_encoded_ahead_is_not_encoded_again(
    engine: BagelEngine, builder: ContextBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_images(engine)
    chain = edit_chain(engine, sketch(), "make it snow")
    image = chain.segments[0].image
    assert image is not None
    wanted = ContextBuilder(engine.model).build(chain)
    encoded, encode = list[int](), Vae.encode

    def counted(vae: Vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(Vae, "encode", counted)
    builder.latents.encode_ahead(image)
    assert encoded == [1]
    for ours, whole in zip(builder.build(chain).kv, wanted.kv, strict=True):
        assert ours.k.equal(whole.k) and ours.v.equal(whole.v)
    assert encoded == [1]
    builder.build(edit_chain(engine, sketch(colour="navy"), "make it snow"))
    assert encoded == [1, 1]


def test_going_on_from_a_cached_prefix_gives_the_same_kv(engine: BagelEngine) -> None:
    engine = small_images(engine)
    chain = edit_chain(engine, sketch(), "make it snow")
    whole = ContextBuilder(engine.model).build(chain)
    stepwise = ContextBuilder(engine.model)
    for end in range(1, len(chain.segments) + 1):
        context = stepwise.build(Chain(chain.segments[:end]))
    for ours, wanted in zip(context.kv, whole.kv, strict=True):
        torch.testing.assert_close(ours.k, wanted.k, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.v, wanted.v, atol=1e-6, rtol=0)


def test_the_cache_keeps_to_its_bytes_and_drops_the_least_recently_used(engine: BagelEngine) -> None:
    chains = [engine.planner.append_text(Chain(), text) for text in ("one cup", "two cups", "three cups")]
    size = max(ContextBuilder(engine.model).build(chain).kv[0].nbytes for chain in chains)
    cache = SegmentCache(max_bytes=2 * size)
    builder = ContextBuilder(engine.model, cache)
    for chain in (chains[0], chains[1], chains[0], chains[2]):
        builder.build(chain)
        assert cache.nbytes <= cache.max_bytes
    assert builder.segments_computed == 3
    builder.build(chains[0])
    assert builder.segments_computed == 3
    builder.build(chains[1])
    assert builder.segments_computed == 4


def test_an_image_beyond_the_position_table_is_refused(engine: BagelEngine) -> None:
    big = small_images(engine, vae=ImageTransform(2048, 1088, 16))
    with pytest.raises(InvalidImage, match="positions for 1024 a side"):
        edit_chain(big, sketch(), "x")


def test_a_users_control_words_add_no_tokens(engine: BagelEngine) -> None:
    chain = engine.planner.append_text(Chain(), "end <|im_end|> here")
    ids = chain.segments[0].token_ids
    assert ids.count(engine.tokenizer.eos) == 1 == ids.count(engine.tokenizer.bos)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_never_waits_for_what_it_launches(checkpoint: Checkpoint, tokenizer: BagelTokenizer) -> None:
    """So that a prefill is launched before its K/V are sent, which takes the interpreter from the engine's thread."""
    model = load_model(checkpoint, Role.CONTEXT, delimiter_ids=(1, 2), dtype=torch.bfloat16, device="cuda")
    planner = ChainPlanner(model.config, tokenizer, b"k")
    parts = (TextPart("a"), ImagePart(sketch(), for_generation=True), TextPart("make it snow"))
    chain = planner.chain(parts, planner.prepare_images(parts, PosteriorMode.CONTENT, seed=0))
    builder = ContextBuilder(model, SegmentCache(0))
    builder.build(chain)
    torch.cuda.set_sync_debug_mode("error")
    try:
        builder.build(chain)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_the_pixels_that_a_cpu_reads() -> None:
    every = Image.frombytes("RGB", (16, 16), bytes(value for value in range(256) for _ in range(3)))
    assert torch.equal(to_pixels(every, torch.device("cuda")).cpu(), to_pixels(every))
