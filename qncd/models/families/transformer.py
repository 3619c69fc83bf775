"""Diffusion transformers of diffusers: blocks of attention and feed-forward layers on tokens, modulated by the time embedding.

One family for all of them: parts are found by the structure of the modules and by their names; what differs between classes is
data here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.models.calls import Call, Inputs
from qncd.models.families.attentions import PLAIN_PROCESSORS, known_attentions
from qncd.models.network import Network, seen_constants

# Processors that call torch's attention once, by themselves or by diffusers' dispatcher.
PROCESSORS = PLAIN_PROCESSORS | {
    "JointAttnProcessor2_0", "FluxAttnProcessor", "SanaAttnProcessor2_0", "HunyuanAttnProcessor2_0", "Lumina2AttnProcessor2_0",
    "AuraFlowAttnProcessor2_0", "QwenDoubleStreamAttnProcessor2_0", "WanAttnProcessor", "ZSingleStreamAttnProcessor",
}  # fmt: skip
# By names: the layer that makes tokens of the sample, the one that makes the prediction of tokens, and those that compute the
# embedding of time, classes and pooled texts and project it.
FIRST = re.compile(r"(pos_embed|patch_embed|x_embedder|img_in)(\.proj)?$|all_x_embedder\.[^.]+$")
LAST = re.compile(r"(proj_out|proj_out_2|norm_out\.linear_2|all_final_layer\.[^.]+\.linear)$")
EMBEDDING = re.compile(
    r"(^|\.)(time_text_embed|time_extra_emb|time_caption_embed|time_step_proj|time_embed|adaln_single|condition_embedder|emb"
    r"|img_mod|txt_mod|t_embedder|adaLN_modulation|distilled_guidance_layer)\.|(^|\.)norm(1|1_context|_out)?\.linear(_1)?$"
)
# Parts that a modulated norm's linear layer gives, and which of them scales what goes to attention, and to the feed-forward.
CHUNKS: dict[str, tuple[int, int, int | None]] = {
    "AdaLayerNormZero": (6, 1, 4),
    "AdaLayerNormZeroSingle": (3, 1, None),
    "SD35AdaLayerNormZeroX": (9, 1, 4),
    "AdaLayerNormContinuous": (2, 0, None),
    "LuminaRMSNormZero": (4, 0, 2),
}
# Of a block's scale_shift_table, to which the output of one of these layers is added.
TABLE_CHUNKS = (6, 1, 4)
TABLE_SOURCES = ("adaln_single.linear", "time_embed.linear", "condition_embedder.time_proj")
SECOND_ATTENTION = ("SD35AdaLayerNormZeroX", 7)  # the part that scales what goes to attn2
# Lists of an activation and the layer that modulates, or of that alone: the layer's place, and its parts.
LISTS = {"img_mod": (1, (6, 1, 4)), "txt_mod": (1, (6, 1, 4)), "adaLN_modulation": (0, (4, 0, 2))}
# (source, layer that it scales, parts, which part): in front of the last layer.
TAILS = (
    ("norm_out.linear", "proj_out", 2, 0),
    ("proj_out_1", "proj_out_2", 2, 1),
    ("norm_out.linear_1", "norm_out.linear_2", 1, 0),
)


def _sites(*attentions: str) -> tuple[str, ...]:
    return tuple(f"{name}.{site}" for name in attentions for site in ("to_q", "to_k", "to_v"))


# Of a block's streams: names of what modulates, layers of attention, and the feed-forward with its first layers.
STREAMS = (
    (
        ("norm1", "norm", "img_mod", "adaLN_modulation"),
        (*_sites("attn", "attn1", "attention"), "proj_mlp"),
        ("ff", "ffn", "feed_forward", "img_mlp"),
    ),
    (
        ("norm1_context", "txt_mod"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("ff_context", "txt_mlp"),
    ),
)
FIRST_OF_FEED_FORWARD = {
    "FeedForward": ("net.0.proj", "w1", "w3"),
    "AuraFlowFeedForward": ("linear_1", "linear_2"),
    "LuminaFeedForward": ("linear_1", "linear_3"),
    "GLUMBConv": ("conv_inverted",),
}
TRAINED_STEPS = 1000  # that time steps between 0 and 1 stand for
TEXT_ROWS = 512  # of texts whose tokens differ in number, or a multiple of it
ROWS = 4  # of the calibration inputs that modulations are computed for


@dataclass(frozen=True)
class Modulation:
    """One scale of the embedding.

    Attributes:
        source: name of the layer that gives it.
        chunks: parts of what that layer gives.
        part: which of them it is.
        layers: names of the layers whose inputs it scales.
        table: name of a parameter that is added, "" for none.
    """

    source: str
    chunks: int
    part: int
    layers: tuple[str, ...]
    table: str = ""


class Transformer(Network):
    """A diffusion transformer."""

    channel_dim: ClassVar[int] = -1
    rotates: ClassVar[bool] = True
    step_window: ClassVar[float] = 0.1  # extremes of tokens differ more from image to image than from step to step

    @property
    def condition(self) -> str | None:
        return next((name for name in ("encoder_hidden_states", "class_labels") if name in self._parameters), None)

    def edges(self) -> tuple[str, ...]:
        """The layer that makes tokens of the sample, and the one that makes the prediction of them."""
        names = [name for name, layer in self.module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        first, last = ([name for name in names if pattern.match(name)] for pattern in (FIRST, LAST))
        return ((first or names)[0], (last or names)[-1])

    def embedding(self) -> set[str]:
        return {name for name in self.layers() if EMBEDDING.search(name)}

    def attentions(self) -> dict[str, Any]:
        return known_attentions(self.module, PROCESSORS)

    def is_block(self, module: nn.Module) -> bool:
        return any(module is block for block in self._transformer_blocks().values())

    def _transformer_blocks(self) -> dict[str, nn.Module]:
        """The members of module lists that hold attention, by name."""
        found: dict[str, nn.Module] = {}

        def visit(name: str, module: nn.Module, listed: bool) -> None:
            if listed and any(hasattr(part, "set_processor") for part in module.modules()):
                found[name] = module
                return
            for child, part in module.named_children():
                visit(f"{name}.{child}" if name else child, part, isinstance(module, nn.ModuleList))

        visit("", self.module, False)
        return found

    def time_at(self, t: float) -> float:
        return float(t)  # HunyuanDiT takes no other numbers

    # Smoothing.

    def modulations(self) -> Iterator[Modulation]:
        """Every scale by which the embedding stretches the inputs of layers, by the structure of the modules."""
        modules = dict(self.module.named_modules())
        for name, block in self._transformer_blocks().items():
            for sources, attention, feed_forwards in STREAMS:
                second = tuple(
                    f"{name}.{feed_forward}.{layer}"
                    for feed_forward in feed_forwards
                    for layer in FIRST_OF_FEED_FORWARD.get(type(getattr(block, feed_forward, None)).__name__, ())
                    if f"{name}.{feed_forward}.{layer}" in modules
                )
                first = tuple(f"{name}.{layer}" for layer in attention if f"{name}.{layer}" in modules)
                for source in sources:
                    kind = type(getattr(block, source, None)).__name__
                    if kind in CHUNKS:
                        yield from _pair(f"{name}.{source}.linear", CHUNKS[kind], first, second)
                    if source in LISTS and kind == "Sequential":
                        place, parts = LISTS[source]
                        yield from _pair(f"{name}.{source}.{place}", parts, first, second)
                    if kind == SECOND_ATTENTION[0]:
                        layers = tuple(f"{name}.{layer}" for layer in _sites("attn2"))
                        yield Modulation(f"{name}.{source}.linear", CHUNKS[kind][0], SECOND_ATTENTION[1], layers)
                table = f"{name}.scale_shift_table"
                for source in TABLE_SOURCES:
                    if source in modules and hasattr(block, "scale_shift_table"):
                        yield from _pair(source, TABLE_CHUNKS, first, second, table)
        beside = ((f"{name.rpartition('.')[0]}.adaLN_modulation.1", name, 1, 0) for name in modules if LAST.match(name))
        for source, layer, chunks, part in (*TAILS, *beside):
            if source in modules and layer in modules:
                yield Modulation(source, chunks, part, (layer,))

    @torch.no_grad()
    def stretch(self, times: Sequence[float], inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Mean |1 + scale_t| of AdaLN over `times`: QNCD's factor of scale-shift blocks (arXiv 2403.19140, section 3.2).

        The scales follow from time, classes and texts alone: the network is called with samples of zeros.

        Raises:
            ValueError: the network was not calibrated, so what it is called with is not known.
        """
        example = self.example(ROWS)
        given = {name: value for name, value in example.items() if name not in (self.sample_name, self.time_name)}
        for name, value in (inputs or {}).items():
            rows = torch.arange(ROWS) * len(value) // ROWS
            given[name] = value[rows].to(self.device, self.dtype if value.is_floating_point() else value.dtype)
        found, seen = list(self.modulations()), dict[str, Tensor]()
        handles = [
            self.module.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
            for name in {modulation.source for modulation in found}
        ]
        sums: dict[str, Tensor] = {}
        visited = sorted(set(times))
        try:
            for t in visited:
                at = torch.full((ROWS,), t, device=self.device)
                self.call(example[self.sample_name].to(self.dtype), at, given, **seen_constants(self.module))
                for modulation in found:
                    values = seen[modulation.source].reshape(ROWS, modulation.chunks, -1)
                    if modulation.table:
                        values = values + self.module.get_parameter(modulation.table).view(modulation.chunks, -1)
                    factor = (1 + values[:, modulation.part]).abs().float().mean(0) / len(visited)
                    for layer in modulation.layers:
                        sums[layer] = sums[layer] + factor if layer in sums else factor
        finally:
            for handle in handles:
                handle.remove()
        return sums


