"""Prompts from text files, and what a prompt may hold."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from qncd.io.files import read_lines


def check_text(text: str, where: str) -> str:
    """The text, if it can be written to a file in UTF-8; control characters can, and CLIP's clean-up takes them away.

    Args:
        where: it comes from, e.g. a flag or a file with the number of a line.

    Raises:
        ValueError: it holds a half of a surrogate pair: bytes on the command line that are not UTF-8, or "\\ud800" in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!a} at character {error.start + 1} is no text in UTF-8") from None
    return text


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; white space around them and empty lines at the end are taken away.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, a line before the last prompt is empty, or one holds nothing but control characters.
    """
    prompts = [line.strip() for line in read_lines(path)]
    while prompts and not prompts[-1]:
        prompts.pop()
    if "" in prompts:
        raise ValueError(f"{path}: line {prompts.index('') + 1} is empty, expected a prompt")
    for number, prompt in enumerate(prompts, 1):
        if all(letter.isspace() or unicodedata.category(letter) == "Cc" for letter in prompt):
            raise ValueError(f"{path}: line {number} holds control characters alone, expected a prompt")
    return prompts
