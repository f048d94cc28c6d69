"""Attention and the elementwise work of a layer: every backend computes the same, and the choice is told."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from bagel.engine.slab import SharedSlab
from bagel.errors import ConfigError
from bagel.model.attention import KvShape, QueryBlock, Rows
from bagel.model.attention_backends import BACKENDS, READ_AHEAD, choose_attention, sdpa
from bagel.model.backend import _fused_kernels, choose_backend
from bagel.model.fp8 import FP8, Scaled
from bagel.model.kernels import TORCH, Activations, Kernels

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYOUTS = {
    "a picture's branches": ((2, 9), (0, 30), (26, 17), False),
    "one decoded token a text": ((1, 0), (0, 40), (37, 5), True),
    "a text segment after contexts": ((6, 0), (3, 40), (20, 6), True),
    "an image block": ((7, 0), (4,), (20,), False),
}


def rows_of(layout: str, device: torch.device = CPU) -> Rows:
    (und, gen), starts, lengths, causal = LAYOUTS[layout]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Rows(
        torch.tensor(starts, device=device),
        torch.tensor(lengths, device=device),
        longest=max(lengths),
        und=und,
        und_slots=none,
        und_rope=(none, none),
        gen=gen,
        causal=causal,
        intervals=list(zip(starts, lengths, strict=True)),
    )


def end_of(rows: Rows) -> int:
    """Where the last row that is seen ends in the slab."""
    return int((rows.starts + rows.lengths).max())


def tensors(rows: Rows, heads: tuple[int, int], dim: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = end_of(rows) + 3
    shapes = (rows.queries, heads[0], dim), (total, heads[1], dim), (total, heads[1], dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Softmax attention in float64, a row's two experts together, written out from the definition."""
    q, k, v = q.double(), k.double(), v.double()
    out, count = torch.empty_like(q), rows.count
    for row, (start, length) in enumerate(rows.intervals or ()):
        und = torch.arange(row * rows.und, (row + 1) * rows.und)
        gen = torch.arange(row * rows.gen, (row + 1) * rows.gen) + count * rows.und
        mine = torch.cat((und, gen)).to(q.device)
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x[start : start + length].repeat_interleave(repeat, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[mine], keys) * q.shape[-1] ** -0.5
        if rows.causal:
            hidden = torch.ones(len(mine), length, dtype=torch.bool, device=q.device).triu(length - len(mine) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        out[mine] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


def test_each_experts_queries_lie_together() -> None:
    und = [QueryBlock(0, 2, 0, 26), QueryBlock(2, 2, 30, 17)]
    gen = [QueryBlock(4, 9, 0, 26), QueryBlock(13, 9, 30, 17)]
    assert rows_of("a picture's branches").blocks == (*und, *gen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_what_its_definition_says(layout: str) -> None:
    rows = rows_of(layout)
    q, k, v = tensors(rows, (6, 2), 16)
    torch.testing.assert_close(sdpa(q, k, v, rows).double(), by_hand(q, k, v, rows), rtol=0, atol=2e-6)


def test_a_cpu_has_one_backend_and_says_so_to_who_asks_for_another() -> None:
    chosen = choose_backend(CPU, torch.bfloat16)
    assert (chosen.attend, chosen.kernels, chosen.attention) == (sdpa, TORCH, "sdpa")
    with pytest.raises(ConfigError, match=r"attention_backend fa3 runs on CUDA devices, not on cpu; choose another"):
        choose_attention(CPU, torch.bfloat16, "fa3")
    with pytest.raises(ConfigError, match=r"attention_backend is 'flash'; it must be auto, sdpa, fa2 or fa3"):
        choose_attention(CPU, torch.bfloat16, "flash")


def test_where_triton_cannot_compile_pytorchs_operators_are_used_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bagel.model.triton_kernels", raising=False)
    assert _fused_kernels(torch.device("cuda"), torch.bfloat16) is TORCH
    (record,) = caplog.records
    assert record.message == "no fused kernels: steps are slower"
    assert "gcc" in vars(record)["fields"]["remedy"]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "dim"), [((28, 4), 128), ((6, 2), 16)])
def test_every_backend_attends_alike(name: str, layout: str, heads: tuple[int, int], dim: int) -> None:
    device = torch.device("cuda")
    try:
        choose_attention(device, torch.bfloat16, name)
    except ConfigError as error:
        pytest.skip(str(error))
    rows = rows_of(layout, device)
    q, k, v = (x.bfloat16() for x in tensors(rows, heads, dim, device))
    wanted = by_hand(q, k, v, rows)
    assert (BACKENDS[name](q, k, v, rows).double() - wanted).norm() < 4e-3 * wanted.norm()


