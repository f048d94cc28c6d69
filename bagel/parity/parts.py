"""Small parts of the network alone, and the tables: sizes, timesteps, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bagel.images import ImageTransform, resized_size
from bagel.model.bagel import Bagel
from bagel.model.flow import latent_patchify, latent_unpatchify, sinusoid, timesteps
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.vit import vit_patchify
from bagel.parity.golden import read_json
from bagel.parity.report import Comparison

NOT_RESULTS = frozenset({"fp32_noise"})
"""Tables that describe the recordings themselves."""


@torch.inference_mode()
def compare_components(model: Bagel, case: Comparison) -> None:
    """Time embedder, autoencoder, position rows, rotary angles and patch orders on recorded inputs."""
    device, config = model.device, model.config
    latent = case.input("latent_patchify.latent")
    tokens = latent_patchify(latent, config.latent_patch_size)
    case.tensor("latent_patchify.tokens", tokens)
    rows, columns = latent.shape[1] // config.latent_patch_size, latent.shape[2] // config.latent_patch_size
    case.equal(
        "latent_unpatchify", latent_unpatchify(tokens, rows, columns, config.latent_patch_size).equal(latent), True
    )
    case.tensor("vit_patchify.tokens", vit_patchify(case.input("vit_patchify.image"), config.vit.patch_size))
    assert model.latent_pos_embed is not None and model.time_embedder is not None
    case.tensor("latent_pos.out", model.latent_pos_embed(case.input("latent_pos.ids").to(device)))
    cos, sin = model.language_model.rotary(case.input("rope.positions").to(device))
    case.tensor("rope.cos", cos)
    case.tensor("rope.sin", sin)
    t = case.input("time.t").to(device)
    case.tensor("time.sinusoid", sinusoid(t))
    case.tensor("time.out", model.time_embedder(t))
    vae = model.autoencoder()
    case.tensor("vae_decode.out", vae.decode(case.input("vae_decode.z").to(device)))
    case.tensor("vae_encode.moments", torch.cat(vae.encode(case.input("vae_encode.pixels").to(device)), dim=1))


def compare_table(path: Path, tokenizer: BagelTokenizer) -> Comparison:
    """Every row of one table; an unknown, empty or damaged one is a failure."""
    case = Comparison(f"tables/{path.stem}", {}, lambda *_: None)
    try:
        table = read_json(path)
        if path.stem == "resize":
            _resize(table, case)
        elif path.stem == "timesteps":
            _timesteps(table, case)
        elif path.stem == "tokenizer":
            _tokenizer(table, tokenizer, case)
        else:
            case.failures.append(f"nothing compares the table {path.stem!r}")
    # A damaged table is one failure, not the end of the rest.
    except Exception as error:
        case.failures.append(f"{type(error).__name__}: {error}")
    return case


def _rows(rows: Any, name: str, case: Comparison) -> Any:
    if not rows:
        case.failures.append(f"{name}: empty, nothing was compared")
    return rows


def _resize(table: Any, case: Comparison) -> None:
    for kind, part in _rows(table, "table", case).items():
        if not isinstance(part, dict):
            continue
        vae, vit = ImageTransform.from_list(part["vae"]), ImageTransform.from_list(part["vit"])
        for row in _rows(part["rows"], kind, case):
            size = (row["in"][0], row["in"][1])
            first = resized_size(*size, vae)
            ours = {
                "vae": first,
                "vae_twice": resized_size(*first, vae),
                "vit_of_in": resized_size(*size, vit),
                "vit_of_vae": resized_size(*first, vit),
            }
            # Over what is recorded, so that a column that nothing computes is a failure.
            for column in _rows(row.keys() - {"in"}, f"{kind} {size}", case):
                case.equal(f"{kind} {size} {column}", list(ours[column]) if column in ours else None, row[column])


def _timesteps(rows: Any, case: Comparison) -> None:
    for row in _rows(rows, "table", case):
        times = timesteps(row["num_timesteps"], row["timestep_shift"])
        label = f"N={row['num_timesteps']} shift={row['timestep_shift']}"
        case.equal(f"{label} steps_run", len(times) - 1, row["steps_run"])
        case.equal(f"{label} t", times[:-1].tolist(), row["t"])
        case.equal(f"{label} dt", (times[:-1] - times[1:]).tolist(), row["dt"])


def _tokenizer(table: Any, tokenizer: BagelTokenizer, case: Comparison) -> None:
    """The reference lets control words in a text become their tokens, so this table is encoded that way."""
    ids = table["special_token_ids"]
    case.equal("bos", tokenizer.bos, ids["bos_token_id"])
    case.equal("eos", tokenizer.eos, ids["eos_token_id"])
    case.equal("start_of_image", tokenizer.image_start, ids["start_of_image"])
    case.equal("end_of_image", tokenizer.image_end, ids["end_of_image"])
    case.equal("len_tokenizer", len(tokenizer), table["len_tokenizer"])
    for row in _rows(table["encode"], "encode", case):
        case.equal(f"encode {row['text']!r}", tokenizer.encode(row["text"], allow_control=True), row["ids"])
    for row in [*table["encode"], *_rows(table["decode"], "decode", case)]:
        case.equal(f"decode {row['ids']}", tokenizer.decode(row["ids"]), row["decoded"])
