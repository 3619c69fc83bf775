"""The exported network on both engines against the fake-quantized one, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from quantized_networks import TIMES, assert_same_in_integers, call, inputs, prepared

from qncd.engines.engine import check_engine, open_engine
from qncd.engines.onnx.model import FILE, check_fits, check_origin, export_network, is_current, read_onnx
from qncd.engines.openvino import openvino_options
from qncd.engines.openvino_graph import expand_group_norms_, multiply_codes_, openvino_core, raise_scalars_, read_network
from qncd.engines.packages import require
from qncd.models.loading import load_config, load_ddim
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import set_all_stepwise_, set_stepwise_ranges_
from qncd.quant.inspection import act_quantizers
from qncd.recipe import QuantConfig

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("onnxruntime", "openvino")


def check(full: Any, unet: Any, folder: Path, backend: str) -> None:
    assert_same_in_integers(full, unet, open_engine(unet, folder, backend, threads=1))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("unet", QuantConfig(8, 8)),
        ("unet", QuantConfig(4, 6, softmax_bits=16)),
        ("unet", QuantConfig(4, 4, rotation=True, rank=4, branch_bits=4.0)),
        ("cross_unet", QuantConfig(4, 8)),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_small_networks(kind: str, config: QuantConfig, make_unet: Any, make_cross_unet: Any, tmp_path: Path) -> None:
    make = make_unet if kind == "unet" else make_cross_unet
    unet = prepared(make(), config)
    export_network(unet, tmp_path, config, "base")
    for backend in ENGINES:
        check(make(), unet, tmp_path, backend)
    model, info = read_onnx(tmp_path)
    assert info.config == config and info.base_hash == "base"
    assert all(node.op_type != "Split" for node in model.graph)  # GEGLU's halves come from a layer each
    assert is_current(tmp_path, unet, (unet.config.in_channels, 8, 8))


def test_the_bundled_model(tmp_path: Path) -> None:
    """With real weights: one step of W8A8, and the file's size."""
    box = load_ddim(load_config(ROOT / "configs" / "fashion_mnist.yml"), None, False)
    unet = prepared(copy.deepcopy(box), QuantConfig(8, 8))
    full = sum(p.numel() * 4 for p in box.parameters())
    path = export_network(unet, tmp_path, QuantConfig(8, 8), "base")
    assert path.stat().st_size < 0.3 * full
    for backend in ENGINES:
        check(box, unet, tmp_path, backend)