def _pair(
    source: str, chunks: tuple[int, int, int | None], first: tuple[str, ...], second: tuple[str, ...], table: str = ""
) -> Iterator[Modulation]:
    """The scales in front of attention and of the feed-forward."""
    for part, layers in zip(chunks[1:], (first, second), strict=True):
        if part is not None and layers:
            yield Modulation(source, chunks[0], part, layers, table)


def filled_rows(tokens: int) -> int:
    """Rows that texts of up to so many tokens have in a call that is taken apart: as many in all calls, so that they fit."""
    return -(-tokens // TEXT_ROWS) * TEXT_ROWS


class HunyuanDiT(Transformer):
    """HunyuanDiT: beside the samples come rotations of their places."""

    shared = frozenset({"image_rotary_emb.0", "image_rotary_emb.1"})


class OfFractions(Transformer):
    """A transformer whose time steps go from 1, which is noise, to 0."""

    def time_at(self, t: float) -> float:
        return t / TRAINED_STEPS


class Reversed(Transformer):
    """A transformer whose time steps go from 0, which is noise, to 1, and that predicts the velocity in that direction."""

    def time_at(self, t: float) -> float:
        return 1 - t / TRAINED_STEPS

    def as_prediction(self, output: Tensor) -> Tensor:
        return -output


class Packed(OfFractions):
    """A transformer whose samples are tokens of 2x2 patches (N, L, 4 C)."""

    packed = True

    @property
    def image_channels(self) -> set[int]:
        return {channels // 4 for channels in super().image_channels}

    def grid(self, call: Call) -> tuple[int, int]:
        """Rows and columns of the patches of a call's samples."""
        raise NotImplementedError

    def to_images(self, samples: Tensor, call: Call | None = None) -> Tensor:
        assert call is not None
        patches = samples.unflatten(1, self.grid(call)).unflatten(-1, (-1, 2, 2))  # (N, rows, columns, C, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def to_samples(self, images: Tensor, like: Tensor) -> Tensor:
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        patches = images.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (N, C, rows, 2, columns, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(like.shape)


class Flux(Packed):
    """FLUX: beside the tokens come ids of their places."""

    shared = frozenset({"img_ids", "txt_ids"})

    def grid(self, call: Call) -> tuple[int, int]:
        places = call.constants["img_ids"].amax(0).tolist()
        return int(places[1]) + 1, int(places[2]) + 1


class QwenImage(Packed):
    """Qwen-Image: beside the tokens come the shapes of the images that they are of, and each text has any number of tokens."""

    texts: ClassVar[str] = "encoder_hidden_states"
    mask: ClassVar[str] = "encoder_hidden_states_mask"  # (N, tokens), which of them are a text's; None for all
    shapes: ClassVar[str] = "img_shapes"  # a list of them for each sample

    @property
    def image_channels(self) -> set[int]:
        return {self.config["in_channels"] // 4, self.config["out_channels"]}  # the second one counts those of an image

    def grid(self, call: Call) -> tuple[int, int]:
        _, rows, columns = call.constants[self.shapes][0][0]
        return rows, columns

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        texts, mask, shapes = (arguments.get(name) for name in (self.texts, self.mask, self.shapes))
        if not isinstance(texts, Tensor) or not shapes or any(other != shapes[0] for other in shapes):
            return arguments
        mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device) if mask is None else mask.bool()
        missing = filled_rows(texts.shape[1]) - texts.shape[1]
        filled = {self.texts: F.pad(texts, (0, 0, 0, missing)), self.mask: F.pad(mask, (0, missing))}
        return {**arguments, **filled, self.shapes: shapes[:1]}

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        mask, shapes = rows.get(self.mask), rows.get(self.shapes)
        if mask is None or not shapes or len(shapes) != 1:
            return rows
        count = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        mask = mask[:, :count]
        texts = {self.texts: rows[self.texts][:, :count], self.mask: None if mask.all() else mask}
        return {**rows, **texts, self.shapes: shapes * len(rows[self.sample_name])}


class ZImage(Reversed):
    """Z-Image: samples and captions come in lists, each caption with tokens of its own number.

    Its pipeline has the condition first, where others have it last: that guidance is the same with the two exchanged.
    """

    listed = True
    captions: ClassVar[str] = "cap_feats"
    tokens: ClassVar[str] = "cap_tokens"  # (N,), how many each caption has; no argument of the module

    @property
    def condition(self) -> str | None:
        return self.captions

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        samples, captions = (_tensors(arguments.get(name)) for name in (self.sample_name, self.captions))
        if not samples or not captions:
            return arguments
        if any(sample.shape != samples[0].shape or sample.shape[1] != 1 for sample in samples):
            raise ValueError("ZImageTransformer2DModel was called with samples of several sizes: allowed are images of one size")
        counts = torch.tensor([len(caption) for caption in captions], device=captions[0].device)
        rows = filled_rows(int(counts.max()))
        filled = torch.stack([F.pad(caption, (0, 0, 0, rows - len(caption))) for caption in captions])
        x = torch.stack(samples).squeeze(2)
        return {**arguments, self.sample_name: x, self.captions: filled, self.tokens: counts}

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(rows)
        counts = arguments.pop(self.tokens).tolist()
        arguments[self.captions] = [caption[:count] for caption, count in zip(rows[self.captions], counts, strict=True)]
        arguments[self.sample_name] = list(rows[self.sample_name].unsqueeze(2))
        return arguments

    def output_of(self, result: Any) -> Tensor:
        return torch.stack(list(super().output_of(result))).squeeze(2)


def _tensors(values: Any) -> list[Tensor]:
    """A list of tensors; an empty one for anything else."""
    listed = isinstance(values, (list, tuple)) and all(isinstance(value, Tensor) for value in values)
    return list(values) if listed else []
