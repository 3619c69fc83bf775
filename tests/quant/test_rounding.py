"""Learned rounding, against AdaRound and BRECQ as released."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qncd.granularity import PerGroup
from qncd.quant.affine import IntegerRange
from qncd.quant.layers import LayerConfig, QuantLinear
from qncd.quant.rounding import (
    LearnedRounding,
    RoundingSchedule,
    initial_alpha,
    reconstruction_loss,
    rectified_sigmoid,
    rounding_regularizer,
)


@pytest.mark.parametrize("kind", ["convw_b4", "convw_b8", "linw_b4", "linw_b8"])
def test_soft_and_hard_targets_are_the_originals(golden: Any, kind: str) -> None:
    data = golden("quantizers_adaround")
    weight, scale, zero = data[f"in_{kind[:-3]}"], data[f"ada_{kind}_delta"], data[f"ada_{kind}_zp"]
    top = 2 ** int(kind[-1]) - 1
    alpha = initial_alpha(weight, scale)
    torch.testing.assert_close(alpha, data[f"ada_{kind}_init_alpha"], rtol=1e-4, atol=1e-4)
    for prefix, values in (("init_", data[f"ada_{kind}_init_alpha"]), ("", data[f"ada_{kind}_alpha"])):
        h = rectified_sigmoid(values)
        torch.testing.assert_close(h, data[f"ada_{kind}_{prefix}h"], rtol=0, atol=1e-5)
        floor = torch.floor(weight / scale)
        for name, up in (("soft", h), ("hard", (values >= 0).float())):
            found = ((floor + up + zero).clamp(0, top) - zero) * scale
            torch.testing.assert_close(found, data[f"ada_{kind}_{prefix}{name}"], rtol=0, atol=1e-5)


def test_loss_and_schedule_are_the_originals(golden: Any) -> None:
    data = golden("quantizers_loss")
    schedule = RoundingSchedule(int(data["max_count"]), float(data["weight"]), warmup=float(data["warmup"]))
    h = rectified_sigmoid(data["alpha"])
    torch.testing.assert_close(h, data["soft_targets"], rtol=0, atol=1e-6)
    rec = reconstruction_loss(data["pred"], data["tgt"], float(data["p"]))
    assert float(rec) == pytest.approx(float(data["rec_loss_p2_4"]), rel=1e-5)
    assert float(reconstruction_loss(data["pred"], data["tgt"])) == pytest.approx(float(data["lp_loss_p2"]), rel=1e-5)
    for beta, expected in zip(data["betas"].tolist(), data["round_loss_unweighted_at_beta"].tolist(), strict=True):
        assert float(rounding_regularizer(h, beta)) == pytest.approx(expected, rel=1e-5)
    totals = []
    for iteration in range(1, schedule.iterations + 1):
        total = rec
        if schedule.active(iteration):
            total = total + schedule.weight * rounding_regularizer(h, schedule.beta(iteration))
        totals.append(float(total))
    np.testing.assert_allclose(totals, data["total_loss_per_step"].numpy(), rtol=1e-5)
    betas = [schedule.beta(i) for i in range(schedule.iterations + 1)]
    np.testing.assert_allclose(betas, data["temp_decay_t0_to_max"].numpy(), rtol=1e-5)


@pytest.mark.parametrize("segments", [None, (8, 12)])
def test_a_layers_rounding_starts_at_its_weight_and_ends_on_its_grid(segments: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    source = nn.Linear(20, 6)
    layer = QuantLinear.from_float(source, LayerConfig(IntegerRange(4, True), None, "max", "max", segments))
    rounding = LearnedRounding(layer)
    assert rounding.alpha.is_leaf and rounding.alpha.requires_grad
    torch.testing.assert_close(rounding.soft(), layer.weight, rtol=0, atol=1e-5)
    nearest = layer.rounded_weight()
    differing = (rounding.hard() - nearest).abs() > 1e-6  # the start value rounds to nearest but for ties
    assert differing.float().mean() < 0.02
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn_like(rounding.alpha))
    codes = rounding.hard() / layer.expanded_scale()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(codes.round().min()) >= -8 and float(codes.round().max()) <= 7
    rounding.soft().sum().backward()
    assert rounding.alpha.grad is not None and (rounding.alpha.grad != 0).float().mean() > 0.5


def test_a_layer_in_floating_point_is_refused() -> None:
    layer = QuantLinear.from_float(nn.Linear(4, 4), LayerConfig(None, IntegerRange(8, False), "max", "max"))
    with pytest.raises(ValueError, match=r"^a layer without integer codes of its weights has no rounding to learn$"):
        LearnedRounding(layer)


def test_scales_of_either_sign_are_learned_on() -> None:
    """Groups of a row may have negative scales: the soft weight starts as the weight, but for what is clipped."""
    torch.manual_seed(0)
    source = nn.Linear(64, 6).requires_grad_(False)
    weight = source.weight.clone()
    config = LayerConfig(IntegerRange(4, True), None, "max", "max", weight_granularity=PerGroup(32))
    rounding = LearnedRounding(QuantLinear.from_float(source, config))
    assert bool((rounding.scale < 0).any())
    inside = ((weight / rounding.scale) > -8) & ((weight / rounding.scale) < 7)
    torch.testing.assert_close(rounding.soft().detach()[inside], weight[inside], rtol=0, atol=1e-5)
    assert float((rounding.hard() - weight).abs()[inside].max()) <= float(rounding.scale.abs().max()) / 2 + 1e-6
