"""How fast one call of a network is: in PyTorch, on the engines in full precision and in integers, and of other toolkits.

All run in one process and take turns, on the same inputs, with the same number of threads.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qncd.benchmark.peers import around, quantize_with_peer
from qncd.engines.engine import export, open_engine
from qncd.engines.onnx.engine import Arrays, ArraySession
from qncd.engines.onnx.model import FILE
from qncd.engines.onnxruntime import open_session
from qncd.engines.openvino import openvino_options
from qncd.engines.openvino_graph import openvino_core, read_network
from qncd.models.calls import Inputs
from qncd.models.network import Network
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet
from qncd.ptq.observing import find_ranges_
from qncd.ptq.stages.bit_allocation import free_quantizers
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.ranges import round_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.inspection import set_act_bits_
from qncd.recipe import QuantConfig, SmoothingConfig

TIMES = (1, 251, 501, 751)
NOT_THERE = "{} is not installed: pip install -e '.[peers]'"
PEAK_SIDE = 2048  # of the matrix product that shows what the machine can do

Call = Callable[[], Any]


@dataclass
class Contest:
    """Who takes part.

    Attributes:
        calls: one call of the network each, by name.
        sizes: bytes of the exported files, by name.
        notes: who does not take part, and why.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in `rounds` rounds in which all take their turn, after one that does not count.

    In each turn a call goes before that does not count either: what samples calls the same network again and again, and finds
    its own weights in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], first: str, second: str) -> float:
    """The median over the rounds of the time of `first` over that of `second`."""
    return statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))


def quantized(
    network: Network, data: CalibrationSet, bits: int = 8, smoothing: bool = True, stepwise: bool = False, mixed: bool = False
) -> QuantConfig:
    """Quantize in place with max ranges, split and attention; returns the configuration.

    To W`bits`A8; `mixed`: activations of 4 to 8 bits in turn, so that layers which share an input seldom share its codes.
    """
    config = QuantConfig(
        bits, 6 if mixed else 8, weight_range="max", act_range="max", stepwise_activations=stepwise, bit_allocation=mixed,
        bias_correction=False,
    )  # fmt: skip
    factors = smoothing_factors(network, TIMES, SmoothingConfig()) if smoothing else {}
    quantize_(network, config)
    smooth_(network, factors)
    if stepwise:
        set_all_stepwise_(network, TIMES)
    if mixed:  # what allocating bits would choose costs a call nothing
        widths = {name: 4 + index % 5 for index, name in enumerate(free_quantizers(network, config))}
        set_act_bits_(network.module, widths)
    find_ranges_(network, data, len(data))
    round_(network)
    return config


def torch_call(network: Network, x: Tensor, t: Tensor, inputs: Inputs | None = None) -> Call:
    """A call of a network, or of an engine in its place, without gradients."""

    def call() -> None:
        with torch.no_grad():
            network.predict(x, t, inputs)

    return call


