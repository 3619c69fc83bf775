"""Embedding-derived smoothing: exact in floats, and the paper's factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn import functional as F

from qncd.models.network import network_of
from qncd.models.stretch import additive_factors, normalized_embedding, scale_shift_factors
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import LayerConfig, QuantConv2d
from qncd.recipe import QuantConfig, SmoothingConfig

TIMES = list(range(0, 1000, 90))
KINDS = {"additive": "default", "scale_shift": "scale_shift"}


def strong_embedding_unet(make_unet: Any, kind: str, **config: Any) -> Any:
    """Groups of 4 and 8 channels, and an embedding that moves the activations about as much as in trained models."""
    unet = make_unet(resnet_time_scale_shift=KINDS[kind], **config)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.time_emb_proj.weight.mul_(8)
    return unet


def outputs(unet: Any, labels: Tensor | None = None) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(x, torch.tensor([990, 500, 77, 0]), class_labels=labels).sample


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_changes_nothing_in_floats(make_unet: Any, kind: str) -> None:
    unet = strong_embedding_unet(make_unet, kind)
    assert any((m.norm2.weight < 0).any() for m in unet.modules() if isinstance(m, ResnetBlock2D))
    expected = outputs(unet)
    factors = smoothing_factors(network_of(unet), TIMES)
    quantize_(unet, QuantConfig(4, 8))
    weights = {name: unet.get_submodule(name).weight.clone() for name in factors}
    smooth_(network_of(unet), factors)
    assert (outputs(unet) - expected).abs().max() <= 1e-5 * expected.abs().max()
    blocks = [name for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    assert set(factors) == {f"{name}.conv2" for name in blocks}
    for name, factor in factors.items():
        assert factor.min() >= 1 and factor.max() > 1.2
        torch.testing.assert_close(unet.get_submodule(name).weight, weights[name] * factor.view(1, -1, 1, 1))
    assert {name for name, layer in quant_layers(unet).items() if layer.smoothing is not None} == set(factors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [None, 3])
def test_factors_are_means_over_the_embeddings_that_blocks_receive(make_unet: Any, kind: str, classes: int | None) -> None:
    unet = strong_embedding_unet(make_unet, kind, num_class_embeds=classes)
    found = smoothing_factors(network_of(unet), [*TIMES, TIMES[0]], SmoothingConfig(floor=0.25))  # a repeated step counts once
    projected: dict[str, list[Tensor]] = {}
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
    for name, block in blocks.items():
        block.time_emb_proj.register_forward_hook(lambda _m, _i, out, name=name: projected.setdefault(name, []).append(out))
    for label in range(classes or 1):
        for t in TIMES:
            unet(torch.zeros(1, 3, 8, 8), t, class_labels=torch.tensor([label]) if classes else None)
    for name, block in blocks.items():
        emb = torch.cat(projected[name]).double()
        assert len(emb) == len(TIMES) * (classes or 1)
        if kind == "scale_shift":
            expected = (1 + emb[:, : emb.shape[1] // 2]).abs().mean(0)
        else:
            grouped = emb.view(len(emb), 4, -1)
            deviation = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
            expected = (deviation.view_as(emb) * block.norm2.weight).abs().mean(0)
        torch.testing.assert_close(found[f"{name}.conv2"].double(), expected.clamp(min=0.25), rtol=1e-4, atol=1e-5)


def test_classes_that_are_no_table_are_those_of_the_calibration_inputs(make_unet: Any) -> None:
    network = network_of(strong_embedding_unet(make_unet, "scale_shift", class_embed_type="timestep"))
    labels = [torch.tensor([label]) for label in (0, 40, 900)]
    every = smoothing_factors(network, TIMES, SmoothingConfig(0.1), {"class_labels": torch.cat([*labels, labels[0]])})
    single = [smoothing_factors(network, TIMES, SmoothingConfig(0.1), {"class_labels": label}) for label in labels]
    name = next(iter(every))
    low, high = torch.stack([s[name] for s in single]).aminmax(dim=0)
    assert ((every[name] >= low - 1e-6) & (every[name] <= high + 1e-6)).all() and (high > low).any()
    torch.testing.assert_close(every[name], torch.stack([s[name] for s in single]).mean(0))
    with pytest.raises(ValueError, match=r"calibration inputs have to hold class_labels$"):
        smoothing_factors(network, TIMES)


def resblock(data: Mapping[str, Tensor], kind: str) -> ResnetBlock2D:
    """diffusers' block with the weights of the original ResBlock."""
    names = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    }  # fmt: skip
    weights = {k[2:].rpartition("."): v for k, v in data.items() if k.startswith("w.")}
    state = {f"{names[layer]}.{kind_}": value for (layer, _, kind_), value in weights.items()}
    block = ResnetBlock2D(
        in_channels=data["x"].shape[2], out_channels=data["out_fp"].shape[2], temb_channels=data["emb"].shape[2],
        groups=32, eps=1e-5, time_embedding_norm="scale_shift" if kind == "ss" else "default",
    )  # fmt: skip
    block.load_state_dict(state)
    return block.eval().requires_grad_(False)


