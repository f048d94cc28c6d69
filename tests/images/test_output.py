"""How a picture is given out: what there is, and what its file is."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bagel.errors import InvalidRequest
from bagel.images.output import OUTPUT_FORMATS, OutputFormat
from bagel.images.png import read_png
from bagel.rpc import convert
from bagel.v1 import dit_pb2, gateway_pb2


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_a_picture_is_a_file_of_its_format(name: str) -> None:
    image = Image.effect_noise((64, 64), 64).convert("RGB")
    sizes = [len(OutputFormat(name.lower(), quality).encode(image)) for quality in (5, 95)]
    assert Image.open(BytesIO(OutputFormat(name).encode(image))).format == name
    assert (sizes[0] < sizes[1]) == (name != "PNG")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (64, 48), (300, 2), (600, 700)])
def test_a_png_has_the_pictures_pixels_and_is_whole(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = OutputFormat("PNG").encode(Image.fromarray(noise))
    assert read_png(data).data == data  # every checksum is right, and nothing else is there
    with Image.open(BytesIO(data)) as opened:
        assert (opened.mode, opened.size) == ("RGB", size)
        assert np.array_equal(np.asarray(opened), noise)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("output_format", {"format": "GIF"}),
        ("output_compression", {"format": "JPEG", "compression": 101}),
        ("output_compression", {"format": "JPEG", "compression": "high"}),
        ("partial_images", {"previews": 4}),
        ("partial_images", {"previews": True}),
    ],
)
def test_an_output_that_there_is_not_is_refused(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        OutputFormat(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize("message", [gateway_pb2.GenerateRequest(), dit_pb2.DitServiceGenerateRequest()])
def test_an_output_comes_over_the_wire_as_it_was(message: convert.OutputMessage) -> None:
    assert convert.output_from_wire(message) == OutputFormat()
    for output in (OutputFormat("WEBP", 0, 2), OutputFormat("PNG")):
        message.Clear()
        convert.output_to_wire(output, message)
        assert convert.output_from_wire(message) == output