def make_contest(network: Network, x: Tensor, folder: Path, threads: int) -> Contest:
    """Everybody who can take part.

    Args:
        network: an unconditional one in full precision.
        x: (N, C, H, W) inputs; all calls are at one time step.
        folder: for the exported files.
        threads: of every engine and of torch.
    """
    torch.set_num_threads(threads)
    contest, t = Contest(), torch.full((len(x),), TIMES[1])
    data = CalibrationSet(torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(2)), torch.tensor(TIMES * 2))

    def on_engines(name: str, exported: Network, config: QuantConfig | None) -> None:
        path = export(exported, folder / name, config)
        contest.sizes[name] = file_size(path.parent)
        for backend in ("onnxruntime", "openvino"):
            engine = open_engine(exported, path.parent, backend, threads=threads)
            contest.calls[f"{backend} {name}"] = functools.partial(engine, x, t)

    contest.calls["torch fp32"] = torch_call(network, x, t)
    on_engines("fp32", network, None)
    arrays: Arrays = {network.sample_name: x.numpy(), network.time_name: t.numpy()}
    variants = {
        "int8": {}, "int8 without smoothing": {"smoothing": False}, "int8 stepwise": {"smoothing": False, "stepwise": True},
        "w4a8": {"bits": 4}, "w4a6 mixed stepwise": {"bits": 4, "smoothing": False, "stepwise": True, "mixed": True},
    }  # fmt: skip
    for name, settings in variants.items():
        variant = copied(network)
        config = quantized(variant, data, **settings)  # type: ignore[arg-type]
        on_engines(name, variant, config)
        if name == "int8":
            add_bfloat16_(contest, network, folder, (x, t, {}), threads)
    compiled = torch_call(around(network, cast(nn.Module, torch.compile(copy.deepcopy(network.module)))), x, t)
    try:
        compiled()
        contest.calls["torch.compile fp32"] = compiled
    except Exception as error:  # the compiler's own exceptions, without a common base
        contest.notes.append(f"torch.compile: {' '.join(str(error).split())[:200]}")
    session = _onnxruntime_static(folder / "fp32", folder / "onnxruntime_static", data, threads)
    contest.calls["onnxruntime static quantizer"] = functools.partial(session, arrays)
    if importlib.util.find_spec("nncf") is None:
        contest.notes.append(NOT_THERE.format("nncf"))
    else:
        contest.calls["nncf on openvino"] = functools.partial(_nncf_openvino(folder / "fp32", data, arrays, threads), arrays)
    for mode, package in (("quanto", "optimum.quanto"), ("torchao", "torchao")):
        if importlib.util.find_spec(package.split(".")[0]) is None:
            contest.notes.append(NOT_THERE.format(package))
            continue
        of_peer, _ = quantize_with_peer(mode, copied(network), data, 8, 8, len(data))
        contest.calls[f"{mode} on torch"] = torch_call(of_peer, x, t)
    return contest


def export_pair(network: Network, data: CalibrationSet, folder: Path) -> None:
    """Write DIR/fp32 and DIR/int8 (W8A8 with everything that a step pays for); the network is quantized in place."""
    export(network, folder / "fp32", None)
    config = quantized(network, data)
    export(network, folder / "int8", config)


