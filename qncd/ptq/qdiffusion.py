"""Quantized checkpoints of Q-Diffusion (Xiuyu-Li/q-diffusion, also written by codes that follow it).

Such a file is the state dict of its QuantModel: below `model.` and the original name of a layer, the weight in floating
point and, for each half of a split layer (the second one with `_0`),

    weight_quantizer.delta, .zero_point   (O, 1, ...)     unsigned codes, asymmetric
    weight_quantizer.alpha                shape of (its part of) the weight: rounded up where alpha >= 0
    act_quantizer.delta, .zero_point      numbers, of the layer's input

and act_quantizer_{q,k,v,w} at attention layers. Bit widths and symmetry are not in the file: they come from the user, as
they do in Q-Diffusion, and what the numbers in the file say of them is compared (`qncd.ptq.qdiffusion_flags`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qncd.models.network import Network
from qncd.models.original.key_tables import Layout, refuse
from qncd.ptq.qdiffusion_flags import Part as _Part
from qncd.ptq.qdiffusion_flags import check_act_flags, check_part, check_softmax_bits, check_weight_bits
from qncd.ptq.stages.prepare import quantize_, restored_on_error
from qncd.quant.affine import IntegerRange
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.inspection import act_quantizers, quant_layers, set_stage
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.recipe import QuantConfig

_QUANTIZER = re.compile(r"(.+)\.(weight_quantizer|act_quantizer)(_0)?\.(delta|zero_point|alpha)")
_OPERAND = re.compile(r"(.+?)(\.attention\.[^.]+)?\.act_quantizer_([qkvw])\.(delta|zero_point)")
ONLY_DEFAULT = (  # of QuantConfig's options
    "weight_granularity", "act_granularity", "weight_format", "act_format", "weight_grid", "temporal_differences",
    "attention_bits",
)  # fmt: skip
_SAME = 1e-5  # largest difference between the file's weights and the base model's, relative to the largest weight


def is_qdiffusion(content: Any) -> bool:
    """Whether what a checkpoint holds is such a state dict."""
    return isinstance(content, Mapping) and any(isinstance(key, str) and ".weight_quantizer." in key for key in content)


@torch.no_grad()
def check_qdiffusion(network: Network, content: Mapping[str, Tensor], table: Mapping[str, Layout], config: QuantConfig) -> None:
    """Raise ValueError where `load_qdiffusion_` would refuse the file's numbers; the network stays as it is."""
    refuse("keys that hold no tensor", [str(key) for key, value in content.items() if not _is_entry(key, value)])
    state = _state(content)
    weights, inputs, operands = _sort(state)
    plain = {key: value for key, value in state.items() if not _QUANTIZER.fullmatch(key) and not _OPERAND.fullmatch(key)}
    _check_base(network.module, plain, table)
    if config.weight_bits is None:
        raise ValueError("--weight_bit 32: the file's weights are quantized")
    for name in ONLY_DEFAULT:
        if (asked := getattr(config, name)) != (only := getattr(QuantConfig, name)):
            raise ValueError(f"--{name} {asked}: a file of Q-Diffusion has {only}")
    if not config.split and any(len(parts) > 1 for parts in weights.values()):
        raise ValueError("--no-split: the file's skip concatenations are split")
    boundaries = network.splits()
    for name, parts in weights.items():
        edge = boundaries.get(_layer_names(name, table)[0])
        for piece, part in zip(_pieces(name, parts, state[f"{name}.weight"], edge), parts, strict=True):
            check_part(f"{name}.weight_quantizer", part, piece)
            check_weight_bits(name, part, piece, config.weight_bits)
    if config.act_bits is not None:
        _check_act_flags(network, inputs, operands, config, table)


def _state(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in content.items()}