GOLDEN = [("add", 64), ("add", 160), ("ss", 64), ("ss", 160)]


@pytest.mark.parametrize(("kind", "channels"), GOLDEN)
def test_normalized_embedding_is_the_originals(golden: Any, kind: str, channels: int) -> None:
    """The original's s_k = max(1, (GN(e) - beta)/gamma); for scale-shift blocks it normalizes the scale twice."""
    data = golden(f"qncd_resblock_{kind}_c{channels}")
    emb = data["emb_out"].flatten(0, 1)[:, :channels]
    if kind == "ss":
        emb = F.group_norm(emb, 32, data["w.out_layers.0.weight"], data["w.out_layers.0.bias"], 1e-5)
    ours = normalized_embedding(emb, 32, 1e-5)
    torch.testing.assert_close(ours.clamp(min=1), data["scale_list"].view_as(emb), rtol=0, atol=1e-5)
    assert ours.max() <= (channels / 32 - 1) ** 0.5 + 1e-4
    assert ours.max() > 0.9 * (channels / 32 - 1) ** 0.5  # no weaker than it has to be


@pytest.mark.parametrize(("kind", "channels"), GOLDEN)
def test_folding_is_the_originals_and_changes_nothing(golden: Any, kind: str, channels: int) -> None:
    data = golden(f"qncd_resblock_{kind}_c{channels}")
    block = resblock(data, kind)
    config = LayerConfig(IntegerRange(4, True), IntegerRange(8, False), "max", "max")
    block.conv2 = QuantConv2d.from_float(block.conv2, config)
    x, emb, expected = (data[key].flatten(0, 1) for key in ("x", "emb", "out_fp"))
    torch.testing.assert_close(block(x, emb), expected, rtol=0, atol=1e-5)
    block.conv2.smooth_(data["scale_mean"].flatten())
    torch.testing.assert_close(block.conv2.weight, data["folded_weight"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(block(x, emb), data["out_after_fold"].flatten(0, 1), rtol=0, atol=1e-5)


def test_additive_factors_take_gamma_without_its_sign(golden: Any) -> None:
    """Unlike the original, whose gamma * max(1, s) turns negative with gamma: here the factor is |s gamma|."""
    data = golden("qncd_resblock_add_c64")
    block, emb = resblock(data, "add"), data["emb_out"].flatten(0, 1)
    plain = additive_factors(emb, block.norm2)
    expected = normalized_embedding(emb, 32, 1e-5).abs() * data["w.out_layers.0.weight"]
    torch.testing.assert_close(plain, expected)
    block.norm2.weight.neg_()
    assert torch.equal(additive_factors(emb, block.norm2), plain)


def test_scale_shift_factors_use_the_first_half() -> None:
    emb = torch.tensor([[0.5, -3.0, 7.0, 9.0]])
    assert torch.equal(scale_shift_factors(emb), torch.tensor([[1.5, 2.0]]))


def test_one_channel_a_group_gives_no_factor() -> None:
    assert normalized_embedding(torch.randn(3, 8), 8, 1e-5).abs().max() == 0


def test_refusals(make_unet: Any, make_cross_unet: Any) -> None:
    unet = make_unet()
    factors = smoothing_factors(network_of(unet), TIMES)
    with pytest.raises(ValueError, match=r"^down_blocks\.0\.resnets\.0\.conv2: smooth_ works on a model prepared by quantize_$"):
        smooth_(network_of(unet), factors)
    text = make_cross_unet(addition_embed_type="text", encoder_hid_dim=12)
    with pytest.raises(ValueError, match=r"^addition_embed_type 'text': smoothing needs an embedding of time and class alone$"):
        smoothing_factors(network_of(text), TIMES)
    for floor in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"^floor {floor!r}: allowed are numbers above 0, up to 1$"):
            SmoothingConfig(floor)
