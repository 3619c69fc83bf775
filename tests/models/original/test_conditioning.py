"""Contexts: class embeddings, CLIP's tokens and text model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode, default_bpe

from qncd.models.original.clip_tokenizer import CLIPTokenizer, small_tokenizer
from qncd.models.original.conditioning import (
    TextConditioner,
    build_class_conditioner,
    build_text_model,
    clip_tokenizer,
    load_class_folder,
    load_text_folder,
    text_key_map,
)

SMALL = {"vocab_size": 49408, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = [
    "", "a photo of a cat", "A  RED circle,\tabove 3 blue squares!", "isn't it the dog's café?", "naïve 你好 😀 x=1.5; (a)[b]",
    "supercalifragilisticexpialidocious " * 3, "hello " * 100,
]  # fmt: skip


@pytest.fixture(scope="module")
def text() -> TextConditioner:
    torch.manual_seed(0)
    return TextConditioner(build_text_model(SMALL)).eval().requires_grad_(False)


def test_tokens_are_those_of_clip(text: TextConditioner) -> None:
    reference, end = SimpleTokenizer(), 49407
    found = text.tokenize(PROMPTS)
    assert found.shape == (len(PROMPTS), 77)
    assert found.dtype == torch.int64
    for prompt, row in zip(PROMPTS, found.tolist(), strict=True):
        ids = [49406, *reference.encode(prompt)][:76]
        assert row == ids + [end] * (77 - len(ids)), prompt


# What CLIP's clean-up changes, and what it must leave alone.
UNCLEAN = [
    "“smart” ‘quotes’", "ﬁsh ﬂy", "fullwidth ＡＢＣ", "a&amp;b", "a&amp;amp;b &lt;b&gt;", "\ufeffa cat", "日本語 🎨",
    "café", "cafe\u0301",
    "schÃ¶n", "tab\tnew\nline\u2028x", "\x1b[31mred", "1½ ²", "ŉ ß ẞ İ", "ΑΣ is Σ", "don’t", "a\u200bb", "ﷺ", "Å", "  spaces  ",
    "x" * 300, "…–—", "e.g. 3&deg;C", "Ｆｕｌｌ　ｓｐａｃｅ", "&#39;", "ÐŸÑ€Ð¸Ð²ÐµÑ‚", "naïve", "\u00a0nbsp\u00a0", "🏳️‍🌈 👩🏽‍🚀",
]  # fmt: skip


def test_tokens_are_those_of_open_clip(tmp_path: Path) -> None:
    """Also those of a tokenizer that was saved, of texts alone, and through the methods that pipelines call."""
    import open_clip

    tokenizer, reference = clip_tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*PROMPTS, *UNCLEAN]
    arguments = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    for text, row, expected in zip(texts, tokenizer(texts, **arguments)["input_ids"], reference(texts), strict=True):
        length = int((expected != 0).sum())
        assert row[:length].tolist() == expected[:length].tolist(), text
        assert set(row[length:].tolist()) <= {49407}
        for other in (tokenizer, again):
            assert other(text, truncation=True)["input_ids"] == row[:length].tolist(), text
    assert tokenizer.tokenize("“a”") == ['"</w>', "a</w>", '"</w>']
    assert tokenizer.encode("“") == tokenizer.encode('"')
    assert tokenizer(["“a”"], is_split_into_words=True)["input_ids"] != tokenizer("“a”")["input_ids"]  # words are left alone


def test_padding_is_the_tokenizers(text: TextConditioner, tmp_path: Path) -> None:
    """Stable Diffusion v2's tokenizer pads with "!", of id 0, and its pipeline of diffusers does."""
    text.tokenizer.save_pretrained(tmp_path)
    padded = TextConditioner(text.text_model, CLIPTokenizer.from_pretrained(tmp_path, pad_token="!"))
    arguments = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    found = padded.tokenize(PROMPTS)
    assert torch.equal(found, padded.tokenizer(PROMPTS, **arguments)["input_ids"])
    assert found[0, :4].tolist() == [49406, 49407, padded.tokenizer.pad_token_id, padded.tokenizer.pad_token_id]
    assert padded.tokenizer.pad_token_id != 49407


def test_tokens_are_those_of_transformers_from_files(text: TextConditioner, tmp_path: Path) -> None:
    """A CLIPTokenizer that reads vocab.json and merges.txt, as those of the published pipelines do."""
    import gzip

    from transformers import CLIPTokenizer

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    names = letters + [x + "</w>" for x in letters] + ["".join(line.split()) for line in lines]
    names += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    other = TextConditioner(text.text_model, CLIPTokenizer.from_pretrained(tmp_path))
    assert torch.equal(other.tokenize(PROMPTS), text.tokenize(PROMPTS))


