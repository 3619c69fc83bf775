"""What the method needs to know of a denoising network, whatever its class: the one place where quantization meets architectures.

`Network` itself is the plain family: every convolution and linear layer is quantized, blocks are single layers, nothing is
smoothed. Families in `qncd.models.families` say more about the classes that they know; `network_of` chooses by the class.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qncd.models.calls import Call, Inputs, PlainCall, flatten, nested
from qncd.models.seen import seen_inputs

log = logging.getLogger("qncd")

# Class of the denoiser -> the family that knows it, as module:class. An author adds a line here.
FAMILIES: dict[str, str] = {
    "UNet2DModel": "qncd.models.families.unet:UNet",
    "UNet2DConditionModel": "qncd.models.families.unet:UNet",
    "DiTTransformer2DModel": "qncd.models.families.transformer:Transformer",
    "PixArtTransformer2DModel": "qncd.models.families.transformer:Transformer",
    "SD3Transformer2DModel": "qncd.models.families.transformer:Transformer",
    "SanaTransformer2DModel": "qncd.models.families.transformer:Transformer",
    "HunyuanDiT2DModel": "qncd.models.families.transformer:HunyuanDiT",
    "WanTransformer3DModel": "qncd.models.families.transformer:Transformer",
    "AuraFlowTransformer2DModel": "qncd.models.families.transformer:OfFractions",
    "Lumina2Transformer2DModel": "qncd.models.families.single_stream:Lumina2",
    "FluxTransformer2DModel": "qncd.models.families.packed:Flux",
    "ChromaTransformer2DModel": "qncd.models.families.packed:Chroma",
    "QwenImageTransformer2DModel": "qncd.models.families.packed:QwenImage",
    "ZImageTransformer2DModel": "qncd.models.families.single_stream:ZImage",
}
TIME_NAMES = ("timestep", "timesteps", "t", "time")  # of the argument that a network's forward has for the time step
PLAIN = (
    "{} has no family here: its convolutions and linear layers are quantized one by one, without shortcut splits, smoothing by "
    "the embedding, quantized attention products or blocks that are reconstructed as a whole"
)


@dataclass(frozen=True)
class TimePath:
    """The part of a network that depends on the time step alone (TFMQ-DM, arXiv 2311.16503).

    Attributes:
        sinusoid: time steps (S,) -> (S, C), what the embedding gets.
        embedding: (S, C) -> (S, E), with layers linear_1, act and linear_2.
        nonlinearity: between the embedding and its projections.
        projections: of the embedding in each block, by name.
    """

    module: nn.Module
    embedding: Any
    nonlinearity: Any
    projections: Mapping[str, nn.Module]

    def sinusoid(self, times: Sequence[int]) -> Tensor:
        """(S,) -> (S, C) on the network's device, in its dtype."""
        module: Any = self.module
        weight = self.embedding.linear_1.weight
        return module.time_proj(torch.tensor(list(times), device=weight.device)).to(weight.dtype)


