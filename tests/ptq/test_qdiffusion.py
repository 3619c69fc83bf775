"""Q-Diffusion's quantized checkpoints, against outputs of Q-Diffusion itself."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.models.files.unpickle import load_checkpoint
from qncd.models.loading import load_config, load_ddim
from qncd.models.network import network_of
from qncd.models.original.compvis import load_ldm_unet
from qncd.models.original.ddim import ddim_key_table
from qncd.models.original.key_tables import Renamed
from qncd.models.original.ldm import ldm_unet_key_map
from qncd.ptq.checkpoint import load_quantized_, save_quantized
from qncd.ptq.qdiffusion import _Part, _set_act, _set_weight, is_qdiffusion, load_qdiffusion_
from qncd.ptq.qdiffusion_flags import check_part, check_weight_bits
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import act_quantizers, quant_layers, set_stage
from qncd.quant.layers import LayerConfig, QuantConv2d
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.recipe import QuantConfig

from ..conftest import FAR

LAYERS = {
    "ddim": {"conv_in": "conv_in", "up.1.block.0.nin_shortcut": "up_blocks.0.resnets.0.conv_shortcut",
             "mid.block_1.temb_proj": "mid_block.resnets.0.time_emb_proj"},
    "sd": {"input_blocks.0.0": "conv_in", "output_blocks.1.0.skip_connection": "up_blocks.0.resnets.1.conv_shortcut",
           "middle_block.1.transformer_blocks.0.attn2.to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"},
}  # fmt: skip
OPERANDS = {"ddim": ("mid.attn_1", "mid_block.attentions.0"), "sd": (
    "middle_block.1.transformer_blocks.0.attn2", "mid_block.attentions.0.transformer_blocks.0.attn2")}  # fmt: skip


def load(kind: str, data: Mapping[str, Tensor]) -> tuple[Any, Any, Any, QuantConfig]:
    """The full-precision model, the file's content, the key table and the configuration."""
    path = FAR / f"qdiff_{kind}_w4a8.pth"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    base = FAR / ("ddim_unet_small" if kind == "ddim" else "sd_txt2img")
    config = load_config(base.with_suffix(".yml" if kind == "ddim" else ".yaml"))
    if kind == "ddim":
        unet, table = load_ddim(config, base.with_suffix(".ckpt")), ddim_key_table(config)
    else:
        unet, table = load_ldm_unet(config, base.with_suffix(".ckpt")), ldm_unet_key_map(config)
    numbers = {key: int(data[key]) for key in ("w_bits", "a_bits", "sm_abit", "a_sym")}
    quant = QuantConfig(numbers["w_bits"], numbers["a_bits"], numbers["sm_abit"], act_symmetric=bool(numbers["a_sym"]))
    return unet, load_checkpoint(path), table, quant


