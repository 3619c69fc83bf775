"""The attention layers of a diffusers network whose products are known here; the others stay in floating point, by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from qncd.models.network import tell_left

# Classes of processors that compute plain attention and nothing else.
PLAIN_PROCESSORS = frozenset({"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"})


def known_attentions(module: nn.Module, processors: Collection[str]) -> dict[str, Any]:
    """Attention layers by name whose processor is one of diffusers' own of these classes; one line names the others.

    Raises:
        ValueError: a layer's projections are fused.
    """
    found: dict[str, Any] = {}
    other: list[str] = []
    for name, attention in module.named_modules():
        if not hasattr(attention, "processor") or not hasattr(attention, "set_processor"):
            continue
        if getattr(attention, "fused_projections", False):
            raise ValueError(f"{name}: attention with fused projections is not supported; unfuse it first")
        processor: Any = attention.processor
        kind = type(processor)
        dispatched = getattr(processor, "_attention_backend", None) is not None  # to other kernels than torch's
        several = getattr(attention, "add_k_proj", None) is not None and not hasattr(attention, "add_q_proj")  # products a call
        if kind.__module__.startswith("diffusers.") and kind.__name__ in processors and not dispatched and not several:
            found[name] = attention
        else:
            other.append(f"{name} ({kind.__name__})")
    tell_left(module, "attention products", other)
    return found