class Network:
    """A denoiser, and the places in it that are treated apart. This class is the plain family.

    Attributes:
        module: the network itself, an nn.Module.
        prediction: "epsilon", "v_prediction", "sample" or "flow": what it was trained to predict.
        condition: name of the input that conditions it in the original codes; None for an unconditional network.
        block_types: modules that are reconstructed as a whole.
        channel_dim: of activations, 1 for images and -1 for tokens.
        shared: names of inputs that all samples of a call share, whatever their shapes.
        tokens: inputs with an axis that runs over the tokens of texts, and that axis: an exported network takes any number.
        packed: samples are tokens of patches, which `to_images` takes apart.
        fractions: time steps are fractions or floats even where they are whole numbers.
        smooths: modes smooth it by its embedding.
        step_window, rotates: what `step_window` and `rotation` of a `QuantConfig` are where they are left to the family.
    """

    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    channel_dim: ClassVar[int] = 1
    step_window: ClassVar[float] = 0.0
    rotates: ClassVar[bool] = False
    smooths: ClassVar[bool] = True
    tokens: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 1, "encoder_attention_mask": 1}
    fractions: ClassVar[bool] = False
    shared: frozenset[str] = frozenset()
    packed: bool = False

    def __init__(self, module: nn.Module, prediction: str = "epsilon") -> None:
        self.module, self.prediction = module, prediction
        signature = inspect.signature(type(module).forward).parameters
        parameters = [name for name, p in signature.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._parameters = parameters[1:]  # without self
        self._required = [name for name in self._parameters if signature[name].default is inspect.Parameter.empty]
        self.sample_name = self._parameters[0]
        self.time_name = next((name for name in TIME_NAMES if name in self._parameters), "")
        if not self.time_name:
            raise ValueError(f"{type(module).__name__}: no denoiser, its forward has no argument named {', '.join(TIME_NAMES)}")

    @property
    def config(self) -> Any:
        """The module's diffusers configuration; an empty mapping where it has none."""
        return getattr(self.module, "config", {})

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def condition(self) -> str | None:
        return None

    # Calls.

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The parts of a call of the module. Raises ValueError where a tensor is missing that every call has."""
        given = self.as_rows({**dict(zip(self._parameters, args, strict=False)), **kwargs})
        try:
            x, time = given.pop(self.sample_name), given.pop(self.time_name)
        except KeyError as error:
            raise ValueError(f"{type(self.module).__name__} was called without {error.args[0]}") from None
        if not isinstance(x, Tensor):
            raise ValueError(f"{type(self.module).__name__} was called with a {type(x).__name__} of samples: allowed is a tensor")
        inputs: dict[str, Tensor] = {}
        constants = {name: value for name, value in given.items() if not flatten(name, value, inputs)}
        for name, value in [*inputs.items()]:
            if name in self.shared or value.ndim == 0 or len(value) not in (1, len(x)):
                constants[name] = inputs.pop(name)
        t = torch.as_tensor(time, device=x.device).reshape(-1)
        if len(t) not in (1, len(x)):
            shape = tuple(torch.as_tensor(time).shape)
            raise ValueError(f"{self.time_name} of shape {shape} for {len(x)} samples: expected one for each, or one for all")
        t = t.float() if t.is_floating_point() else t.long()
        return Call(x, t.expand(len(x)) if len(t) == 1 else t, inputs, constants)

    def times_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The time steps of a call, (N,) or ()."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        return torch.as_tensor(given[self.time_name])

    def call(self, x: Tensor, t: Tensor | int, inputs: Inputs | None = None, **constants: Any) -> Tensor:
        """The module's output at `x` (N, ...) and `t` (N,): the prediction, and beside it a learned variance if there is one."""
        shared = {name: constants.pop(name) for name in [*constants] if isinstance(constants[name], Tensor)}
        arguments = nested({**(inputs or {}), **shared})
        for name, value in constants.items():
            arguments[name] = {**value, **arguments[name]} if isinstance(arguments.get(name), dict) else value
        arguments.pop("return_dict", None)
        given = {*arguments, self.sample_name, self.time_name}
        arguments |= {name: None for name in self._required if name not in given}  # a context that the network makes itself
        return self.output_of(self.module(**self.as_arguments({self.sample_name: x, self.time_name: t, **arguments})))

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the module, by name, as tensors with a row for each sample."""
        return arguments

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `as_rows`."""
        return rows

    def output_of(self, result: Any) -> Tensor:
        """What a call of the module returned, as a tensor with a row for each sample."""
        output: Tensor = result[0] if isinstance(result, tuple) else result.sample
        return output

    def as_result(self, output: Tensor) -> Any:
        """The inverse of `output_of`, without its tuple."""
        return output

    def trimmed(self, inputs: Inputs) -> dict[str, Tensor]:
        """Inputs of a call by name, as `as_rows` gives them, without tokens that no text of the call has."""
        return dict(inputs)

    @contextmanager
    def traced(self, constants: Mapping[str, Any]) -> Iterator[PlainCall]:
        """Within it, `call` in a form in which no shape depends on values, for tracing.

        Args:
            constants: what else the module is called with.
        """
        yield lambda x, t, inputs: self.call(x, t, inputs, **constants)

    def as_prediction(self, output: Tensor) -> Tensor:
        """What the module's output is in `prediction`: some give the negative of it."""
        return output

    def predict(self, x: Tensor, t: Tensor | int, inputs: Inputs | None = None, **constants: Any) -> Tensor:
        """The network's prediction at `x` (N, ...) and `t` (N,), same shape; a learned variance is dropped."""
        out = self.as_prediction(self.call(x, t, inputs, **constants))
        if out.ndim > 1 and x.ndim == out.ndim and out.shape[1] == 2 * x.shape[1] and out.shape[2:] == x.shape[2:]:
            out = out.chunk(2, 1)[0]
        return out

    def example(self, batch: int, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Zeros in the shape of one call by name, sample and time step first: what an exporter traces.

        Raises:
            ValueError: the family does not know what its networks are called with.
        """
        seen = seen_inputs(self.module)
        if seen is None:
            raise ValueError(
                f"{type(self.module).__name__}: what it is called with is known once it is calibrated: export the quantized "
                "network, or one that a quantized checkpoint was loaded into"
            )
        rows = {name: (tuple(one), getattr(torch, dtype)) for name, (one, dtype) in seen.items()}
        if shape is not None:
            rows[self.sample_name] = (tuple(shape), rows[self.sample_name][1])
        return {
            name: torch.zeros(*(one if name in self.shared else (batch, *one)), dtype=dtype, device=self.device)
            for name, (one, dtype) in rows.items()
        }

    # Samples.

    @property
    def image_channels(self) -> set[int]:
        """Channels that predictions may have in `to_images`; empty where the configuration does not say."""
        return {self.config[key] for key in ("in_channels", "out_channels") if self.config.get(key) is not None}

    def time_at(self, t: float) -> float:
        """What the network is given as the time step where its scheduler is at time step `t`."""
        return t

    def shape_of(self, latents: Sequence[int]) -> tuple[int, ...]:
        """The shape of one sample as the module gets it, of latents (C, H, W)."""
        return tuple(latents)

    def to_images(self, samples: Tensor, call: Call | None = None) -> Tensor:
        """Samples as images (N, C, H, W), on which corrections work: the frames of a video (N, C, F, H, W) below one another,
        tokens (N, L, C) in one column.

        Args:
            call: a call of the network; needed where samples are `packed`.
        """
        if samples.ndim == 3:
            return samples.mT.unsqueeze(-1)
        return samples.flatten(2, 3) if samples.ndim == 5 else samples

    def to_samples(self, images: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_images`, in the shape of `like`."""
        return images.squeeze(-1).mT if like.ndim == 3 else images.view_as(like)

    # Places.

    def layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """What is quantized, by name: convolutions of images and linear layers that compute what torch's own classes compute.

        Convolutions of other dimensions, subclasses and layers with another forward, and layers that stand in several
        places stay in floating point, and one line names them.
        """
        found: dict[str, nn.Conv2d | nn.Linear] = {}
        other: list[str] = []
        places = Counter(id(layer) for _, layer in self.module.named_modules(remove_duplicate=False))
        for name, layer in self.module.named_modules():
            if not isinstance(layer, (_ConvNd, nn.Linear)) or hasattr(layer, "weight_scale"):
                continue
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not _is_plain(layer):
                other.append(f"{name} ({type(layer).__name__})")
            elif places[id(layer)] > 1:
                other.append(f"{name} ({type(layer).__name__} in {places[id(layer)]} places)")
            else:
                found[name] = layer
        tell_left(self.module, "layers", other)
        return found

    def edges(self) -> tuple[str, ...]:
        """The first and the last layer."""
        names = list(self.layers())
        return (names[0], names[-1]) if names else ()

    def embedding(self) -> set[str]:
        """Layers that compute the time embedding and project it."""
        return set()

    def read_layers(self) -> set[str]:
        """Layers whose weights the network reads instead of calling them: their inputs cannot be rounded."""
        return set()

    def splits(self) -> dict[str, int]:
        """Layers fed by a concatenation [h ; skip], and the channels of h."""
        return {}

    def is_block(self, module: nn.Module) -> bool:
        """Whether a module is reconstructed or compensated as a whole."""
        return isinstance(module, self.block_types)

    def blocks(self) -> dict[str, nn.Module]:
        """What is reconstructed or compensated together, by name, in the order of the modules; single layers else."""
        units: dict[str, nn.Module] = {}

        def visit(name: str, module: nn.Module) -> None:
            if self.is_block(module) or hasattr(module, "weight_scale"):
                units[name] = module
                return
            for child, part in module.named_children():
                visit(f"{name}.{child}" if name else child, part)

        visit("", self.module)
        return units

    def attentions(self) -> dict[str, Any]:
        """Attention layers whose operands can be quantized, by name."""
        return {}

    def stretch(self, times: Sequence[float], inputs: Inputs | None = None) -> dict[str, Tensor]:
        """How much the embedding stretches the input channels of a layer: mean size of the factor over `times`, (C,) by layer.

        Args:
            inputs: of calibration calls, for embeddings of more than the time step.

        Raises:
            ValueError: this family knows no such layer.
        """
        raise ValueError(f"{type(self.module).__name__}: smoothing by the embedding is not known for its family")

    def time_path(self) -> TimePath | None:
        """What depends on the time step alone; None where nothing does, or other conditions are added to the embedding."""
        return None


def network_of(module: nn.Module | Network, prediction: str | None = None) -> Network:
    """The network of a module, by its class; an unknown class gets the plain family, and one line says what that goes without.

    Raises:
        ValueError: the module is no denoiser.
    """
    if isinstance(module, Network):
        return module
    own = getattr(module, "_qncd_network", None)  # of a module that stands in for another one, as on an engine
    if isinstance(own, Network):
        return own
    for kind in type(module).__mro__:
        if kind.__name__ in FAMILIES:
            room, _, name = FAMILIES[kind.__name__].partition(":")
            family: type[Network] = getattr(importlib.import_module(room), name)
            return family(module, prediction or "epsilon")
    network = Network(module, prediction or "epsilon")
    tell_once(module, PLAIN.format(type(module).__name__))
    return network


def without_memory(network: Network) -> Network:
    """The network with shapes alone in the place of its weights."""
    module = network.module
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    memo |= {id(p): _shape_of(p) for p in module.parameters()}
    return network_of(copy.deepcopy(module, memo), network.prediction)


def _shape_of(parameter: Tensor) -> Tensor:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _is_plain(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer computes what torch's own does: neither its class nor the layer itself has another forward."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return type(layer).forward is kind.forward and not {"forward", "_conv_forward"} & vars(layer).keys()


def tell_left(module: nn.Module, what: str, names: Sequence[str]) -> None:
    """One line for parts of a network that are not quantized because their classes are not known; nothing for none."""
    if names:
        tell_once(module, f"{len(names)} {what} compute what is not known here and stay in floating point: {few(names)}")


def tell_once(module: nn.Module, line: str) -> None:
    """Warn of something about a network, once."""
    told: set[str] = module.__dict__.setdefault("_qncd_told", set())
    if line not in told:
        log.warning(line)
        told.add(line)


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are: for a log line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
