"""BRECQ (arXiv 2102.05426): the rounding of weights learned block by block against the full-precision network.

For each block in the order of the forward pass: its inputs come from the network with the blocks before it already
quantized, its targets from the full-precision network; both are computed once and kept. What is minimized is
|block_q(x_q) - block_fp(x_fp)|^2 + lambda sum(1 - |2h - 1|^beta) over the rounding variables of the block's layers.
Activations stay in floating point meanwhile, as in Q-Diffusion: their ranges are found afterwards.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from qncd.config import ReconstructionConfig
from qncd.ptq.activation_store import ActivationStore, CallStore
from qncd.ptq.calibration import CalibrationSet, Progress, call_unet
from qncd.quant.convert import UNet, quant_layers
from qncd.quant.layers import QuantLayer
from qncd.quant.rounding import LearnedRounding, learn_roundings_, reconstruction_loss

log = logging.getLogger("qncd")
BLOCKS = (ResnetBlock2D, Attention, BasicTransformerBlock)  # reconstructed as a whole; other layers one by one
HELD_OUT = 8  # one input in so many is kept out of the optimization, to judge it by


class _Reached(Exception):
    """The forward pass has come as far as it has to."""


@dataclass(frozen=True)
class BlockResult:
    """What reconstructing one block brought.

    Attributes:
        name: of the block.
        before, after: mean squared error of the block's output on held-out inputs, with weights rounded to nearest and
            as learned; relative to the mean square of the target.
        seconds: taken.
        kept: whether the learned rounding is better than nearest and was kept.
    """

    name: str
    before: float
    after: float
    seconds: float
    kept: bool


def reconstruction_units(unet: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in the order of the modules: residual, attention and transformer blocks, and single layers."""
    units: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, (*BLOCKS, QuantLayer)):
            if any(layer.config.weight_codes is not None for layer in _layers(module).values()):
                units[name] = module
            return
        for child, part in module.named_children():
            visit(f"{name}.{child}" if name else child, part)

    visit("", unet)
    return units


def _layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers below a module by their names in it; of a layer alone, itself under ""."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantLayer)}


def _open_layers(module: nn.Module, rounded: Collection[QuantLayer]) -> dict[str, QuantLayer]:
    """Those of `_layers` whose rounding is still to be learned."""
    return {
        key: layer for key, layer in _layers(module).items() if layer.config.weight_codes is not None and layer not in rounded
    }


@contextmanager
def _hooked(handles: Sequence[Any]) -> Any:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def execution_order(unet: UNet, data: CalibrationSet, units: dict[str, nn.Module]) -> list[str]:
    """Names of the units in the order in which the network runs them; those that it never runs are left out."""
    order: dict[str, None] = {}
    handles = [unit.register_forward_pre_hook(lambda *_, n=name: order.setdefault(n)) for name, unit in units.items()]
    with _hooked(handles), torch.no_grad():
        _run(unet, data.subset(torch.tensor([0])), 1)
    return list(order)


def _run(unet: UNet, data: CalibrationSet, batch_size: int) -> None:
    for x, t, cond in data.batches(batch_size):
        try:
            call_unet(unet, x.to(unet.device), t.to(unet.device), None if cond is None else cond.to(unet.device))
        except _Reached:
            continue


def reconstruct_(
    unet: UNet,
    reference: UNet,
    data: CalibrationSet,
    config: ReconstructionConfig,
    progress: Progress | None = None,
    folder: Path | None = None,
    rounded: Collection[QuantLayer] = (),
) -> list[BlockResult]:
    """Learn the rounding of all weights and round them, in place.

    Args:
        unet: prepared by `quantize_`, smoothed or not, its weights in floating point.
        reference: the same network in floating point, e.g. a copy of `unet`.
        data: calibration inputs.
        progress: called with (blocks done, blocks in all).
        folder: for finished blocks: a run that was cut off goes on after the last one in it.
        rounded: layers whose weights are rounded already and stay as they are.

    Raises:
        ValueError: names the block at which something went wrong; the folder holds another reconstruction.
    """
    part = data if config.inputs is None or config.inputs >= len(data) else data.subset(_spread(len(data), config.inputs))
    units = {name: unit for name, unit in reconstruction_units(unet).items() if _open_layers(unit, rounded)}
    order = execution_order(unet, part, units)
    results: list[BlockResult] = []
    done = _open_folder(folder, config, order) if folder else {}
    for count, name in enumerate(order):
        try:
            if name in done:
                tensors = load_file(done[name])
                for key, layer in _layers(units[name]).items():
                    layer.set_weight_codes(tensors[f"{key}|codes"], tensors[f"{key}|scale"])
            else:
                results.append(_reconstruct_unit_(unet, reference, name, part, config, rounded))
                if folder:
                    _save_unit(folder, name, units[name])
        except (ValueError, RuntimeError, FloatingPointError) as error:
            raise ValueError(f"reconstruction of {name}: {error}") from None
        if progress:
            progress(count + 1, len(order))
    for layer in quant_layers(unet).values():
        layer.quantize_weight_()
    return results


