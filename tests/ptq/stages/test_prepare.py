"""quantize_: whole networks, before and after they are switched over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from qncd.models.families.unet import UNet
from qncd.models.network import network_of
from qncd.ptq.stages.prepare import quantize_, restored_on_error
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.inspection import act_quantizers, observing, quant_layers, set_stage
from qncd.quant.layers import QuantConv2d, QuantLinear
from qncd.quant.quantizers import Stage
from qncd.recipe import QuantConfig

MAX = {"weight_range": "max", "act_range": "max"}


def inputs(kind: str, count: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    channels = 3 if kind == "unet" else 4
    x = torch.randn(count, channels, 8, 8, generator=generator)
    context = {} if kind == "unet" else {"encoder_hidden_states": torch.randn(count, 5, 12, generator=generator)}
    return x, torch.tensor([999, 400, 3])[:count], context


def run(unet: nn.Module, kind: str) -> Tensor:
    x, t, context = inputs(kind)
    return unet(x, t, **context).sample


@torch.no_grad()
def switch_over(unet: nn.Module, kind: str) -> nn.Module:
    with observing(unet):
        run(unet, kind)
    for quantizer in act_quantizers(unet).values():
        quantizer.finish_observing()
    for layer in quant_layers(unet).values():
        layer.quantize_weight_()
    set_stage(unet, Stage.QUANTIZE)
    return unet


@pytest.fixture
def make(make_unet: Any, make_cross_unet: Any) -> Any:
    """make(kind, **config): "unet" or "cross"."""
    return lambda kind, **config: (make_unet if kind == "unet" else make_cross_unet)(**config)


KINDS = [
    ("unet", {}),
    ("unet", {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4}),
    ("unet", {"layers_per_block": 2, "block_out_channels": (16, 24), "num_class_embeds": None}),
    ("cross", {"use_linear_projection": True}),
    ("cross", {"use_linear_projection": False}),
]


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_before_switching_over_it_is_the_original(make: Any, kind: str, config: dict[str, Any]) -> None:
    unet = make(kind, **config)
    expected, names = run(unet, kind), set(unet.state_dict())
    quantized = quantize_(unet, QuantConfig(4, 8, softmax_bits=16)).module
    assert quantized is unet and isinstance(network_of(quantized), UNet)
    found = run(unet, kind)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    left = [name for name, m in unet.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert not left, "layers without a quantizer"
    assert names <= set(unet.state_dict()), "a parameter got another name"
    assert any(isinstance(m, QuantConv2d) for m in unet.modules()) and any(isinstance(m, QuantLinear) for m in unet.modules())


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_eight_bits_are_close_and_four_are_further(make: Any, kind: str) -> None:
    reference = run(make(kind), kind)

    def error(config: QuantConfig) -> float:
        out = run(switch_over(quantize_(make(kind), config).module, kind), kind)
        return float((out - reference).square().mean() / reference.square().mean())

    errors = [error(QuantConfig(*bits, **MAX)) for bits in ((8, 8), (4, 8), (4, 4))]
    assert 0 < errors[0] < 0.01 and errors[0] < errors[1] < errors[2] < 1
    assert error(QuantConfig(None, 8, **MAX)) < errors[0] and error(QuantConfig(8, None, **MAX)) < errors[0]


@pytest.mark.parametrize("kind", ["unet", "cross"])
@pytest.mark.parametrize("changes", [{"softmax_bits": 2}, {"quantize_attention": False}, {"split": False}])
def test_each_setting_changes_the_output(make: Any, kind: str, changes: dict[str, Any]) -> None:
    first = run(switch_over(quantize_(make(kind), QuantConfig(8, 4, **MAX)).module, kind), kind)
    second = run(switch_over(quantize_(make(kind), QuantConfig(8, 4, **MAX, **changes)).module, kind), kind)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_attention_operands_have_the_configured_widths(make: Any, kind: str) -> None:
    unet = quantize_(make(kind), QuantConfig(8, 4, softmax_bits=16, act_symmetric=True)).module
    processors = [m for m in unet.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == (4 if kind == "unet" else 8)
    for processor in processors:
        for name in ("q", "k", "v"):
            codes = getattr(processor, name).codes
            assert (codes.bits, codes.signed) == (4, True)
        assert (processor.softmax.codes.bits, processor.softmax.codes.signed) == (16, False)
    assert not any(isinstance(m, QuantAttnProcessor) for m in quantize_(make(kind), QuantConfig(4, None)).module.modules())


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_first_and_last_layers_are_eight_bits(make: Any, kind: str) -> None:
    layers = quant_layers(quantize_(make(kind), QuantConfig(4, 3)).module)
    for name, layer in layers.items():
        edge = name in ("conv_in", "conv_out")
        assert layer.config.weight_codes.bits == (8 if edge else 4), name
        assert layer.config.act_codes.bits == (8 if edge else 3), name
    assert {"conv_in", "conv_out"} <= set(layers)
    for name, layer in quant_layers(quantize_(make(kind), QuantConfig(4, None)).module).items():
        assert layer.config.act_codes is None, name
        assert layer.config.weight_codes.bits == (8 if name in ("conv_in", "conv_out") else 4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [*KINDS, ("unet", {"block_out_channels": (32, 16)}), ("cross", {"layers_per_block": 2, "block_out_channels": (8, 24)})],
)
def test_skip_boundaries_are_where_the_network_concatenates(
    make: Any, monkeypatch: pytest.MonkeyPatch, kind: str, config: dict[str, Any]
) -> None:
    unet = make(kind, **config)
    joined: list[tuple[Tensor, ...]] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *a, **k: joined.append(tuple(parts)) or cat(parts, *a, **k))
    seen: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            key = f"{name}.conv_shortcut"
            module.conv_shortcut.register_forward_pre_hook(lambda _m, args, key=key: seen.update({key: args[0]}))
    run(unet, kind)
    expected = {}
    for name, x in seen.items():
        for hidden, skip in (parts for parts in joined if len(parts) == 2 and parts[0].ndim == 4):
            if cat([hidden, skip], 1).shape == x.shape and torch.equal(cat([hidden, skip], 1), x):
                expected[name] = hidden.shape[1]
    found = network_of(unet).splits()
    assert found == expected and len(found) >= 2
    monkeypatch.undo()
    layers = quant_layers(quantize_(unet, QuantConfig(4, 8)).module)
    for name, layer in layers.items():
        boundary = found.get(name)
        assert layer.config.segments == ((boundary, layer.weight.shape[1] - boundary) if boundary else None), name


def test_no_split_without_the_setting(make_unet: Any) -> None:
    layers = quant_layers(quantize_(make_unet(), QuantConfig(4, 8, split=False)).module)
    assert all(layer.config.segments is None for layer in layers.values())


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_state_dict_round_trip(make: Any, kind: str) -> None:
    """A model calibrated otherwise computes the same once it has the other's state dict: nothing lives outside it."""
    config = QuantConfig(4, 4, **MAX)
    source = switch_over(quantize_(make(kind), config).module, kind)
    target = quantize_(make(kind, seed=1), config).module
    switch_over(target, kind)
    expected = run(source, kind)
    assert not torch.allclose(run(target, kind), expected, atol=1e-3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(run(target, kind), expected)
    assert torch.equal(run(copy.deepcopy(source), kind), expected)


def test_observing_ends_in_floats_even_after_an_error(make_unet: Any) -> None:
    unet = quantize_(make_unet(), QuantConfig(4, 8)).module
    with pytest.raises(RuntimeError, match="stop"), observing(unet):
        assert {q.stage for q in act_quantizers(unet).values()} == {Stage.OBSERVE}
        raise RuntimeError("stop")
    assert {q.stage for q in act_quantizers(unet).values()} == {Stage.FLOAT}


def test_refusals(make_unet: Any) -> None:
    unet = quantize_(make_unet(), QuantConfig(4, 8)).module
    with pytest.raises(ValueError, match=r"^the model is quantized already$"):
        quantize_(unet, QuantConfig(4, 8))
    vq = VQModel(block_out_channels=(8,), norm_num_groups=4)
    for other, name in ((nn.Conv2d(3, 3, 1), "Conv2d"), (vq, "VQModel")):
        with pytest.raises(
            ValueError, match=rf"^{name}: no denoiser, its forward has no argument named timestep, timesteps, t, time$"
        ):
            quantize_(other, QuantConfig(4, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 1}, "weight_bits 1: allowed are whole numbers, 2 to 8"),
        ({"weight_bits": 9}, "weight_bits 9: allowed are whole numbers, 2 to 8"),
        ({"weight_bits": 4.0}, "weight_bits 4.0: allowed are whole numbers, 2 to 8"),
        ({"weight_bits": True}, "weight_bits True: allowed are whole numbers, 2 to 8"),
        ({"act_bits": "8"}, "act_bits '8': allowed are whole numbers, 2 to 8"),
        ({"softmax_bits": 17}, "softmax_bits 17: allowed are whole numbers, 2 to 16"),
        ({"edge_bits": 0}, "edge_bits 0: allowed are whole numbers, 2 to 8"),
        ({"weight_range": "running"}, "weight_range 'running': allowed are mse, max"),
        ({"act_range": "minmax"}, "act_range 'minmax': allowed are mse, max, running"),
        ({"weight_bits": None, "act_bits": None}, "weight_bits and act_bits are both None: nothing would be quantized"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        QuantConfig(**changes)
    assert str(caught.value) == message


def test_config_labels() -> None:
    assert (QuantConfig(4, 8).label, QuantConfig(4, None).label, QuantConfig(None, 6).label) == ("W4A8", "W4A32", "W32A6")


def test_stable_diffusion_xls_unet_is_covered() -> None:
    """Two text encoders' contexts, size and crop as additional conditions, linear projections, several transformer layers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 12,
    ).eval().requires_grad_(False)  # fmt: skip
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16)
    added = {"text_embeds": torch.randn(2, 12), "time_ids": torch.rand(2, 6) * 1024}

    def run() -> Tensor:
        return unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample

    before = run()
    quantize_(unet, QuantConfig(4, 8))
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
    with observing(unet):
        run()
    for layer in quant_layers(unet).values():
        layer.quantize_weight_()
    for quantizer in act_quantizers(unet).values():
        quantizer.finish_observing()
    set_stage(unet, Stage.QUANTIZE)
    after = run()
    assert 0.001 < float((after - before).abs().max() / before.abs().max()) < 0.6
    names = quant_layers(unet)
    assert "add_embedding.linear_1" in names and "mid_block.attentions.0.transformer_blocks.1.attn2.to_k" in names


def test_the_embedding_may_stay_in_floating_point_and_softmax_have_its_own_range(make_unet: Any) -> None:
    unet = quantize_(make_unet(), QuantConfig(4, 8, quantize_embedding=False, softmax_range="running")).module
    assert not any("time_emb" in name for name in quant_layers(unet))
    assert type(unet.time_embedding.linear_1) is nn.Linear and type(unet.mid_block.resnets[0].time_emb_proj) is nn.Linear
    with observing(unet):
        kinds = {name.rpartition(".")[2]: {type(o).__name__ for o in q.observers} for name, q in act_quantizers(unet).items()}
    assert kinds["softmax"] == {"RunningObserver"} and kinds["q"] != kinds["softmax"]


def undone_by(change: str, unet: Any) -> None:
    """What users of diffusers call on a network, and what replaces its attention processors."""
    if change == "slicing":
        unet.set_attention_slice("auto")
    elif change == "processor":
        unet.set_attn_processor(AttnProcessor2_0())
    elif change == "fusing":
        unet.fuse_qkv_projections()
    else:
        unet.down_blocks[1].attentions[0].set_processor(AttnProcessor2_0())


@pytest.mark.parametrize(
    ("kind", "change"), [("cross", "slicing"), ("cross", "processor"), ("cross", "fusing"), ("unet", "a single layer's")]
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_call_notices_that_quantized_attention_was_replaced(make: Any, kind: str, change: str, calibrated: bool) -> None:
    unet = quantize_(make(kind), QuantConfig(4, 8)).module
    if calibrated:
        switch_over(unet, kind)
    run(unet, kind)
    undone_by(change, unet)
    name = "down_blocks.1.attentions.0" + (".transformer_blocks.0.attn1" if kind == "cross" else "")
    with pytest.raises(ValueError) as caught:
        run(unet, kind)
    new = {"slicing": "SlicedAttnProcessor", "fusing": "FusedAttnProcessor2_0"}.get(change, "AttnProcessor2_0")
    reason = f"its quantized attention was replaced by a {new}: set attention up before quantizing"
    assert str(caught.value) == f"{name}: {reason}"


def test_attention_without_quantizers_may_be_replaced(make: Any) -> None:
    unet = make("cross")
    unet.set_attention_slice("auto")
    expected = run(unet, "cross")
    quantize_(unet, QuantConfig(4, 8))  # sliced attention is plain attention
    torch.testing.assert_close(run(unet, "cross"), expected, rtol=1e-4, atol=1e-5)
    other = quantize_(make("cross"), QuantConfig(4, 8, quantize_attention=False)).module
    undone_by("processor", other)
    run(other, "cross")


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_save_pretrained_is_refused(make: Any, kind: str, tmp_path: Path) -> None:
    unet = make(kind)
    unet.save_pretrained(tmp_path / "before")
    quantize_(unet, QuantConfig(4, 8))
    for module in (unet, copy.deepcopy(unet)):
        with pytest.raises(
            ValueError, match=r"^a quantized network is saved by qncd\.save: save_pretrained would write one that"
        ):
            module.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("kind", ["unet", "cross"])
def test_an_error_leaves_the_network_as_it_was(make: Any, kind: str, tmp_path: Path) -> None:
    network = network_of(make(kind))
    unet = network.module
    expected, state = run(unet, kind), {name: value.clone() for name, value in unet.state_dict().items()}
    modules = dict(unet.named_modules())
    processors = {name: m.processor for name, m in modules.items() if isinstance(m, Attention)}
    with pytest.raises(KeyboardInterrupt), restored_on_error(network):
        quantize_(network, QuantConfig(4, 4))
        switch_over(unet, kind)
        for layer in quant_layers(unet).values():
            layer.shift_bias_(torch.ones(len(layer.weight)))
        unet.conv_norm_out.weight.mul_(3)
        assert not torch.allclose(run(unet, kind), expected)
        raise KeyboardInterrupt
    assert torch.equal(run(unet, kind), expected)
    assert all(m is modules[name] for name, m in unet.named_modules()) and len(list(unet.named_modules())) == len(modules)
    assert processors and all(modules[name].processor is processor for name, processor in processors.items())
    assert unet.state_dict().keys() == state.keys() and all(torch.equal(v, state[n]) for n, v in unet.state_dict().items())
    assert not unet._forward_pre_hooks
    unet.save_pretrained(tmp_path / "after")
    quantize_(network, QuantConfig(4, 8))  # and it can be quantized again


def test_without_an_error_it_stays_quantized(make: Any) -> None:
    network = network_of(make("unet"))
    with restored_on_error(network):
        quantize_(network, QuantConfig(4, 8))
    assert quant_layers(network.module)
    with pytest.raises(ValueError, match=r"a quantized network is saved by"):
        network.module.save_pretrained("nowhere")
