"""One guided call of a network at full size, with random weights: in PyTorch, in bfloat16 and in integers on the engines."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qncd.benchmark.engine_speed import alternate, export_pair, make_large_contest, ratio
from qncd.io.files import scratch_folder
from qncd.models.configs import CONFIGS
from qncd.models.network import Network, network_of
from qncd.models.seen import remember_inputs
from qncd.ptq.data import CalibrationSet

TIMES = (1, 501)


def stable_diffusion() -> tuple[Network, CalibrationSet]:
    """Stable Diffusion v1's UNet (860 M), and what a guided call gets."""
    from qncd.models.loading import load_config
    from qncd.models.original.ldm import build_ldm_unet

    torch.manual_seed(0)
    network = network_of(build_ldm_unet(load_config(CONFIGS / "sd-v1-inference.yaml")).eval().requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 64, 64, generator=generator), torch.randn(2, 77, 768, generator=generator)
    return network, CalibrationSet(x, torch.tensor(TIMES), {"encoder_hidden_states": context})


def transformer() -> tuple[Network, CalibrationSet]:
    """DiT-XL/2 for images of 256x256 (675 M, arXiv 2212.09748), and what a guided call gets."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    network = network_of(module.eval().requires_grad_(False))
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    data = CalibrationSet(x, torch.tensor(TIMES), {"class_labels": torch.tensor([207, 1000])})
    remember_inputs(network, data.x, data.t, data.inputs, {})
    return network, data


LARGE: dict[str, Callable[[], tuple[Network, CalibrationSet]]] = {
    "stable_diffusion": stable_diffusion,
    "transformer": transformer,
}


def _export(kind: str, folder: Path, threads: int) -> None:
    """For a separate process, whose memory is free again afterwards."""
    torch.set_num_threads(threads)
    export_pair(*LARGE[kind](), folder)


def measure_large(kind: str, rounds: int, threads: int) -> dict[str, Any]:
    """Ratios by name, each of `kind` over PyTorch in float32 or what its name says.

    Raises:
        OSError: the memory does not suffice.
    """
    with scratch_folder() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_export, args=(kind, folder, threads))
        process.start()
        process.join()
        if process.exitcode:
            raise OSError(f"exporting the network of {kind}: its process ended without a model, for want of memory most likely")
        contest = make_large_contest(*LARGE[kind](), folder, threads)
        seconds = alternate(contest.calls, rounds)
    base, figures = "torch fp32", dict[str, Any]()
    for name in contest.calls:
        print(f"{kind}, {name:34} {statistics.median(seconds[name]):7.2f} s   {ratio(seconds, base, name):5.2f}x", flush=True)
        figures[f"{kind}_{name.replace(' ', '_')}_speedup"] = ratio(seconds, base, name)
    for other in ("openvino fp32", "openvino bf16"):
        if other in contest.calls:
            figures[f"{kind}_int8_over_{other.replace(' ', '_')}"] = ratio(seconds, other, "openvino int8")
    figures[f"{kind}_onnx_w8_over_fp32"] = contest.sizes["int8"] / contest.sizes["fp32"]
    for note in contest.notes:
        print(f"note: {note}")
    return figures