def _spread(total: int, count: int) -> Tensor:
    return torch.arange(count) * total // count


def _reconstruct_unit_(
    unet: UNet,
    reference: UNet,
    name: str,
    data: CalibrationSet,
    config: ReconstructionConfig,
    rounded: Collection[QuantLayer],
) -> BlockResult:
    start = time.perf_counter()
    unit = unet.get_submodule(name)
    with tempfile.TemporaryDirectory() as files:
        calls, targets = _collect(unet, reference, name, data, config, Path(files))
        layers = _open_layers(unit, rounded)
        roundings = {key: LearnedRounding(layer) for key, layer in layers.items()}
        rows = torch.arange(data.inputs)
        held_out, used = rows[::HELD_OUT], rows[rows % HELD_OUT != 0] if len(rows) > HELD_OUT else rows
        nearest = {key: layer.rounded_weight() for key, layer in layers.items()}
        before = _error(unit, nearest, calls, targets, held_out, config.batch_size)
        _optimize(unit, roundings, calls, targets, used, config)
        learned = {key: rounding.hard() for key, rounding in roundings.items()}
        after = _error(unit, learned, calls, targets, held_out, config.batch_size)
    kept = after < before
    for key, layer in layers.items():
        layer.weight = nn.Parameter(learned[key] if kept else nearest[key], requires_grad=False)
    return BlockResult(name, before, after, time.perf_counter() - start, kept)


def _collect(
    unet: UNet, reference: UNet, name: str, data: CalibrationSet, config: ReconstructionConfig, folder: Path
) -> tuple[CallStore, ActivationStore]:
    """The unit's inputs from the network as quantized so far, and its outputs in the full-precision one."""
    room = int(config.memory_gb * 1e9)

    def spill(size: int) -> Path | None:
        nonlocal room
        room -= size
        return None if room >= 0 else folder

    calls = CallStore(data.inputs, spill)
    stores: list[ActivationStore] = []

    def keep_inputs(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(args, kwargs)
        raise _Reached

    def keep_output(_: nn.Module, __: Any, output: Tensor) -> None:
        if not stores:
            stores.append(ActivationStore(data.inputs, folder=spill(2 * data.inputs * output[0].numel())))
        stores[0].append(output)
        raise _Reached

    with torch.no_grad():
        with _hooked([unet.get_submodule(name).register_forward_pre_hook(keep_inputs, with_kwargs=True)]):
            _run(unet, data, config.batch_size)
        with _hooked([reference.get_submodule(name).register_forward_hook(keep_output)]):
            _run(reference, data, config.batch_size)
    return calls, stores[0]


def _optimize(
    unit: nn.Module,
    roundings: dict[str, LearnedRounding],
    calls: CallStore,
    targets: ActivationStore,
    rows: Tensor,
    config: ReconstructionConfig,
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    device = next(iter(roundings.values())).alpha.device

    def error(weights: dict[str, Tensor]) -> Tensor:
        chosen = rows[torch.randperm(len(rows), generator=generator)[: config.batch_size]]
        args, kwargs = calls.batch(chosen, device)
        output = functional_call(unit, {_weight(key): weight for key, weight in weights.items()}, tuple(args), kwargs)
        return reconstruction_loss(output, targets[chosen].to(device))

    learn_roundings_(roundings, config.iterations, config.lr, error)


@torch.no_grad()
def _error(
    unit: nn.Module, weights: dict[str, Tensor], calls: CallStore, targets: ActivationStore, rows: Tensor, batch_size: int
) -> float:
    """Mean squared error of the unit's output with these weights, relative to the mean square of the target."""
    squared = expected = 0.0
    device = next(iter(weights.values())).device
    for chosen in rows.split(batch_size):
        args, kwargs = calls.batch(chosen, device)
        target = targets[chosen].to(device)
        output = functional_call(unit, {_weight(key): w for key, w in weights.items()}, tuple(args), kwargs)
        squared += float((output - target).square().sum())
        expected += float(target.square().sum())
    return squared / max(expected, 1e-30)


def _weight(key: str) -> str:
    return f"{key}.weight" if key else "weight"


def _open_folder(folder: Path, config: ReconstructionConfig, order: Sequence[str]) -> dict[str, Path]:
    """Files of the blocks that are finished. Raises ValueError where the folder's run had other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, file = json.loads(json.dumps({"config": asdict(config), "blocks": list(order)})), folder / "reconstruction.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{folder}: holds a reconstruction with other settings: name another folder or delete it")
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    found = {name: folder / f"{name}.safetensors" for name in order}
    return {name: path for name, path in found.items() if path.is_file()}


def _save_unit(folder: Path, name: str, unit: nn.Module) -> None:
    tensors: dict[str, Tensor] = {}
    for key, layer in _layers(unit).items():
        if layer.weight_scale is not None:
            tensors |= {f"{key}|codes": layer.weight_codes(), f"{key}|scale": layer.weight_scale}
    partial = folder / f".{name}.part"
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial)
    partial.replace(folder / f"{name}.safetensors")
