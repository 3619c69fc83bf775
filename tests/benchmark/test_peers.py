"""Other toolkits as modes: what they can do, what is said where they are missing, and each on a tiny model where it is there."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.benchmark.peers import PEERS, check_peer, quantize_with_peer
from qncd.benchmark.plan import FULL, WIDTHS, Cell, make_cells
from qncd.models.network import Network, network_of
from qncd.models.original.ddim import build_ddim_unet
from qncd.ptq.context import copied
from qncd.ptq.data import CalibrationSet

MODULES = {
    "modelopt-int8": "modelopt.torch.quantization",
    "modelopt-smoothquant": "modelopt.torch.quantization",
    "nncf": "nncf",
    "quanto": "optimum.quanto",
    "torchao": "torchao.quantization",
}


def tiny_network() -> Network:
    """16 and 32 channels, with attention; 8x8 images."""
    torch.manual_seed(0)
    model = {
        "in_channels": 1, "out_ch": 1, "ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
        "num_groups": 4, "dropout": 0.0, "resamp_with_conv": True,
    }  # fmt: skip
    return network_of(build_ddim_unet({"data": {"image_size": 8, "channels": 1}, "model": model}).eval())


def calibration_set() -> CalibrationSet:
    torch.manual_seed(1)
    return CalibrationSet(torch.randn(12, 1, 8, 8), torch.arange(12) * 80)


@torch.no_grad()
def outputs(network: Network) -> Tensor:
    torch.manual_seed(2)
    return network.predict(torch.randn(8, 1, 8, 8), torch.arange(8) * 120)


def test_every_peer_is_tested() -> None:
    assert MODULES.keys() == PEERS.keys()


@pytest.mark.parametrize(
    ("mode", "bits", "message"),
    [
        ("nncf", (4, 6), "--modes nncf: nncf cannot do W4A6; allowed are W8A8"),
        ("quanto", (8, 6), "--modes quanto: optimum-quanto cannot do W8A6; allowed are W2A8, W4A8, W8A8"),
        ("torchao", (4, 6), "--modes torchao: torchao cannot do W4A6; allowed are W2A8, W3A8, W4A8, W5A8, W6A8, W7A8, W8A8"),
        ("modelopt-int8", (9, 8), "--modes modelopt-int8: nvidia-modelopt cannot do W9A8; allowed are W2A2 to W8A8"),
        ("modelopt-smoothquant", (4, 8), "nvidia-modelopt cannot do W4A8; allowed are W8A8"),
    ],
)
def test_width_is_refused(mode: str, bits: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}$"):
        quantize_with_peer(mode, tiny_network(), calibration_set(), *bits)


@pytest.mark.parametrize("mode", PEERS)
def test_missing_package_is_named(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=rf"^--modes {mode}: needs the package .+: pip install -e '\.\[peers\]'$"):
        check_peer(mode)


def test_broken_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "nncf", None)  # import nncf raises ImportError
    with pytest.raises(ValueError, match=r"^--modes nncf: nncf 9\.9 cannot be imported: "):
        quantize_with_peer("nncf", tiny_network(), calibration_set(), 8, 8)


def test_plan_leaves_out_what_a_peer_cannot_do() -> None:
    cells = make_cells(None, ["torchao", "nncf", "qncd"], 2)
    assert cells[0] == Cell(FULL)
    assert {cell.width for cell in cells if cell.mode == "qncd"} == set(WIDTHS)
    assert [(cell.width, cell.seed) for cell in cells if cell.mode == "nncf"] == [("W8A8", 0), ("W8A8", 1)]
    # No calibration set changes torchao: one repetition is all of them.
    assert [(cell.width, cell.seed) for cell in cells if cell.mode == "torchao"] == [("W8A8", 0), ("W4A8", 0)]
    assert [cell.mode for cell in cells if cell.width == "W8A8" and not cell.seed] == ["torchao", "nncf", "qncd"]


def test_plan_refuses_a_peer_without_a_cell() -> None:
    with pytest.raises(ValueError, match=r"^--widths W4A6 W4A8: --modes nncf can do W8A8$"):
        make_cells(["w4a6", "W4A8"], ["qncd", "nncf"], 1)


def test_cells_know_their_peer() -> None:
    assert Cell("W8A8", "nncf").peer is PEERS["nncf"] and Cell("W8A8", "qncd").peer is None


@pytest.mark.parametrize("mode", PEERS)
def test_quantizes_and_counts(mode: str) -> None:
    pytest.importorskip(MODULES[mode], exc_type=ImportError)
    network = tiny_network()
    reference, before = copied(network), outputs(network)
    quantized, counts = quantize_with_peer(mode, network, calibration_set(), 8, 8, batch_size=4)
    after: Any = outputs(quantized)
    error = float((after - before).square().sum() / before.square().sum())
    assert type(after) is Tensor and 0 < error < 0.1
    assert torch.equal(outputs(quantized), after)
    assert quantized.config["in_channels"] == 1 and quantized.device == torch.device("cpu")  # what a denoiser reads
    layers = [m for m in reference.module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    linear = sum(isinstance(m, torch.nn.Linear) for m in layers)
    floats = ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut")
    kept = sum(
        any(part in name for part in floats)
        for name, m in reference.module.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    )
    expected = {
        "modelopt-int8": (len(layers) - kept, len(layers) - kept),
        "modelopt-smoothquant": (len(layers) - kept, len(layers) - kept),
        "nncf": (len(layers) - 2, len(layers) - 2),
        "quanto": (len(layers), linear),  # inputs of convolutions stay float
        "torchao": (linear, linear),
    }
    assert counts == dict(zip(("layers", "weights", "inputs"), (len(layers), *expected[mode]), strict=True))
    # Nothing that a toolkit patches reaches other networks.
    assert torch.equal(outputs(reference), before)


@pytest.mark.parametrize("mode", ["modelopt-int8", "quanto", "torchao"])
def test_fewer_bits_cost_more(mode: str) -> None:
    pytest.importorskip(MODULES[mode], exc_type=ImportError)
    before, errors = outputs(tiny_network()), []
    for bits in (8, 4, 2):
        quantized, _ = quantize_with_peer(mode, tiny_network(), calibration_set(), bits, 8, batch_size=4)
        errors.append(float((outputs(quantized) - before).square().sum()))
    assert errors[0] < errors[1] < errors[2]
