"""Image files of cameras, editors and browsers: whatever shows a picture is read, and read alike however it comes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageCms, TiffImagePlugin

from bagel.client.calls import _image_bytes
from bagel.errors import InvalidImage
from bagel.images import image_size, load_image, to_rgb
from bagel.images.jpeg import MAX_SCANS
from bagel.prompts import ImagePart

BANDS = [Image.effect_noise((48, 32), 50), Image.linear_gradient("L"), Image.radial_gradient("L")]
PICTURE = Image.merge("RGB", [band.resize((48, 32)) for band in BANDS])
"""Every part of it is unlike the others."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def profile(matrix: Iterable[str] = ("rXYZ", "gXYZ", "bXYZ")) -> bytes:
    """The sRGB profile, the colorants of its channels in another order."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = struct.unpack_from(">I", data, 128)[0]
    tags = {data[132 + 12 * at : 136 + 12 * at]: data[136 + 12 * at : 144 + 12 * at] for at in range(count)}
    order = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), (name.encode() for name in matrix), strict=True))
    table = b"".join(name + tags[order.get(name, name)] for name in tags)
    return data[:132] + table + data[132 + 12 * count :]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


class TestMetadataRefusesNothing:
    PNG = encoded(PICTURE, "PNG")

    @pytest.mark.parametrize(
        "more",
        [
            [chunk(b"eXIf", b"no EXIF block")],
            [chunk(b"tEXt", b"exif\0no EXIF block either")],
            [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  99\nzz")],
            [chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000)],
            [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(90_000_000)))],
            [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(9_000_000)))],
            [chunk(b"zTXt", b"workflow\0\0not compressed")],
            [chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(40_000_000)))],
            [chunk(b"iCCP", b"icc\0\0not compressed")],
            [chunk(b"iCCP", b"no profile at all")],
            [chunk(b"tIME", bytes(7), checksum=1), chunk(b"gAMA", bytes(4), checksum=2)],
            [chunk(b"pHYs", b"short")],
            [chunk(b"acTL", b"x"), chunk(b"fcTL", b"y")],
        ],
        ids=lambda more: more[0][4:8].decode() + str(len(more[0])),
    )
    def test_png(self, more: list[bytes]) -> None:
        data = png_with(self.PNG, *more)
        assert same(load_image(data), bare(self.PNG))
        assert image_size(data) == (48, 32)

    def test_png_without_its_end(self) -> None:
        assert same(load_image(self.PNG[:-12]), bare(self.PNG))

    def test_a_damaged_chunk_that_is_needed_is_refused(self) -> None:
        at = self.PNG.index(b"IDAT") + 40
        for broken in (self.PNG[:at] + bytes([self.PNG[at] ^ 1]) + self.PNG[at + 1 :], self.PNG[: at + 200]):
            with pytest.raises(InvalidImage, match="damaged"):
                load_image(broken)

    @pytest.mark.parametrize(
        ("marker", "body"),
        [
            (0xE0, b"JFIF\0"),
            (0xE0, b"JFIF"),
            (0xE2, b"ICC_PROFILE\0"),
            (0xEE, b"Adobe"),
            (0xE1, b"Exif\0\0no EXIF block"),
            (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
            (0xE2, b"MPF\0MM\0*\xff\xff\xff\xff"),
            (0xE2, b"ICC_PROFILE\0\x01\x09cut"),
            (0xED, b"Photoshop 3.0\x008BIM\x03"),
            (0xFE, b"c" * 60_000),
        ],
    )
    def test_jpeg(self, marker: int, body: bytes) -> None:
        data = encoded(PICTURE, "JPEG")
        assert same(load_image(jpeg_with(data, marker, body)), load_image(data))

    def test_webp(self) -> None:
        data = encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0no EXIF block")
        assert same(load_image(data), bare(data))

    def test_tiff(self) -> None:
        """Its EXIF block lies beyond the end of the file, and it is to be turned."""
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[274], tags[34665] = 6, 2**31
        data = encoded(PICTURE, "TIFF", tiffinfo=tags)
        assert load_image(data).size == image_size(data) == (32, 48)
        assert same(load_image(data), bare(encoded(PICTURE, "TIFF")).transpose(Image.Transpose.ROTATE_270))


def bare(data: bytes) -> Image.Image:
    """The picture without what this project makes of it."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return Image.frombytes("RGB", image.size, image.tobytes())


