"""CLIP score against the prompts, and CLIP-IQA: image quality as the choice between two antonym prompts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qncd.io.files import read_lines
from qncd.io.prompts import check_text, read_prompts
from qncd.metrics.networks.weights import file_digest
from qncd.metrics.report.sources import ImageFolder, ImageSource

DEFAULT_MODEL, DEFAULT_WEIGHTS = "ViT-B-32", "openai"
PROMPTS_FILE = "prompts.jsonl"
LOGIT_SCALE = 100.0
# Antonym pairs of Wang et al. 2023 (CLIP-IQA), the good end first.
ANTONYMS = {
    "quality": ("Good photo.", "Bad photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "noisiness": ("Clean photo.", "Noisy photo."),
    "brightness": ("Bright photo.", "Dark photo."),
    "contrast": ("High contrast photo.", "Low contrast photo."),
    "colorfulness": ("Colorful photo.", "Dull photo."),
    "natural": ("Natural photo.", "Synthetic photo."),
    "real": ("Real photo.", "Abstract photo."),
    "beautiful": ("Beautiful photo.", "Ugly photo."),
}
_TEXT_BATCH = 64


def _parse_json_lines(path: Path) -> list[tuple[str, str]]:
    """The file and the prompt of each line that is not empty."""
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, prompt = entry["file"], entry["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            file = prompt = None
        if not (isinstance(file, str) and isinstance(prompt, str)):
            raise ValueError(f'{path}: line {number} is no JSON object with "file" and "prompt"')
        pairs.append((file, check_text(prompt, f"{path}: line {number}")))
    return pairs


def _prompts_of_files(path: Path, source: ImageFolder) -> list[str]:
    """The prompt of each image: of the line with its path in or beside the folder, else of the only line with its file name."""
    pairs = _parse_json_lines(path)
    lines, bases = dict(pairs), Counter(Path(file).name for file, _ in pairs)
    if twice := next((file for file, prompt in pairs if lines[file] != prompt), None):
        raise ValueError(f"{path}: two prompts for {twice}")
    by_base = {Path(file).name: prompt for file, prompt in pairs}
    images = Counter(Path(name).name for name in source.names)
    prompts = []
    for name in source.names:
        base = Path(name).name
        prompt = lines.get(name, lines.get(f"{source.path.name}/{name}"))
        if prompt is None and base not in by_base:
            raise ValueError(f"{path}: no prompt for {name} of {source.path}")
        if prompt is None and max(images[base], bases[base]) > 1:
            raise ValueError(f"{path}: no line for {name}, and several lines or images with the file name {base}")
        prompts.append(by_base[base] if prompt is None else prompt)
    return prompts


def find_prompts(source: ImageSource, named: Path | None = None) -> list[str]:
    """The prompt of every image, in the order of the images.

    Args:
        source: the images.
        named: a text file with one prompt a line in the order of the images, or a .jsonl file with "file" and "prompt"; by
            default `prompts.jsonl` in the folder of the images or in the one above, as txt2img.py writes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a prompt is missing, several lines may be meant, or the number of lines is not that of the images.
    """
    if named is None:
        places = [source.path / PROMPTS_FILE, source.path.parent / PROMPTS_FILE]
        named = next((place for place in places if place.is_file()), None) if isinstance(source, ImageFolder) else None
        if named is None:
            raise FileNotFoundError(f"{source.path}: no {PROMPTS_FILE} in this folder or above it: name one with --prompts")
    try:
        if named.suffix.lower() != ".jsonl":
            prompts = read_prompts(named)
        elif isinstance(source, ImageFolder):
            prompts = _prompts_of_files(named, source)
        else:
            prompts = [prompt for _, prompt in _parse_json_lines(named)]
    except FileNotFoundError:
        raise FileNotFoundError(f"{named}: no such file (prompts, one a line, or prompts.jsonl of txt2img.py)") from None
    if len(prompts) != source.count:
        raise ValueError(f"{named}: {len(prompts)} prompts for {source.count} images of {source.path}")
    return prompts


@contextlib.contextmanager
def _told_on_success() -> Iterator[None]:
    """Hold back what a library logs in the body: where it fails, its error says the same."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logging.root.addFilter(hold)
    try:
        yield
    finally:
        logging.root.removeFilter(hold)
    for record in held:
        logging.root.handle(record)


