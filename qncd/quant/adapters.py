"""Adapters (LoRA) that peft puts beside a network's layers: the layer stays what it is, the adapter is in floating point."""

from __future__ import annotations

from typing import Any

from torch import nn

from qncd.quant.layers import QuantLayer

MERGED = "load the pipeline again: an adapter was merged into integer weights, which cannot hold it"
FUSED = (
    "fuse_lora: the weights are quantized, and the adapter stays in floating point beside them (set_adapters scales it); "
    "to quantize it with the weights, fuse it before quantizing"
)

BEFORE = (
    "unload_lora_weights() and load them again once it is quantized, or fuse_lora() and unload_lora_weights() to quantize them "
    "with the weights"
)


def adapters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the adapters beside a network's layers."""
    return tuple(getattr(module, "peft_config", None) or ())


def check_no_adapters(module: nn.Module, instead: str) -> None:
    """Raise ValueError where adapters are beside a network's layers; `instead` says what to do."""
    if names := adapters_of(module):
        raise ValueError(f"{type(module).__name__} has adapters beside its layers ({', '.join(names)}): {instead}")


def check_adapted(module: nn.Module) -> None:
    """Raise ValueError where an adapter of a quantized network does not compute what it says."""
    if not adapters_of(module):
        return
    for name, part in module.named_modules():
        beside: Any = part
        base = getattr(beside, "base_layer", None)
        if not isinstance(base, QuantLayer):
            continue
        if getattr(beside, "merged", False):
            raise ValueError(f"{name}: {MERGED}")
        how = {"smoothed": base.smoothing, "rotated": base.rotation, "split": base.up}
        changes = [word for word, change in how.items() if change is not None]
        if changes and any(getattr(beside, "use_dora", {}).values()):
            raise ValueError(f"{name}: DoRA needs the norm of the weight, which is {changes[0]} here: fuse it before quantizing")


def refuse_to_fuse(*_: Any, **__: Any) -> None:
    """What a quantized network has in the place of diffusers' `fuse_lora`."""
    raise ValueError(FUSED)
