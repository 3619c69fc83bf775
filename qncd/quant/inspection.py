"""The quantized parts of a network: its layers and activation quantizers by name, and all of them in one stage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import ActQuantizer, Stage


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Every quantized layer by name, in the order of the network's modules."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantLayer)}


class UnpackedState(Mapping[str, Tensor]):
    """The state dict of a network as it is with no weight packed; packed weights are made of their codes one at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.packed = {f"{name}.weight": layer for name, layer in quant_layers(module).items() if layer.packed}
        codes = {f"{name.removesuffix('.weight')}.codes" for name in self.packed}
        self.others = {name: value for name, value in module.state_dict().items() if name not in codes}

    def __getitem__(self, name: str) -> Tensor:
        return self.packed[name].weight if name in self.packed else self.others[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.packed, *self.others])

    def __len__(self) -> int:
        return len(self.packed) + len(self.others)


class StateOfPacked(OrderedDict[str, Tensor]):
    """A state dict that knows of the packed weights, which it does not hold, shapes alone: diffusers looks up those of the
    layers that a LoRA of FLUX is for.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._metadata: OrderedDict[str, Any] = OrderedDict()  # where nn.Module keeps versions
        self._module = module

    def __missing__(self, name: str) -> Tensor:
        parent, _, own = name.rpartition(".")
        try:
            layer: Any = self._module.get_submodule(parent)
        except AttributeError:
            raise KeyError(name) from None
        layer = getattr(layer, "base_layer", layer)  # beside which an adapter is
        if own != "weight" or not isinstance(layer, QuantLayer):
            raise KeyError(name)
        return torch.empty(layer.weight_shape, dtype=layer.weight_dtype, device="meta")


def state_dict_of_packed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a quantized network has in the place of `nn.Module.state_dict`: the same, as a `StateOfPacked`."""
    if not args and kwargs.get("destination") is None:
        kwargs["destination"] = StateOfPacked(module)
    return type(module).state_dict(module, *args, **kwargs)


def act_quantizers(module: nn.Module) -> dict[str, ActQuantizer]:
    """Every activation quantizer that has codes, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, ActQuantizer) and m.codes is not None}


def calibrated_quantizers(module: nn.Module) -> dict[str, ActQuantizer]:
    """Those of them whose ranges a calibration set gives, by name."""
    return {name: quantizer for name, quantizer in act_quantizers(module).items() if quantizer.calibrated}


def set_act_bits_(module: nn.Module, bits: Mapping[str, int]) -> None:
    """Set the number of bits of each activation quantizer, in place, before they are calibrated.

    Raises:
        ValueError: a name is none of theirs, or a width is not 2 to 16.
    """
    quantizers = act_quantizers(module)
    for name, width in bits.items():
        if name not in quantizers:
            raise ValueError(f"{name}: no activation quantizer of this model")
        quantizers[name].set_bits(width)


def replace_quantizers_(module: nn.Module, new: Callable[[str, ActQuantizer], ActQuantizer]) -> None:
    """Put `new(name, quantizer)` in the place of every activation quantizer that has codes, in place."""
    for name, quantizer in act_quantizers(module).items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new(name, quantizer))


def set_stage(module: nn.Module, stage: Stage) -> None:
    """Put every activation quantizer of the model into one stage."""
    for quantizer in act_quantizers(module).values():
        quantizer.set_stage(stage)


@contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Within it, forward passes stay in floating point and show every activation to fresh observers."""
    set_stage(module, Stage.OBSERVE)
    try:
        yield
    finally:
        set_stage(module, Stage.FLOAT)