class ClipFeatures:
    """A CLIP model of open_clip as a feature extractor; its one layer `embedding` has rows of length 1.

    Args:
        model: a name of open_clip, `local-dir:FOLDER` or `hf-hub:ORGANIZATION/NAME`.
        weights: a tag of open_clip (downloaded on first use) or a file; of no effect for the last two.
        device: where the network runs.

    Raises:
        ValueError: there is no such model, or its weights cannot be had.
    """

    channels = 3
    any_size = True

    def __init__(self, model: str = DEFAULT_MODEL, weights: str = DEFAULT_WEIGHTS, device: str | torch.device = "cpu") -> None:
        import open_clip

        self.name = f"open_clip {model}"
        local = Path(model.removeprefix("local-dir:")) if model.startswith("local-dir:") else None
        if local is not None and not local.is_dir():
            raise ValueError(f"--clip_model {model}: no such folder")
        builtin = ":" not in model
        if builtin and model not in open_clip.list_models():
            raise ValueError(f"--clip_model {model}: unknown to open_clip {open_clip.__version__} (open_clip.list_models())")
        source = f" {weights}" if builtin else ""
        if builtin and not open_clip.get_pretrained_cfg(model, weights) and not Path(weights).is_file():
            raise ValueError(f"CLIP {model}{source}: {self._remedy(model, weights)}")
        try:
            with _told_on_success():
                network, self._preprocess = open_clip.create_model_from_pretrained(
                    model, pretrained=weights if builtin else None, device=device
                )
                self._tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # the hub, torch and open_clip each have their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"CLIP {model}{source} cannot be loaded ({reason}): {self._remedy(model, weights)}") from None
        self.network: Any = network.eval().requires_grad_(False)
        self.device = device
        self.convention = f"open_clip {model}{source}"
        if local is not None:
            digests = "\n".join(file_digest(path) for path in sorted(local.rglob("*")) if path.is_file())
        else:
            digests = file_digest(Path(weights)) if builtin and Path(weights).is_file() else source
        self.identity = f"{self.convention} | {hashlib.sha256(digests.encode()).hexdigest()} | {self._preprocess}"
        self.dimension = len(self.embed_texts(["a"])[0])

    @staticmethod
    def _remedy(model: str, weights: str) -> str:
        import open_clip

        if ":" in model:
            return "give the folder of a model as --clip_model local-dir:FOLDER"
        entry = open_clip.get_pretrained_cfg(model, weights)
        if not entry and not Path(weights).is_file():
            return f"--clip_weights takes a file or one of {', '.join(open_clip.list_pretrained_tags_by_model(model))}"
        hub = entry.get("hf_hub")
        url = entry.get("url") or (f"https://huggingface.co/{hub.strip('/')}" if hub else None)
        return f"get {url} and name the file with --clip_weights PATH" if url else "name a file with --clip_weights PATH"

    def check_size(self, height: int, width: int) -> None:
        """Any size: images are resized."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The model's own resize, crop and normalization: float32 (3, S, S)."""
        return self._preprocess(Image.fromarray(image)).numpy()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings (N, D) of prepared images (N, 3, S, S)."""
        embedding = self.network.encode_image(images.to(self.device))
        return {"embedding": torch.nn.functional.normalize(embedding.float(), dim=1).cpu()}

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (N, D) of length 1; equal texts are encoded once."""
        unique = sorted(set(texts))
        parts = []
        for start in range(0, len(unique), _TEXT_BATCH):
            tokens = self._tokenizer(unique[start : start + _TEXT_BATCH]).to(self.device)
            parts.append(torch.nn.functional.normalize(self.network.encode_text(tokens).float(), dim=1).cpu())
        rows = {text: i for i, text in enumerate(unique)}
        return torch.cat(parts)[[rows[text] for text in texts]]


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> np.ndarray:
    """100 max(cos, 0) of each image and its prompt, (N,) float64 (Hessel et al. 2021 with w = 100 in place of 2.5).

    Args:
        images, texts: embeddings (N, D) of length 1.
    """
    return (100 * (images.double() * texts.double()).sum(1).clamp(min=0)).numpy()


def clip_iqa(images: torch.Tensor, good: torch.Tensor, bad: torch.Tensor) -> np.ndarray:
    """Probability of the good one of two antonym prompts, (N,) float64: softmax of 100 cos (Wang et al. 2023, eq. 2 and 3).

    Args:
        images: embeddings (N, D) of length 1.
        good, bad: of the two prompts, (D,).
    """
    similarity = images.double() @ torch.stack([good, bad], 1).double()  # (N, 2)
    return (LOGIT_SCALE * similarity).softmax(1)[:, 0].numpy()
