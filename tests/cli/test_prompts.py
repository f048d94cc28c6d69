"""Prompts of flags, files and stdin: what a file is written in, what no prompt holds, and which line is told of."""

from __future__ import annotations

import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from bagel.cli import main
from bagel.cli.prompts import read_prompts
from bagel.errors import InvalidRequest
from bagel.request import MAX_TEXT_BYTES

TEXT = "a red cube\nзелёный круг\n青い四角 on a café table\n"


def texts(data: bytes, tmp_path: Path) -> list[str]:
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    return [prompt.text for prompt in read_prompts(None, str(file))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_is_read_as_utf_8_or_as_its_mark_says(encoding: str, tmp_path: Path) -> None:
    assert texts(TEXT.encode(encoding), tmp_path) == TEXT.splitlines()


@pytest.mark.parametrize("end", ["be", "le"])
@pytest.mark.parametrize("width", ["16", "32"])
def test_a_mark_of_either_byte_order_is_understood(width: str, end: str, tmp_path: Path) -> None:
    assert texts(f"\ufeff{TEXT}".encode(f"utf-{width}-{end}"), tmp_path) == TEXT.splitlines()


WRONG: list[tuple[bytes, str]] = [
    ("a red cube\n".encode("utf-16-le"), "seems to be UTF-16-LE without a byte-order mark"),
    ("a red cube\n".encode("utf-16-be"), "seems to be UTF-16-BE without"),
    ("a red cube\n".encode("utf-32-le"), "seems to be UTF-32-LE without"),
    ("красный куб\n".encode("utf-16-le"), "seems to be UTF-16-LE without"),
    ("青い四角\r\n赤い丸\r\n".encode("utf-16-be"), "seems to be UTF-16-BE without"),
    ("a red cube".encode("utf-16")[:-1], "begins as UTF-16-LE does, but is damaged"),
    ("a red cube\nun café au lait\n".encode("latin-1"), "not UTF-8 in line 2 (byte 0xe9); it may be Latin-1"),
    ("a\nzelený “cube”".encode("cp1252", "replace"), "not UTF-8 in line 2 (byte 0xfd); it may be Latin-1"),
    ("красный куб\n".encode("cp1251"), "not UTF-8 in line 1 (byte 0xea); it is in another encoding"),
    (b"a red cube\na blue\x00 one\n", "line 2 of", ),
    (b"a red cube\r\n\r\na blue\x1b[0m one\n", "line 3 of"),
    (b"one\rtwo\r\x07three", "line 3 of"),
    ("ein\x85zwei".encode(), "holds the control character U+0085"),
    (b"", "has no prompt"),
    (b"\xef\xbb\xbf\n", "has no prompt"),
    (b"\xff\xfe", "has no prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), WRONG, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_would_be_drawn_as_garbage_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        texts(data, tmp_path)
    assert said in str(caught.value)


def test_tabs_and_line_separators_are_text(tmp_path: Path) -> None:
    assert texts("a\tcube\u2028of\u00a0ice\n".encode(), tmp_path) == ["a\tcube\u2028of\u00a0ice"]


def test_stdin_is_a_file_called_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"one\n\ntwo\x00\n")))
    with pytest.raises(InvalidRequest, match="line 3 of stdin holds a NUL character"):
        read_prompts(["zero"], "-")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"one\n\ntwo\n")))
    assert [(each.text, each.where) for each in read_prompts(["zero"], "-")] == [
        ("zero", "--prompts, number 1"),
        ("one", "line 1 of stdin"),
        ("two", "line 3 of stdin"),
    ]


def test_a_prompt_that_no_model_reads_is_named(tmp_path: Path) -> None:
    long = "x" * (MAX_TEXT_BYTES + 1)
    with pytest.raises(InvalidRequest, match=r"^line 3 of '.*prompts.txt': has 1048577 bytes"):
        texts(f"a\n\n{long}\n".encode(), tmp_path)
    with pytest.raises(InvalidRequest, match=r"^--prompts, number 2: has 1048577 bytes"):
        read_prompts(["a", long], None)


@pytest.mark.parametrize("prompt", ["a \x07 bell", "a \x1b[31m red cube"])
def test_control_characters_of_a_flag_are_refused(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts", "fine\nin two lines", prompt]) == 2
    assert "take it out" in capsys.readouterr().err
