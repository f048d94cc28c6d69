"""FP8: what it computes, what is quantised and how it is loaded, and where it is refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bagel.checkpoint.config import BAGEL_7B_MOT
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.loading import LoadedModel, load_role
from bagel.errors import ConfigError
from bagel.model.bagel import Bagel
from bagel.model.fp8 import AT_ONCE, FP8, check_fp8, quantise, quantise_into, scaled_product
from bagel.model.linear import Fp8Linear, Quantization
from bagel.model.weights import empty_model, load_model, random_model
from bagel.parallel.groups import Groups
from bagel.parallel.mesh import Mesh
from tests.model.forwards import FORWARDS
from tests.model.test_shares import Threads, ranks_of, together

DELIMITERS = (929, 930)
GIB = 2**30
PARTS = ("input.qkv_proj", "output.o_proj", "output.mlp.gate_up_proj", "output.mlp.down_proj")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def loaded(checkpoint: Checkpoint) -> LoadedModel:
    return load_role(
        checkpoint, Role.FULL, dtype=torch.bfloat16, device=torch.device("cpu"), quantization=Quantization.FP8
    )


@pytest.fixture(scope="module")
def quantised(loaded: LoadedModel) -> Bagel:
    return loaded.model


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Bagel:
    return load_model(checkpoint, delimiter_ids=DELIMITERS, dtype=torch.bfloat16)


def fp8_layers(model: Bagel) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


# -- arithmetic


def test_every_row_has_a_range_of_its_own() -> None:
    """A token of large values costs one of small values no digits."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-9], [1e-3], [1.0], [1e20]])
    values, scales = quantise(x)
    assert values.dtype is FP8 and scales.shape == (4, 1)
    for row in range(4):
        # Half a step: an eighth of a value's power of two, or of the smallest number that has all three digits.
        torch.testing.assert_close(
            values[row].float() * scales[row], x[row], rtol=2**-4, atol=float(scales[row]) * 2**-10
        )


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    assert (quantise(torch.zeros(2, 16)).values.float() == 0).all()
    for odd in (torch.nan, torch.inf):
        values, scales = quantise(torch.tensor([[odd, 1.0]]))
        assert not (values.float() * scales)[0, 0].isfinite()


def product(device: str, tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A product with a bias as computed in FP8, and in float64 of the same rounded numbers."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator).bfloat16()
    (values, scales), w = quantise(x.to(device)), quantise(weight.to(device))
    ours = scaled_product(quantise(x.to(device)), w.values, w.scales, bias.to(device))
    wanted = (values.double() * scales) @ (w.values.double() * w.scales).t() + bias.to(device).double()
    return ours, wanted


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 96, 160), (33, 512, 48), (5, 3584, 4608)])
def test_a_product_is_that_of_the_rounded_numbers(device: str, tokens: int, inputs: int, outputs: int) -> None:
    ours, wanted = product(device, tokens, inputs, outputs)
    assert ours.dtype is torch.bfloat16 and ours.shape == (2, tokens, outputs)
    # A GPU rounds the product, of about sqrt(inputs), and adds the bias to that.
    rounded = 1e-4 if device == "cpu" else 1e-2
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=rounded * inputs**0.5)


# -- what is quantised


def test_the_decoders_layers_are_quantised_and_nothing_else(quantised: Bagel, plain: Bagel) -> None:
    layers = range(quantised.config.llm.num_hidden_layers)
    names = {
        f"language_model.layers.{i}.{expert}_{part}" for i in layers for expert in ("und", "gen") for part in PARTS
    }
    assert set(fp8_layers(quantised)) == names
    others = {
        name: each
        for name, each in quantised.named_parameters()
        if name.rpartition(".")[0] not in names or "bias" in name
    }
    theirs = dict(plain.named_parameters())
    for name, each in others.items():
        assert each.dtype == theirs[name].dtype and torch.equal(each, theirs[name]), name


def test_weights_are_rounded_once_from_the_file(quantised: Bagel, plain: Bagel) -> None:
    weights = dict(plain.named_parameters())
    for name, layer in fp8_layers(quantised).items():
        wanted = quantise(weights[f"{name}.weight"])
        assert torch.equal(layer.weight.float(), wanted.values.float()) and torch.equal(layer.scale, wanted.scales)


def test_a_large_weight_is_quantised_a_part_at_a_time() -> None:
    values = torch.randn(2 * AT_ONCE + 5, 16)
    target, scale = torch.empty(values.shape, dtype=FP8), torch.empty(len(values), 1)
    quantise_into(values, target, scale, values.device)
    wanted = quantise(values)
    assert torch.equal(target.float(), wanted.values.float()) and torch.equal(scale, wanted.scales)