@torch.no_grad()
def load_qdiffusion_(network: Network, content: Mapping[str, Tensor], table: Mapping[str, Layout], config: QuantConfig) -> None:
    """Turn a full-precision network into the quantized model of such a file, in place.

    Args:
        content: the state dict.
        table: original key -> place in the network, as `qncd.models` has it for the model's family.
        config: bit widths, `softmax_bits` and `act_symmetric` as they were given to Q-Diffusion; `act_bits` None leaves
            activations in floating point. Ranges, split and the rest come from the file.

    Raises:
        ValueError: keys that fit no layer, parts that are missing or damaged, another base model, or a config that contradicts
            the file's numbers. The network is then as before.
    """
    check_qdiffusion(network, content, table, config)
    unet, state = network.module, _state(content)
    weights, inputs, operands = _sort(state)
    split = any(len(parts) > 1 for parts in weights.values())
    boundaries = network.splits()
    shape = QuantConfig(
        weight_bits=config.weight_bits, act_bits=config.act_bits, softmax_bits=config.softmax_bits, edge_bits=None,
        weight_range="max", act_range="max", act_symmetric=config.act_symmetric, split=split, bias_correction=False,
    )  # fmt: skip
    with restored_on_error(network):
        quantize_(network, shape)
        layers = quant_layers(unet)
        covered = {ours for name in weights for ours in _layer_names(name, table)}
        refuse("layers without a weight quantizer", layers.keys() - covered)
        covered |= {ours for name in inputs for ours in _layer_names(name, table)}
        refuse("quantizers of what is no quantized layer", covered - layers.keys())
        for name, parts in weights.items():
            _set_weight(layers, name, parts, state[f"{name}.weight"], table, boundaries)
        if config.act_bits is not None:
            for name, parts in inputs.items():
                for ours in _layer_names(name, table):
                    _set_act(unet.get_submodule(ours).act, parts)  # type: ignore[arg-type]
            for name, scaled, kind, part in operands:
                _set_operand(unet, name, scaled, kind, part, config, table)
            pending = [name for name, quantizer in act_quantizers(unet).items() if quantizer.stage is not Stage.QUANTIZE]
            refuse("activation quantizers are missing in the file", pending)
        set_stage(unet, Stage.QUANTIZE)


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _check_act_flags(
    network: Network,
    inputs: Mapping[str, list[_Part]],
    operands: list[tuple[str, bool, str, _Part]],
    config: QuantConfig,
    table: Mapping[str, Layout],
) -> None:
    for name, parts in inputs.items():
        for part in parts:
            check_part(f"{name}.act_quantizer", part)
    for name, _, kind, part in operands:
        check_part(f"{name}.act_quantizer_{kind}", part)
    edges = network.edges()
    first_of_all = next(iter(edges), None)
    first = next((parts for name, parts in inputs.items() if first_of_all in _layer_names(name, table)), [])
    others = [part for parts in inputs.values() for part in parts] + [part for _, _, kind, part in operands if kind != "w"]
    check_act_flags(first, others, config)
    for scaled in (False, True):
        outputs = [part for _, product, kind, part in operands if kind == "w" and product == scaled]
        check_softmax_bits(outputs, _softmax_codes(config, scaled))


def _softmax_codes(config: QuantConfig, scaled: bool) -> IntegerRange:
    """DDIM's attention takes the symmetry of all activations, LDM's own matrix products (`scaled`) never do."""
    return IntegerRange(config.softmax_bits, config.act_symmetric and not scaled)


