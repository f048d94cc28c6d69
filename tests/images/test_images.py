"""Images as they come in (files, resize rule) and go out (PNG, names)."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from bagel import images
from bagel.errors import CheckpointError, InvalidImage, InvalidRequest, OutputFailed
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM, ImageTransform
from bagel.images.output import OUTPUT_FORMATS, OutputFormat

SMALL_VAE = ImageTransform(128, 64, 16)
SMALL_VIT = ImageTransform(140, 56, 14)
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]

# Recorded from the reference: input, after the VAE rule, after the ViT rule on that (width, height).
PUBLIC_ROWS = [
    ((1, 1), (512, 512), (518, 518)),
    ((64, 64), (512, 512), (518, 518)),
    ((112, 80), (720, 512), (714, 518)),
    ((333, 777), (432, 1024), (420, 980)),
    ((520, 520), (512, 512), (518, 518)),
    ((540, 520), (544, 512), (546, 518)),
    ((800, 600), (800, 608), (798, 602)),
    ((980, 980), (976, 976), (980, 980)),
    ((1023, 1025), (1024, 1024), (980, 980)),
    ((1024, 300), (1024, 304), (980, 294)),
    ((1500, 500), (1024, 336), (980, 322)),
    ((2000, 300), (1024, 160), (980, 154)),
    ((3000, 200), (1024, 64), (980, 56)),
    ((40, 600), (64, 1024), (56, 980)),
    ((5000, 100), (1024, 16), (980, 14)),
]
SMALL_ROWS = [
    ((112, 80), (112, 80), (112, 84)),
    ((1, 1), (64, 64), (70, 70)),
    ((200, 300), (80, 128), (84, 126)),
    ((1024, 300), (128, 32), (140, 28)),
    ((333, 777), (64, 128), (70, 126)),  # the least side wins over the greatest
    ((27, 1000), (16, 128), (14, 140)),
]
# The ViT rule on the input itself, recorded likewise; (1024, 300) shows that pixels are rounded before strides.
VIT_OF_INPUT_ROWS = [
    ((64, 64), (224, 224)),
    ((1024, 300), (980, 280)),
    ((3000, 200), (980, 70)),
    ((27, 1000), (28, 980)),
]


def gradient(width: int, height: int) -> Image.Image:
    """An RGB image in which no two neighbours and no two quarters are alike."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 7 % 256, y * 11 % 256, (x + y) * 5 % 256) for y in range(height) for x in range(width)])
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hollow_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes of data do not fill."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refusal(source: str | Path | bytes) -> str:
    """The message with which an image is refused: about the field image, in one line."""
    with pytest.raises(InvalidImage) as caught:
        images.load_image(source)
    assert caught.value.field == "image"
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestResizeRule:
    @pytest.mark.parametrize(("given_size", "vae", "vit"), PUBLIC_ROWS)
    def test_reference_rows(self, given_size: tuple[int, int], vae: tuple[int, int], vit: tuple[int, int]) -> None:
        assert images.resized_size(*given_size, VAE_TRANSFORM) == vae
        assert images.resized_size(*vae, VAE_TRANSFORM) == vae
        assert images.resized_size(*vae, VIT_TRANSFORM) == vit

    @pytest.mark.parametrize(("given_size", "vae", "vit"), SMALL_ROWS)
    def test_reference_rows_of_other_transforms(
        self, given_size: tuple[int, int], vae: tuple[int, int], vit: tuple[int, int]
    ) -> None:
        assert images.resized_size(*given_size, SMALL_VAE) == vae
        assert images.resized_size(*vae, SMALL_VIT) == vit

    @pytest.mark.parametrize(("given_size", "vit"), VIT_OF_INPUT_ROWS)
    def test_vit_rule_on_the_input(self, given_size: tuple[int, int], vit: tuple[int, int]) -> None:
        assert images.resized_size(*given_size, VIT_TRANSFORM) == vit

    def test_area_factor_has_no_square_root(self) -> None:
        # 2000 x 1500 pixels exceed MAX_PIXELS; a square root would leave about 1552 x 1164.
        assert images.resized_size(2000, 1500, ImageTransform(2048, 16, 4)) == (1204, 904)

    @given(
        width=st.integers(1, 10**8),
        height=st.integers(1, 10**8),
        transform=st.sampled_from([VAE_TRANSFORM, VIT_TRANSFORM, SMALL_VAE, SMALL_VIT]),
    )
    @example(width=1, height=10_000, transform=VAE_TRANSFORM)
    @example(width=10**8, height=1, transform=VIT_TRANSFORM)
    def test_every_size_fits_the_models_tables(self, width: int, height: int, transform: ImageTransform) -> None:
        size = images.resized_size(width, height, transform)
        assert all(side % transform.stride == 0 for side in size)
        assert transform.stride <= min(size) <= max(size) <= transform.max_size
        assert size[0] * size[1] <= images.transforms.MAX_PIXELS
        # Holds for the public transforms, whose bounds are multiples of the stride.
        assert images.resized_size(*size, transform) == size

    @given(width=st.integers(1, 5000), height=st.integers(1, 5000))
    def test_width_and_height_are_alike(self, width: int, height: int) -> None:
        turned = images.resized_size(height, width, VAE_TRANSFORM)
        assert images.resized_size(width, height, VAE_TRANSFORM) == turned[::-1]

    def test_no_pixels(self) -> None:
        with pytest.raises(InvalidImage, match="0x5"):
            images.resized_size(0, 5, VAE_TRANSFORM)

    def test_transform_from_config(self) -> None:
        assert ImageTransform.from_list([1024, 512, 16]) == VAE_TRANSFORM

    @pytest.mark.parametrize(
        "values", [None, 1024, "980", [1024, 512], [512, 1024, 16], [1024, 8, 16], [1024, 512, 0], [1024.0, 512, 16]]
    )
    def test_transform_refused(self, values: object) -> None:
        with pytest.raises(CheckpointError, match=r"\[1024, 512, 16\]"):
            ImageTransform.from_list(values)


