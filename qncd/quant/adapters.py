"""What stands around or beside a network's layers: wrappers, and adapters (LoRA), which stay in floating point beside a layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")  # the one child of what torch.compile and parallel classes return
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


def check_quantizable(module: nn.Module) -> None:
    """Raise ValueError where a network cannot be quantized as it is, or not yet; the message says what to do."""
    kind = type(module).__name__
    children = [name for name, _ in module.named_children()]
    if len(children) == 1 and children[0] in _WRAPPED:
        raise ValueError(f"{kind} wraps a network: quantize the network itself, and wrap or compile it afterwards")
    if quant_layers(module):
        how = "is quantized already" if hasattr(module, "_qncd") else "was left half quantized by an error"
        raise ValueError(f"{kind} {how}: load the full-precision model again")
    check_no_adapters(module, BEFORE)
    for name, part in module.named_modules():
        if is_parametrized(part):
            raise ValueError(f"{kind}: {name} has a parametrized weight: remove_parametrizations first")
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        if isinstance(part, (nn.Conv2d, nn.Linear)) and hooks:
            raise ValueError(
                f"{kind}: {name} has a hook ({_name_of(hooks[0])}), which its quantized layer would not have: remove it first "
                "(remove_weight_norm, remove_spectral_norm), and register it again afterwards"
            )
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"{kind}: {name} is on the meta device, without values: load the weights, and offload them afterwards"
            )


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


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