def plain(x: Activations) -> Tensor:
    return x.values.float() * x.scales if isinstance(x, Scaled) else x


def elementwise(kernels: Kernels, dtype: torch.dtype, takes: torch.dtype) -> dict[str, Tensor]:
    """Every function once, on two rows of five tokens, for products that take a type; what is written is poisoned."""
    generator, device = torch.Generator().manual_seed(2), torch.device("cuda")
    rows, n, width, heads, kv_heads, dim = 2, 5, 100, 6, 2, 20

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, delta, weight = random(rows, n, width), random(rows, n, width).to(dtype), random(width)
    added, normed = kernels.add_norm(x, delta, weight, 1e-6, takes)
    qkv = random(rows, n, (heads + 2 * kv_heads) * dim).to(dtype)
    q, k, v = (
        torch.full((size, h, dim), torch.nan, dtype=dtype, device=device) for size, h in ((10, 6), (30, 2), (30, 2))
    )
    slots = torch.randperm(30, generator=generator)[:10].to(device)
    rope = random(rows, n, 1, dim), random(rows, n, 1, dim)
    norms = random(dim), random(dim)
    kernels.rotate(qkv, norms, 1e-6, rope, q, (k, v), slots)
    # Queries, and keys with values, each by themselves.
    none, split = q.new_empty(len(slots), 0, dim), heads * dim
    alone = {name: torch.full_like(each, torch.nan) for name, each in {"q": q, "k": k, "v": v}.items()}
    kernels.rotate(qkv[..., :split].contiguous(), norms, 1e-6, rope, alone["q"], (none, none), slots)
    kernels.rotate(qkv[..., split:].contiguous(), norms, 1e-6, rope, none, (alone["k"], alone["v"]), slots)
    taken = {
        "norm": kernels.norm(x, weight, 1e-6, takes),
        "normed": normed,
        # Longer than the blocks of the kernel that scales it.
        "gate": kernels.gate(random(rows, n, 2 * 5000).to(dtype), takes),
        "cast": kernels.cast(delta, takes),
    }
    apart = {f"{name} alone": each for name, each in alone.items()}
    return {"added": added, "q": q, "k": k, "v": v, **apart, **{name: plain(each) for name, each in taken.items()}}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("dtype", "takes", "near"),
    # PyTorch rounds SiLU, and its product with up once more. e4m3 has steps of an eighth, and values on the border of
    # two may go either way.
    [(torch.float32, torch.float32, 1e-6), (torch.bfloat16, torch.bfloat16, 8e-3), (torch.bfloat16, FP8, 0.13)],
)
def test_fused_kernels_compute_what_pytorchs_operators_do(dtype: torch.dtype, takes: torch.dtype, near: float) -> None:
    from bagel.model.triton_kernels import TRITON

    ours, theirs = elementwise(TRITON, dtype, takes), elementwise(TORCH, dtype, takes)
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=near, atol=near, equal_nan=True, msg=name)


def test_an_interval_of_the_slab_begins_finite_and_ends_apart_from_the_next() -> None:
    space = SharedSlab(KvShape(2, 1, 8), dtype=torch.float32, device=CPU, read_ahead=5, size=30)
    first, second = space.take(10), space.take(10)
    assert (first, second) == (0, 15)
    space.slab.k[:, second : second + 10] = space.slab.v[:, second : second + 10] = torch.nan
    assert space.slab.k[:, : first + 15].isfinite().all() and space.slab.v[:, : first + 15].isfinite().all()
    space.give(second)
    assert space.take(10) == second
    assert space.slab.k.isfinite().all() and space.slab.v.isfinite().all()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_what_attention_reads_ahead_is_no_more_than_is_cleared(name: str) -> None:
    device = torch.device("cuda")
    try:
        choose_attention(device, torch.bfloat16, name)
    except ConfigError as error:
        pytest.skip(str(error))
    for layout in LAYOUTS:
        for heads, dim in (((28, 4), 128), ((6, 2), 16), ((4, 4), 64)):
            rows = rows_of(layout, device)
            q, k, v = (x.bfloat16() for x in tensors(rows, heads, dim, device))
            end = end_of(rows)
            ahead = torch.zeros(READ_AHEAD.get(name, 0), *k.shape[1:], dtype=k.dtype, device=device)
            poison = torch.full_like(k[:1].expand(300, -1, -1), torch.nan)
            k, v = (torch.cat((x[:end], ahead, poison)) for x in (k, v))
            assert BACKENDS[name](q, k, v, rows).isfinite().all(), (layout, heads, dim)
