"""What quantization costs in time and memory, as ratios against full precision, side by side in one run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.io.files import scratch_folder
from qncd.models.configs import CONFIGS

if TYPE_CHECKING:
    from qncd.models.network import Network
    from qncd.ptq.data import CalibrationSet
    from qncd.recipe import QuantConfig

CALIBRATION_BATCH = 32
GPU_BATCH = 64  # of the CIFAR-10-size network
JOB_PROMPT = "a large red circle above a small blue square"


def _cifar() -> Network:
    """The CIFAR-10-size network with random weights."""
    import torch

    from qncd.models.loading import load_config
    from qncd.models.network import network_of
    from qncd.models.original.ddim import build_ddim_unet

    torch.manual_seed(0)
    return network_of(build_ddim_unet(load_config(CONFIGS / "cifar10.yml")).eval().requires_grad_(False))


def _bundled() -> Network:
    """The network of the bundled Fashion-MNIST model."""
    from qncd.models.loading import load_config, load_ddim
    from qncd.models.network import network_of

    return network_of(load_ddim(load_config(CONFIGS / "fashion_mnist.yml")))


def _inputs(network: Network, count: int) -> CalibrationSet:
    import torch

    from qncd.ptq.data import CalibrationSet

    generator, config = torch.Generator().manual_seed(1), network.config
    shape = (count, config["in_channels"], config["sample_size"], config["sample_size"])
    times = torch.randint(0, 1000, (count,), generator=generator)
    return CalibrationSet(torch.randn(shape, generator=generator), times)


def _quantized(network: Network, bits: int = 8) -> QuantConfig:
    """To W`bits`A8, in place, with every part of the method that a step pays for: smoothing, split, attention."""
    from qncd.ptq.pipeline import calibrate_
    from qncd.ptq.stages.prepare import quantize_
    from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
    from qncd.recipe import QuantConfig

    config = QuantConfig(weight_bits=bits, weight_range="max", act_range="max", bias_correction=False)
    factors = smoothing_factors(network, range(0, 1000, 10))
    quantize_(network, config)
    smooth_(network, factors)
    calibrate_(network, _inputs(network, 8), config, 8)
    return config


def _ratio(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median of the ratios of alternating runs first/second, and both median times in seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(-1, rounds):  # one warm-up
        for side, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            if round_ >= 0:
                times[side].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return ratio, statistics.median(times[0]), statistics.median(times[1])


def step_cost(make: Callable[[], Network], batch: int, rounds: int) -> tuple[float, float, float]:
    """A fake-quantized W8A8 step over a full-precision one."""
    import torch

    plain, quantized = make(), make()
    _quantized(quantized)
    data = _inputs(plain, batch)
    with torch.no_grad():
        return _ratio(lambda: quantized.predict(data.x, data.t), lambda: plain.predict(data.x, data.t), rounds)


def packing_cost(make: Callable[[], Network], bits: int, batch: int, rounds: int) -> tuple[tuple[float, float, float], float]:
    """A step with packed weights over one with float weights beside them, as `_ratio`; its memory over that of full precision.

    The memory is that of parameters and buffers.
    """
    import torch

    from qncd.saving import pack_weights

    plain, packed = make(), make()
    data, full = _inputs(plain, batch), _kept_bytes(plain)
    for network in (plain, packed):
        _quantized(network, bits)
    pack_weights(packed.module)
    with torch.no_grad():
        ratio = _ratio(lambda: packed.predict(data.x, data.t), lambda: plain.predict(data.x, data.t), rounds)
    return ratio, _kept_bytes(packed) / full


def _kept_bytes(network: Network) -> int:
    return sum(tensor.nbytes for tensor in [*network.module.parameters(), *network.module.buffers()])


def calibration_run(kind: str, samples: int, threads: int | None, queue: Any) -> None:
    """For a separate process: a full-precision pass ("fp") or a calibration; puts seconds and MiB of peak growth.

    A calibration is ranges of least error and bias correction.
    """
    import torch

    from qncd.ptq.observing import run_over
    from qncd.ptq.pipeline import calibrate_
    from qncd.ptq.stages.prepare import quantize_
    from qncd.recipe import QuantConfig

    if threads:
        torch.set_num_threads(threads)
    network = _cifar()
    data = _inputs(network, samples)
    with torch.no_grad():
        network.predict(data.x[:1], data.t[:1])  # kernels are chosen on first use
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "fp":
        start = time.perf_counter()
        with torch.no_grad():
            run_over(network, data, CALIBRATION_BATCH)
    else:
        config = QuantConfig(weight_bits=8, act_bits=8, weight_range="mse", act_range="mse")
        quantize_(network, config)
        start = time.perf_counter()
        calibrate_(network, data, config, CALIBRATION_BATCH)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.numel() * p.element_size() for p in network.module.parameters()) / 1024
    # The weights belong to both sides; what was there before them (the interpreter, libraries) to neither.
    queue.put((seconds, (peak - bare + weights) / 1024))


def calibration_cost(samples: int, threads: int | None) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of peak growth of a full-precision pass and of calibrating on the same samples."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for kind in ("fp", "calibration"):
        queue = context.Queue()
        process = context.Process(target=calibration_run, args=(kind, samples, threads, queue))
        process.start()
        results[kind] = queue.get()
        process.join()
    return results


def checkpoint_size(bits: int) -> float:
    """Bytes of the quantized checkpoint over bytes of the same weights in float32 safetensors."""
    from safetensors.torch import save_file

    from qncd.ptq.checkpoint import save_quantized

    with scratch_folder() as folder:
        full, small = folder / "fp32.safetensors", folder / "quantized.safetensors"
        network = _cifar()
        save_file(network.module.state_dict(), full)
        config = _quantized(network, bits)
        save_quantized(network, small, config, "", {})
        return small.stat().st_size / full.stat().st_size


def measure_simulation(rounds: int, samples: int, threads: int | None) -> dict[str, Any]:
    """Fake quantization in PyTorch over full precision: steps, calibration, files."""
    figures = dict[str, Any]()
    for key, make, batch in (("fake_quant_over_fp", _cifar, 4), ("fake_quant_over_fp_box", _bundled, 64)):
        ratio, quantized, plain = step_cost(make, batch, rounds)
        figures[key] = ratio
        print(f"{key} {ratio:.3f}   ({quantized * 1e3:.0f} ms against {plain * 1e3:.0f} ms, batch {batch})", flush=True)
    for bits in (8, 4):
        for suffix, make, batch in (("", _cifar, 4), ("_box", _bundled, 64)):
            (ratio, packed, plain), kept = packing_cost(make, bits, batch, rounds)
            figures |= {f"packed_w{bits}_over_unpacked{suffix}": ratio, f"packed_w{bits}_memory_over_fp32{suffix}": kept}
            compared = f"{packed * 1e3:.0f} ms against {plain * 1e3:.0f} ms, batch {batch}; memory {kept:.3f} x full precision"
            print(f"packed_w{bits}_over_unpacked{suffix} {ratio:.3f}   ({compared})", flush=True)
    cost = calibration_cost(samples, threads)
    figures["calibration_over_fp_pass"] = cost["calibration"][0] / cost["fp"][0]
    figures["calibration_peak_over_fp"] = cost["calibration"][1] / cost["fp"][1]
    seconds = " against ".join(f"{cost[k][0]:.1f} s" for k in ("calibration", "fp"))
    memory = " against ".join(f"{cost[k][1]:.0f} MiB" for k in ("calibration", "fp"))
    print(f"calibration_over_fp_pass {figures['calibration_over_fp_pass']:.2f}   ({seconds}, {samples} samples)")
    print(f"calibration_peak_over_fp {figures['calibration_peak_over_fp']:.2f}   ({memory})", flush=True)
    for bits in (8, 4):
        figures[f"checkpoint_w{bits}_over_fp32"] = checkpoint_size(bits)
        print(f"checkpoint_w{bits}_over_fp32 {figures[f'checkpoint_w{bits}_over_fp32']:.4f}", flush=True)
    return figures


def print_figures(figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if not isinstance(value, dict):
            print(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}", flush=True)


def measure_engines(rounds: int, threads: int, profiled: bool) -> dict[str, Any]:
    """One call of the CIFAR-10-size network, batch 4, of everybody who can take part."""
    import torch

    from qncd.benchmark.engine_speed import alternate, fp32_peak, make_contest, multiply_adds, profile, ratio

    network = _cifar()
    x = _inputs(network, 4).x
    with scratch_folder() as folder:
        contest = make_contest(network, x, folder, threads)
        seconds = alternate(contest.calls, rounds)
        base, figures = "torch fp32", dict[str, Any]()
        for name in contest.calls:
            print(f"{name:34} {statistics.median(seconds[name]) * 1e3:7.1f} ms   {ratio(seconds, base, name):5.2f}x", flush=True)
        figures["speedup_over_torch_fp32"] = {name: ratio(seconds, base, name) for name in contest.calls}
        for engine in ("openvino", "onnxruntime"):
            figures[f"int8_{engine}_speedup"] = ratio(seconds, base, f"{engine} int8")
            figures[f"int8_over_{engine}_fp32"] = ratio(seconds, f"{engine} fp32", f"{engine} int8")
            figures[f"smoothing_cost_{engine}"] = ratio(seconds, f"{engine} int8", f"{engine} int8 without smoothing") - 1
            figures[f"stepwise_cost_{engine}"] = ratio(seconds, f"{engine} int8 stepwise", f"{engine} int8 without smoothing") - 1
        if "openvino bf16" in contest.calls:
            figures["int8_over_openvino_bf16"] = ratio(seconds, "openvino bf16", "openvino int8")
            figures["bf16_beside_int8"] = ratio(seconds, "openvino int8", "openvino int8 beside bf16")
        figures["int8_over_engine_fp32"] = figures["int8_over_openvino_fp32"]
        for name, key in (("int8", "onnx_w8_over_fp32"), ("w4a8", "onnx_w4_over_fp32")):
            figures[key] = contest.sizes[name] / contest.sizes["fp32"]
        print_figures(figures)
        for note in contest.notes:
            print(f"note: {note}")
        if profiled:
            macs, peak = multiply_adds(network, x), fp32_peak(threads)
            print(f"float32 product of 2048x2048 matrices in PyTorch: {peak:.0f} billion multiply-adds a second")
            figures["fp32_gmacs"], figures["profile"] = peak, {}
            for name in ("fp32", "int8"):
                kinds = profile(folder / name, x, threads, macs)
                figures["profile"][name] = [dataclasses.asdict(kind) for kind in kinds]
                for kind in kinds:
                    rate = "" if kind.gmacs is None else f"   {kind.gmacs:6.0f} G/s, {kind.gmacs / peak:.2f} of the product's"
                    print(f"openvino {name}: {kind.name:24} {kind.milliseconds:7.2f} ms{rate}", flush=True)
    torch.set_num_threads(threads)
    return figures


def _run_command(name: str, *flags: str | Path) -> float:
    """Seconds of a whole command line. Raises ValueError where it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "qncd", name, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"qncd {name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return time.perf_counter() - start


