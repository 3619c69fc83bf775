"""Attention with quantized operands, against Q-Diffusion's attention blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor
from torch import Tensor, nn

from qncd.models.families.unet import UNet
from qncd.quant.affine import IntegerRange
from qncd.quant.attention import AttentionProducts, QuantAttnProcessor, QuantizedProducts
from qncd.quant.quantizers import Stage

HEADS = 4  # of the original's cross-attention block
OPERANDS = ("q", "k", "v", "softmax")


def processor_of(attention: Attention, bits: int = 8, softmax_bits: int = 8) -> QuantAttnProcessor:
    processor = QuantAttnProcessor(IntegerRange(bits, False), IntegerRange(softmax_bits, False), "max")
    attention.set_processor(processor)
    return processor


def set_stage(processor: AttentionProducts, stage: Stage) -> None:
    for name in OPERANDS:
        getattr(processor, name).set_stage(stage)


@torch.no_grad()
def observe(attention: Attention, processor: QuantAttnProcessor, *inputs: Tensor | None) -> None:
    set_stage(processor, Stage.OBSERVE)
    attention(*inputs)
    for name in OPERANDS:
        getattr(processor, name).finish_observing()
    set_stage(processor, Stage.QUANTIZE)


def spatial_attention(weights: Mapping[str, Tensor], heads: int = 1) -> Attention:
    """diffusers' attention over pixels with the weights of an original block with 1x1 convolutions."""
    channels = len(weights["norm.weight"])
    attention = Attention(
        channels, heads=heads, dim_head=channels // heads, norm_num_groups=32, eps=1e-6, bias=True, residual_connection=True
    )
    names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    attention.load_state_dict({f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": w for k, w in weights.items()})
    return attention.requires_grad_(False)


def assert_near(found: Tensor, expected: Tensor, softmax_bits: int) -> None:
    """Within 1e-5 but for 0.5 % ties; 16-bit probabilities are within float error of a tie far more often."""
    if softmax_bits == 16:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        return
    error = (found - expected).abs()
    assert (error > 1e-5).float().mean() <= 0.005, f"{(error > 1e-5).float().mean():.4f} differ, by up to {error.max():.2e}"


@pytest.mark.parametrize("softmax_bits", [8, 16])
def test_ddim_attention_is_the_originals(golden: Any, softmax_bits: int) -> None:
    data = golden("quant_blocks")
    weights = {k[12:]: w.flatten(1) if w.ndim == 4 else w for k, w in data.items() if k.startswith("ddim_attn_w.")}
    attention, x = spatial_attention(weights), data["ddim_attn_x"]
    processor = processor_of(attention, 8, softmax_bits)
    torch.testing.assert_close(attention(x), data["ddim_attn_fp"], rtol=0, atol=1e-5)
    observe(attention, processor, x)
    key = f"ddim_attn_a8_sm{softmax_bits}"
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(processor, name).scale[0], data[f"{key}_{name}_delta"], rtol=1e-5, atol=0)
        assert getattr(processor, name).zero_point[0] == data[f"{key}_{name}_zp"]
    # The original scales the softmax output here by max - min; ours reaches from 0 to max.
    assert processor.softmax.scale[0] >= data[f"{key}_w_delta"]
    processor.softmax.set_qparams(data[f"{key}_w_delta"].view(1), data[f"{key}_w_zp"].view(1))
    assert_near(attention(x), data[key], softmax_bits)


@pytest.mark.parametrize("softmax_bits", [8, 16])
def test_cross_attention_is_the_originals(golden: Any, softmax_bits: int) -> None:
    data = golden("quant_blocks")
    weights = {k[13:]: w for k, w in data.items() if k.startswith("cross_attn_w.")}
    x, context = data["cross_attn_x"], data["cross_attn_ctx"]
    attention = Attention(32, cross_attention_dim=20, heads=HEADS, dim_head=32 // HEADS, bias=False)
    attention.load_state_dict(weights)
    processor = processor_of(attention.requires_grad_(False), 8, softmax_bits)
    torch.testing.assert_close(attention(x, context), data["cross_attn_fp"], rtol=0, atol=1e-5)
    observe(attention, processor, x, context)
    key = f"cross_attn_a8_sm{softmax_bits}"
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(processor, name).scale[0], data[f"{key}_{name}_delta"], rtol=1e-5, atol=0)
        assert getattr(processor, name).zero_point[0] == data[f"{key}_{name}_zp"]
    processor.softmax.set_qparams(data[f"{key}_w_delta"].view(1), data[f"{key}_w_zp"].view(1))
    assert_near(attention(x, context), data[key], softmax_bits)


def block(cross: bool = False, **settings: Any) -> tuple[Attention, list[Tensor | None]]:
    torch.manual_seed(0)
    attention = Attention(16, cross_attention_dim=12 if cross else None, heads=2, dim_head=8, **settings)
    return attention.requires_grad_(False), [torch.randn(3, 9, 16), torch.randn(3, 5, 12) if cross else None]


@pytest.mark.parametrize(
    ("cross", "settings"),
    [
        (False, {}),
        (True, {}),
        (False, {"bias": True, "residual_connection": True, "rescale_output_factor": 2.0}),
        (False, {"qk_norm": "layer_norm"}),
        (True, {"cross_attention_norm": "layer_norm"}),
        (False, {"upcast_softmax": True, "norm_num_groups": 4}),
        (False, {"scale_qk": False}),
    ],
)
def test_in_floats_it_is_diffusers_attention(cross: bool, settings: dict[str, Any]) -> None:
    attention, inputs = block(cross, **settings)
    mask = torch.zeros(3, 1, 5 if cross else 9)
    mask[1, :, 2:] = -10000.0
    plain, masked = attention(*inputs), attention(*inputs, attention_mask=mask.repeat_interleave(2, 0))
    assert not torch.allclose(plain, masked)
    processor_of(attention)
    torch.testing.assert_close(attention(*inputs), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention(*inputs, attention_mask=mask.repeat_interleave(2, 0)), masked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERANDS)
def test_every_operand_is_quantized(name: str) -> None:
    attention, inputs = block(True)
    inputs = [x if x is None else 3 * x for x in inputs]
    fine, coarse = copy.deepcopy(attention), copy.deepcopy(attention)
    reference = attention(*inputs)
    observe(fine, processor_of(fine, 8, 16), *inputs)
    processor = processor_of(coarse, 8, 16)
    observe(coarse, processor, *inputs)
    only = getattr(processor, name)
    only.codes = IntegerRange(2, False)
    observe(coarse, processor, *inputs)
    errors = [(attn(*inputs) - reference).abs().max() for attn in (fine, coarse)]
    assert errors[0] > 0 and errors[1] > 3 * errors[0]


def test_probabilities_get_no_zero_point() -> None:
    attention, inputs = block(True)
    processor = processor_of(attention, 8, 8)
    observe(attention, processor, *inputs)
    assert processor.softmax.zero_point == 0 and processor.q.zero_point > 0
    assert processor.softmax.scale <= 1 / 255


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("act_range", ["max", "mse", "running"])
@pytest.mark.parametrize(("elements", "shapes"), [
    (1 << 18, [(3, 2, 9, 5)]), (200, [(2, 2, 9, 5), (1, 2, 9, 5)]), (50, 6 * [(1, 1, 9, 5)]), (1, 6 * [(1, 1, 9, 5)]),
])  # fmt: skip
def test_parts_change_nothing(
    monkeypatch: pytest.MonkeyPatch, act_range: str, stage: Stage, elements: int, shapes: list[tuple[int, ...]]
) -> None:
    """Images and heads computed one by one, in every stage: the same output, ranges and running averages."""
    results = []
    for size in (1 << 18, elements):
        monkeypatch.setattr("qncd.quant.attention.SCORE_ELEMENTS", size)
        attention, inputs = block(True)
        codes = IntegerRange(8, False)
        processor = QuantAttnProcessor(codes, codes, act_range)
        attention.set_processor(processor)
        mask = torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(1))
        set_stage(processor, Stage.OBSERVE)
        for factor in (1, 3):  # two batches: a running average of parts would move more often
            attention(inputs[0] * factor, inputs[1], attention_mask=mask)
        for name in OPERANDS:
            getattr(processor, name).finish_observing()
        set_stage(processor, stage)
        seen: list[tuple[int, ...]] = []
        processor.softmax.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape)))
        results.append((attention(*inputs, attention_mask=mask), processor.softmax.scale, processor.q.scale))
    assert seen == shapes
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_attention_can_be_back_propagated_through() -> None:
    attention, inputs = block(True)
    observe(attention, processor_of(attention), *inputs)
    x = inputs[0].clone().requires_grad_()  # type: ignore[union-attr]
    assert torch.equal(attention(x, inputs[1]), attention(*inputs))
    attention(x, inputs[1]).sum().backward()
    assert x.grad is not None


