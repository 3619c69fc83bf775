"""Back-propagation through a whole run of the sampler, in the memory of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qncd.ptq.observing import Progress
from qncd.sampling.corrector import Denoiser
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.guidance import Conditions


def step_by_step(denoise: Denoiser) -> Denoiser:
    """The denoiser, whose activations are computed anew when its gradients are: those of one step are held at a time."""

    def checkpointed(x: Tensor, t: float) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()  # the first: a re-entrant checkpoint needs one that does
        result: Tensor = checkpoint(denoise, x, t, use_reentrant=True)
        return result

    return checkpointed


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it, no gradients of parameters."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def probe_samples(
    diffusion: Diffusion,
    conditions: Conditions | None,
    counts: tuple[int, int],
    first_seed: int,
    watching: Callable[[int], AbstractContextManager[object]],
    wrap: Callable[[Denoiser], Denoiser] = step_by_step,
    progress: Progress | None = None,
) -> None:
    """Back-propagate v . x_0 through runs of the sampler, v a vector of random signs, a lane at a time.

    Args:
        diffusion: with the network in floating point; its lane is how many samples go at once.
        conditions: are used in turn, as many as there are.
        counts: seeds that are sampled, and vectors v for each.
        first_seed: of the samples.
        watching: what is there while one batch of so many samples is made and back-propagated.
        wrap: of the denoiser; has to hold one step at a time, as `step_by_step` does.

    Raises:
        FloatingPointError: a sample is NaN or infinite.
    """
    (samples, probes), size, generator = counts, diffusion.lane, torch.Generator().manual_seed(0)
    for probe in range(probes):
        for start in range(0, samples, size):
            count = min(size, samples - start)
            rows = [i % len(conditions) for i in range(start, start + count)] if conditions else []
            with frozen(diffusion.network.module), watching(count):
                seeds = range(first_seed + start, first_seed + start + count)
                x0 = diffusion.sample(seeds, None, None, wrap, conditions[rows] if conditions else None, gradients=True)
                signs = torch.randint(0, 2, x0.shape, generator=generator) * 2.0 - 1
                x0.backward(signs.to(x0))
            if progress:
                progress(probe * samples + start + count, probes * samples)
