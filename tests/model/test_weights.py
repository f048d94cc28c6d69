"""Checkpoints: what each role loads, what a damaged one is refused for, and what names its content."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.files import AE, EMA, Checkpoint, find_checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.local import BagelEngine
from bagel.errors import CheckpointError
from bagel.model.bagel import Bagel
from bagel.model.naming import slots
from bagel.model.weights import empty_model, inventory, load_model, main

PUBLIC = Path(__file__).parents[1] / "data" / "bagel-7b-mot-tensors.json"
DELIMITERS = (929, 930)
GIB = 2**30


@pytest.fixture(scope="module")
def public() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the public BAGEL-7B-MoT, by file."""
    listed = json.loads(PUBLIC.read_text())
    return {file: {name: tuple(shape) for name, shape in tensors.items()} for file, tensors in listed.items()}


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint folder to damage. Its files are links, as in the hub's cache; write anew what changes."""
    for path in checkpoint.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def change_json(folder: Path, file: str, **values: Any) -> None:
    data = {**json.loads((folder / file).read_text()), **values}
    rewrite(folder / file, json.dumps(data).encode())


def change_tensors(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    (folder / file).unlink()
    save_file(tensors, folder / file)


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def load(folder: Path, role: Role = Role.FULL) -> Bagel:
    return load_model(Checkpoint(folder), role, delimiter_ids=DELIMITERS)


def stored(checkpoint: Checkpoint, name: str) -> Tensor:
    with safe_open(checkpoint.path(EMA), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.float()


# -- the public model


def test_full_role_uses_every_tensor_of_the_public_model(public: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    model = empty_model(BAGEL_7B_MOT, Role.FULL, dtype=torch.bfloat16, device="meta")
    needed = [(slot.file, slot.name, slot.shape) for slot in slots(model)]
    assert len(needed) == len(set(needed))
    assert set(needed) == {(file, name, shape) for file, tensors in public.items() for name, shape in tensors.items()}


@pytest.mark.parametrize("role", Role)
def test_every_role_fits_the_public_model(role: Role, public: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    model = empty_model(BAGEL_7B_MOT, role, dtype=torch.bfloat16, device="meta")
    for slot in slots(model):
        assert public[slot.file][slot.name] == slot.shape
        embedding = slot.name == "language_model.model.embed_tokens.weight"
        assert embedding or slot.target.numel() == torch.Size(slot.shape).numel()


@pytest.mark.parametrize(
    ("role", "least", "most"),
    [
        (Role.UNDERSTAND, 14.5, 15.04),
        (Role.CONTEXT, 27.0, 28.5),
        (Role.DENOISE, 24.0, 26.5),
        (Role.FULL, 27.0, 29.0),
    ],
)
def test_bytes_of_a_role_at_bfloat16(role: Role, least: float, most: float) -> None:
    model = empty_model(BAGEL_7B_MOT, role, dtype=torch.bfloat16, device="meta")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size == sum(slot.target.nbytes for slot in slots(model))
    assert least < size / GIB < most


def test_inventory_has_one_line_a_role(public: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    lines = inventory(public, BAGEL_7B_MOT, "here")
    assert [line.split()[0] for line in lines] == list(Role)
    count = sum(len(tensors) for tensors in public.values())
    assert f" {count} tensors " in lines[-1]


def test_inventory_refuses_what_does_not_fit(public: dict[str, dict[str, tuple[int, ...]]]) -> None:
    extra = {**public, EMA: {**public[EMA], "rope.freqs": (64,)}}
    with pytest.raises(CheckpointError, match=r"here holds tensors that BAGEL does not have: rope\.freqs"):
        inventory(extra, BAGEL_7B_MOT, "here")
    shrunk = {**public, EMA: {**public[EMA], "llm2vae.bias": (65,)}}
    with pytest.raises(CheckpointError, match=r"llm2vae\.bias is \[65\], the configuration makes it \[64\]"):
        inventory(shrunk, BAGEL_7B_MOT, "here")


def test_command_prints_one_line_a_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PUBLIC)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(Role)


def test_command_reads_a_folder(checkpoint: Checkpoint, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint.folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(Role)
    change_json(copy, "llm_config.json", hidden_size=128, num_attention_heads=8)
    assert main([str(copy)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.match(r"error: .* does not fit its configuration: .*\n\Z", printed.err)


def test_command_says_what_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


# -- loading by role


@pytest.mark.parametrize(
    ("role", "absent"),
    [
        (Role.UNDERSTAND, {"vae2llm", "llm2vae", "time_embedder", "latent_pos_embed", "vae", "norm_moe_gen", "gen"}),
        (Role.CONTEXT, {"llm2vae", "norm_moe_gen", "decoder"}),
        (Role.DENOISE, {"vit_model", "connector", "vit_pos_embed", "norm", "lm_head", "encoder"}),
        (Role.FULL, set()),
    ],
)
def test_a_role_loads_only_what_it_needs(checkpoint: Checkpoint, role: Role, absent: set[str]) -> None:
    model = load(checkpoint.folder, role)
    decoder = model.language_model
    parts: dict[str, object] = {
        name: getattr(model, name)
        for name in "vit_model connector vit_pos_embed vae2llm llm2vae time_embedder latent_pos_embed vae".split()
    }
    parts |= {name: getattr(decoder, name) for name in ("norm", "norm_moe_gen", "lm_head")}
    parts |= {"gen": decoder.layers[0].gen_input, "und": decoder.layers[0].und_input}
    if model.vae is not None:
        parts |= {name: getattr(model.vae.autoencoder, name) for name in ("encoder", "decoder")}
    assert {name for name, part in parts.items() if part is None} == absent
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("role", [Role.UNDERSTAND, Role.CONTEXT, Role.DENOISE])
def test_a_roles_values_are_the_whole_models(checkpoint: Checkpoint, engine: BagelEngine, role: Role) -> None:
    whole: dict[str, Tensor] = dict(engine.model.named_parameters())
    for name, parameter in load(checkpoint.folder, role).named_parameters():
        expected = whole[name]
        if role is Role.DENOISE and name == "language_model.embed_tokens.weight":
            expected = expected[list(DELIMITERS)]
        assert torch.equal(parameter, expected), name


def test_values_are_the_files(checkpoint: Checkpoint, engine: BagelEngine) -> None:
    """Tensors that one parameter here is made of lie in it in their order."""
    parameters = dict(engine.model.named_parameters())
    for file_names, name in (
        ("self_attn.{}_proj_moe_gen.weight", "gen_input.qkv_proj.weight"),
        ("self_attn.{}_proj.bias", "und_input.qkv_proj.bias"),
        ("mlp.{}_proj.weight", "und_output.mlp.gate_up_proj.weight"),
        ("mlp_moe_gen.{}_proj.weight", "gen_output.mlp.gate_up_proj.weight"),
    ):
        pieces = ("gate", "up") if "gate" in name else ("q", "k", "v")
        tensors = [stored(checkpoint, f"language_model.model.layers.2.{file_names.format(piece)}") for piece in pieces]
        assert torch.equal(parameters[f"language_model.layers.2.{name}"], torch.cat(tensors)), name


def test_a_fed_role_keeps_the_delimiters_embeddings_alone(checkpoint: Checkpoint, engine: BagelEngine) -> None:
    model = load(checkpoint.folder, Role.DENOISE)
    rows = stored(checkpoint, "language_model.model.embed_tokens.weight")[list(DELIMITERS)]
    assert torch.equal(model.language_model.embed_tokens.weight, rows)
    assert torch.equal(model.delimiter_embeddings(), rows)
    assert torch.equal(engine.model.delimiter_embeddings(), rows)


def test_norms_and_autoencoder_stay_float32(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint, delimiter_ids=DELIMITERS, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float32}
    assert {"language_model.norm.weight", "llm2vae.weight", "vae2llm.bias", "time_embedder.mlp.0.weight"} <= kept
    assert all("norm" in name or not name.startswith(("language_model.", "vit_model.")) for name in kept)
    assert {name for name, _ in model.named_parameters() if name.startswith("vae.")} <= kept


# -- checkpoints that do not fit


def drop(file: str, name: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, file, lambda tensors: tensors.pop(name))


def replace_tensor(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, EMA, lambda tensors: tensors.update({name: tensor}))


def cut(file: str, kept: int) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / file, (folder / file).read_bytes()[:kept])


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / file, text.encode())


def setting(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, file, **values)


UP = "language_model.model.layers.3.mlp_moe_gen.up_proj.weight"
VIT_BIAS = "vit_model.vision_model.encoder.layers.1.self_attn.v_proj.bias"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing tensor", drop(EMA, UP), rf"ema\.safetensors lacks {re.escape(UP)} \[256, 96\]"),
    ("missing VAE tensor", drop(AE, "decoder.conv_in.bias"), r"ae\.safetensors lacks decoder\.conv_in\.bias \[64\]"),
    ("shape", replace_tensor(VIT_BIAS, torch.zeros(65)), rf"{re.escape(VIT_BIAS)} is \[65\], the .* makes it \[64\]"),
    ("transposed", replace_tensor("llm2vae.weight", torch.zeros(96, 64)), r"llm2vae\.weight is \[96, 64\]"),
    (
        "integers",
        replace_tensor(VIT_BIAS, torch.zeros(64, dtype=torch.int64)),
        rf"holds quantised weights.*{re.escape(VIT_BIAS)} is I64; only plain weights in F32, F16 or BF16",
    ),
    ("double", replace_tensor(VIT_BIAS, torch.zeros(64, dtype=torch.float64)), rf"{re.escape(VIT_BIAS)} is F64"),
    ("scalar table", replace_tensor("latent_pos_embed.pos_embed", torch.tensor(1.0)), "pos_embed has 0 rows; a square"),
    ("empty table", replace_tensor("vit_pos_embed.pos_embed", torch.zeros(0, 96)), "pos_embed has 0 rows; a square"),
    ("vocabulary", setting("llm_config.json", vocab_size=2**24), r"embed_tokens.weight is \[1000, 96\], the config"),
    ("oblong table", replace_tensor("latent_pos_embed.pos_embed", torch.zeros(4095, 96)), "4095 rows; a square"),
    ("cut short", cut(EMA, 4_000_000), r"ema\.safetensors is cut short: 4000000 of \d+ bytes; download it again"),
    ("last byte lost", cut(AE, -1), r"ae\.safetensors is cut short"),
    ("cut in the header", cut(AE, 1000), r"ae\.safetensors is not a readable safetensors file"),
    ("empty", cut(EMA, 0), r"ema\.safetensors is not a readable safetensors file"),
    ("no safetensors", write(AE, "<!DOCTYPE html><html></html>"), r"ae\.safetensors is not a readable safetensors"),
    ("no weights", remove(EMA), r"ema\.safetensors is missing"),
    ("no autoencoder", remove(AE), r"ae\.safetensors is missing"),
    *(
        (f"no {file}", remove(file), f"{file} is missing")
        for file in ("config.json", "llm_config.json", "vit_config.json")
    ),
    ("bad JSON", write("llm_config.json", "{"), "llm_config.json cannot be read as JSON"),
    ("no object", write("vit_config.json", "[]"), "vit_config.json holds list"),
    ("no text", write("config.json", "\0"), "config.json cannot be read as JSON"),
    ("no field", write("llm_config.json", "{}"), "llm_config.json lacks 'hidden_size'"),
    ("activation", setting("llm_config.json", hidden_act="relu"), "hidden_act is 'relu'; only 'silu'"),
    ("window", setting("llm_config.json", use_sliding_window=True), "use_sliding_window is True; only False"),
    ("interpolation", setting("config.json", interpolate_pos=True), "interpolate_pos is True; only False"),
    ("connector", setting("config.json", connector_act="relu"), "connector_act is 'relu'; only 'gelu_pytorch_tanh'"),
    ("q/k norm", setting("config.json", llm_config={"qk_norm": False}), "qk_norm is False; only True"),
    (
        "layers",
        setting("config.json", llm_config={"layer_module": "Qwen2MoEDecoderLayer"}),
        "layer_module is 'Qwen2MoE",
    ),
    ("word", setting("llm_config.json", num_hidden_layers="four"), "num_hidden_layers is 'four'; a positive int"),
    ("negative", setting("llm_config.json", rope_theta=-1), "rope_theta is -1; a positive float"),
    ("heads", setting("llm_config.json", num_attention_heads=7), "hidden_size 96 is not divisible by num_attention_h"),
    (
        "more layers",
        setting("llm_config.json", num_hidden_layers=5),
        r"lacks language_model\.model\.layers\.4\..*more\)",
    ),
    ("downsample", setting("config.json", vae_config={"downsample": 4}), "downsample is 4; ch_mult makes it 8"),
    ("size", setting("config.json", default_image_size=[512]), r"default_image_size is \[512\]; \[height, width\]"),
    ("transform", setting("config.json", image_transforms={"vae": [64, 128, 16]}), r"image_transforms\.vae: .*64, 128"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_checkpoint_is_refused_by_name(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"latent_patch_size": "two"}, {"max_latent_size": None}, {"vae_config": {"ch_mult": 4}}, {"vae_config": [1]}],
    ids=str,
)
def test_other_settings_that_are_none_are_refused(copy: Path, values: dict[str, Any]) -> None:
    change_json(copy, "config.json", **values)
    with pytest.raises(CheckpointError, match=rf"config.json.*{next(iter(values))}"):
        load(copy)


def test_many_differences_make_a_short_message(copy: Path) -> None:
    change_json(copy, "llm_config.json", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"\(and \d+ more\)") as caught:
        load(copy)
    assert str(caught.value).count("mlp") == 5


def test_a_role_does_not_miss_what_it_does_not_need(copy: Path) -> None:
    change_tensors(copy, EMA, lambda tensors: [tensors.pop(name) for name in list(tensors) if "moe_gen" in name])
    load(copy, Role.UNDERSTAND)
    with pytest.raises(CheckpointError, match=r"lacks language_model.*moe_gen"):
        load(copy, Role.DENOISE)


def quantised(kind: str) -> Callable[[Path], None]:
    """One matrix as the tools leave it that quantise checkpoints."""

    def change(tensors: dict[str, Tensor]) -> None:
        stem, weight = UP.removesuffix(".weight"), tensors[UP]
        beside: dict[str, dict[str, Tensor]] = {
            "float8": {f"{UP}_scale": torch.ones(1), UP: weight.to(torch.float8_e4m3fn)},
            "float8 with its inverse": {f"{UP}_scale_inv": torch.ones(2, 1), UP: weight.to(torch.float8_e5m2)},
            "float8 again in bfloat16": {f"{UP}_scale": torch.ones(1)},
            "bitsandbytes int8": {f"{stem}.SCB": torch.ones(256), UP: weight.to(torch.int8)},
            "bitsandbytes nf4": {f"{UP}.absmax": torch.zeros(384, dtype=torch.uint8), UP: torch.zeros(12288, 1).byte()},
            "gptq": {f"{stem}.{part}": torch.zeros(12, 256).int() for part in ("qweight", "qzeros", "g_idx")},
            "compressed-tensors": {f"{stem}.weight_packed": torch.zeros(256, 12).int()},
        }
        if kind in ("gptq", "compressed-tensors"):
            del tensors[UP]
        tensors |= beside[kind]

    return lambda folder: change_tensors(folder, EMA, change)


@pytest.mark.parametrize(
    "kind",
    [
        "float8",
        "float8 with its inverse",
        "float8 again in bfloat16",
        "bitsandbytes int8",
        "bitsandbytes nf4",
        "gptq",
        "compressed-tensors",
    ],
)
def test_a_quantised_checkpoint_is_refused_by_every_role(copy: Path, kind: str) -> None:
    quantised(kind)(copy)
    for role in Role:
        with pytest.raises(CheckpointError, match=r"quantised.*only plain weights in F32, F16 or BF16") as caught:
            load(copy, role)
        assert UP.removesuffix(".weight") in str(caught.value)


def test_tensors_of_another_architecture_are_refused(copy: Path) -> None:
    replace_tensor("pooling_head.weight", torch.zeros(3))(copy)
    with pytest.raises(CheckpointError, match=r"that BAGEL does not have.*ema\.safetensors: pooling_head\.weight"):
        load(copy)


def test_what_is_left_out_on_purpose_is_no_matter(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What other programs save beside the weights, and the ViT's last layer and pooling head."""

    def add(tensors: dict[str, Tensor]) -> None:
        vision = "vit_model.vision_model"
        tensors |= {
            "language_model.model.rotary_emb.inv_freq": torch.zeros(8),
            f"{vision}.embeddings.position_ids": torch.zeros(1, 4, dtype=torch.int64),
            f"{vision}.head.probe": torch.zeros(1, 1, 64),
        }
        layer = f"{vision}.encoder.layers.1."
        tensors |= {n.replace(".1.", ".2.", 1): t.clone() for n, t in tensors.items() if n.startswith(layer)}

    before = load(copy).state_dict()
    change_tensors(copy, EMA, add)
    with caplog.at_level(logging.INFO):
        after = load(copy).state_dict()
    assert "language_model.model.rotary_emb.inv_freq" in caplog.text
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bagel, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    for values in ({"vocab_size": 2**24}, {"intermediate_size": 2**20}, {"num_hidden_layers": 64}):
        change_json(copy, "llm_config.json", **values)
        with pytest.raises(CheckpointError, match="does not fit its configuration"):
            load(copy)


def test_a_sharded_checkpoint_says_what_to_do(copy: Path) -> None:
    (copy / EMA).unlink()
    rewrite(copy / "model.safetensors.index.json", b'{"weight_map": {"a": "ema-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"is missing; .*names 1 other files, like ema-00001-of-0.*join them"):
        load(copy)


def test_a_file_that_changes_under_a_loader_is_refused(copy: Path) -> None:
    for file in (EMA, "merges.txt", "llm_config.json"):
        checkpoint = Checkpoint(copy)
        loading = checkpoint.loading()
        loading.__enter__()
        rewrite(copy / file, (copy / file).read_bytes())
        with pytest.raises(CheckpointError, match=f"{file} changed while"):
            loading.__exit__(None, None, None)


def test_position_tables_say_their_own_size(copy: Path) -> None:
    """The published config.json has said 32 where the weights hold 64 x 64 rows."""
    change_json(copy, "config.json", max_latent_size=32, vit_max_num_patch_per_side=35)
    config = Checkpoint(copy).config
    assert (config.max_latent_size, config.vit_max_num_patch_per_side, config.max_image_size) == (64, 70, 1024)
    assert load(copy).latent_pos_embed is not None


def test_no_checkpoint_at_all_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*nowhere.*; give a folder or a hub name like"):
        find_checkpoint(str(tmp_path / "nowhere"))
    assert find_checkpoint(str(tmp_path)).folder == tmp_path


# -- the fingerprint


def test_the_fingerprint_is_the_contents(checkpoint: Checkpoint, copy: Path) -> None:
    assert len(checkpoint.fingerprint) == 16
    assert Checkpoint(copy).fingerprint == checkpoint.fingerprint
    change_json(copy, "generation_config.json", do_sample=True)
    (copy / "README.md").write_text("another model card")
    tensors = load_file(copy / AE)
    (copy / AE).unlink()
    save_file(tensors, copy / AE, metadata={"written": "again"})
    assert Checkpoint(copy).fingerprint == checkpoint.fingerprint


def first_value(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] += 1


def middle(tensors: dict[str, Tensor]) -> None:
    for name, tensor in list(tensors.items())[:24]:
        flat = tensor.flatten().clone()
        flat[flat.numel() // 3 : flat.numel() // 3 * 2] = 0
        tensors[name] = flat.view(tensor.shape)


def last_value(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.0.mlp.up_proj.weight"][-1, -1] += 1


def renamed(tensors: dict[str, Tensor]) -> None:
    first, second = (f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_tensors(folder, EMA, first_value),
        lambda folder: change_tensors(folder, EMA, middle),
        lambda folder: change_tensors(folder, EMA, last_value),
        lambda folder: change_tensors(folder, EMA, renamed),
        lambda folder: change_tensors(folder, AE, lambda tensors: tensors["encoder.conv_in.bias"].add_(1)),
        lambda folder: rewrite(folder / "merges.txt", (folder / "merges.txt").read_bytes() + b"Q Z\n"),
        setting("tokenizer_config.json", model_max_length=7),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        setting("config.json", image_transforms={"vit": [980, 224, 28]}),
        setting("llm_config.json", rope_theta=10_000.0),
    ],
    ids=(
        "first-value middle last-value swapped autoencoder merges tokenizer-config special-tokens added-tokens "
        "transforms rope"
    ).split(),
)
def test_other_content_has_another_fingerprint(
    checkpoint: Checkpoint, copy: Path, change: Callable[[Path], None]
) -> None:
    change(copy)
    assert Checkpoint(copy).fingerprint != checkpoint.fingerprint
