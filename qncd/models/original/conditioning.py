"""What latent diffusion UNets are conditioned on: class embeddings, and CLIP's text model with its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from qncd.io.files import first_line
from qncd.models.files.diffusers_folders import drain, read_settings, read_weights
from qncd.models.original.key_tables import KeyTable, Renamed, network_with_weights
from qncd.models.schema import CLASS_FOLDER, CLASSES, TEXT_CONFIG, check

logger = logging.getLogger(__name__)

# Fields of OpenAI's CLIP ViT-L/14 text model, the one of Stable Diffusion v1.
CLIP_VIT_L_14: Mapping[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip


class ClassConditioner(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """LDM's ClassEmbedder: one vector for each class. The last class stands for none.

    A model of diffusers, so that it can be a component of a pipeline.

    Args:
        n_classes: the one for none included.
        embed_dim: D.
    """

    @register_to_config
    def __init__(self, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def n_classes(self) -> int:
        """Number of classes, the last, which stands for none, included."""
        return self.embedding.num_embeddings

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (N,) int64 -> contexts (N, 1, D). Raises ValueError for a label that is no class."""
        if labels.numel() and not ((labels >= 0) & (labels < self.n_classes)).all():
            raise ValueError(f"classes {labels.tolist()}: allowed are 0 to {self.n_classes - 1}")
        return self.embedding(labels.to(self.embedding.weight.device))[:, None]

    def unconditional(self, n: int) -> Tensor:
        """Contexts (n, 1, D) of no class."""
        return self(torch.full((n,), self.n_classes - 1))


def load_class_folder(folder: Path) -> ClassConditioner:
    """The class embedding of a pipeline's folder (`class_embedder/`), as float32.

    Raises:
        ValueError: the folder holds none, or the weights do not fit.
    """
    config = read_settings(folder / "config.json", CLASS_FOLDER)
    source, state = read_weights(folder)
    return network_with_weights(lambda: build_class_conditioner(config), drain(state), source)


def build_class_conditioner(params: Mapping[str, Any]) -> ClassConditioner:
    """A ClassConditioner with fresh weights for the params of LDM's ClassEmbedder. Raises ValueError where they make none."""
    check(params, CLASSES, "cond_stage_config")
    return ClassConditioner(params.get("n_classes", 1000), params["embed_dim"])


def class_key_map() -> KeyTable:
    """The one key below `cond_stage_model.`."""
    return {"embedding.weight": Renamed("embedding.weight")}


def clip_tokenizer() -> Any:
    """CLIP's tokenizer, with 49,408 tokens and its clean-up of the text, as in Stable Diffusion v1; no download."""
    from qncd.models.original.clip_tokenizer import END, START, CLIPTokenizer, clip_bpe

    vocabulary, merges = clip_bpe()
    return CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), unk_token=END, bos_token=START, eos_token=END, pad_token=END,
        model_max_length=77,
    )  # fmt: skip


