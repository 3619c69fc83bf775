"""Back-propagation through a whole run of the sampler, in the memory of one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qncd.sampling.corrector import Denoiser


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
