"""A network on an engine, in the place of the module that it was made from: in our samplers, and in diffusers' pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from qncd.models.calls import Call, Inputs, rows_of
from qncd.models.network import Network, network_of, without_memory
from qncd.models.seen import settings_of
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.quantizers import HALVES

Session = Callable[[dict[str, Tensor]], Tensor]  # named inputs -> the network's output, on the inputs' device


@dataclass(frozen=True)
class InputSpec:
    """What an engine takes as one input.

    Attributes:
        dtype: that the engine computes with; what comes in another is converted.
        shape: None for an axis of any size.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return "x".join("?" if size is None else str(size) for size in self.shape)


@dataclass
class EngineOutput(BaseOutput):
    """What a denoiser of diffusers returns: `sample` (N, ...) or a list of tensors, which is also `[0]`."""

    sample: Any


class EngineNetwork(nn.Module):
    """A network on an engine, called as the module that it stands in for, by position or by name.

    Args:
        network: that it stands in for; its weights are not kept.
        session: the engine, called with named tensors, the sample and the time steps first.
        inputs: what the engine takes, by name; None where it takes whatever the network does.
        settings: what the engine was made for beside tensors, by name (`qncd.models.seen.settings_of`); calls must have the same.
        one_step_a_call: inputs of several time steps go to the engine step by step.

    Attributes:
        config: of the original module.
        device, dtype: of the inputs that it expects and of its outputs; they follow `.to()`.
    """

    place: Tensor  # empty: where the module is, and in which dtype

    def __init__(
        self,
        network: Network,
        session: Session,
        inputs: Mapping[str, InputSpec] | None = None,
        settings: Mapping[str, Any] | None = None,
        one_step_a_call: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.session, self.inputs, self.one_step_a_call = network.config, session, inputs, one_step_a_call
        self.settings = dict(settings or {})
        self.register_buffer("place", torch.empty(0, device=network.device, dtype=network.dtype), persistent=False)
        # What pipelines look up in the original, such as the width of an embedding: shapes alone.
        object.__setattr__(self, "_original", without_memory(network).module)
        self._qncd_network: Network = _StandIn(network, self)  # what qncd.models.network.network_of gives
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("_"):
                raise
            return getattr(original, name)

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> EngineOutput | tuple[Any]:
        """The arguments of the original module -> `.sample` (N, ...) in the sample's dtype; a tuple without `return_dict`.

        Raises:
            ValueError: naming an argument that the engine does not take, or one that is missing.
        """
        network = self._qncd_network
        call = network.bind(args, kwargs)
        self._check_settings(settings_of(self._original, call.constants))
        shared = {name: value for name, value in call.constants.items() if isinstance(value, Tensor)}
        given = {network.sample_name: call.x, network.time_name: call.t, **call.inputs, **shared}
        out = network.as_result(self._run(self._converted(network.trimmed(given)), network.time_name).to(call.x.dtype))
        return EngineOutput(out) if call.constants.get("return_dict", return_dict) else (out,)

    def _check_settings(self, given: Mapping[str, Any]) -> None:
        for name in sorted({*given, *self.settings}):
            if given.get(name) != self.settings.get(name):
                here = f"is {given[name]!r:.80}" if name in given else "is not given"
                there = f"for {self.settings[name]!r:.80}" if name in self.settings else "without it"
                raise ValueError(f"{name} {here}: the network on the engine is made {there}")

    def _converted(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs as the engine takes them, in the engine's order."""
        if self.inputs is None:
            return {name: value.detach().to(_plain(value.dtype)) for name, value in given.items()}
        for name in given:
            if name not in self.inputs:
                raise ValueError(f"the exported model has no input {name}; it has {', '.join(self.inputs)}")
        converted = {}
        for name, spec in self.inputs.items():
            if name not in given:
                raise ValueError(f"the exported model needs its input {name}")
            converted[name] = _fitting(name, given[name].detach(), spec)
        return converted

    def _run(self, inputs: dict[str, Tensor], time_name: str) -> Tensor:
        times = inputs[time_name]
        distinct = times.unique().tolist() if self.one_step_a_call else []
        if len(distinct) <= 1:
            return self.session(inputs)
        order = [(times == time).nonzero().flatten() for time in distinct]
        parts = [self.session(rows_of(inputs, rows)) for rows in order]
        return torch.cat(parts)[torch.cat(order).argsort()]


class _StandIn(Network):
    """How the rest of the package sees a network on an engine: called as the original is, and without any layers."""

    def __init__(self, original: Network, module: EngineNetwork) -> None:
        vars(self).update(vars(original))  # the names of the arguments, and what is predicted
        self.module, self._original = module, original
        self.shared, self.packed = original.shared, original.packed

    @property
    def condition(self) -> str | None:
        return self._original.condition

    def as_prediction(self, output: Tensor) -> Tensor:
        return self._original.as_prediction(output)

    def time_at(self, t: float) -> float:
        return self._original.time_at(t)

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._original.as_rows(arguments)

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        return self._original.as_arguments(rows)

    def output_of(self, result: Any) -> Tensor:
        return self._original.output_of(result)

    def as_result(self, output: Tensor) -> Any:
        return self._original.as_result(output)

    def trimmed(self, inputs: Inputs) -> dict[str, Tensor]:
        return self._original.trimmed(inputs)

    def to_images(self, samples: Tensor, call: Call | None = None) -> Tensor:
        return self._original.to_images(samples, call)

    def to_samples(self, images: Tensor, like: Tensor) -> Tensor:
        return self._original.to_samples(images, like)

    @property
    def device(self) -> torch.device:
        return self.module.get_buffer("place").device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_buffer("place").dtype


def in_float32(network: Network) -> Network:
    """The network with what it computes in half precision in float32; codes stay shared. Itself where nothing is half.

    The weights of layers whose codes are known are not there: engines take the codes.
    """
    module = network.module
    tensors = (*module.parameters(), *module.buffers())
    if all(tensor.dtype not in HALVES for tensor in tensors):
        return network
    module = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in module.modules():
        if isinstance(part, QuantLayer):
            part.pack_weight_()
            part.weight_dtype = torch.float32
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if value.dtype in HALVES:
                setattr(part, name, nn.Parameter(value.float(), False) if isinstance(value, nn.Parameter) else value.float())
    return network_of(module, network.prediction)


DYNAMIC_ATTENTION = "attention's products with scales found at run time have no kernel: pass --no-quantize_attention"


def check_kernels(network: Network, where: str, tokens: bool = False) -> None:
    """Raise ValueError naming the first layer that `where` has no form for.

    Args:
        tokens: it has one for scales of tokens, which are found at run time.
    """
    for name, layer in quant_layers(network.module).items():
        if (found := layer.config.without_kernel(tokens)) is not None:
            raise ValueError(f"{name}: {where} has no form for {found}")


def _plain(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else torch.bool if dtype is torch.bool else torch.int64


def _fitting(name: str, value: Tensor, spec: InputSpec) -> Tensor:
    """The input in the engine's dtype. Raises ValueError where its shape is another, or where whole numbers are needed."""
    if len(value.shape) != len(spec.shape) or any(b not in (None, a) for a, b in zip(value.shape, spec.shape, strict=True)):
        raise ValueError(f"{name} is {'x'.join(map(str, value.shape))}, the exported model takes {spec}")
    if value.is_floating_point() and not spec.dtype.is_floating_point and not bool((value == value.round()).all()):
        raise ValueError(f"{name} holds fractions, the exported model takes whole numbers")
    return value.to(spec.dtype)
