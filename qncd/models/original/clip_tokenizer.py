"""CLIP's tokenizer: that of transformers, with the clean-up of the text that the original does first."""

from __future__ import annotations

import gzip
from functools import lru_cache
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
