"""Options of reconstruction: a part of `qncd.recipe.Recipe`."""

from __future__ import annotations

from dataclasses import dataclass

from qncd.options import Limits, check_options, option

CACHES = ("fp16", "bf16", "fp32")
ACT_ITERATIONS = 500  # of --recon_act, where --cali_iters_a does not say


@dataclass(frozen=True)
class ReconstructionConfig:
    """BRECQ: rounding of the weights learned block by block (arXiv 2102.05426; AdaRound, arXiv 2004.10568).

    Attributes:
        iterations: optimizer steps of each block.
        batch_size: inputs a step.
        lr: of Adam on the rounding variables.
        inputs: calibration inputs used, evenly spread over the set; None for all.
        memory_gb: cached activations of a block above this go to a file; of each process where there are several.
        cache: how they are kept, "fp16", "bf16" (8 bits of precision, any size) or "fp32".
        seed: of the order in which inputs are drawn.
        act_iterations: optimizer steps of each block's activation scales, after all weights and ranges (LSQ, arXiv
            1902.08153, as the second phase of BRECQ and Q-Diffusion); 0 leaves the scales as calibrated.
        act_lr: of Adam on the logarithms of the scales; falls to 0 over the steps as a cosine. 0.01 is the best of 0.001 to
            0.03 on blocks of the bundled latent model.
    """

    iterations: int = option(
        2000, flag="cali_iters", limits=Limits(1), help="iterations a block (default {default}; the papers: 20000)"
    )  # fmt: skip
    batch_size: int = option(
        32, flag="recon_batch", limits=Limits(1),
        help="inputs an iteration (default {default}; fewer are faster and a little worse)",
    )  # fmt: skip
    lr: float = option(
        1e-2, flag="recon_lr", limits=Limits(above=0), help="Adam's learning rate (default {default}; the papers: 0.001)"
    )
    inputs: int | None = option(512, flag="recon_inputs", limits=Limits(1), optional=True, help="calibration inputs used")
    memory_gb: float = option(
        4.0, flag="recon_memory", limits=Limits(0), help="GB of activations in memory, the rest in files (default {default})"
    )
    cache: str = option(
        "fp16", flag="recon_cache", choices=CACHES,
        help="how activations are kept (default {default}); bf16 where one is too large for fp16",
    )  # fmt: skip
    seed: int = option(0, limits=Limits(0))
    act_iterations: int = option(
        0, flag="cali_iters_a", limits=Limits(0),
        help=f"iterations a block for the activation scales (default {ACT_ITERATIONS}; the papers: 5000)",
    )  # fmt: skip
    act_lr: float = option(
        1e-2, flag="cali_lr", limits=Limits(above=0), needs="act_iterations", help="their relative learning rate"
    )

    def __post_init__(self) -> None:
        check_options(self)
