"""Prompt files: one rule for lines, whatever else a prompt holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from qncd.io.prompts import check_text, read_prompts

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\x00"


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_separate_prompts(tmp_path: Path, separator: str, start: str, end: str) -> None:
    prompts = [f"a cat{separator}on a sofa", "two dogs"]
    (tmp_path / "p.txt").write_bytes((start + end.join(prompts) + end + end).encode())
    assert read_prompts(tmp_path / "p.txt") == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "p.txt: line 2 is empty, expected a prompt"),
        (b"\xef\xbb\xbf \nb", "p.txt: line 1 is empty, expected a prompt"),
        (b"a\xffb", r"p.txt: not a text file in UTF-8 \(byte 1\)"),
        (b"a\xed\xa0\x80", r"p.txt: not a text file in UTF-8 \(byte 1\)"),
        ("ab".encode("utf-16"), "p.txt: not a text file in UTF-8"),
        (b"a\n" + bytes(512), "p.txt: line 2 holds control characters alone, expected a prompt"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")


def test_an_empty_file_holds_no_prompts(tmp_path: Path) -> None:
    for content in ("", "\n", "\ufeff", " \r\n\n"):
        (tmp_path / "p.txt").write_text(content)
        assert read_prompts(tmp_path / "p.txt") == []


def test_half_surrogates_are_refused() -> None:
    assert check_text("\x00 \x1b \ufffe 🎨", "here") == "\x00 \x1b \ufffe 🎨"
    with pytest.raises(ValueError, match=r"--prompt: '\\udcff' at character 3 is no text in UTF-8"):
        check_text("a \udcff", "--prompt")