class TestPrepare:
    def test_image_of_the_right_size_is_not_resampled(self) -> None:
        image = gradient(112, 80)
        assert images.resize(image, SMALL_VAE) is image

    def test_vit_sees_the_vae_resized_image(self) -> None:
        image = gradient(100, 90)
        prepared = images.prepare(image, SMALL_VAE, SMALL_VIT, for_generation=False)
        once = image.resize((96, 96), Image.Resampling.BICUBIC)
        assert prepared.vae is None
        assert prepared.size == (96, 96)
        assert prepared.vit is not None
        assert prepared.vit.tobytes() == once.resize((98, 98), Image.Resampling.BICUBIC).tobytes()

    def test_vae_rule_comes_twice(self) -> None:
        # A least side that is no multiple of the stride: the rule is not idempotent.
        prepared = images.prepare(gradient(7, 10), ImageTransform(128, 72, 16), SMALL_VIT, for_generation=True)
        assert prepared.size == (64, 96)
        assert prepared.vae is not None
        assert prepared.vae.size == (64, 112)

    def test_only_what_is_wanted(self) -> None:
        prepared = images.prepare(gradient(4, 4), for_generation=True, for_understanding=False)
        assert prepared.vit is None
        assert prepared.vae is not None
        assert prepared.vae.size == (512, 512)

    def test_transparency_is_white(self) -> None:
        prepared = images.prepare(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), for_generation=True)
        assert prepared.vae is not None
        assert prepared.vae.getextrema() == ((255, 255),) * 3

    def test_digest_tells_shape_and_pixels(self) -> None:
        digest = images.pixel_digest(Image.new("RGB", (2, 8)))
        assert len(digest) == 16
        assert digest == images.pixel_digest(Image.new("RGB", (2, 8)))
        assert digest != images.pixel_digest(Image.new("RGB", (8, 2)))
        assert digest != images.pixel_digest(Image.new("RGB", (2, 8), (0, 0, 1)))


class TestToRgb:
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
    def test_alpha_over_white(self, mode: str) -> None:
        assert images.to_rgb(Image.new(mode, (1, 1))).getpixel((0, 0)) == (255, 255, 255)

    def test_half_transparent(self) -> None:
        assert images.to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)

    @pytest.mark.parametrize("kind", ["PNG", "GIF"])
    def test_transparent_palette_entry(self, kind: str) -> None:
        image = Image.new("P", (2, 2), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        assert images.load_image(encoded(image, kind)).getpixel((0, 0)) == (10, 20, 30)
        assert images.load_image(encoded(image, kind, transparency=1)).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3))])
    def test_transparent_colour(self, mode: str, colour: int | tuple[int, ...]) -> None:
        data = encoded(Image.new(mode, (2, 2), colour), "PNG", transparency=colour)
        assert images.load_image(data).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
    def test_other_modes(self, mode: str) -> None:
        image = Image.new(mode, (1, 1))
        assert images.to_rgb(image).tobytes() == image.convert("RGB").tobytes()

    @pytest.mark.parametrize("mode", ["I", "F", "LAB"])
    def test_deep_modes_are_refused(self, mode: str) -> None:
        with pytest.raises(InvalidImage, match=f"{mode}; save it with 8 bits"):
            images.to_rgb(Image.new(mode, (1, 1)))


