"""Quantize, export, sample in integers: the README's three commands on the bundled DDIM model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import ROOT, run_in_process
from small_pipelines import KINDS
from small_pipelines import made as made_pipeline

import qncd

from .test_reconstruction_flags import pixels

MODEL = ("--config", str(ROOT / "configs" / "fashion_mnist.yml"), "--device", "cpu")
QUANTIZED = (
    "--ptq", "--quant_mode", "qncd", "--weight_bit", "8", "--timesteps", "5", "--cali_n", "8", "--cali_st", "5",
    "--max_images", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with q.safetensors, the images of torch and the exported model."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = ("--cali_ckpt", str(folder / "q.safetensors"))
    run_in_process("sample_diffusion_ddim.py", *MODEL, *QUANTIZED, *checkpoint, "-l", folder / "torch")
    run_in_process("export.py", *MODEL[:2], *checkpoint, "--out", folder / "onnx")
    return folder


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_pictures(made: Path, backend: str, tmp_path: Path) -> None:
    engine = ("--backend", backend, "--onnx", str(made / "onnx"))
    run_in_process(
        "sample_diffusion_ddim.py", *MODEL, *QUANTIZED, "--cali_ckpt", str(made / "q.safetensors"), *engine, "-l", tmp_path
    )
    expected, found = (np.stack(list(pixels(folder / "images").values())).astype(float) for folder in (made / "torch", tmp_path))
    errors = np.square(expected - found).mean(axis=(1, 2))
    assert (10 * np.log10(255**2 / np.maximum(errors, 1e-9))).mean() >= 35


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    common = (*MODEL, *QUANTIZED, "--cali_ckpt", str(made / "q.safetensors"), "-l", str(tmp_path / "out"))

    def refused(*flags: str) -> str:
        return run_in_process("sample_diffusion_ddim.py", *common, *flags, status=2)

    assert "--onnx needs --backend" in refused("--onnx", str(made / "onnx"))
    assert "no such model" in refused("--backend", "openvino", "--onnx", str(tmp_path))
    assert "no TensorrtExecutionProvider" in refused("--backend", "tensorrt")
    refusal = refused("--backend", "onnxruntime", "--engine_precision", "fp16")
    assert "fp16: allowed with backend onnxruntime is fp32; triton has fp16" in refusal
    assert "triton does not run it" in refused("--backend", "triton", "--onnx", str(made / "onnx"))
    if not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            assert "there is no CUDA device" in refused("--backend", "triton")
        text = run_in_process("benchmark_speed.py", "--parts", "gpu", status=2)
        assert "--parts gpu: there is no CUDA device; allowed here are simulation, engines" in text
    other = (*common[:-4], "-l", str(tmp_path / "other"), "--quant_mode", "linear", "--quant_act")
    text = run_in_process("sample_diffusion_ddim.py", *other, "--backend", "onnxruntime", "--onnx", str(made / "onnx"), status=2)
    assert "exported from another network" in text


def test_a_quantized_folder_is_exported_as_it_is(tmp_path: Path) -> None:
    """And not recorded as one in full precision; a second quantized checkpoint is refused."""
    pipe = made_pipeline("SD1")
    qncd.quantize(pipe, "W8A8", "linear", calls=[KINDS["SD1"].call], steps=2)
    qncd.save(pipe, tmp_path / "q")
    text = run_in_process("export.py", "--ckpt", tmp_path / "q", "--out", tmp_path / "onnx")
    assert "model.onnx: W8A8, " in text
    weights = tmp_path / "q" / "unet" / "diffusion_pytorch_model.safetensors"
    more = ("--cali_ckpt", weights, "--out", tmp_path / "other")
    assert "is quantized already" in run_in_process("export.py", "--ckpt", tmp_path / "q", *more, status=2)
    to_gguf = ("--out", tmp_path / "q.gguf")
    assert "W8A8: GGUF has one scale for each 32" in run_in_process("export.py", "--ckpt", tmp_path / "q", *to_gguf, status=2)