def inputs_of(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": data["context"]} if "context" in data else {}


@pytest.mark.parametrize("kind", ["ddim", "sd"])
def test_outputs_are_q_diffusions(golden: Any, kind: str) -> None:
    data = golden(f"qdiff_{kind}_w4a8_io")
    unet, content, table, config = load(kind, data)
    assert is_qdiffusion(content)
    x, t, given = data["x"], data["t"], inputs_of(data)
    torch.testing.assert_close(network_of(unet).predict(x, t, given), data["eps_fp"], rtol=0, atol=1e-5)
    load_qdiffusion_(network_of(unet), content, table, config)
    layers = quant_layers(unet)
    for original, ours in LAYERS[kind].items():
        found = layers[ours].weight
        torch.testing.assert_close(found, data[f"wdeq.{original}"].view_as(found), rtol=0, atol=1e-7)
        out = layers[ours](data[f"in.{original}"])
        expected = data[f"out.{original}"]
        assert float(((out - expected).abs() > 1e-5).float().mean()) < 0.005  # one step off at ties
    original, ours = OPERANDS[kind]
    softmax = unet.get_submodule(ours).processor.softmax
    probabilities = data[f"in.{original}.act_quantizer_w"]
    torch.testing.assert_close(softmax(probabilities), data[f"out.{original}.act_quantizer_w"], rtol=0, atol=1e-6)

    set_stage(unet, Stage.FLOAT)
    torch.testing.assert_close(network_of(unet).predict(x, t, given), data["eps_w4"], rtol=0, atol=1e-5)
    set_stage(unet, Stage.QUANTIZE)
    difference = network_of(unet).predict(x, t, given) - data["eps_w4a8"]
    assert float(difference.square().mean().sqrt()) < (0.075 if kind == "ddim" else 0.063)
    # In float64 no activation is at a tie for another reason than in the original.
    unet.double()
    out = network_of(unet).predict(x.double(), t, {name: value.double() for name, value in given.items()})
    torch.testing.assert_close(out, data["eps_w4a8_f64"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["ddim", "sd"])
def test_it_becomes_a_checkpoint_of_ours(golden: Any, kind: str, tmp_path: Path) -> None:
    data = golden(f"qdiff_{kind}_w4a8_io")
    unet, content, table, config = load(kind, data)
    load_qdiffusion_(network_of(unet), content, table, config)
    save_quantized(network_of(unet), tmp_path / "q.safetensors", unet_config(unet, config), "h", {})
    again = load(kind, data)[0]
    load_quantized_(network_of(again), tmp_path / "q.safetensors")
    inputs = data["x"], data["t"], inputs_of(data)
    assert torch.equal(network_of(again).predict(*inputs), network_of(unet).predict(*inputs))


def unet_config(unet: Any, config: QuantConfig) -> QuantConfig:
    return QuantConfig(
        config.weight_bits, config.act_bits, config.softmax_bits, edge_bits=None, weight_range="max", act_range="max",
        act_symmetric=config.act_symmetric, split=any(len(q.scale) > 1 for q in act_quantizers(unet).values()),
    )  # fmt: skip


def _drop(content: dict[str, Tensor], part: str) -> None:
    for key in [key for key in content if part in key]:
        del content[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model.mid.block_1.conv1.weight_quantizer.delta"), "parts of mid.block_1.conv1.weight_quantizer are"),
        (lambda c: c.pop("model.mid.attn_1.act_quantizer_k.delta"), "parts of mid.attn_1.act_quantizer_k are missing"),
        (lambda c: c.update({"model.conv_in.weight": c["model.conv_in.weight"] + 1}), "not the weights of this model"),
        (lambda c: c.update({"model.extra.weight": torch.zeros(1)}), "keys that this model lacks: extra.weight"),
        (lambda c: _drop(c, "conv_in.act_quantizer"), "activation quantizers are missing"),
        (lambda c: _drop(c, "conv_out.weight_quantizer"), "layers without a weight quantizer: conv_out"),
    ],
)
def test_files_that_do_not_do(golden: Any, change: Any, message: str) -> None:
    unet, content, table, config = load("ddim", golden("qdiff_ddim_w4a8_io"))
    content = dict(content)
    change(content)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load_qdiffusion_(network_of(unet), content, table, config)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("edge", "learned"), [(None, False), (None, True), (4, True)])
