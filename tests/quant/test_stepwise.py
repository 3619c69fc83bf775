"""A range for each time step: observed, put between its neighbours', looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_networks import calibrate_with_
from small_pipelines import made

from qncd.models.calls import rows_of
from qncd.models.network import network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import act_quantizers
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.stepwise import StepwiseActQuantizer, _TellSteps, interpolated, make_stepwise, nearest_steps, select_steps_on_call
from qncd.recipe import QuantConfig

CODES = IntegerRange(8, False)
TIMES = torch.tensor([0, 100, 200, 400])


def observed(rows: dict[int, torch.Tensor], **settings: Any) -> StepwiseActQuantizer:
    quantizer = StepwiseActQuantizer(CODES, TIMES, **settings)
    quantizer.set_stage(Stage.OBSERVE)
    for row, values in rows.items():
        quantizer.select(row)
        quantizer(values)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    return quantizer


def alone(values: torch.Tensor, **settings: Any) -> ActQuantizer:
    quantizer = ActQuantizer(CODES, settings.pop("act_range", "max"), **settings)
    quantizer.set_stage(Stage.OBSERVE)
    quantizer(values)
    quantizer.finish_observing()
    quantizer.set_stage(Stage.QUANTIZE)
    return quantizer


@pytest.mark.parametrize("settings", [{}, {"act_range": "mse"}, {"segments": (2, 4)}])
def test_each_step_has_its_own_scale_and_all_have_one_zero_point(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 6, 4, 4, generator=generator)
    values = {row: base * 2.0**row for row in range(4)}
    quantizer = observed(values, **settings)
    assert torch.equal(quantizer.zero_point, quantizer.zero_point[:1].expand_as(quantizer.zero_point))
    one = {}  # a quantizer of each step alone, with what that step got
    for row, x in values.items():
        one[row] = alone(x, **settings)
        torch.testing.assert_close(quantizer.scale[row], one[row].scale, rtol=0.01, atol=0)
        one[row].set_qparams(quantizer.scale[row], quantizer.zero_point[row])
        quantizer.select(row)
        torch.testing.assert_close(quantizer(x), one[row](x), rtol=0, atol=1e-5)
    mixed = torch.cat([values[2][:1], values[0][:1], values[2][1:2]])
    quantizer.select(torch.tensor([2, 0, 2]))
    expected = torch.cat([one[r](mixed[i : i + 1]) for i, r in enumerate((2, 0, 2))])
    torch.testing.assert_close(quantizer(mixed), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(quantizer(mixed[1:], images=slice(1, 3)), expected[1:], rtol=0, atol=1e-5)
    smoothing = torch.rand(1, 6, 1, 1, generator=generator) + 0.5
    quantizer.select(2)
    torch.testing.assert_close(quantizer(values[2], smoothing), one[2](values[2] / smoothing), rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"segments": (2, 4)}])
def test_a_range_covers_those_of_steps_around_it(settings: dict[str, Any]) -> None:
    """What a step itself was not shown, too, and nothing of steps farther off."""
    base = torch.linspace(-1, 2, 12).view(1, 6, 2)
    quantizer = observed({row: base * 2.0**row for row in range(4)}, reach=1, **settings)
    alone_ = observed({row: base * 2.0 ** min(row + 1, 3) for row in range(4)}, **settings)
    assert torch.equal(quantizer.scale, alone_.scale) and torch.equal(quantizer.zero_point, alone_.zero_point)
    wide = make_stepwise(ActQuantizer(CODES, "max"), torch.arange(20), 0.1)
    assert isinstance(wide, StepwiseActQuantizer) and wide.reach == 2
    assert make_stepwise(ActQuantizer(CODES, "max"), torch.arange(4), 0.1).reach == 0


@pytest.mark.parametrize(("asked", "unet", "transformer"), [(None, 0, 2), (0.3, 6, 6), (0.0, 0, 0)])
def test_the_family_says_how_far_ranges_reach(asked: float | None, unet: int, transformer: int, make_unet: Any) -> None:
    for network, reach in ((network_of(make_unet()), unet), (network_of(made("SD3").transformer), transformer)):
        quantize_(network, QuantConfig(8, 8, stepwise_activations=True))
        set_all_stepwise_(network, range(0, 1000, 50), asked)
        found = {q.reach for q in act_quantizers(network.module).values() if isinstance(q, StepwiseActQuantizer) and not q.fixed}
        assert found == {reach}


def test_mixed_batches_are_observed_row_by_row() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0], [1.0], [5.0]])
    quantizer = StepwiseActQuantizer(CODES, TIMES)
    quantizer.set_stage(Stage.OBSERVE)
    quantizer.select(torch.tensor([0, 3, 0, 3]))
    quantizer(x)
    quantizer.finish_observing()
    for row, part in ((0, x[[0, 2]]), (3, x[[1, 3]])):  # not clipped, and no wider than the zero point asks for
        quantizer.stage = Stage.QUANTIZE
        quantizer.select(row)
        assert (quantizer(part) - part).abs().max() <= 0.501 * quantizer.scale[row]
        assert quantizer.scale[row] < 1.5 * alone(part).scale


def test_a_step_that_calibration_did_not_see_lies_between_its_neighbours() -> None:
    low, high = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 6.0]])
    quantizer = observed({1: low, 3: high})
    widths = quantizer.scale[:, 0] * 255
    torch.testing.assert_close(widths, torch.tensor([2.0, 2.0, 2 + 4 / 3, 6.0]))
    with pytest.raises(ValueError, match="no calibration data"):
        observed({})


def test_interpolation_and_lookup() -> None:
    values = torch.tensor([[0.0, 10.0], [4.0, 30.0]])
    found = interpolated([0, 10, 20, 30, 40], [10, 30], values)
    assert found.tolist() == [[0, 10], [0, 10], [2, 20], [4, 30], [4, 30]]
    assert nearest_steps((0, 100, 200), torch.tensor(149)) == 1 and nearest_steps((0, 100, 200), torch.tensor([151, 151])) == 2
    rows = nearest_steps((0, 100, 200), torch.tensor([990, 3]))
    assert isinstance(rows, torch.Tensor) and rows.tolist() == [2, 0]


def test_it_must_be_told_the_step() -> None:
    quantizer = StepwiseActQuantizer(CODES, TIMES)
    quantizer.set_stage(Stage.QUANTIZE)
    with pytest.raises(ValueError, match="select_steps_on_call"):
        quantizer(torch.zeros(2, 3))
    quantizer.select(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="3 inputs where the network was called with 2"):
        quantizer(torch.zeros(3, 3))
    assert make_stepwise(quantizer, TIMES) is quantizer


@pytest.mark.parametrize("kind", ["unet", "cross_unet"])
def test_all_of_a_network(kind: str, make_unet: Any, make_cross_unet: Any) -> None:
    """Images of different steps in one call get what each gets alone, and 4 bits hold better than with one range."""
    generator = torch.Generator().manual_seed(0)
    times, channels = [1, 301, 601, 901], 3 if kind == "unet" else 4
    t = torch.tensor(times).repeat_interleave(4)
    x = torch.randn(16, channels, 8, 8, generator=generator) * (1 + t.view(-1, 1, 1, 1) / 150)
    given = {} if kind == "unet" else {"encoder_hidden_states": torch.randn(16, 5, 12, generator=generator)}
    make = make_unet if kind == "unet" else make_cross_unet
    exact, found = make(), {}

    def call(unet: Any, rows: slice) -> torch.Tensor:
        out: torch.Tensor = unet(x[rows], t[rows], **rows_of(given, rows)).sample
        return out

    for stepwise in (False, True):
        unet = quantize_(make(), QuantConfig(None, 6)).module
        if stepwise:
            set_all_stepwise_(network_of(unet), times)
            select_steps_on_call(unet, network_of(unet).times_of)
            told = [h for h in unet._forward_pre_hooks.values() if isinstance(h, _TellSteps)]
            assert len(told) == 1 and all(isinstance(q, StepwiseActQuantizer) for q in act_quantizers(unet).values())
        calibrate_with_(unet, CalibrationSet(x, t, given), 16)
        found[stepwise] = (call(unet, slice(0, 16)) - call(exact, slice(0, 16))).square().mean()
    together = call(unet, slice(0, 16))
    alone = torch.cat([call(unet, slice(i, i + 1)) for i in range(16)])
    assert ((together - alone).abs() > 1e-4).float().mean() < 0.05  # a rounding error may tip a tie
    assert found[True] < 0.8 * found[False]