def measure_jobs(rounds: int, images: int) -> dict[str, float]:
    """Images a second of whole command lines, in full precision in PyTorch and in int8 on OpenVINO, in turn."""
    figures = {}
    with scratch_folder() as folder:
        saved: Any = _cifar().module
        saved.save_pretrained(folder / "cifar_size")
        cifar = ("--config", CONFIGS / "cifar10.yml", "--ckpt", folder / "cifar_size")
        scenes = ("--config", CONFIGS / "scenes.yaml")
        steps, count = ("--timesteps", "20"), ("--max_images", str(images), "--lane", "4")
        jobs: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
            "cifar_size": (cifar, (*steps, *count)),
            "txt2img": (scenes, ("--prompt", JOB_PROMPT, "--n_samples", str(images))),
        }
        for title, (model, flags) in jobs.items():
            checkpoint = ("--cali_ckpt", folder / f"{title}.safetensors")
            calibration = ("--cali_n", "2", "--cali_st", "4", *checkpoint)
            method = ("--ptq", "--quant_mode", "qncd", "--weight_bit", "8", "--no-sample_reverse", *calibration)
            _run_command("sample", *model, *flags, *method, "-l", folder / f"{title}_made")
            _run_command("export", *model, *checkpoint, "--out", folder / f"{title}_onnx")
            integers = (*method, "--backend", "openvino", "--onnx", folder / f"{title}_onnx")
            seconds: dict[str, list[float]] = {"fp32": [], "int8": []}
            for round_ in range(rounds):
                for kind, more in (("fp32", ()), ("int8", integers)):
                    seconds[kind].append(_run_command("sample", *model, *flags, *more, "-l", folder / f"{title}_{kind}{round_}"))
            for kind, times in seconds.items():
                figures[f"{title}_{kind}_images_per_second"] = images / statistics.median(times)
            figures[f"{title}_job_speedup"] = statistics.median(seconds["fp32"]) / statistics.median(seconds["int8"])
    print_figures(figures)
    return figures


