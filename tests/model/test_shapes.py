"""A checkpoint of other shapes than the recorded one: everything follows its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bagel
from bagel.checkpoint.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from bagel.checkpoint.files import AE, EMA, Checkpoint
from bagel.checkpoint.roles import Role
from bagel.deployment.deploy_file import shipped_deploy_config
from bagel.engine.local import BagelEngine
from bagel.images import ImageTransform
from bagel.model.naming import slots
from bagel.model.weights import random_model
from tests.helpers import agree, request, sketch

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
CONFIG = ModelConfig(
    llm=LlmConfig(
        hidden_size=160,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=200,
        vocab_size=1100,
    ),
    vit=VitConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, image_size=280),
    vae=VaeConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4),
    max_latent_size=32,
    vit_max_num_patch_per_side=24,
    vae_transform=ImageTransform(96, 64, 8),
    vit_transform=ImageTransform(112, 56, 14),
    default_image_size=(64, 96),
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of CONFIG with random weights."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / name, folder)
    model = random_model(CONFIG, Role.FULL, dtype=torch.float32, device="cpu", seed=3)
    files: dict[str, dict[str, torch.Tensor]] = {EMA: {}, AE: {}}
    for slot in slots(model):
        files[slot.file][slot.name] = slot.target.detach().reshape(slot.shape).contiguous().clone()
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    write_json(folder)
    return folder


def write_json(folder: Path) -> None:
    llm, vit, vae = CONFIG.llm, CONFIG.vit, CONFIG.vae
    config = {
        "max_latent_size": 64,  # wrong on purpose, as in a published file: the weight decides
        "vae_config": {
            "ch": vae.ch,
            "ch_mult": list(vae.ch_mult),
            "num_res_blocks": 1,
            "z_channels": 4,
            "downsample": 4,
        },
        "image_transforms": {"vae": [96, 64, 8], "vit": [112, 56, 14]},
        "default_image_size": [64, 96],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "llm_config.json").write_text(json.dumps({**vars(llm), "hidden_act": "silu"}))
    layers = {"num_hidden_layers": vit.num_hidden_layers + 1}
    (folder / "vit_config.json").write_text(json.dumps({**vars(vit), **layers, "hidden_act": "gelu_pytorch_tanh"}))


def test_it_is_read_as_it_was_written(other: Path) -> None:
    assert Checkpoint(other).config == CONFIG


def test_every_modality_works_and_batches(other: Path) -> None:
    engine = BagelEngine.load(Checkpoint(other))
    asked = [
        request("text2img", height=None, width=None),
        request("img2img", image=sketch(60, 90), seed=3),
        request("text2img", think=True, max_think_tokens=4),
        request("img2text", max_tokens=4),
        request("text2text", max_tokens=4),
    ]
    together = engine.generate(asked)
    sizes = [result.image.size if result.image else None for result in together]
    assert sizes == [(96, 64), (64, 96), (64, 64), None, None]
    for one, result in zip(asked, together, strict=True):
        (alone,) = BagelEngine.load(Checkpoint(other)).generate([one])
        assert alone.token_ids == result.token_ids
        if result.image is not None and alone.image is not None:
            assert agree(result.image, alone.image)


@pytest.mark.slow
def test_services_serve_it(other: Path) -> None:
    requests = [
        request("text2img", think=True, max_think_tokens=4),
        request("img2img", image=sketch(), cfg_img_scale=2.0, posterior="seed"),
        request("img2text", max_tokens=4),
    ]
    expected = BagelEngine.load(Checkpoint(other)).generate(requests)
    with bagel.Omni(other, deploy_config=shipped_deploy_config("bagel"), device="cpu", init_timeout=120) as omni:
        served = omni.generate(requests)
    assert [each.text for each in served] == [each.text for each in expected]
    for one, wanted in zip(served[:2], expected[:2], strict=True):
        assert one.image is not None and wanted.image is not None and agree(one.image, wanted.image)