def _sort(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, list[_Part]], dict[str, list[_Part]], list[tuple[str, bool, str, _Part]]]:
    """The quantizers of weights and of inputs by layer, both halves in order, and those of attention operands."""
    found: dict[tuple[str, str, bool], dict[str, Tensor]] = {}
    loose: dict[tuple[str, bool, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _QUANTIZER.fullmatch(key):
            found.setdefault((match[1], match[2], match[3] is not None), {})[match[4]] = value
        elif match := _OPERAND.fullmatch(key):
            loose.setdefault((match[1], match[2] is not None, match[3]), {})[match[4]] = value
    weights: dict[str, list[_Part]] = {}
    inputs: dict[str, list[_Part]] = {}
    for (name, kind, second), values in sorted(found.items(), key=lambda item: item[0]):
        refuse(f"parts of {name}.{kind} are missing", {"delta", "zero_point"} - values.keys())
        if second and (name, kind, False) not in found:
            raise ValueError(f"{name}.{kind}: the second half of a layer without the first")
        (weights if kind == "weight_quantizer" else inputs).setdefault(name, []).append(_Part(**values))
    for (name, _scaled, kind), values in loose.items():
        refuse(f"parts of {name}.act_quantizer_{kind} are missing", {"delta", "zero_point"} - values.keys())
    operands = [(name, scaled, kind, _Part(**values)) for (name, scaled, kind), values in loose.items()]
    return weights, inputs, operands


def _check_base(unet: nn.Module, plain: Mapping[str, Tensor], table: Mapping[str, Layout]) -> None:
    """Raise ValueError unless the file's floating-point tensors are the model's own."""
    own = unet.state_dict()
    refuse("keys that this model lacks", plain.keys() - table.keys())
    refuse(f"of {len(table)} keys are missing in the checkpoint", table.keys() - plain.keys())
    for key, value in plain.items():
        for name, tensor in zip(table[key].names, table[key].split(value), strict=True):
            expected = own[name].cpu().float()
            if tensor.shape != expected.shape:
                raise ValueError(f"{key}: shape {tuple(tensor.shape)}, the model has {tuple(expected.shape)}")
            if not float((tensor.float() - expected).abs().max()) <= _SAME * max(1e-3, float(expected.abs().max())):  # NaN too
                raise ValueError(f"{key}: not the weights of this model: the file was made from another one")


def _layer_names(name: str, table: Mapping[str, Layout]) -> list[str]:
    """Our layers of an original one: one, or q, k and v of a fused projection."""
    if f"{name}.weight" not in table:
        raise ValueError(f"{name}: a quantizer of a layer that this model lacks")
    return [key.removesuffix(".weight") for key in table[f"{name}.weight"].names]


def _pieces(name: str, parts: list[_Part], weight: Tensor, edge: int | None) -> list[Tensor]:
    """The input channels of each half of a layer that is split at `edge`, or all of them."""
    if len(parts) == 1:
        return [weight]
    if parts[0].alpha is None or parts[0].alpha.ndim < 2 or parts[0].alpha.shape[1] != edge:
        raise ValueError(f"{name}: split at another channel than this model's, {edge}")
    return [weight[:, :edge], weight[:, edge:]]


def _set_weight(
    layers: Mapping[str, QuantLayer],
    name: str,
    parts: list[_Part],
    weight: Tensor,
    table: Mapping[str, Layout],
    boundaries: Mapping[str, int],
) -> None:
    layout, ours = table[f"{name}.weight"], _layer_names(name, table)
    codes = layers[ours[0]].config.weight_codes
    assert codes is not None
    pieces = _pieces(name, parts, weight, boundaries.get(ours[0]))
    columns = []  # codes, scales and zero points in the weight's shape, so that a layout may move their rows
    for piece, part in zip(pieces, parts, strict=True):
        scaled = piece / part.delta
        up = (part.alpha >= 0).to(scaled) if part.alpha is not None else torch.round(scaled) - torch.floor(scaled)
        code = (torch.floor(scaled) + up + part.zero_point).clamp(0, codes.qmax - codes.qmin)
        columns.append((code, part.delta.expand_as(piece), part.zero_point.expand_as(piece)))
    whole = [torch.cat([column[i] for column in columns], 1).contiguous() for i in range(3)]
    starts = [0] if len(parts) == 1 else [0, pieces[0].shape[1]]
    for target, code, scale, zero in zip(ours, *(layout.split(value) for value in whole), strict=True):
        picked = [value.flatten(2)[..., 0] if value.ndim > 2 else value for value in (scale, zero)]  # (O, I)
        layers[target].set_weight_codes((code + codes.qmin).to(torch.int8), picked[0][:, starts], picked[1][:, starts])


def _set_act(quantizer: ActQuantizer, parts: list[_Part], factor: float = 1.0) -> None:
    if quantizer.codes is None:
        return
    if len(parts) != len(quantizer.scale):
        raise ValueError(f"{len(parts)} activation quantizers for a layer with {len(quantizer.scale)}")
    scale = torch.stack([part.delta.reshape(()) for part in parts]).float() * factor
    quantizer.set_qparams(scale, torch.stack([part.zero_point.reshape(()) for part in parts]).float())
    quantizer.set_stage(Stage.QUANTIZE)


def _set_operand(
    unet: nn.Module, name: str, scaled: bool, kind: str, part: _Part, config: QuantConfig, table: Mapping[str, Layout]
) -> None:
    attention: Any = unet.get_submodule(_attention_name(unet, name, table))
    processor: QuantAttnProcessor = attention.processor
    if kind == "w":
        processor.softmax.codes = _softmax_codes(config, scaled)
        _set_act(processor.softmax, [part])
        return
    # LDM's matrix product quantizes q and k after multiplying each by (C/heads)^-1/4; ours before.
    width = attention.to_q.weight.shape[0] // attention.heads
    factor = width**0.25 if scaled and kind in "qk" else 1.0
    _set_act(getattr(processor, kind), [part], factor)


def _attention_name(unet: nn.Module, original: str, table: Mapping[str, Layout]) -> str:
    """The attention layer in which the layers below an original name lie."""
    inside = next((layout.names[0] for key, layout in table.items() if key.startswith(f"{original}.")), "")
    while inside and not hasattr(unet.get_submodule(inside.rpartition(".")[0]), "processor"):
        inside = inside.rpartition(".")[0]
    if not inside:
        raise ValueError(f"{original}: attention quantizers of a layer that this model lacks")
    return inside.rpartition(".")[0]