def measure_gpu(rounds: int) -> dict[str, Any]:
    """One call on a CUDA device, in PyTorch and in integers."""
    import torch

    from qncd.benchmark.engine_speed import alternate, ratio
    from qncd.benchmark.gpu_speed import make_gpu_contest
    from qncd.benchmark.large_speed import LARGE
    from qncd.ptq.data import CalibrationSet

    device, figures = torch.device("cuda"), dict[str, Any](gpu=torch.cuda.get_device_name())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(GPU_BATCH, 3, 32, 32, generator=generator)
    networks: dict[str, Callable[[], tuple[Network, CalibrationSet]]] = {
        "cifar": lambda: (_cifar(), CalibrationSet(x, torch.zeros(len(x)))),
        "sd": LARGE["stable_diffusion"],
        "dit": LARGE["transformer"],
    }
    for title, make in networks.items():
        network, data = make()
        network.module.to(device)
        contest = make_gpu_contest(network, data.x.to(device), {name: value.to(device) for name, value in data.inputs.items()})
        seconds = alternate(contest.calls, rounds)
        for name in contest.calls:
            milliseconds = 1e3 * statistics.median(seconds[name])
            print(f"{title}, {name:26} {milliseconds:8.2f} ms   {ratio(seconds, 'torch fp32', name):5.2f}x", flush=True)
        for precision in ("fp32", "fp16"):
            figures[f"gpu_{title}_int8_{precision}_speedup"] = ratio(seconds, "torch fp32", f"triton int8 beside {precision}")
        for key, name in (("fp16_graph", "torch fp16, CUDA graph"), ("compiled_fp16", "torch.compile fp16")):
            figures[f"gpu_{title}_int8_over_{key}"] = ratio(seconds, name, "triton int8 beside fp16")
    print_figures(figures)
    return figures
