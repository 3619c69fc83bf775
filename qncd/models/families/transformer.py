"""Diffusion transformers of diffusers: blocks of attention and feed-forward layers on tokens, modulated by the time embedding.

One family for all of them: parts are found by the structure of the modules and by their names; what differs between classes is
data here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qncd.models.calls import Inputs
from qncd.models.families.attentions import PLAIN_PROCESSORS, known_attentions
from qncd.models.network import Network
from qncd.models.seen import seen_constants

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
    smooths: ClassVar[bool] = False
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


class HunyuanDiT(Transformer):
    """HunyuanDiT: beside the samples come rotations of their places, and texts have one number of tokens."""

    shared = frozenset({"image_rotary_emb.0", "image_rotary_emb.1"})
    tokens: ClassVar[Mapping[str, int]] = {}
    fractions = True

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The embedding of time takes the dtype of the time steps, which pipelines give in that of the samples."""
        return {**rows, self.time_name: rows[self.time_name].to(rows[self.sample_name].dtype)}

    def read_layers(self) -> set[str]:
        """Those of the pooling of texts."""
        return {name for name, layer in self.module.named_modules() if ".pooler." in name and isinstance(layer, nn.Linear)}


class OfFractions(Transformer):
    """A transformer whose time steps go from 1, which is noise, to 0."""

    fractions = True

    def time_at(self, t: float) -> float:
        return t / TRAINED_STEPS


def filled_rows(tokens: int) -> int:
    """Rows that texts of up to so many tokens have in a call that is taken apart: as many in all calls, so that they fit."""
    return -(-tokens // TEXT_ROWS) * TEXT_ROWS


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, a module computes `forward`."""
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
