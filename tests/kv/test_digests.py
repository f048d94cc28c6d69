"""Names of K/V: everything that changes K/V changes its name, and nothing else does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagel.kv import digests
from bagel.kv.digests import DIGEST_BYTES, ROOT, SegmentKind, fingerprint, segment_digest

MODEL = fingerprint(b"model", "bfloat16")
PARENT = segment_digest(ROOT, SegmentKind.TEXT, b"parent", MODEL)
SEGMENT = (PARENT, SegmentKind.TEXT, b"content", MODEL)
Fields = tuple[bytes, SegmentKind, bytes, bytes]
FIELDS = st.tuples(st.binary(max_size=3), st.sampled_from(SegmentKind), st.binary(max_size=3), st.binary(max_size=3))


def test_a_digest_is_a_function_of_its_segment() -> None:
    digest = segment_digest(*SEGMENT)
    assert digest == segment_digest(*SEGMENT) and len(digest) == DIGEST_BYTES
    # Frozen, as processes of other versions compute it too: with another name LAYOUT_VERSION must rise.
    assert digest.hex() == "de4643460ec603ee637eb129cb65421f"


@pytest.mark.parametrize(
    ("place", "other"),
    [(0, ROOT), (0, MODEL), (1, SegmentKind.VAE), (1, SegmentKind.VIT), (2, b"Content"), (2, b""), (3, PARENT)],
)
def test_a_digest_covers_parent_kind_content_and_fingerprint(place: int, other: bytes | SegmentKind) -> None:
    changed = (*SEGMENT[:place], other, *SEGMENT[place + 1 :])
    assert segment_digest(*changed) != segment_digest(*SEGMENT)  # type: ignore[arg-type]


@given(one=FIELDS, other=FIELDS)
def test_fields_do_not_run_into_one_another(one: Fields, other: Fields) -> None:
    assert (segment_digest(*one) == segment_digest(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((b"c", SegmentKind.TEXT, b"", b"ab"), (b"bc", SegmentKind.TEXT, b"", b"a")),
        ((b"text", SegmentKind.TEXT, b"", b""), (b"", SegmentKind.TEXT, b"text", b"")),
    ],
)
def test_bytes_moved_from_field_to_field_are_another_segment(one: Fields, other: Fields) -> None:
    assert segment_digest(*one) != segment_digest(*other)


def test_a_fingerprint_covers_model_and_kv_type(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {fingerprint(m, t) for m, t in itertools.product((b"model", b"other"), ("bfloat16", "float32"))}
    assert len(found) == 4 and MODEL in found
    assert fingerprint(b"modelb", "float16") != fingerprint(b"model", "bfloat16")
    monkeypatch.setattr(digests, "LAYOUT_VERSION", digests.LAYOUT_VERSION + 1)
    assert fingerprint(b"model", "bfloat16") not in found