class Holder(nn.Module):
    """A denoiser that is nothing but an attention layer, mid.attn."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.mid = nn.Module()
        self.mid.attn = attention

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def test_fused_projections_are_refused_and_other_products_named(caplog: pytest.LogCaptureFixture) -> None:
    attention, _ = block(added_kv_proj_dim=4)
    attention.set_processor(AttnAddedKVProcessor())
    with caplog.at_level("WARNING", "qncd"):
        assert UNet(Holder(attention)).attentions() == {}
    assert "1 attention products compute what is not known here" in caplog.text and "AttnAddedKVProcessor" in caplog.text
    attention, _ = block()
    assert UNet(Holder(attention)).attentions() == {"mid.attn": attention}
    attention.fuse_projections()
    with pytest.raises(ValueError, match=r"^mid\.attn: attention with fused projections is not supported; unfuse it first"):
        UNet(Holder(attention)).attentions()


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_scores_of_half_precision_are_cast_where_that_is_asked_for(upcast: bool, dtype: torch.dtype) -> None:
    """The softmax is taken in float32 or as the operands are; what comes out has the operands' type either way."""
    processor = QuantAttnProcessor(None, None, "max")
    seen: list[torch.dtype] = []
    processor.softmax.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    q, k, v = torch.randn(3, 2, 4, 9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = processor.attend(q, k, v, None, 0.4, upcast)
    assert seen == [dtype] and out.dtype == torch.bfloat16
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.4)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.02)


