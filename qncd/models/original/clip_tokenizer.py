"""CLIP's tokenizer: that of transformers, with the clean-up of the text that the original does first."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import transformers
from open_clip.tokenizer import basic_clean, bytes_to_unicode, default_bpe, whitespace_clean

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # what CLIP uses of the merges in its file


class CLIPTokenizer(transformers.CLIPTokenizer):
    """transformers' tokenizer, which since its version 5 lacks OpenAI's clean-up: that is done here, as open_clip does it.

    The clean-up (ftfy's repairs, HTML's character references twice, white space, lower case) turns curly quotes, ligatures and
    full-width letters into plain ones. A saved tokenizer is transformers' own: its files cannot say that the text is cleaned.
    """

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if not kwargs.get("is_split_into_words"):
            text, text_pair = _clean(text), _clean(text_pair)
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)


def _clean(text: Any) -> Any:
    """A text or a list of texts (or of pairs) as CLIP's own tokenizer cleans it; other values as they are."""
    if isinstance(text, str):
        return whitespace_clean(basic_clean(text)).lower()
    return type(text)(_clean(part) for part in text) if isinstance(text, list | tuple) else text


@lru_cache(maxsize=1)
def clip_bpe() -> tuple[dict[str, int], list[Any]]:
    """CLIP's vocabulary (token -> id) and merges, from the file that open_clip brings along."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters: list[str] = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def small_tokenizer(words: Sequence[str], length: int, pad: str = END) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with the part of its vocabulary that some words need; other words come as their letters.

    Args:
        length: tokens of a text, start and end included.
        pad: token behind the end.
    """
    vocabulary, merges = clip_bpe()
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            used.add(best)
            at = list(pairwise(parts)).index(best)
            parts[at : at + 2] = ["".join(best)]
    kept: list[Any] = sorted(used, key=ranks.__getitem__)
    letters = [token for token, number in vocabulary.items() if number < 2 * 256]
    tokens = [*letters, *("".join(merge) for merge in kept), START, END]
    numbers = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(numbers, kept, pad_token=pad, model_max_length=length)
