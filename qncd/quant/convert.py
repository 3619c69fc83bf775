"""quantize_: replace the layers of a diffusers UNet by quantized ones, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from qncd.quant.affine import IntegerRange
from qncd.quant.attention import QuantAttnProcessor, check_supported
from qncd.quant.layers import LayerConfig, QuantConv2d, QuantLayer, QuantLinear
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.recipe import QuantConfig

UNet = UNet2DModel | UNet2DConditionModel
EDGE_LAYERS = ("conv_in", "conv_out")
EMBEDDING_LAYERS = ("time_embedding", "add_embedding", "time_emb_proj")  # by a part of their names


def quantize_(unet: UNet, config: QuantConfig) -> UNet:
    """Replace every convolution, linear layer and attention product of `unet` by a quantizable one, in place.

    The result still computes in floating point, what it did before up to float error: `qncd.ptq` then smooths, calibrates and
    switches it over, or loads a quantized checkpoint into it.

    Args:
        unet: a UNet2DModel or UNet2DConditionModel, on any device.
        config: widths and ranges.

    Raises:
        ValueError: another kind of model, one that is quantized already, or attention that is not covered.
    """
    if not isinstance(unet, (UNet2DModel, UNet2DConditionModel)):
        raise ValueError(f"{type(unet).__name__}: allowed are UNet2DModel and UNet2DConditionModel")
    if any(isinstance(m, QuantLayer) for m in unet.modules()):
        raise ValueError("the model is quantized already")
    attentions = [(name, m) for name, m in unet.named_modules() if isinstance(m, Attention)]
    for name, attention in attentions:
        check_supported(name, attention)
    splits = skip_boundaries(unet) if config.split else {}
    for name, layer in list(unet.named_modules()):
        if type(layer) not in (nn.Conv2d, nn.Linear):
            continue
        if not config.quantize_embedding and not set(name.split(".")).isdisjoint(EMBEDDING_LAYERS):
            continue
        parent, _, child = name.rpartition(".")
        wrapped: QuantLayer
        if isinstance(layer, nn.Conv2d):
            wrapped = QuantConv2d.from_float(layer, _layer_config(name, layer.in_channels, config, splits))
        else:
            wrapped = QuantLinear.from_float(layer, _layer_config(name, layer.in_features, config, splits))
        setattr(unet.get_submodule(parent), child, wrapped)
    if config.quantize_attention and config.act_bits is not None:
        codes, softmax_codes = IntegerRange(config.act_bits, config.act_symmetric), IntegerRange(config.softmax_bits, False)
        for _, attention in attentions:
            processor = QuantAttnProcessor(codes, softmax_codes, config.act_range, config.softmax_range)
            attention.set_processor(processor.to(unet.device))  # type: ignore[arg-type]
    return unet


@contextmanager
def restored_on_error(unet: UNet) -> Iterator[None]:
    """Within it, an error leaves the network as it was on entry, in floating point: layers, processors and small parameters."""
    layers = {name: m for name, m in unet.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    processors = [(m, m.processor) for m in unet.modules() if isinstance(m, Attention)]
    weights = {f"{name}.weight" for name in layers}
    parameters = {name: p.detach().clone() for name, p in unet.named_parameters() if name not in weights}
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer)
        for attention, processor in processors:
            attention.set_processor(processor)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if name in parameters:
                    parameter.copy_(parameters[name])
        raise


def _layer_config(name: str, channels: int, config: QuantConfig, splits: dict[str, int]) -> LayerConfig:
    edge = name in EDGE_LAYERS and config.edge_bits is not None
    weight_bits = config.edge_bits if edge and config.weight_bits is not None else config.weight_bits
    act_bits = config.edge_bits if edge and config.act_bits is not None else config.act_bits
    boundary = splits.get(name)
    return LayerConfig(
        weight_codes=IntegerRange(weight_bits, True) if weight_bits is not None else None,
        act_codes=IntegerRange(act_bits, config.act_symmetric) if act_bits is not None else None,
        weight_range=config.weight_range,
        act_range=config.act_range,
        segments=(boundary, channels - boundary) if boundary else None,
    )


def skip_boundaries(unet: Any) -> dict[str, int]:
    """Layers fed directly by a concatenation [h ; skip], and the channels of h.

    In these UNets that is the 1x1 shortcut of every residual block of the up path (Q-Diffusion splits the same ones).
    """
    boundaries: dict[str, int] = {}
    channels = unet.mid_block.resnets[-1].out_channels if unet.mid_block is not None else unet.config.block_out_channels[-1]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if isinstance(resnet, ResnetBlock2D) and resnet.conv_shortcut is not None and channels < resnet.in_channels:
                boundaries[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = channels
            channels = resnet.out_channels
    return boundaries


def quant_layers(unet: nn.Module) -> dict[str, QuantLayer]:
    """Every quantized layer by name, in the order of the network's modules."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, QuantLayer)}


def act_quantizers(unet: nn.Module) -> dict[str, ActQuantizer]:
    """Every activation quantizer that has codes, by name."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, ActQuantizer) and m.codes is not None}


def set_act_bits_(unet: nn.Module, bits: Mapping[str, int]) -> None:
    """Give activation quantizers widths of their own, in place, before they are calibrated.

    Raises:
        ValueError: a name is none of theirs, or a width is not 2 to 16.
    """
    quantizers = act_quantizers(unet)
    for name, width in bits.items():
        if name not in quantizers:
            raise ValueError(f"{name}: no activation quantizer of this model")
        quantizers[name].set_bits(width)


def replace_quantizers_(unet: nn.Module, new: Callable[[str, ActQuantizer], ActQuantizer]) -> None:
    """Put `new(name, quantizer)` in the place of every activation quantizer that has codes, in place."""
    for name, quantizer in act_quantizers(unet).items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, new(name, quantizer))


def set_stage(unet: nn.Module, stage: Stage) -> None:
    """Put every activation quantizer of the model into one stage."""
    for quantizer in act_quantizers(unet).values():
        quantizer.set_stage(stage)


@contextmanager
def observing(unet: nn.Module) -> Iterator[None]:
    """Within it, forward passes stay in floating point and show every activation to fresh observers."""
    set_stage(unet, Stage.OBSERVE)
    try:
        yield
    finally:
        set_stage(unet, Stage.FLOAT)