def test_bfloat16_beside_the_integers(make_cross_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly the same predictions, but not the same; refused by name on a CPU that cannot."""
    unet = prepared(make_cross_unet(), QuantConfig(8, 8))
    export_network(unet, tmp_path, QuantConfig(8, 8), "base")
    data = inputs(unet)
    if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        expected = call(unet, data)
        exact, rough = (
            (call(open_engine(unet, tmp_path, "openvino", precision, threads=1), data) - expected).square().mean()
            for precision in ("fp32", "bf16")
        )
        assert exact < rough < 0.02 * expected.square().mean()
    monkeypatch.setattr("qncd.engines.openvino.openvino_core", lambda: SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"]))
    with pytest.raises(ValueError, match="engine precision bf16: OpenVINO computes in it on CPUs with AMX or AVX512-BF16"):
        open_engine(unet, tmp_path, "openvino", "bf16")


def test_full_precision_is_exported_too(make_unet: Any, tmp_path: Path) -> None:
    unet = make_unet()
    export_network(unet, tmp_path, None, "base")
    data = inputs(unet)
    for backend in ENGINES:
        torch.testing.assert_close(
            call(open_engine(unet, tmp_path, backend, threads=1), data), call(unet, data), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("unet", QuantConfig(8, 8, stepwise_activations=True)),
        ("unet", QuantConfig(4, 6, softmax_bits=16, stepwise_activations=True)),
        ("unet", QuantConfig(8, 8, stepwise_embedding=True)),
        ("cross_unet", QuantConfig(4, 8, stepwise_activations=True)),
        ("cross_unet", QuantConfig(4, 4, gptq=True, smoothing_search=True, stepwise_activations=True)),
        ("cross_unet", QuantConfig(4, 6, gptq=True, bit_allocation=True, stepwise_activations=True)),
        ("cross_unet", QuantConfig(4, 6, rotation=True, rank=4, branch_bits=4.0, stepwise_activations=True)),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_ranges_for_each_step(kind: str, config: QuantConfig, make_unet: Any, make_cross_unet: Any, tmp_path: Path) -> None:
    """In a call of mixed steps too; and any number of inputs goes."""
    make = make_unet if kind == "unet" else make_cross_unet
    unet = prepared(make(), config, set_all_stepwise_ if config.stepwise_activations else set_stepwise_ranges_)
    export_network(unet, tmp_path, config, "base")
    for backend in ENGINES:
        check(make(), unet, tmp_path, backend)
    data = inputs(unet, 96)
    again = CalibrationSet(data.x, torch.full((96,), TIMES[1]), data.inputs)
    found, expected = (call(network, again) for network in (open_engine(unet, tmp_path, "onnxruntime", threads=1), unet))
    other = call(unet, CalibrationSet(data.x, torch.full((96,), TIMES[3]), data.inputs))
    assert (found - expected).square().mean() < 0.1 * (other - expected).square().mean()


def test_onnxruntime_writes_nothing_of_its_own(tmp_path: Path) -> None:
    """Its telemetry writes to the home and the temporary folder unless it is told not to before it is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {key: str(tmp_path) for key in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    code = "from qncd.engines.packages import require; print(require('onnxruntime').get_available_providers())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "CPUExecutionProvider" in done.stdout and not list(tmp_path.iterdir())


def test_what_is_refused(make_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = quantize_(make_unet(), QuantConfig(8, 8))
    with pytest.raises(ValueError, match="only a calibrated model"):
        export_network(unet, tmp_path, QuantConfig(8, 8), "base")
    with pytest.raises(FileNotFoundError, match="no such model"):
        open_engine(unet, tmp_path, "openvino")
    (tmp_path / FILE).write_bytes(b"\xff\xffnot a model")
    with pytest.raises(ValueError, match="not a whole ONNX model"):
        open_engine(unet, tmp_path, "onnxruntime")
    unet = prepared(make_unet(), QuantConfig(8, 8))
    export_network(unet, tmp_path, QuantConfig(8, 8), "base")
    with pytest.raises(ValueError, match="exported from another network"):
        check_fits(tmp_path, prepared(make_unet(seed=1), QuantConfig(8, 8)), (3, 8, 8))
    with pytest.raises(ValueError, match="exported for samples 3x8x8, this run has 3x16x16"):
        check_fits(tmp_path, unet, (3, 16, 16))
    check_origin(tmp_path, "base", QuantConfig(8, 8), (3, 8, 8))
    for base, config, side, message in (
        ("other", QuantConfig(8, 8), 8, "model.onnx: made from weights base, this model has other$"),
        ("base", QuantConfig(4, 8), 8, "model.onnx: W8A8, asked for is W4A8$"),
        ("base", None, 8, "model.onnx: W8A8, asked for is full precision$"),
        ("base", QuantConfig(8, 8), 16, "exported for samples 3x8x8, this run has 3x16x16$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_origin(tmp_path, base, config, (3, side, side))
    with pytest.raises(ValueError, match="no TensorrtExecutionProvider"):
        check_engine("tensorrt")
    with pytest.raises(ValueError, match="fp16: allowed with backend openvino is fp32, bf16; triton has fp16"):
        check_engine("openvino", "fp16")
    with pytest.raises(ValueError, match=r"bf16: allowed with backend onnxruntime is fp32; openvino has bf16$"):
        check_engine("onnxruntime", "bf16")
    with pytest.raises(ValueError, match="'cuda': allowed are torch"):
        check_engine("cuda")
    with pytest.raises(ValueError, match=r"no_such_package is not there.*\[export\]"):
        require("no_such_package")
    assert act_quantizers(unet)


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (3, 8, 7)])
def test_group_norms_with_channels_last(shape: tuple[int, ...]) -> None:
    """As torch computes them, far from zero too; and nothing else of a model changes."""
    openvino = pytest.importorskip("openvino")
    op = pytest.importorskip("openvino.opset13")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[1], generator=generator).view(-1, *[1] * (len(shape) - 2)) + 5
    weight, bias = torch.randn(2, shape[1], generator=generator)
    entry = op.parameter(list(shape), np.float32)
    node = op.group_normalization(entry, op.constant(weight.numpy()), op.constant(bias.numpy()), 4, 1e-5)
    model = openvino.Model([op.relu(node)], [entry])
    assert expand_group_norms_(model) == 1 and expand_group_norms_(model) == 0
    found = openvino_core().compile_model(model, "CPU", openvino_options(1))(x.numpy())[0]
    expected = torch.nn.functional.group_norm(x, 4, weight, bias, 1e-5).relu()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedding", [(2, 8, 1, 1), (1, 8, 1, 1)])
def test_what_comes_before_a_group_norm(embedding: tuple[int, ...]) -> None:
    """A step's scale, a bias and the time embedding join the norm's factor and term; the scalar gets its operand's rank."""
    openvino = pytest.importorskip("openvino")
    op = pytest.importorskip("openvino.opset13")
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, 8, 5, 3, generator=generator), torch.tensor(0.7)
    added, constant = torch.randn(embedding, generator=generator), torch.randn(8, 1, 1, generator=generator)
    weight, bias = torch.randn(2, 8, generator=generator)
    entries = [op.parameter(list(value.shape), np.float32) for value in (x, scale, added)]
    before = op.add(op.add(op.multiply(op.relu(entries[0]), entries[1]), op.constant(constant.numpy())), entries[2])
    node = op.group_normalization(before, op.constant(weight.numpy()), op.constant(bias.numpy()), 4, 1e-5)
    model = openvino.Model([op.relu(node)], entries)
    assert raise_scalars_(model) == 1 and raise_scalars_(model) == 0
    assert expand_group_norms_(model) == 1
    assert all(node.get_friendly_name() != before.get_friendly_name() for node in model.get_ops())
    compiled = openvino_core().compile_model(model, "CPU", openvino_options(1))
    found = compiled([value.numpy() for value in (x, scale, added)])[0]
    expected = torch.nn.functional.group_norm(x.relu() * scale + constant + added, 4, weight, bias, 1e-5).relu()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def product_inputs(compiled: Any) -> set[tuple[str, ...]]:
    """Types of the first two inputs of the operators in which OpenVINO multiplies two activations, alone or with the softmax."""
    found = set()
    for node in compiled.get_runtime_model().get_ops():
        kind, parts = (node.get_rt_info()[name].astype(str) for name in ("layerType", "originalLayersNames"))
        if kind == "MatMul" or (kind == "Subgraph" and "softmax" in parts.lower()):
            found.add(tuple(value.get_element_type().get_type_name() for value in node.inputs()[:2]))
    return found


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("zeros", [(120, -5), (120, 0), (0, -5), (255, 127)])
@pytest.mark.parametrize("scales", [(0.02, 0.025), (1.0, 0.5), (1.0, 1.0)])
def test_products_of_codes(scales: tuple[float, float], zeros: tuple[int, int], softmax: bool) -> None:
    """Activations with zero points are multiplied in integers, with the same result; a scale of 1 is a range for each step."""
    openvino = pytest.importorskip("openvino")
    op = pytest.importorskip("openvino.opset13")
    generator = np.random.default_rng(0)
    shapes, data, values, operands, entries = ((2, 1, 9, 40), (2, 1, 40, 7)), [], [], [], []
    for shape, scale, zero, (kind, low) in zip(shapes, scales, zeros, (("u8", 0), ("i8", -128)), strict=True):
        entry, ends = op.parameter(list(shape), np.float32), [np.float32(value) for value in (low, low + 255)]
        grid = op.fake_quantize(entry, *((end - np.float32(zero)) * np.float32(scale) for end in ends), *ends, 256)
        codes = op.convert(op.convert(grid, kind), "f32")
        operands.append(op.multiply(op.subtract(codes, np.float32(zero)), np.float32(scale)))
        entries.append(entry)
        data.append(generator.normal(0, 40 * scale, shape).astype(np.float32))
        values.append((np.clip(np.round(data[-1] / np.float32(scale)) + zero, low, low + 255) - zero) * scale)
    expected = values[0] @ values[1]
    factor = np.float32(1 / expected.std())
    product = op.multiply(op.matmul(*operands, False, False), factor)
    model = openvino.Model([op.softmax(product, -1) if softmax else op.relu(product)], entries)
    expected = torch.from_numpy(expected * factor).double()
    expected = expected.softmax(-1) if softmax else expected.relu()
    assert multiply_codes_(model) == 1 and multiply_codes_(model) == 0
    compiled = openvino_core().compile_model(model, "CPU", openvino_options(1))
    torch.testing.assert_close(torch.from_numpy(compiled(data)[0]).double(), expected, rtol=1e-4, atol=1e-4)
    assert product_inputs(compiled) == {("u8", "i8")}


@pytest.mark.parametrize("stepwise", [None, set_all_stepwise_])
def test_attention_in_integers_on_openvino(stepwise: Any, make_cross_unet: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    config = QuantConfig(8, 8, weight_range="max", act_range="max", stepwise_activations=stepwise is not None)
    unet = prepared(make_cross_unet(), config, stepwise)
    data = inputs(unet, 2)
    path = export_network(unet, tmp_path / "onnx", config, "")
    shapes = {
        "sample": data.x.shape,
        "timestep": data.t.shape,
        "encoder_hidden_states": data.inputs["encoder_hidden_states"].shape,
    }
    compiled = openvino_core().compile_model(read_network(path, shapes), "CPU", openvino_options(1))
    assert product_inputs(compiled) == {("u8", "i8")}


TWO_ENGINES = """
import os, signal, sys
from pathlib import Path
import numpy as np
from qncd.engines.openvino import OpenVino

shapes = {"sample": (1, 3, 8, 8), "timestep": (1,)}
first, second = (OpenVino().session(Path(sys.argv[1]), 1) for _ in range(2))
for session in (first, second):
    session({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
del session, first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_engines_are_gone(make_unet: Any, tmp_path: Path) -> None:
    """OpenVINO sets the stack on which handlers run: whichever engine goes first, there has to be one."""
    config = QuantConfig(8, 8)
    unet = prepared(make_unet(), config)
    export_network(unet, tmp_path, config, "base")
    command = [sys.executable, "-c", TWO_ENGINES, str(tmp_path)]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "handled\n"), found.stderr
