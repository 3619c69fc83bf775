"""How many bits a quantized network has in the mean, first and last layer and softmax outputs included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.network import Network
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import hooked, run_over
from qncd.quant.attention import AttentionProducts
from qncd.quant.inspection import act_quantizers, quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.transforms import BRANCH_BITS

FLOAT = 32  # bits of what stays in floating point


@dataclass(frozen=True)
class MeanBits:
    """Bits in the mean.

    Attributes:
        weight_bits: over all weights of convolutions and linear layers, with the scales of groups and the branches beside them.
        act_bits: over all activations that enter multiplications, each counted as often as it is multiplied.
    """

    weight_bits: float
    act_bits: float

    def __str__(self) -> str:
        return f"weights {self.weight_bits:.2f}, activations {self.act_bits:.2f}"


@torch.no_grad()
def mean_bits(network: Network, data: CalibrationSet) -> MeanBits:
    """What a network prepared by `quantize_` has.

    Args:
        data: whose first input passes the network once, which tells the sizes of all activations.
    """
    counts: dict[str, int] = {}
    with counting_multiplications(network.module, counts):
        run_over(network, data.spread(1), 1)
    widths = {name: quantizer.codes.bits for name, quantizer in act_quantizers(network.module).items() if quantizer.codes}
    sizes = {layer: layer.weight_shape.numel() for layer in quant_layers(network.module).values()}
    stored = sum(weight_bits(layer) * size + bits_beside(layer) for layer, size in sizes.items())
    plain = sum(layer.weight.numel() for layer in network.layers().values())
    taken = sum(count * widths.get(name, FLOAT) for name, count in counts.items())
    return MeanBits((stored + FLOAT * plain) / (sum(sizes.values()) + plain), taken / sum(counts.values()))


def weight_bits(layer: QuantLayer) -> int:
    """Of each weight itself."""
    codes = layer.config.weight_codes
    return codes.bits if codes is not None else FLOAT


def bits_beside(layer: QuantLayer) -> int:
    """Of what is stored beside the weights: the scales of groups, 16 each (those of channels are too few to count), a branch."""
    scales = math.prod(layer.scale_shape) if layer.config.weight_codes is not None and layer.config.grouped else 0
    return 16 * scales + BRANCH_BITS * layer.branch_size


@contextmanager
def counting_multiplications(module: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Within it, multiplications of one input of the network go to `counts`, by the quantizer of each activation they take."""

    def layer_hook(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: Any, _: tuple[Tensor, ...], out: Tensor) -> None:
            counts[f"{name}.act"] = out[0].numel() * layer.weight_shape[1:].numel()

        return hook

    def product_hook(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        """The keys are quantized after the queries: q k^T multiplies each query by each key, and so do the products with v."""

        def hook(_: Any, __: tuple[Tensor, ...], keys: Tensor) -> None:
            heads, length, width = keys.shape[1:]
            count = heads * queries[name] * length * width
            counts.update({f"{name}.{operand}": count for operand in ("q", "k", "v", "softmax")})

        return hook

    queries: dict[str, int] = {}
    processors = {name: part for name, part in module.named_modules() if isinstance(part, AttentionProducts)}
    handles = [layer.register_forward_hook(layer_hook(name)) for name, layer in quant_layers(module).items()]
    for name, processor in processors.items():
        seen = lambda _, __, out, name=name: queries.update({name: out.shape[2]})  # noqa: E731
        handles += [processor.q.register_forward_hook(seen), processor.k.register_forward_hook(product_hook(name))]
    with hooked(handles):
        yield
