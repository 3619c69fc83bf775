"""quantize_: replace the layers of a network by quantizable ones, in place. The first stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from qncd.granularity import ACTIVATIONS, WEIGHTS, PerGroup
from qncd.models.families.attentions import PLAIN_PROCESSORS
from qncd.models.network import Network, network_of
from qncd.ptq.context import Context
from qncd.quant.adapters import BEFORE, check_adapted, check_no_adapters, refuse_to_fuse
from qncd.quant.affine import Codes, IntegerRange
from qncd.quant.attention import AttentionProducts, QuantAttnProcessor, QuantizedProducts
from qncd.quant.float8 import Float8Codes
from qncd.quant.inspection import quant_layers, state_dict_of_packed
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLinear
from qncd.quant.trajectory import follow_trajectories
from qncd.recipe import GGUF, GGUF_GROUP, QuantConfig, Recipe
from qncd.widths import FP8


def quantize_(network: Network | nn.Module, config: QuantConfig) -> Network:
    """Replace every convolution, linear layer and attention product of a network by a quantizable one, in place.

    The result still computes in floating point, what it did before up to float error: later stages smooth, calibrate and
    switch it over, or a quantized checkpoint is loaded into it.

    Args:
        network: or its module, on any device.
        config: widths and ranges.

    Raises:
        ValueError: the network is quantized already, has adapters beside its layers, or has nothing to quantize.
    """
    network = network_of(network)
    module = network.module
    check_no_adapters(module, BEFORE)
    if quant_layers(module):
        raise ValueError("the model is quantized already")
    layers, attentions = network.layers(), network.attentions()
    if not layers:
        raise ValueError(f"{type(module).__name__}: has no convolution or linear layer to quantize")
    splits = network.splits() if config.split else {}
    left = set() if config.quantize_embedding else network.embedding()
    if config.weight_grid == GGUF:
        left |= network.embedding() if network.channel_dim == 1 else set()  # of UNets, readers take it in floats
        left |= {name for name, layer in layers.items() if not _has_blocks(layer)}
        if not layers.keys() - left:
            raise ValueError(f"{type(module).__name__}: has no linear layer whose rows are blocks of {GGUF_GROUP}, GGUF's")
    edges = network.edges() if config.edge_bits is not None else ()
    for name, layer in layers.items():
        if name in left:
            continue
        parent, _, child = name.rpartition(".")
        boundary, channels = splits.get(name), layer.weight.shape[1]
        new = layer_config(config, name in edges, (boundary, channels - boundary) if boundary else None)
        wrapped = QuantConv2d.from_float(layer, new) if isinstance(layer, nn.Conv2d) else QuantLinear.from_float(layer, new)
        setattr(module.get_submodule(parent), child, wrapped)
    if config.quantize_attention and config.act_bits is not None:
        codes = _codes(config.attention_bits or config.act_bits, config.act_format, config.act_symmetric)
        softmax_codes = _codes(config.softmax_bits, config.act_format, False)
        for attention in attentions.values():
            own = attention.processor
            settings = codes, softmax_codes, config.act_range, config.softmax_range, ACTIVATIONS[config.act_granularity]
            plain = type(own).__name__ in PLAIN_PROCESSORS
            processor = QuantAttnProcessor(*settings) if plain else QuantizedProducts(own, *settings)
            attention.set_processor(processor.to(network.device))
    if config.temporal_differences:
        follow_trajectories(module, network.times_of)
    watch_(network)
    return network


def _has_blocks(layer: nn.Module) -> bool:
    """Whether a layer's weight is what GGUF's readers take in blocks: that of a linear layer, with whole blocks in each row."""
    return isinstance(layer, nn.Linear) and layer.in_features % GGUF_GROUP == 0


def layer_config(config: QuantConfig, edge: bool = False, segments: tuple[int, ...] | None = None) -> LayerConfig:
    """What a layer gets; `edge`: the first or the last one."""
    weight_bits = config.edge_bits if edge and config.weight_bits is not None else config.weight_bits
    act_bits = config.edge_bits if edge and config.act_bits is not None else config.act_bits
    return LayerConfig(
        weight_codes=_codes(weight_bits, config.weight_format, True),
        act_codes=_codes(act_bits, config.act_format, config.act_symmetric),
        weight_range=config.weight_range,
        act_range=config.act_range,
        segments=segments,
        weight_granularity=PerGroup(GGUF_GROUP) if config.weight_grid == GGUF else WEIGHTS[config.weight_granularity],
        act_granularity=ACTIVATIONS[config.act_granularity],
        act_differences=config.temporal_differences,
        new_bias=config.weight_grid != GGUF,  # no reader has a place for it
    )


def _codes(bits: int | None, form: str, signed: bool) -> Codes | None:
    """What a width and a number format come to; None leaves values in floating point."""
    if bits is None:
        return None
    return Float8Codes() if form == FP8 else IntegerRange(bits, signed)


def watch_(network: Network) -> None:
    """Let a quantized network notice what would quietly undo its quantization, in place.

    A call raises ValueError where an attention layer's quantized processor was replaced or its projections were fused (by
    enable_attention_slicing, set_attn_processor, load_ip_adapter, ...), or where an adapter beside a layer does not compute what
    it says; save_pretrained, which would write a network that diffusers loads in floating point, and fuse_lora raise too.
    """
    module: Any = network.module
    module.register_forward_pre_hook(
        _Watch(module, [name.rpartition(".")[0] for name, m in module.named_modules() if isinstance(m, AttentionProducts)])
    )
    for name, refuse in REFUSED.items():
        if hasattr(module, name):
            object.__setattr__(module, name, refuse)
    object.__setattr__(module, STATE, MethodType(state_dict_of_packed, module))


class _Watch:
    """The hook that looks at attention layers and adapters before a call."""

    of_qncd = True

    def __init__(self, module: nn.Module, attentions: list[str]) -> None:
        self.fused = {name: _is_fused(module.get_submodule(name)) for name in attentions}

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for name, fused in self.fused.items():
            attention: Any = module.get_submodule(name)
            if not isinstance(attention.processor, AttentionProducts):
                kind = type(attention.processor).__name__
                raise ValueError(f"{name}: its quantized attention was replaced by a {kind}: set attention up before quantizing")
            if _is_fused(attention) != fused:
                raise ValueError(f"{name}: its quantized projections were fused or taken apart: do that before quantizing")
        check_adapted(module)


def _is_fused(attention: nn.Module) -> bool:
    return bool(getattr(attention, "fused_projections", False))


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError("a quantized network is saved by qncd.save: save_pretrained would write one that loads in floating point")


STATE = "state_dict"
REFUSED = {"save_pretrained": _refuse_to_save, "fuse_lora": refuse_to_fuse}  # what diffusers would do wrongly


@contextmanager
def restored_on_error(network: Network) -> Iterator[None]:
    """Within it, an error leaves the network as it was on entry, in floating point: layers, processors and small parameters."""
    module: Any = network.module
    layers, attentions = network.layers(), network.attentions()
    processors = [(attention, attention.processor) for attention in attentions.values()]
    weights = {f"{name}.weight" for name in layers}
    parameters = {name: p.detach().clone() for name, p in module.named_parameters() if name not in weights}
    hooks, own = dict(module._forward_pre_hooks), dict(module.__dict__)
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        for attention, processor in processors:
            attention.set_processor(processor)
        for name, parameter in module.named_parameters():
            if name in parameters:
                parameter.data.copy_(parameters[name])
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(hooks)
        for name in {STATE, *REFUSED} - own.keys():
            module.__dict__.pop(name, None)
        raise


class Prepare:
    """The stage."""

    title = "preparing"
    unit = "layer"
    weights = True

    def wanted(self, recipe: Recipe) -> bool:
        return True

    def run(self, context: Context) -> None:
        if context.recipe.quant.temporal_differences and len(set(context.visited())) < 2:
            raise ValueError(
                "temporal_differences with a single time step: there is none before it to differ from; allowed are two and more"
            )
        quantize_(context.network, context.recipe.quant)