def make_large_contest(network: Network, data: CalibrationSet, folder: Path, threads: int) -> Contest:
    """A large network in PyTorch, what `export_pair` wrote of it on OpenVINO, and in integers on ONNX Runtime.

    Args:
        network: in full precision.
        data: what a call gets, conditions included; all of it at one time step.
    """
    torch.set_num_threads(threads)
    contest, t = Contest(), torch.full((len(data),), TIMES[1])
    contest.calls["torch fp32"] = torch_call(network, data.x, t, data.inputs)
    for backend, name in (("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "int8")):
        engine = open_engine(network, folder / name, backend, threads=threads)
        contest.calls[f"{backend} {name}"] = functools.partial(engine, data.x, t, **data.inputs)
    add_bfloat16_(contest, network, folder, (data.x, t, data.inputs), threads)
    contest.sizes = {name: file_size(folder / name) for name in ("fp32", "int8")}
    return contest


def add_bfloat16_(contest: Contest, network: Network, folder: Path, given: tuple[Tensor, Tensor, Inputs], threads: int) -> None:
    """Let DIR/fp32 and DIR/int8 take part on OpenVINO in bfloat16 too, where the CPU has it.

    Args:
        given: samples, time steps and other inputs of a call.
    """
    x, t, inputs = given
    for name, title in (("fp32", "openvino bf16"), ("int8", "openvino int8 beside bf16")):
        try:
            engine = open_engine(network, folder / name, "openvino", "bf16", threads)
        except ValueError as error:
            contest.notes.append(f"{title}: {error}")
            continue
        contest.calls[title] = functools.partial(engine, x, t, **inputs)


def file_size(folder: Path) -> int:
    """Bytes of DIR/model.onnx, with those weights of it that lie beside it."""
    return sum(part.stat().st_size for part in folder.glob(f"{FILE}*"))


def _items(data: CalibrationSet) -> Iterator[Arrays]:
    for x, t, _ in data.batches(1):
        yield {"sample": x.numpy(), "timestep": t.numpy()}


def _onnxruntime_static(exported: Path, folder: Path, data: CalibrationSet, threads: int) -> ArraySession:
    """ONNX Runtime's own static quantizer, QDQ with int8 weights per channel, on its CPU kernels as it comes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = _items(data)

        def get_next(self) -> Arrays | None:
            return next(self.items, None)

    folder.mkdir(parents=True, exist_ok=True)
    ready, path = folder / "ready.onnx", folder / FILE
    quant_pre_process(str(exported / FILE), str(ready), skip_symbolic_shape=True)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_static(
            str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        root.setLevel(level)
    return open_session(path, threads)


def _nncf_openvino(exported: Path, data: CalibrationSet, inputs: Arrays, threads: int) -> ArraySession:
    """NNCF's post-training quantization of the OpenVINO model (model_type TRANSFORMER, as for diffusion networks)."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.WARNING)
    model = openvino_core().read_model(exported / FILE)
    model = nncf.quantize(
        model, nncf.Dataset(list(_items(data))), subset_size=len(data), model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )  # fmt: skip
    return _openvino(model, inputs, threads)


def _openvino(model: Any, inputs: Arrays, threads: int) -> ArraySession:
    """An openvino.Model as it comes, for inputs of these shapes."""
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    compiled = openvino_core().compile_model(model, "CPU", openvino_options(threads))
    return lambda given: np.array(compiled(given)[0])


@dataclass(frozen=True)
class Kind:
    """Operators of one kind in a profiled call: milliseconds, and billions of multiply-adds a second where they multiply."""

    name: str
    milliseconds: float
    gmacs: float | None


def multiply_adds(network: Network, x: Tensor) -> dict[str, int]:
    """Multiply-adds of one call in convolutions and in linear layers."""
    found = {"Convolution": 0, "FullyConnected": 0}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Conv2d):
            found["Convolution"] += output.numel() * weight[0].numel()
        else:
            found["FullyConnected"] += output.numel() * weight.shape[1]

    layers = [module for module in network.module.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            network.predict(x, torch.full((len(x),), TIMES[1]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def profile(folder: Path, x: Tensor, threads: int, macs: dict[str, int], calls: int = 5) -> list[Kind]:
    """What OpenVINO spends a call of DIR/model.onnx on, the longest first; kinds under 1 % are one, "rest"."""
    inputs = {"sample": x.numpy(), "timestep": torch.full((len(x),), TIMES[1]).numpy()}
    model = read_network(folder / FILE, {name: value.shape for name, value in inputs.items()})
    options = openvino_options(threads) | {"PERF_COUNT": True}
    request = openvino_core().compile_model(model, "CPU", options).create_infer_request()
    total: dict[str, float] = {}
    for _ in range(calls):
        request.infer(inputs)
        for node in request.get_profiling_info():
            precision = "int8" if node.exec_type.lower().endswith(("i8", "u8")) else "fp32"
            key = f"{node.node_type} {precision}" if node.node_type in macs else node.node_type
            total[key] = total.get(key, 0.0) + node.real_time.total_seconds() * 1e3 / calls
    kinds, rest, everything = [], 0.0, sum(total.values())
    for key, milliseconds in sorted(total.items(), key=lambda item: -item[1]):
        if milliseconds < 0.01 * everything:
            rest += milliseconds
            continue
        name, _, precision = key.partition(" ")
        alone = sum(other.startswith(f"{name} ") for other in total) == 1
        kinds.append(Kind(key, milliseconds, macs[name] / milliseconds / 1e6 if precision and alone else None))
    return [*kinds, Kind("rest", rest, None)]


def fp32_peak(threads: int, rounds: int = 5) -> float:
    """Billions of multiply-adds a second of a large float32 matrix product in PyTorch: what the cores can do."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE)
    times = alternate({"product": lambda: a @ b}, rounds)["product"]
    return PEAK_SIDE**3 / min(times) / 1e9