def test_a_prompt_that_is_cut_is_said(text: TextConditioner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qncd"):
        text.tokenize(["a cat " * 30])
        assert caplog.records == []
        text.tokenize(["cat " * 75 + "dog bird"])
    assert [record.getMessage().endswith("cut off: 'dog bird'") for record in caplog.records] == [True]


def test_contexts(text: TextConditioner) -> None:
    contexts = text(["a cat", ""])
    assert contexts.shape == (2, 77, 8)
    assert torch.allclose(text.unconditional(3), contexts[1:].expand(3, -1, -1), atol=1e-6)
    assert torch.equal(contexts, text.encode(text.tokenize(["a cat", ""])))
    assert contexts.mean(-1).abs().max() < 1e-5  # after the final layer norm
    assert text.tokenize([]).shape == (0, 77)
    with pytest.raises(ValueError, match="expected a sequence of texts"):
        text.tokenize("a cat")


def test_a_text_model_of_few_tokens_takes_ids_alone() -> None:
    small = TextConditioner(
        build_text_model({**SMALL, "vocab_size": 10, "bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 9})
    )
    assert small.encode(torch.zeros(1, 77, dtype=torch.int64)).shape == (1, 77, 8)
    with pytest.raises(ValueError, match="the tokenizer has 49408 tokens, the text model knows 10"):
        small(["a"])
    with pytest.raises(ValueError, match="text_config makes no CLIP text model"):
        build_text_model({"hidden_size": 7, "num_attention_heads": 2})


def test_the_default_is_vit_l_14() -> None:
    with torch.device("meta"):
        model = build_text_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 123_060_480
    near = Path(__file__).resolve().parents[2] / "data" / "golden"
    manifest = json.loads((near / "manifest_sd_v1.json").read_text())
    prefix = "cond_stage_model.transformer."
    expected = {key.removeprefix(prefix): shape for key, shape in manifest.items() if key.startswith(prefix)}
    del expected["text_model.embeddings.position_ids"]
    own = model.state_dict()
    assert {old: list(own[layout.names[0]].shape) for old, layout in text_key_map().items()} == expected


def test_text_folders(text: TextConditioner, tmp_path: Path) -> None:
    text.text_model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_text_folder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert torch.equal(loaded(PROMPTS[:3]), text(PROMPTS[:3]))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # Older folders: half precision, a prefix on each key, position_ids among the weights, a pickle.
    state = {f"text_model.{key}": value.half() for key, value in text.text_model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "text_encoder" / "pytorch_model.bin")
    loaded = load_text_folder(tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert (loaded(["a"]) - text(["a"])).abs().max() < 1e-2
    del state["text_model.final_layer_norm.bias"]
    torch.save(state, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: 1 keys are missing: .*final_layer_norm\.bias"):
        load_text_folder(tmp_path / "text_encoder", tmp_path / "tokenizer")


def test_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes = build_class_conditioner({"n_classes": 5, "embed_dim": 3, "key": "class_label"}).requires_grad_(False)
    labels = torch.tensor([0, 4, 2])
    table = classes.state_dict()["embedding.weight"]
    assert torch.equal(classes(labels), table[labels][:, None])
    assert torch.equal(classes.unconditional(2), table[[4, 4]][:, None])
    assert classes.n_classes == 5
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=rf"classes \[{wrong}\]: allowed are 0 to 4"):
            classes(torch.tensor([wrong]))
    classes.save_pretrained(tmp_path / "class_embedder")
    loaded = load_class_folder(tmp_path / "class_embedder")
    assert torch.equal(loaded(labels), classes(labels))
    (tmp_path / "class_embedder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: embed_dim is missing: allowed are whole numbers from 1 to 65536$"):
        load_class_folder(tmp_path / "class_embedder")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_classes": 5}, "embed_dim is missing: allowed are whole numbers"),
        ({"n_classes": 1, "embed_dim": 3}, "n_classes 1: allowed are whole numbers from 2 to 1000000"),
    ],
)
def test_class_config_errors(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_class_conditioner(params)


def test_a_small_vocabulary_splits_its_words_as_clip_does_and_other_texts_into_letters() -> None:
    words = ["a", "large", "purple", "triangle", "above", "small", "cross"]
    text = "a large purple triangle above a small cross"
    whole, small = clip_tokenizer(), small_tokenizer(words, 32)
    assert small.tokenize(text) == whole.tokenize(text)
    ids = small(text, padding="max_length").input_ids
    assert len(ids) == 32 and max(ids) < len(small) < 600 and ids[0] == small.bos_token_id and ids[-1] == small.eos_token_id
    assert (
        len(small.tokenize("giraffe")) > 1
        and small.decode(small("giraffe").input_ids, skip_special_tokens=True).strip() == "giraffe"
    )