class TextConditioner(nn.Module):
    """CLIP's text model and tokenizer, as Stable Diffusion v1 uses them: prompts -> contexts.

    Args:
        text_model: transformers' CLIPTextModel.
        tokenizer: a CLIPTokenizer of transformers; where there is none, `clip_tokenizer` makes CLIP's.
    """

    def __init__(self, text_model: nn.Module, tokenizer: Any | None = None) -> None:
        super().__init__()
        self.text_model = text_model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, made on first use: that takes half a second."""
        if self._tokenizer is None:
            self._tokenizer = clip_tokenizer()
        return self._tokenizer

    @property
    def length(self) -> int:
        """Tokens of a context, 77 in CLIP."""
        return int(self.text_model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> ids (N, 77) int64: start, text, end, and the tokenizer's padding up to the length.

        CLIP pads with the end again, the tokenizers of Stable Diffusion v2 with "!".

        Longer texts are cut so that the end stays; a warning says what was cut.

        Raises:
            ValueError: the tokenizer has more tokens than the text model.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: expected a sequence of texts, not one text")
        ids = self.tokenizer(list(prompts), add_special_tokens=True)["input_ids"] if prompts else []
        known = int(self.text_model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        if len(self.tokenizer) > known:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, the text model knows {known}: give it ids instead")
        end, rows = self.tokenizer.eos_token_id, []
        padding = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > self.length:
                lost = self.tokenizer.decode(row[self.length - 1 : -1])
                logger.warning("the prompt %r is longer than %d tokens; cut off: %r", prompt, self.length, lost)
                row = [*row[: self.length - 1], end]
            rows.append([*row, *[padding] * (self.length - len(row))])
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Ids (N, 77) int64 -> contexts (N, 77, D): the last hidden state after the final layer norm."""
        device = next(self.text_model.parameters()).device
        return self.text_model(input_ids=tokens.to(device)).last_hidden_state

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> contexts (N, 77, D)."""
        return self.encode(self.tokenize(prompts))

    def unconditional(self, n: int) -> Tensor:
        """Contexts (n, 77, D) of the empty prompt."""
        return self([""]).expand(n, -1, -1)


def build_text_model(fields: Mapping[str, Any] | None = None) -> nn.Module:
    """CLIPTextModel with fresh weights.

    Args:
        fields: of CLIPTextConfig; those that are absent are CLIP ViT-L/14's.

    Raises:
        ValueError: they make no text model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPTextConfig, CLIPTextModel

    check(fields, TEXT_CONFIG, "text_config")
    try:
        return CLIPTextModel(CLIPTextConfig(**{**CLIP_VIT_L_14, **(fields or {})}))
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"text_config makes no CLIP text model: {reason}") from None


def bare_text_key(key: str) -> str:
    """A text model's key without `text_model.`: transformers before version 5 and Stable Diffusion have that in front."""
    return key.removeprefix("text_model.")


def text_key_map(fields: Mapping[str, Any] | None = None) -> KeyTable:
    """Every key below `cond_stage_model.transformer.` -> its key in `build_text_model(fields)`; `position_ids` is no weight."""
    with torch.device("meta"):
        names = build_text_model(fields).state_dict()
    return {f"text_model.{bare_text_key(name)}": Renamed(name) for name in names}


def finish_text_model(text_model: nn.Module) -> nn.Module:
    """Fill the buffers that a state dict does not hold, which a model built without memory lacks."""
    for module in text_model.modules():
        positions = module._buffers.get("position_ids")
        if positions is not None and positions.is_meta:
            module._buffers["position_ids"] = torch.arange(positions.shape[-1]).expand(1, -1)
    return text_model


def text_model_with_weights(build: Callable[[], nn.Module], state: dict[str, Any], source: str) -> nn.Module:
    """The text model with these weights, which are EMPTIED on the way, as float32; `text_model.` may be in front of their names.

    Raises:
        ValueError: the weights do not fit.
    """
    with torch.device("meta"):
        names: dict[str, str] = {bare_text_key(name): name for name in build().state_dict()}
    weights = (
        (names.get(bare_text_key(key), key), value) for key, value in drain(state) if not key.endswith("position_ids")
    )  # which transformers saved before 4.31
    return finish_text_model(network_with_weights(build, weights, source))


def load_text_folder(folder: Path, tokenizer_folder: Path) -> TextConditioner:
    """The text model and tokenizer of a Stable Diffusion pipeline's folder (`text_encoder/`, `tokenizer/`), as float32.

    Raises:
        ValueError: the folder holds no CLIP text model or tokenizer, or the weights do not fit.
    """
    from qncd.models.original.clip_tokenizer import CLIPTokenizer

    settings = read_settings(folder / "config.json", TEXT_CONFIG)
    kinds = settings.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise ValueError(f"{folder / 'config.json'}: the model is a {kinds[0]}, expected a CLIPTextModel")
    fields = {key: value for key, value in settings.items() if key not in ("architectures", "model_type", "torch_dtype", "dtype")}
    source, state = read_weights(folder, "model" if any(folder.glob("model*.safetensors*")) else "pytorch_model")
    build: Callable[[], nn.Module] = lambda: build_text_model(fields)  # noqa: E731
    text_model = text_model_with_weights(build, state, source)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise ValueError(f"{tokenizer_folder}: no tokenizer of CLIP ({reason})") from None
    return TextConditioner(text_model, tokenizer)