class Dispatched:
    """A processor that calls torch's attention by diffusers' dispatcher, `count` times."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def __call__(self, attn: Any, hidden_states: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)) for part in (attn.to_q(hidden_states), attn.to_k(hidden_states), hidden_states))
        for _ in range(self.count):
            v = dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale)
        return v.flatten(2)


def test_any_processor_with_one_product_is_quantized() -> None:
    """In floats what torch computes, queries without keys included; then on the grids of its operands."""
    attention, inputs = block()
    x = inputs[0]
    mask = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 0, 2] = False
    codes = IntegerRange(8, False)
    quantized = QuantizedProducts(Dispatched(), codes, codes, "max")
    assert list(inspect.signature(quantized.__call__).parameters) == ["attn", "hidden_states", "mask", "scale"]
    for given in ({}, {"mask": mask}, {"mask": mask, "scale": 0.2}):
        exact = Dispatched()(attention, x, **given)
        torch.testing.assert_close(quantized(attention, x, **given), exact, rtol=0, atol=1e-6)
    set_stage(quantized, Stage.OBSERVE)
    quantized(attention, x)
    for name in OPERANDS:
        getattr(quantized, name).finish_observing()
    set_stage(quantized, Stage.QUANTIZE)
    rounded = quantized(attention, x)
    error = (rounded - Dispatched()(attention, x)).abs().max()
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match="Dispatched called torch's attention 2 times, expected 1"):
        QuantizedProducts(Dispatched(2), codes, codes, "max")(attention, x)