def test_weights_are_rounded_by_the_files_quantizers(edge: int | None, learned: bool, kernel: int) -> None:
    """clamp(floor(w / delta) + (alpha >= 0) + z, 0, 15), minus z, times delta, of each part; to the nearest without alpha."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 5, kernel).requires_grad_(False)
    weight = torch.randn(conv.weight.shape, generator=generator)
    segments = None if edge is None else (edge, 6 - edge)
    layer = QuantConv2d.from_float(conv, LayerConfig(IntegerRange(4, True), None, "max", "max", segments))
    parts, expected = [], []
    for piece in weight.split(segments or 6, 1):
        delta = torch.rand(5, 1, 1, 1, generator=generator) * 0.2 + 0.1
        zero = torch.randint(4, 12, (5, 1, 1, 1), generator=generator).float()
        alpha = torch.randn(piece.shape, generator=generator) if learned else None
        steps = piece / delta
        whole = steps.round() if alpha is None else steps.floor() + (alpha >= 0)
        expected.append(((whole + zero).clamp(0, 15) - zero) * delta)
        parts.append(_Part(delta, zero, alpha))
    _set_weight({"conv": layer}, "old", parts, weight, {"old.weight": Renamed("conv.weight")}, {"conv": edge or 0})
    torch.testing.assert_close(layer.weight, torch.cat(expected, 1), rtol=1e-6, atol=1e-6)
    assert layer.weight_scale is not None and layer.weight_scale.shape == (5, len(parts))
    if len(parts) > 1:
        with pytest.raises(ValueError, match=r"^old: split at another channel than this model's, 3$"):
            _set_weight({"conv": layer}, "old", parts, weight, {"old.weight": Renamed("conv.weight")}, {"conv": 3})


def test_activations_get_the_files_ranges() -> None:
    quantizer = ActQuantizer(IntegerRange(8, False), "max", (2, 3))
    parts = [_Part(torch.tensor([0.5]), torch.tensor([3.0])), _Part(torch.tensor(0.25), torch.tensor(7.0))]
    _set_act(quantizer, parts, 2.0)
    assert quantizer.scale.tolist() == [1.0, 0.5] and quantizer.zero_point.tolist() == [3.0, 7.0]
    assert quantizer.stage is Stage.QUANTIZE
    with pytest.raises(ValueError, match=r"^1 activation quantizers for a layer with 2$"):
        _set_act(quantizer, parts[:1])


@pytest.mark.parametrize("mode", ["qdiff", "qncd"])
def test_the_script_takes_it_as_cali_ckpt(tmp_path: Path, mode: str) -> None:
    checkpoint = FAR / "qdiff_ddim_w4a8.pth"
    if not checkpoint.is_file():
        pytest.skip("qdiff_ddim_w4a8.pth is not here")
    script = Path(__file__).resolve().parents[2] / "scripts" / "sample_diffusion_ddim.py"
    words = f"""--config {FAR}/ddim_unet_small.yml --ckpt {FAR}/ddim_unet_small.ckpt --timesteps 4 --max_images 2 --lane 2
        --cali_n 4 --cali_st 2 --ptq --quant_mode {mode} --weight_bit 4 --quant_act --a_sym --no-recon --resume --compare_fp
        --cali_ckpt {checkpoint} -l {tmp_path}/o {"--reverse_interval 2" if mode == "qncd" else ""}""".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(script), *words])
        runpy.run_path(str(script), run_name="__main__")
    assert len(list((tmp_path / "o" / "images").iterdir())) == 2
    assert json.loads((tmp_path / "o" / "run.json").read_text())["figures"]["psnr_to_fp_db"] > 8


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ddim", {"weight_bits": 8}, "--weight_bit 8: conv_in was quantized to 4 bits, as its zero points and weights say"),
        ("ddim", {"weight_bits": 2}, "--weight_bit 2: conv_in was quantized to 4 bits, as its zero points and weights say"),
        ("ddim", {"weight_bits": None}, "--weight_bit 32: the file's weights are quantized"),
        ("ddim", {"act_granularity": "token"}, "--act_granularity token: a file of Q-Diffusion has tensor"),
        ("ddim", {"attention_bits": 4}, "--attention_bits 4: a file of Q-Diffusion has None"),
        ("ddim", {"act_bits": 4}, "--act_bit 4: the scale of the first layer's input is one of 8 bits"),
        ("ddim", {"act_symmetric": False}, "the file's activations have no zero points, they are symmetric: give --a_sym"),
        ("ddim", {"softmax_bits": 16}, "--sm_abit 16: with the file's scales softmax outputs would reach 2.4e+02: about 8 bits"),
        ("ddim", {"split": False}, "--no-split: the file's skip concatenations are split"),
        (
            "sd",
            {"weight_bits": 3},
            "--weight_bit 3: input_blocks.0.0 was quantized to 4 bits, as its zero points and weights say",
        ),
        ("sd", {"act_bits": 4}, "--act_bit 4: the file's activations have zero points up to 150, 15 is the largest"),
        ("sd", {"act_symmetric": True}, "--a_sym: the file's activations have zero points up to 150: they are asymmetric"),
        ("sd", {"softmax_bits": 8}, "--sm_abit 8: with the file's scales softmax outputs would reach 0.0035: about 16 bits"),
    ],
)
def test_flags_that_the_files_numbers_contradict(golden: Any, kind: str, changes: dict[str, Any], message: str) -> None:
    unet, content, table, config = load(kind, golden(f"qdiff_{kind}_w4a8_io"))
    with pytest.raises(ValueError) as caught:
        load_qdiffusion_(network_of(unet), content, table, dataclasses.replace(config, **changes))
    assert str(caught.value) == message
    assert not quant_layers(unet)


def quantizer(weight: Tensor, bits: int, ratio: float, clipped: bool) -> _Part:
    """Q-Diffusion's range search: the part of the range that `ratio` leaves, widened to hold 0 where it is `clipped` to that."""
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    low, high = (low.clamp(max=0), high.clamp(min=0)) if clipped else (low, high)
    delta = (high - low) * ratio / (2**bits - 1)
    shape = (-1, *[1] * (weight.ndim - 1))
    return _Part(delta.view(shape), (-low * ratio / delta).round().view(shape))


