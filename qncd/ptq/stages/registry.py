"""The stages of quantization, in the order in which they run. An author adds a line here."""

from __future__ import annotations

from qncd.ptq.context import Context, Stage
from qncd.ptq.observing import naming
from qncd.ptq.stages.activation_steps import ActivationSteps
from qncd.ptq.stages.bias_correction import BiasCorrection
from qncd.ptq.stages.bit_allocation import BitAllocation
from qncd.ptq.stages.compensation import Compensation
from qncd.ptq.stages.low_rank import LowRank
from qncd.ptq.stages.prepare import Prepare
from qncd.ptq.stages.ranges import Ranges, Rounding
from qncd.ptq.stages.reconstruction import Reconstruction
from qncd.ptq.stages.rotation import Rotation
from qncd.ptq.stages.smoothing import Smoothing
from qncd.ptq.stages.smoothing_search import SmoothingSearch
from qncd.ptq.stages.step_weights import StepWeights
from qncd.ptq.stages.temporal import StepwiseRanges, TemporalReconstruction

STAGES: list[Stage] = [
    Prepare(),
    StepWeights(),
    Smoothing(),
    Rotation(),
    StepwiseRanges(),
    SmoothingSearch(),
    LowRank(),
    BitAllocation(),
    TemporalReconstruction(),
    Reconstruction(),
    Ranges(),
    BiasCorrection(),
    Compensation(),
    Rounding(),
    ActivationSteps(),
]


def run_stages(context: Context, weights_given: bool = False) -> None:
    """Run the stages that the recipe asks for, in place.

    Args:
        weights_given: the network was prepared with weights of a checkpoint: the stages that make weights are left out.

    Raises:
        ValueError: what a stage raises; the stage is named, and the layer where it
            was in the call of one, for errors of torch and of arithmetic.
    """
    for stage in STAGES:
        if stage.wanted(context.recipe) and not (weights_given and stage.weights):
            with naming(stage.title):
                stage.run(context)
