"""Activation scales learned block by block against the full-precision network: the second phase of BRECQ.

As in BRECQ (arXiv 2102.05426, section 3.4) and Q-Diffusion, after the weights and the ranges: rounding passes gradients
straight through, zero points stay, and what is minimized is |block_q(x_q) - block_fp(x_fp)|^2.4 over the scales of the block's
activation quantizers. The steps are taken on the logarithms of the scales: they differ by orders of magnitude, and one
learning rate moves them all by the same ratio. Scales that shrink clip what is rare, which shows in other inputs alone: a
block keeps the scales of least held-out error on the way, those of the calibration where none is better.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from qncd.distributed import OneProcess, Processes
from qncd.io.files import first_line, scratch_folder
from qncd.models.network import Network
from qncd.ptq.blocks import BlockData, collect, execution_order, multiplications, reconstruction_units
from qncd.ptq.checkpoint_schema import Rule
from qncd.ptq.context import Context
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages.reconstruction import BlockProgress, BlockResult, TimeLeft, load_block, open_folder, part_of, save_block
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.rounding import backpropagate
from qncd.quant.stepwise import StepwiseActQuantizer
from qncd.recipe import Recipe, ReconstructionConfig

NORM = 2.4  # exponent of the loss, as in Q-Diffusion's code
CHECKS = 10  # times that the held-out error is looked at on the way


def step_quantizers(unit: nn.Module) -> dict[str, ActQuantizer]:
    """The activation quantizers of a block whose scales can be learned, by name: all but those with a range for each step."""
    return {
        name: part
        for name, part in unit.named_modules()
        if isinstance(part, ActQuantizer) and not isinstance(part, StepwiseActQuantizer) and part.codes is not None
    }


def learn_steps_(
    network: Network,
    reference: Network,
    data: CalibrationSet,
    config: ReconstructionConfig,
    progress: BlockProgress | None = None,
    folder: Path | None = None,
    processes: Processes | None = None,
) -> list[BlockResult]:
    """Learn the scales of all activation quantizers, block by block in the order of the forward pass, in place.

    Args:
        network: calibrated by `calibrate_`.
        reference: the same network in floating point, prepared as `network` was before its weights were rounded.
        data: calibration inputs.
        config: `act_iterations` and `act_lr` of it are this phase's.
        progress: called with (blocks done, blocks in all, seconds left).
        folder: for finished blocks: a run that was cut off goes on after the last one in it.
        processes: as in `reconstruct_`.

    Raises:
        ValueError: `network` is not calibrated; names the block at which something went wrong; the folder holds another
            reconstruction.
    """
    processes = processes or OneProcess()
    data = part_of(data, config)
    units = {name: unit for name, unit in reconstruction_units(network).items() if step_quantizers(unit)}
    if any(quantizer.stage is not Stage.QUANTIZE for unit in units.values() for quantizer in step_quantizers(unit).values()):
        raise ValueError("learn_steps_ works on a model calibrated by calibrate_")
    order = execution_order(network, data, units)
    results: list[BlockResult] = []
    time_left = TimeLeft(order, multiplications(network, data, units), config.act_iterations, config.batch_size, data.passed)
    settings = {"config": asdict(config), "blocks": order}
    done = processes.first(lambda: open_folder(folder, settings, "activation_steps.json", ".steps")) if folder else {}
    for count, name in enumerate(order):
        quantizers = step_quantizers(units[name])
        try:
            if name in done:
                rules = {_scale(key): Rule(tuple(part.scale.shape), positive=True) for key, part in quantizers.items()}
                scales = processes.first(lambda file=done[name], rules=rules: load_block(file, rules))  # type: ignore[misc]
                time_left.skip(name)
            else:
                result, scales = _learn_unit(network, reference, name, data, config, processes)
                results.append(result)
                time_left.add(name, result.seconds)
                scales = processes.share({key: scale.cpu() for key, scale in scales.items()})
                if folder and processes.is_first:
                    save_block(folder, f"{name}.steps", scales)
            for key, quantizer in quantizers.items():
                quantizer.set_qparams(scales[_scale(key)].to(quantizer.scale), quantizer.zero_point)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"activation steps of {name}: {first_line(error)}") from None
        if progress:
            progress(count + 1, len(order), time_left.left)
    return results


def _learn_unit(
    network: Network, reference: Network, name: str, inputs: CalibrationSet, config: ReconstructionConfig, processes: Processes
) -> tuple[BlockResult, dict[str, Tensor]]:
    start = time.perf_counter()
    with scratch_folder() as files:
        data = collect(network, reference, name, inputs, config, files, processes)
        calibrated = {_scale(key): quantizer.scale.clone() for key, quantizer in step_quantizers(data.unit).items()}
        before = data.error(calibrated, config.batch_size, network.device)
        learned, after = _optimize(data, calibrated, config, network.device)
    kept = after < before
    return BlockResult(name, before, after, time.perf_counter() - start, kept), learned if kept else calibrated


def _optimize(
    data: BlockData, calibrated: dict[str, Tensor], config: ReconstructionConfig, device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """The best scales on the way from those of the calibration, and their held-out error."""
    generator = torch.Generator().manual_seed(config.seed)
    logs = {key: torch.zeros_like(scale).requires_grad_(True) for key, scale in calibrated.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=config.act_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.act_iterations)
    average_ = data.processes.average_ if data.processes.world > 1 else None
    every = -(-config.act_iterations // CHECKS)
    best, least = calibrated, float("inf")
    for iteration in range(1, config.act_iterations + 1):
        scales = {key: scale * logs[key].exp() for key, scale in calibrated.items()}
        try:
            backpropagate(data.loss(data.draw(config.batch_size, generator), scales, NORM), list(logs.values()), average_)
        except FloatingPointError as problem:
            raise FloatingPointError(f"{problem} at iteration {iteration}") from None
        optimizer.step()
        schedule.step()
        if iteration % every == 0 or iteration == config.act_iterations:
            scales = {key: scale * logs[key].detach().exp() for key, scale in calibrated.items()}
            error = data.error(scales, config.batch_size, device)
            if error < least:
                best, least = scales, error
    return best, least


def _scale(key: str) -> str:
    return f"{key}.scale"


class ActivationSteps:
    """The stage: after everything else."""

    title = "activation steps"
    unit = "block"
    weights = False

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.reconstruction is not None and recipe.reconstruction.act_iterations > 0

    def run(self, context: Context) -> None:
        config, reference = context.recipe.reconstruction, context.reference
        assert config is not None and reference is not None  # made before the weights were rounded
        with context.monitor(self.title, self.unit) as update:
            context.found["activation_steps"] = learn_steps_(
                context.network, reference, context.data, config, update, context.folder, context.processes
            )