class TestJpegWithoutItsEnd:
    @pytest.mark.parametrize("progressive", [False, True])
    def test_is_read_if_it_lacks_that_alone(self, progressive: bool) -> None:
        data = encoded(PICTURE, "JPEG", progressive=progressive, quality=90)
        assert same(load_image(data[:-2]), load_image(data))

    @pytest.mark.parametrize("progressive", [False, True])
    def test_is_refused_if_pixels_are_missing(self, progressive: bool) -> None:
        data = encoded(PICTURE, "JPEG", progressive=progressive, quality=90)
        scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
        cuts = {*range(len(data) - 80, len(data) - 3), len(data) // 2, *(scans[1:] if progressive else ())}
        for cut in cuts:
            with pytest.raises(InvalidImage, match="truncated"):
                load_image(data[:cut])

    def test_is_refused_if_it_was_filled_up(self) -> None:
        data = encoded(PICTURE, "JPEG")
        with pytest.raises(InvalidImage, match="truncated"):
            load_image(data[: len(data) * 3 // 4] + bytes(len(data)))
        with pytest.raises(InvalidImage, match="truncated"):
            load_image(data[:-6] + bytes(6))


def test_scans_are_counted_before_anything_is_decoded() -> None:
    data = encoded(PICTURE, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last:-2] * MAX_SCANS + data[-2:]
    for read in (load_image, image_size):
        with pytest.raises(InvalidImage, match=f"more than {MAX_SCANS} scans"):
            read(many)
    thumbnails = jpeg_with(data, 0xE1, b"Exif\0\0" + b"\xff\xda" * 2 * MAX_SCANS)
    assert same(load_image(thumbnails), load_image(data))  # those of metadata are none


class TestOneRule:
    """The same picture as a path, as bytes and as a Pillow image, in every place where one may enter."""

    def ways(self, data: bytes, folder: Path) -> list[Image.Image]:
        (folder / "picture").write_bytes(data)

        def opened() -> Image.Image:
            return Image.open(io.BytesIO(data))

        through: list[Callable[[], Image.Image]] = [
            lambda: load_image(data),
            lambda: load_image(folder / "picture"),
            lambda: to_rgb(opened()),
            lambda: ImagePart(opened(), for_generation=True).pixels,
            lambda: load_image(_image_bytes(opened())),
            lambda: load_image(_image_bytes(folder / "picture")),
        ]
        return [way() for way in through]

    @pytest.mark.parametrize("turn", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
    def test_orientation(self, kind: str, turn: int, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(PICTURE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        first, *others = self.ways(data, tmp_path)
        assert all(same(first, other) for other in others)
        assert first.size == image_size(data) == ((48, 32) if turn < 5 else (32, 48))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
    def test_a_profile_is_converted(self, kind: str, tmp_path: Path) -> None:
        swapped = profile(("bXYZ", "gXYZ", "rXYZ"))
        options = {"lossless": True} if kind == "WEBP" else {}
        first, *others = self.ways(encoded(PICTURE, kind, icc_profile=swapped, **options), tmp_path)
        assert all(same(first, other) for other in others)
        red, green, blue = load_image(encoded(PICTURE, kind, **options)).split()
        moved = ImageChops.difference(first, Image.merge("RGB", (blue, green, red)))
        assert max(moved.tobytes()) <= 2

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
    @pytest.mark.parametrize("which", [profile(), b"no profile" * 20, profile()[:300]], ids=["sRGB", "none", "cut"])
    def test_a_profile_that_is_srgb_or_unreadable_changes_no_bit(self, kind: str, which: bytes) -> None:
        assert same(load_image(encoded(PICTURE, kind, icc_profile=which)), load_image(encoded(PICTURE, kind)))

    def test_alpha_is_kept_apart_from_a_profile(self) -> None:
        half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
        swapped = load_image(encoded(half, "PNG", icc_profile=profile(("bXYZ", "gXYZ", "rXYZ"))))
        red, green, blue = swapped.getpixel((0, 0))  # type: ignore[misc]
        assert (blue, green) == (255, 127) and abs(red - 127) <= 1

    def test_a_profile_of_another_colour_space_is_ignored(self) -> None:
        grey = PICTURE.convert("L")
        data = encoded(grey, "PNG", icc_profile=profile(("bXYZ", "gXYZ", "rXYZ")))
        assert same(load_image(data), grey.convert("RGB"))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_keep_the_upper_eight(self, kind: str, tmp_path: Path) -> None:
        """In grey as in colour, and also where rounding would give another value."""
        values = [value * 257 % 65536 + offset for value in range(255) for offset in (0, 127, 128, 255)]
        grey = Image.frombytes("I;16", (len(values), 1), struct.pack(f"<{len(values)}H", *values))
        first, *others = self.ways(encoded(grey, kind), tmp_path)
        assert all(same(first, other) for other in others)
        wanted = bytes(value >> 8 for value in values for _ in range(3))
        assert first.tobytes() == wanted
        assert load_image(deep_png(values)).tobytes() == wanted

    def test_an_image_without_pixels(self) -> None:
        empty = Image.new("RGB", (0, 5))
        for refuse in (to_rgb, _image_bytes, lambda image: ImagePart(image, for_generation=True)):
            with pytest.raises(InvalidImage, match="0x5 pixels; it must have at least one"):
                refuse(empty)


def deep_png(values: list[int]) -> bytes:
    """A row of grey pixels as a PNG of three channels of 16 bits."""
    row = b"\0" + b"".join(struct.pack(">3H", value, value, value) for value in values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