class TestLoad:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_formats(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "picture"  # the content counts, not the name
        path.write_bytes(encoded(gradient(12, 8), kind))
        image = images.load_image(path)
        assert (image.mode, image.size, type(image)) == ("RGB", (12, 8), Image.Image)
        assert image.tobytes() == images.load_image(path.read_bytes()).tobytes()
        if kind in {"PNG", "BMP", "TIFF"}:
            assert image.tobytes() == gradient(12, 8).tobytes()

    def test_first_frame(self) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert images.load_image(data).getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
    def test_orientation(self, kind: str) -> None:
        image = Image.new("RGB", (32, 16), "black")
        image.paste((255, 255, 255), (0, 0, 16, 16))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
        upright = images.load_image(encoded(image, kind, exif=exif))
        assert upright.size == (16, 32)
        assert upright.resize((1, 2), Image.Resampling.BOX).tobytes() == bytes([255] * 3 + [0] * 3)
        assert not upright.getexif()

    def test_missing(self, tmp_path: Path) -> None:
        assert "no file" in refusal(tmp_path / "nothing.png")
        assert "https://example.org/a.png" in refusal("https://example.org/a.png")

    def test_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert "is a folder" in refusal(tmp_path)
        assert "not a regular file" in refusal(tmp_path / "pipe")
        assert "null" in refusal("a\0b")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty.png").touch()
        assert "0 bytes" in refusal(tmp_path / "empty.png")
        assert "0 bytes" in refusal(b"")

    def test_not_an_image(self, tmp_path: Path) -> None:
        path = tmp_path / "page\n.png"
        path.write_text("<!DOCTYPE html>")
        message = refusal(path)
        assert "<!DOCTYP" in message
        assert "WEBP" in message

    def test_other_formats_are_not_tried(self) -> None:
        assert "no intact" in refusal(encoded(gradient(4, 4), "PPM"))

    @pytest.mark.parametrize("kind", FORMATS)
    def test_truncated(self, kind: str) -> None:
        data = encoded(gradient(64, 64), kind)
        assert "damaged" in refusal(data[: len(data) * 3 // 4])
        refusal(data[:10])

    @pytest.mark.parametrize("kind", FORMATS)
    @given(data=st.data())
    def test_damage_never_crashes(self, kind: str, data: st.DataObject) -> None:
        broken = bytearray(encoded(gradient(8, 8), kind))
        for _ in range(data.draw(st.integers(1, 4))):
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(InvalidImage):  # anything else is a crash
            assert images.load_image(bytes(broken)).mode == "RGB"

    @pytest.mark.parametrize("size", [(8000, 8001), (10_000, 9000), (20_000, 20_000), (100_000, 10), (2**31 - 1, 1)])
    def test_size_is_checked_before_decoding(self, size: tuple[int, int]) -> None:
        assert "scale it down to at most 64000000 pixels" in refusal(hollow_png(*size))

    def test_too_many_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encoded(gradient(4, 4), "PNG")
        monkeypatch.setattr(images.reading, "MAX_INPUT_BYTES", len(data))
        assert images.load_image(data).size == (4, 4)
        assert f"{len(data) + 1} bytes" in refusal(data + b"\0")


SETTINGS = {"prompt": "ein roter Würfel\n立方体", "seed": "42", "negative_prompt": "grün"}


class TestSave:
    def test_round_trip(self, tmp_path: Path) -> None:
        images.save_png(gradient(6, 4), tmp_path / "a.png", SETTINGS)
        assert images.read_settings(tmp_path / "a.png") == SETTINGS
        assert images.load_image(tmp_path / "a.png").tobytes() == gradient(6, 4).tobytes()
        assert os.listdir(tmp_path) == ["a.png"]

    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        images.save_png(gradient(2, 2), tmp_path / "a.png", {})
        assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_prompt_that_is_no_text_still_saves(self, tmp_path: Path) -> None:
        images.save_png(gradient(2, 2), tmp_path / "a.png", {"prompt": "caf\udce9"})
        assert images.read_settings(tmp_path / "a.png") == {"prompt": "caf\\udce9"}

    def test_failure_leaves_the_old_picture_and_no_litter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images.save_png(gradient(2, 2), tmp_path / "a.png", {"seed": "1"})

        def fill_disk(_: Image.Image, file: io.BufferedWriter, **__: object) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", fill_disk)
        with pytest.raises(OutputFailed, match="No space left") as caught:
            images.save_png(gradient(2, 2), tmp_path / "a.png", {"seed": "2"})
        assert caught.value.exit_code == 1
        assert os.listdir(tmp_path) == ["a.png"]
        assert images.read_settings(tmp_path / "a.png") == {"seed": "1"}

    def test_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in ("missing", "file"):
            with pytest.raises(InvalidRequest, match=r"cannot write .*choose another folder"):
                images.save_png(gradient(2, 2), tmp_path / folder / "a.png", {})

    def test_settings_of_what_is_no_picture(self, tmp_path: Path) -> None:
        gradient(8, 8).save(tmp_path / "a.bmp")
        with pytest.raises(InvalidImage, match="not a readable PNG, JPEG or WebP"):
            images.read_settings(tmp_path / "a.bmp")

    @pytest.mark.parametrize("format_", OUTPUT_FORMATS)
    def test_settings_are_put_into_a_file_of_each_format(self, format_: str, tmp_path: Path) -> None:
        plain = OutputFormat(format_).encode(gradient(37, 21))
        assert images.read_settings(plain) == {}
        made = images.embed(plain, SETTINGS)
        (tmp_path / "picture").write_bytes(made)
        assert images.read_settings(made) == images.read_settings(tmp_path / "picture") == SETTINGS
        assert images.load_image(made).tobytes() == images.load_image(plain).tobytes()

    @pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
    def test_long_texts_fit_into_a_jpeg_cut_short(self, format_: str) -> None:
        long = {
            name: text * 20_000 for name, text in (("prompt", '"'), ("negative_prompt", "🎉"), ("think_text", "\\"))
        }
        read = images.read_settings(images.embed(OutputFormat(format_).encode(gradient(8, 8)), {**long, "seed": "1"}))
        assert read["seed"] == "1"
        assert all(read[name] == text[: len(read[name]) - 1] + "…" for name, text in long.items())


class TestNames:
    @pytest.mark.parametrize(
        ("prompt", "slug"),
        [
            ("A red cube on a table", "a-red-cube-on-a-table"),
            ("  3 cats, 2 dogs!  ", "3-cats-2-dogs"),
            ("Cafe\u0301 \uff26\uff35\uff2c\uff2c", "caf\u00e9-full"),
            ("हिन्दी में", "हिन्दी-में"),
            ("❤️ love", "love"),
            ("../../etc/passwd", "etc-passwd"),
            (".hidden -rf", "hidden-rf"),
            ("!?", "picture"),
            ("", "picture"),
            ("a" * 100, "a" * 60),
            ("a" * 59 + " b", "a" * 59),
            ("𠀀" * 100, "𠀀" * 50),
        ],
    )
    def test_slug(self, prompt: str, slug: str) -> None:
        assert images.picture_name(prompt, 42) == f"{slug}_seed42.png"

    @given(prompt=st.text(max_size=300), seed=st.integers(0, 2**63 - 1))
    @example(prompt="CON", seed=0)
    @example(prompt="\udcff\0/\\", seed=2**63 - 1)
    def test_always_a_safe_file_name(self, prompt: str, seed: int) -> None:
        name = images.picture_name(prompt, seed)
        slug = name.removesuffix(f"_seed{seed}.png")
        assert 1 <= len(slug) <= 60
        assert len(name.encode()) <= 250  # room for a number below the file systems' 255
        assert not slug.startswith(("-", "."))
        assert all(char == "-" or unicodedata.category(char)[0] in "LMN" for char in slug)

    def test_free_path_counts_up(self, tmp_path: Path) -> None:
        for expected in ("a_seed1.png", "a_seed1-2.png", "a_seed1-3.png"):
            path = images.free_path(tmp_path, "a_seed1.png")
            assert path == tmp_path / expected
            path.touch()

    def test_a_dangling_link_is_not_free(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").symlink_to(tmp_path / "gone")
        assert images.free_path(tmp_path, "a.png") == tmp_path / "a-2.png"
