"""What the reference's calls saw, against ours: image sizes, token ids, lengths and positions of every forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bagel.engine.segments import Segment
from bagel.kv.digests import SegmentKind
from bagel.model.attention import Rows
from bagel.parity.record import Recorder
from bagel.parity.report import Comparison

Forward = tuple[str, bool, int, int, int, int]
"""(mode, causal, K/V rows before, rows of its own, first position, last position)."""

_PREPARE = ("Bagel.prepare_prompts", "Bagel.prepare_vae_images", "Bagel.prepare_vit_images")


class Calls:
    """Our forwards of one case. Sets: the reference computes what branches share once per branch, the engine once."""

    def __init__(self) -> None:
        self.text_ids: set[tuple[int, ...]] = set()
        self.contexts: set[tuple[int, int]] = set()
        self.vae_inputs: set[tuple[int, ...]] = set()
        self.forwards: set[Forward] = set()

    def add_segment(self, segment: Segment, past: int, record: Recorder) -> None:
        """A segment that was computed behind `past` K/V rows."""
        self.contexts.add((past + segment.length, segment.next_rope))
        if segment.kind is SegmentKind.TEXT:
            self.text_ids.add(segment.token_ids)
        if segment.kind is SegmentKind.VAE:
            self.vae_inputs.add(tuple(record.last("encoder.in").shape))
        self.add_forwards([past], record)

    def add_forwards(self, pasts: Sequence[int], record: Recorder) -> None:
        """The recorded forwards of one row each, in order, behind pasts[i] K/V rows."""
        positions = record.all("rotary.in")
        for past, inputs, at in zip(pasts, record.all("decoder.in"), positions, strict=True):
            rows: Rows = inputs[2]
            mode = "gen" if rows.gen else "und"
            # A recorder allows no graphs, so the host knows the places.
            assert rows.intervals is not None
            _, length = rows.intervals[0]
            span = (past, length - past, int(at.min()), int(at.max()))
            self.forwards.add((mode, rows.causal, *span))

    def compare(self, recorded: Sequence[dict[str, Any]], report: Comparison) -> None:
        """Compare with a case's `call_order`."""
        prepared = [call for call in recorded if call["call"] in _PREPARE]
        encoded = [call for call in recorded if call["call"] == "AutoEncoder.encode"]
        wanted = {
            "text_ids": {tuple(call["ids"]) for call in prepared if "ids" in call},
            "contexts": {(call["new_kv_lens"][0], call["new_ropes"][0]) for call in prepared},
            "vae_inputs": {tuple(call["input_shape"]) for call in encoded},
            "forwards": {_forward(call) for call in recorded if call["call"].endswith(".forward_inference")},
        }
        for name, values in wanted.items():
            report.equal(f"call_order.{name}", sorted(getattr(self, name)), sorted(values))


def _forward(call: dict[str, Any]) -> Forward:
    span = (call["n_past"], call["n_query"], call["first_position"], call["last_position"])
    return (call["mode"], call["is_causal"], *span)
