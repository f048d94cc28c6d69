"""Files of a checkpoint that are odd: each is refused by its name, before anything of it is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagel.checkpoint.config_files import read_model_config
from bagel.checkpoint.headers import read_header
from bagel.errors import CheckpointError
from tests.conftest import GOLDEN

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def stored(header: object, data: int = 24) -> bytes:
    """A safetensors file: a header as JSON, text or bytes, and so many bytes of data."""
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    packed = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(packed)) + packed + bytes(data)


def entry(**changed: object) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **changed}}


ODD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "no length": (b"\0\0\0", "it has 3 bytes"),
    "huge length": (struct.pack("<Q", 2**64 - 1) + b"{}", "the header is longer than the file"),
    "length of all": (struct.pack("<Q", 3) + b"{}", "the header is longer than the file"),
    "large header": (stored("{" + " " * 2**24 + "}", 0), "the header has 16777218 bytes; at most 16777216"),
    "no JSON": (stored("<html>"), "Expecting value"),
    "no UTF-8": (stored(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "UTF-16": (stored(json.dumps(GOOD).encode("utf-16")), "not UTF-8 at byte 0"),
    "list": (stored([]), "holds list"),
    "deep": (stored("[" * 100_000), "more than 32 levels deep"),
    "deep, closed": (stored('{"a":' * 200 + "1" + "}" * 200), "more than 32 levels deep"),
    "deep metadata": (stored({"__metadata__": {"a": [[1]]}, **GOOD}), "__metadata__ is .*an object of texts"),
    "metadata": (stored({"__metadata__": 7, **GOOD}), "__metadata__ is 7"),
    "twice": (stored(json.dumps(GOOD)[:-1] + ', "a": {}}'), "the key 'a' is there twice"),
    "no object": (stored({**GOOD, "b": 7}), "b is 7; an object with dtype, shape and data_offsets"),
    "no dtype": (stored({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4), "a: dtype is None"),
    "dtype": (stored(entry(dtype="F7")), "b: dtype is 'F7'"),
    "list as dtype": (stored(entry(dtype=["BF16"])), r"b: dtype is \['BF16'\]"),
    "type of another size": (stored(entry(dtype="F32")), r"b: data_offsets \[16, 24\] are 8 bytes; F32 \[4\] has 16"),
    "shape": (stored(entry(shape=[5])), r"are 8 bytes; BF16 \[5\] has 10"),
    "no sizes": (stored(entry(shape=[0, 4])), r"are 8 bytes; BF16 \[0, 4\] has 0"),
    "negative size": (stored(entry(shape=[-2, -2])), r"b: shape is \[-2, -2\]"),
    "bool as size": (stored(entry(shape=[True, 4])), r"b: shape is \[True, 4\]"),
    "fraction": (stored(entry(shape=[4.0])), r"b: shape is \[4.0\]"),
    "NaN": (stored(entry(shape=[float("nan")])), "NaN is no number that JSON has"),
    "infinity": (stored(entry(data_offsets=[16, float("inf")])), "Infinity is no number"),
    "large number": (stored(json.dumps(entry(shape=[10**400]))), "b: shape is|data_offsets"),
    "longer number": (stored(f'{{"a": {"9" * 5000}}}'), "not a readable safetensors"),
    "text as shape": (stored(entry(shape="4")), "b: shape is '4'"),
    "many dimensions": (stored(entry(shape=[1] * 16 + [4])), "b: shape is .* up to 16"),
    "negative offset": (stored(entry(data_offsets=[-8, 0])), r"b: data_offsets is \[-8, 0\]"),
    "reversed": (stored(entry(data_offsets=[24, 16])), r"b: data_offsets is \[24, 16\]"),
    "three offsets": (stored(entry(data_offsets=[16, 24, 24])), "b: data_offsets is"),
    "overlap": (stored(entry(data_offsets=[12, 20])), "b: data_offsets begin at 12 instead of 16: it overlaps a"),
    "the same bytes": (stored({"a": GOOD["a"], "c": GOOD["a"]}, 16), "c: .* it overlaps a"),
    "gap": (stored(entry(data_offsets=[20, 28]), 28), "b: .* lies behind bytes of no tensor"),
    "late start": (stored({"b": GOOD["b"]}), "b: data_offsets begin at 16 instead of 0"),
    "cut short": (stored(GOOD, 23), r"is cut short: \d+ of \d+ bytes; download it again"),
    "out of range": (stored(entry(shape=[2**60], data_offsets=[16, 16 + 2**61])), "is cut short"),
    "bytes behind": (stored(GOOD, 25), "1 bytes behind its last tensor"),
    "odd bits": (stored({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1), "are 1 bytes; F4"),
    "unprintable name": (stored({"a\n\x1b[2J": {}}), r"'a\\n\\x1b\[2J': dtype is None"),
}


@pytest.mark.parametrize(("content", "message"), list(ODD.values()), ids=list(ODD))
def test_an_odd_safetensors_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "ema.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    told = str(caught.value)
    assert told.startswith(str(file)) and "\n" not in told and len(told) < 1000


def test_a_good_file_is_read(tmp_path: Path) -> None:
    for header, data in ((GOOD, 24), ({"__metadata__": {"format": "pt"}, **GOOD}, 24), ({}, 0)):
        (tmp_path / "good").write_bytes(stored(header, data))
        assert list(read_header(tmp_path / "good").tensors) == [name for name in header if name in GOOD]
    empty = {"a": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}
    (tmp_path / "empty").write_bytes(stored(empty, 0))
    assert read_header(tmp_path / "empty").tensors["a"].shape == (0, 3)


# -- configurations


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in ("config.json", "llm_config.json", "vit_config.json"):
        (tmp_path / file).write_bytes((GOLDEN / "checkpoint" / file).read_bytes())
    return tmp_path


def changed(folder: Path, file: str, **values: object) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


@pytest.mark.parametrize("file", ["config.json", "llm_config.json", "vit_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "more than 32 levels"),
        ('{"a":' * 100 + "1" + "}" * 100, "more than 32 levels"),
        ('{"hidden_act": NaN}', "NaN is no number"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("\ufeff{}", "cannot be read as JSON"),
        (" " * (16 * 2**20 + 1), "has more than 16777216 bytes"),
    ],
    ids=["deep", "deep-closed", "nan", "twice", "mark", "large"],
)
def test_json_that_is_no_configuration_is_refused_by_name(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(folder)
    assert str(caught.value).startswith(str(folder / file))


COUNTS = [
    ("llm_config.json", "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
     "vocab_size rope_theta rms_norm_eps max_position_embeddings"),
    ("vit_config.json", "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size num_channels "
     "image_size layer_norm_eps"),
    ("config.json", "latent_patch_size max_latent_size vit_max_num_patch_per_side default_image_size"),
]  # fmt: skip
ABSURD = (-1, 0, True, False, 10**12, 10**400, 1e300, 1.5, "8", [[8]], None, {"a": [8]})


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in COUNTS for name in names.split()])
def test_an_absurd_configuration_is_refused_by_its_field(folder: Path, file: str, name: str) -> None:
    before = (folder / file).read_text()
    for value in ABSURD:
        if isinstance(value, float) and value == 1.5 and name in ("rope_theta", "rms_norm_eps", "layer_norm_eps"):
            continue
        (folder / file).write_text(before)
        changed(folder, file, **{name: value})
        with pytest.raises(CheckpointError) as caught:
            read_model_config(folder)
        told = str(caught.value)
        assert told.startswith(str(folder)) and name in told and "\n" not in told and len(told) < 500, value


@pytest.mark.parametrize("name", ["ch", "num_res_blocks", "z_channels", "in_channels", "out_ch", "scale_factor"])
def test_an_absurd_autoencoder_is_refused_by_its_field(folder: Path, name: str) -> None:
    vae = json.loads((folder / "config.json").read_text())["vae_config"]
    for value in (-1, 0, True, 10**12, 10**400, "8", None):
        changed(folder, "config.json", vae_config={**vae, name: value})
        with pytest.raises(CheckpointError, match=rf"config\.json: {name} is"):
            read_model_config(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("llm_config.json", {"num_attention_heads": 96}, "96 is not divisible|is not divisible"),
        ("llm_config.json", {"num_attention_heads": 32}, "3 is not divisible by rotary"),
        ("llm_config.json", {"num_key_value_heads": 12}, "6 is not divisible by num_key_value_heads 12"),
        ("vit_config.json", {"num_hidden_layers": 1}, "num_hidden_layers is 1; at least 2"),
        ("vit_config.json", {"num_channels": 4}, "num_channels is 4; only 3"),
        ("vit_config.json", {"patch_size": 14, "image_size": 13}, "patch_size 14 is larger"),
        ("config.json", {"vae_config": {"ch": 33}}, "ch x 1 .* is not divisible by"),
        ("config.json", {"vae_config": {"ch_mult": [1] * 9}}, "ch_mult is"),
        ("config.json", {"vae_config": {"ch_mult": [0]}}, "ch_mult is 0"),
        ("config.json", {"vae_config": 0}, "vae_config is 0"),
        ("config.json", {"image_transforms": {"vae": [10**9, 1, 1]}}, r"image_transforms\.vae is"),
        ("config.json", {"image_transforms": {"vit": [[980], 224, 14]}}, r"image_transforms\.vit is"),
        ("config.json", {"image_transforms": {"vit": [980, True, 14]}}, r"image_transforms\.vit is"),
        ("config.json", {"default_image_size": [True, True]}, "default_image_size is"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_refused(
    folder: Path, file: str, values: dict[str, Any], message: str
) -> None:
    changed(folder, file, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: changed(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        lambda folder: changed(folder, "llm_config.json", quantization_config={"load_in_8bit": True}),
        lambda folder: changed(folder, "vit_config.json", compression_config={"quant_method": "compressed-tensors"}),
        lambda folder: changed(folder, "config.json", llm_config={"quantization_config": {"quant_method": "awq"}}),
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        lambda folder: (folder / "quant_config.json").write_text("{}"),
    ],
    ids=["gptq", "bitsandbytes", "compressed-tensors", "nested", "gptq-file", "awq-file"],
)
def test_a_quantised_model_is_refused_by_its_configuration(folder: Path, damage: Callable[[Path], object]) -> None:
    read_model_config(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=r"says that the weights are quantised.*only plain weights in F32"):
        read_model_config(folder)