@pytest.mark.parametrize("shape", [(3, 8), (4, 2, 3, 3), (64, 16)])
@pytest.mark.parametrize("ratio", [1.0, 0.63, 0.21])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_tell_their_bits(bits: int, ratio: float, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.1
    for clipped in (True, False):
        part = quantizer(weight, bits, ratio, clipped)
        check_weight_bits("conv", part, weight, bits)
        for other in {2, 4, 8} - {bits}:
            with pytest.raises(ValueError, match=rf"^--weight_bit {other}: conv was quantized to {bits} bits"):
                check_weight_bits("conv", part, weight, other)


def test_weights_that_tell_nothing_are_read() -> None:
    weight = torch.rand(4, 8) + 1  # of one sign
    check_weight_bits("conv", quantizer(weight, 4, 1.0, False), weight, 8)
    with pytest.raises(ValueError, match=r"^conv: zero points of symmetric weights, which are not read"):
        check_weight_bits("conv", _Part(torch.ones(4, 1), torch.zeros(4, 1)), torch.linspace(-1, 1, 32).view(8, 4).T, 4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (_Part(torch.ones(1), torch.zeros(4, 1)), "conv.delta: shape (1,), expected (4, 1)"),
        (_Part(torch.ones(4, 1), torch.zeros(1)), "conv.zero_point: shape (1,), expected (4, 1)"),
        (_Part(torch.zeros(4, 1), torch.zeros(4, 1)), "conv.delta: holds 0, allowed are numbers above 0"),
        (_Part(torch.full((4, 1), torch.nan), torch.zeros(4, 1)), "conv.delta: holds NaN or infinity"),
        (_Part(torch.ones(4, 1), torch.full((4, 1), 0.5)), "conv.zero_point: holds numbers that are not whole"),
        (_Part(torch.ones(4, 1), torch.zeros(4, 1), torch.zeros(4, 1)), "conv.alpha: shape (4, 1), expected (4, 8)"),
        (_Part(torch.ones(4, 1), torch.zeros(4, 1), torch.full((4, 8), torch.nan)), "conv.alpha: holds NaN or infinity"),
    ],
)
def test_quantizers_that_do_not_do(part: _Part, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_part("conv", part, torch.zeros(4, 8))
    assert str(caught.value) == message


def test_weights_that_are_not_numbers_are_another_model(golden: Any) -> None:
    unet, content, table, config = load("ddim", golden("qdiff_ddim_w4a8_io"))
    content = {**content, "model.conv_in.weight": torch.full_like(content["model.conv_in.weight"], torch.nan)}
    with pytest.raises(ValueError, match=r"^conv_in\.weight: not the weights of this model"):
        load_qdiffusion_(network_of(unet), content, table, config)