@pytest.mark.parametrize(
    ("role", "quantization", "most"),
    [
        (Role.DENOISE, Quantization.FP8, 14),
        (Role.DENOISE, None, 25),
        (Role.FULL, Quantization.FP8, 17),
    ],
)
def test_bytes_of_the_public_models_weights(role: Role, quantization: Quantization | None, most: int) -> None:
    model = empty_model(BAGEL_7B_MOT, role, dtype=torch.bfloat16, device="meta", quantization=quantization)
    assert sum(each.nbytes for each in [*model.parameters(), *model.buffers()]) <= most * GIB


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_is_near_float32_but_farther_than_bfloat16(
    checkpoint: Checkpoint, quantised: Bagel, plain: Bagel, name: str
) -> None:
    exact = load_model(checkpoint, delimiter_ids=DELIMITERS)
    with torch.inference_mode():
        outputs = zip(*(FORWARDS[name](model) for model in (exact, plain, quantised)), strict=True)
        for wanted, bf16, fp8 in outputs:
            assert distance(bf16, wanted) < distance(fp8, wanted) < 0.2


def test_the_log_says_what_is_quantised(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_role(checkpoint, Role.DENOISE, dtype=torch.bfloat16, device=torch.device("cpu"), quantization="fp8")
    (fields,) = [record.fields for record in caplog.records if record.message == "quantised"]  # type: ignore[attr-defined]
    assert fields["format"] == "fp8" and fields["layers"] == 4 * 2 * len(PARTS)
    # e4m3 and a float32 an output, beside bfloat16.
    assert 0.5 < fields["bytes"] / fields["bytes_unquantised"] < 0.53


# -- many ranks


def test_ranks_scale_their_own_shares(checkpoint: Checkpoint, quantised: Bagel) -> None:
    threads = Threads(2)
    shares = [
        load_model(
            checkpoint,
            delimiter_ids=DELIMITERS,
            dtype=torch.bfloat16,
            groups=threads.groups(rank),
            quantization=Quantization.FP8,
        )
        for rank in ranks_of(2)
    ]
    name = "language_model.layers.1.gen_output.mlp"
    whole, halves = fp8_layers(quantised), [fp8_layers(share) for share in shares]
    gate = [half[f"{name}.gate_up_proj"] for half in halves]
    columns = len(gate[0].weight) // 2
    rows = torch.cat([each.scale[:columns] for each in gate])
    assert torch.equal(rows, whole[f"{name}.gate_up_proj"].scale[: 2 * columns])
    down = [half[f"{name}.down_proj"].scale for half in halves]
    assert torch.equal(torch.maximum(*down), whole[f"{name}.down_proj"].scale)
    with torch.inference_mode():
        (wanted, *_) = FORWARDS["denoise step"](quantised)
    for outputs in together(shares, FORWARDS["denoise step"]):
        assert distance(outputs[0], wanted) < 0.1


# -- identity of K/V


def test_kv_of_a_quantised_model_have_a_name_of_their_own(checkpoint: Checkpoint, loaded: LoadedModel) -> None:
    """A DiT that receives K/V names those of its Thinker, whatever its own weights are."""

    def fingerprint(role: Role, quantization: str | None) -> bytes:
        place = torch.device("cpu")
        return load_role(checkpoint, role, dtype=torch.bfloat16, device=place, quantization=quantization).kv_fingerprint

    assert loaded.kv_fingerprint != fingerprint(Role.FULL, None) == fingerprint(Role.CONTEXT, None)
    assert fingerprint(Role.DENOISE, "fp8") == fingerprint(Role.CONTEXT, None)


# -- refusals


def test_float32_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"fp8 computes in bfloat16, not in float32; choose --dtype bfloat16"):
        load_model(checkpoint, delimiter_ids=DELIMITERS, quantization=Quantization.FP8)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        ConfigError, match=r"compute capability 8\.9, like an L4 or H100; cuda:0 has 8\.0; leave it out"
    ):
        check_fp8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_fp8(cuda, torch.bfloat16)


def test_widths_that_the_hardware_cannot_multiply_are_refused(checkpoint: Checkpoint) -> None:
    config = replace(checkpoint.config, llm=replace(checkpoint.config.llm, intermediate_size=208))
    random_model(config, Role.DENOISE, dtype=torch.bfloat16, device="cpu", seed=0, quantization=Quantization.FP8)
    with pytest.raises(
        ConfigError, match=r"multiples of 16; .*mlp\.down_proj has 104 and 96; leave it out, or use fewer"
    ):
        empty_model(
            config,
            Role.DENOISE,
            dtype=torch.bfloat16,
            device="meta",
            groups=Groups(Mesh(tp=2).rank(0)),
            quantization=Quantization.FP8,
        )
