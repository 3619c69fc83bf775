"""Published toolkits as modes of the quality benchmark, each with the settings that it documents for diffusion UNets.

They calibrate on our calibration sets and are sampled and scored by the same code as our own modes. What they quantize
differs, so every result says how many convolutions and linear layers got integer weights and integer inputs. Their packages
are an extra, `pip install -e '.[peers]'`, and are imported only where they are used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qncd.models.network import Network
    from qncd.ptq.data import CalibrationSet

# Layers that ModelOpt's example for diffusers (examples/diffusers/quantization, filter_func_default) leaves in floating point.
MODELOPT_FLOAT = ("time_emb_proj", "time_embedding", "add_embedding", "conv_in", "conv_out", "conv_shortcut")
TORCHAO_GROUP = 32  # inputs that share a scale; torchao's default
PROBE = 64  # inputs by which quantized activations are told from others: float ones have far more than 256 values

SAMPLE = 1 << 15  # values of an activation that are looked at


@dataclass(frozen=True)
class Peer:
    """A toolkit with one of its recipes.

    Attributes:
        title: what the table calls it.
        package: its name in the registry.
        weight_bits: widths of weights that it can do.
        act_bits: the same of activations.
        settings: what is done, in words.
        quantize: (network, calibration set, bits of weights, bits of activations, batch size) -> the quantized module; the
            network's may have been changed in place.
        integer_weights: how many convolutions and linear layers of a quantized module have integer weights.
        calibrated: whether the calibration set matters; without it, inputs are quantized by their own extremes, in the layer.
    """

    title: str
    package: str
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    settings: str
    quantize: Callable[[Network, CalibrationSet, int, int, int], nn.Module]
    integer_weights: Callable[[nn.Module], int]
    calibrated: bool = True

    def allows(self, weight_bits: int, act_bits: int) -> bool:
        return weight_bits in self.weight_bits and act_bits in self.act_bits

    @property
    def widths(self) -> str:
        """What it can do, for messages: W4A8, W8A8, or W2A2 to W8A8."""
        kinds = [f"W{w}A{a}" for w in self.weight_bits for a in self.act_bits]
        return ", ".join(kinds) if len(kinds) <= 7 else f"{kinds[0]} to {kinds[-1]}"

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


def check_peer(mode: str, weight_bits: int | None = None, act_bits: int | None = None) -> Peer:
    """The peer of a mode.

    Raises:
        ValueError: its package is not installed, or it has no such width.
    """
    peer = PEERS[mode]
    if weight_bits is not None and act_bits is not None and not peer.allows(weight_bits, act_bits):
        raise ValueError(f"--modes {mode}: {peer.package} cannot do W{weight_bits}A{act_bits}; allowed are {peer.widths}")
    try:
        importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"--modes {mode}: needs the package {peer.package}: pip install -e '.[peers]'") from None
    return peer


def quantize_with_peer(
    mode: str, network: Network, data: CalibrationSet, weight_bits: int, act_bits: int, batch_size: int = 32
) -> tuple[Network, dict[str, int]]:
    """The network as the peer quantizes it, and how much of it is quantized.

    Args:
        network: in full precision; not to be used afterwards.
        data: its calibration set.
        batch_size: inputs a forward pass where the peer leaves that open.

    Returns:
        the quantized network, to be called as `network` was, and the numbers of `layers` (convolutions and linear layers), of
        those with integer `weights` and of those with integer `inputs`.

    Raises:
        ValueError: as `check_peer`; the set does not fit the model; the package cannot be imported.
    """
    peer = check_peer(mode, weight_bits, act_bits)
    data.check_model(network)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars and counts, where our table goes
            quantized = around(network, peer.quantize(network, data, weight_bits, act_bits, batch_size).eval())
    except ImportError as error:
        raise ValueError(f"--modes {mode}: {peer.package} {peer.version} cannot be imported: {error}") from error
    return quantized, count_integer(peer, quantized, data)


def around(network: Network, module: nn.Module) -> Network:
    """The network with a module in the place of its own that is called in the same way."""
    other = copy.copy(network)
    other.module = module
    return other


def count_integer(peer: Peer, network: Network, data: CalibrationSet) -> dict[str, int]:
    """How many convolutions and linear layers there are, and how many have integer weights and get integer inputs."""
    import torch

    weights = peer.integer_weights(network.module)
    probe = data.subset(torch.arange(PROBE) % len(data))
    # A different time step for each input: with few of them, time embeddings would look quantized.
    probe = dataclasses.replace(probe, t=torch.linspace(0, 999, PROBE).long())
    inputs = _integer_inputs(network, probe) if peer.calibrated else weights
    return {"layers": len(_layers(network.module)), "weights": weights, "inputs": inputs}


def _integer_inputs(network: Network, probe: CalibrationSet) -> int:
    """How many calls of a convolution or a linear layer get a quantized tensor, or a float one with at most 256 values."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    found = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            if func in (functional.conv2d, functional.linear):
                x = args[0]
                found += type(x) is not torch.Tensor or len(x.flatten()[:: 1 + x.numel() // SAMPLE].unique()) <= 256
            return func(*args, **(kwargs or {}))

    with Watch():
        _run(network, probe, PROBE)
    return found


def _layers(module: nn.Module) -> list[Any]:
    from torch import nn

    return [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]


def _run(network: Network, data: CalibrationSet, batch_size: int, order: Tensor | None = None) -> None:
    """Run the network over the whole set."""
    import torch

    from qncd.ptq.observing import call_on

    with torch.no_grad():
        for x, t, inputs in data.batches(batch_size, order):
            call_on(network, x, t, inputs, data.constants)


def _modelopt(preset: str) -> Callable[[Network, CalibrationSet, int, int, int], nn.Module]:
    def quantize(network: Network, data: CalibrationSet, weight_bits: int, act_bits: int, batch_size: int) -> nn.Module:
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(getattr(mtq, preset))
        for pattern, bits in (("weight_quantizer", weight_bits), ("input_quantizer", act_bits)):
            for entry in config["quant_cfg"]:
                if entry["quantizer_name"] == f"*{pattern}" and entry.get("cfg"):
                    entry["cfg"]["num_bits"] = bits
        config["quant_cfg"] += [{"quantizer_name": f"*{name}*", "enable": False} for name in MODELOPT_FLOAT]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is not calibrated, skip smoothing")  # the layers just disabled
            run = lambda module: _run(around(network, module), data, batch_size)  # noqa: E731
            quantized: nn.Module = mtq.quantize(network.module, config, run)
        return quantized

    return quantize


def _modelopt_weights(module: nn.Module) -> int:
    return sum(layer.weight_quantizer.is_enabled for layer in _layers(module))


def _quantize_nncf(network: Network, data: CalibrationSet, weight_bits: int, act_bits: int, batch_size: int) -> nn.Module:
    import nncf
    import torch

    logging.getLogger("nncf").setLevel(logging.WARNING)
    device = network.device

    def arguments(item: tuple[Tensor, Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        x, t, inputs = item
        return {name: v.to(device) for name, v in {network.sample_name: x, network.time_name: t, **inputs}.items()}

    # First and last layer in floating point, as OpenVINO's notebooks recommend for generation: they cost most of the error.
    first_and_last = [
        f"{name.replace('.', '/')}/{'conv2d' if isinstance(layer, torch.nn.Conv2d) else 'linear'}/0"
        for name, layer in network.layers().items()
        if name in network.edges()
    ]
    # One input at a time (two with guidance), as in its notebooks: ranges are means over the extremes of the items.
    quantized: nn.Module = nncf.quantize(
        network.module,
        nncf.Dataset(list(data.batches(1)), arguments),
        subset_size=len(data),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=first_and_last),
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    return quantized


def _nncf_weights(module: nn.Module) -> int:
    from nncf.torch.function_hook import get_hook_storage
    from nncf.torch.quantization.layers import BaseQuantizer

    # Hooks are named after the function, its call and the argument: conv1/conv2d/3__1 is the weight of the fourth conv1.
    hooks = get_hook_storage(module).pre_hooks.items()
    weights = [chain for name, chain in hooks if name.endswith("__1") and name.split("/")[-2] in ("conv2d", "linear")]
    return sum(any(isinstance(hook, BaseQuantizer) for hook in chain.values()) for chain in weights)


def _quantize_quanto(network: Network, data: CalibrationSet, weight_bits: int, act_bits: int, batch_size: int) -> nn.Module:
    import torch
    from optimum import quanto

    weights = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}[weight_bits]
    quanto.quantize(network.module, weights=weights, activations=quanto.qint8)
    # Its scales are moving averages: over a set in the order of its time steps they would hold the last ones' alone.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    with quanto.Calibration():
        _run(network, data, batch_size, order)
    quanto.freeze(network.module)
    return network.module


def _tensor_subclasses(module: nn.Module) -> int:
    import torch

    return sum(type(layer.weight.data) is not torch.Tensor for layer in _layers(module))


def _quantize_torchao(network: Network, data: CalibrationSet, weight_bits: int, act_bits: int, batch_size: int) -> nn.Module:
    import torch
    from torchao import quantization as ao

    module = network.module
    if weight_bits == 8:
        ao.quantize_(module, ao.Int8DynamicActivationInt8WeightConfig())
        return module
    kind = getattr(torch, f"int{weight_bits}")

    def grouped(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and layer.in_features % TORCHAO_GROUP == 0

    def rest(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and not grouped(layer, name)

    for granularity, chosen in ((ao.PerGroup(TORCHAO_GROUP), grouped), (ao.PerAxis(0), rest)):
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity)
        ao.quantize_(module, config, chosen)
    return module


PEERS = {
    "modelopt-int8": Peer(
        "ModelOpt, INT8", "nvidia-modelopt", tuple(range(2, 9)), tuple(range(2, 9)),
        "INT8_DEFAULT_CFG without the layers that its diffusers example leaves in floating point, num_bits as the width says",
        _modelopt("INT8_DEFAULT_CFG"), _modelopt_weights,
    ),
    "modelopt-smoothquant": Peer(
        "ModelOpt, SmoothQuant", "nvidia-modelopt", (8,), (8,),
        "INT8_SMOOTHQUANT_CFG without the layers that its diffusers example leaves in floating point",
        _modelopt("INT8_SMOOTHQUANT_CFG"), _modelopt_weights,
    ),
    "nncf": Peer(
        "NNCF", "nncf", (8,), (8,),
        "nncf.quantize on the torch model, model_type TRANSFORMER (mixed preset, SmoothQuant), no bias correction, first and "
        "last layer ignored",
        _quantize_nncf, _nncf_weights,
    ),
    "quanto": Peer(
        "optimum-quanto", "optimum-quanto", (2, 4, 8), (8,),
        "quantize with qint weights and qint8 activations, Calibration in mixed order, freeze",
        _quantize_quanto, _tensor_subclasses,
    ),
    "torchao": Peer(
        "torchao", "torchao", tuple(range(2, 9)), (8,),
        "int8 dynamic activations, int8 weights a channel or intx weights in groups of 32, linear layers only",
        _quantize_torchao, _tensor_subclasses, calibrated=False,
    ),
}  # fmt: skip
