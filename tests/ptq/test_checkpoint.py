"""The quantized checkpoint: what is saved comes back bit for bit, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qncd.models.files import safetensors_files
from qncd.models.network import network_of
from qncd.ptq.bits import mean_bits
from qncd.ptq.checkpoint import load_quantized_, peek_quantized, save_quantized
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.quant.inspection import quant_layers
from qncd.quant.packing import pack4, unpack4
from qncd.recipe import QuantConfig, SamplerConfig
from qncd.sampling.correctors.runtime import TABLE_TENSORS, NoiseTable
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.process import Process
from qncd.sampling.schedule import linear_betas

PROCESS = Process.from_betas(linear_betas(1e-4, 0.02, 1000))
HASH = "0123456789abcdef" * 4
SETTINGS = {"timesteps": 4, "skip_type": "uniform"}


def calibrated(unet: Any, config: QuantConfig, smoothed: bool = False) -> Any:
    generator = torch.Generator().manual_seed(4)
    factors = smoothing_factors(network_of(unet), range(0, 1000, 100)) if smoothed else {}
    quantize_(unet, config)
    smooth_(network_of(unet), factors)
    x = torch.randn(8, unet.config.in_channels, 8, 8, generator=generator)
    calibrate_(unet, CalibrationSet(x, torch.arange(8) * 120), config)
    return unet


def images(unet: Any) -> Tensor:
    diffusion = Diffusion(network_of(unet), PROCESS, SamplerConfig(timesteps=4, eta=0.5), (3, 8, 8), lane=4)
    return diffusion.sample([1, 2, 3])


def table() -> NoiseTable:
    return NoiseTable(
        indices=(1, 3),
        coefficients=torch.randn(2, 3, 3),
        spread=torch.rand(2, 3),
        coefficients_all=torch.randn(2, 3),
        spread_all=torch.rand(2),
        variance=torch.rand(2),
        images=48,
        target="consistent",
    )


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 255])
def test_pack4_round_trip(count: int) -> None:
    codes = torch.randint(-8, 8, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    packed = pack4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == ((count + 1) // 2,)
    assert torch.equal(unpack4(packed, (count,)), codes)


def test_pack4_holds_every_pair_in_its_place() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert len(pack4(codes).unique()) == 256
    assert torch.equal(unpack4(pack4(codes.view(16, 4, 4, 2)), (16, 4, 4, 2)), codes.view(16, 4, 4, 2))
    assert pack4(torch.tensor([1, -1], dtype=torch.int8)).tolist() == [0xF1]
    with pytest.raises(ValueError, match=r"^3 bytes of packed codes for 7 weights$"):
        unpack4(torch.zeros(3, dtype=torch.uint8), (7,))


CONFIGS = [
    (QuantConfig(8, 8), False),
    (QuantConfig(4, 8), True),
    (QuantConfig(3, 4, softmax_bits=16, act_symmetric=True), True),
    (QuantConfig(4, None), True),
    (QuantConfig(None, 8, split=False), True),
    (QuantConfig(8, 6, quantize_attention=False, weight_range="max", act_range="max"), False),
    (QuantConfig(4, 4, rotation=True, rank=4, branch_bits=4.0), True),
    (QuantConfig(4, 8, weight_granularity="group32", act_granularity="token"), True),
    (QuantConfig(4, 4, act_granularity="token", temporal_differences=True, attention_bits=6), True),
    (QuantConfig(8, 8, weight_format="fp8", act_format="fp8"), True),
    (QuantConfig(8, 6, weight_format="fp8", weight_granularity="group64", act_granularity="group16"), False),
]


@pytest.mark.parametrize(("config", "smoothed"), CONFIGS, ids=lambda v: v.label if isinstance(v, QuantConfig) else str(v))
@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_images_come_back_bit_for_bit(make_unet: Any, tmp_path: Path, kind: str, config: QuantConfig, smoothed: bool) -> None:
    source = calibrated(make_unet(resnet_time_scale_shift=kind), config, smoothed)
    path = tmp_path / "deep" / "model.safetensors"
    control = table()
    save_quantized(network_of(source), path, config, HASH, SETTINGS, control)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # The base's own weights and biases are all in the file, so that even another seed's model becomes the saved one.
    target = make_unet(seed=1, resnet_time_scale_shift=kind)
    info = load_quantized_(network_of(target), path, HASH)
    back = info.records["noise_table"]
    assert torch.equal(images(target), images(source))
    peeked = peek_quantized(path)
    assert (
        dataclasses.replace(info, records={}) == dataclasses.replace(peeked, records={})
        and info.records.keys() == peeked.records.keys()
    )
    assert (info.config, info.smoothed, info.base_hash, info.settings) == (config, smoothed, HASH, SETTINGS)
    assert isinstance(back, NoiseTable) and (back.indices, back.images, back.target) == ((1, 3), 48, "consistent")
    for field in TABLE_TENSORS:
        assert torch.equal(getattr(back, field), getattr(control, field))
    layers = quant_layers(source)
    for name, layer in quant_layers(target).items():
        assert torch.equal(layer.weight, layers[name].weight), name
    save_quantized(network_of(target), tmp_path / "again.safetensors", config, HASH, SETTINGS, control)
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_cross_attention_round_trip(make_cross_unet: Any, tmp_path: Path, bias_correction: bool) -> None:
    """Layers without a bias among them, which bias correction gives one."""
    config = QuantConfig(4, 8, bias_correction=bias_correction)
    unet = quantize_(make_cross_unet(), config).module
    x, t, context = torch.randn(3, 4, 8, 8), torch.tensor([9, 500, 900]), torch.randn(3, 5, 12)
    calibrate_(unet, CalibrationSet(x, t, {"encoder_hidden_states": context}), config)
    save_quantized(network_of(unet), tmp_path / "m", config, HASH, {})
    target = make_cross_unet()
    assert load_quantized_(network_of(target), tmp_path / "m").records == {}
    assert torch.equal(target(x, t, context).sample, unet(x, t, context).sample)


def test_four_bit_files_are_small(make_unet: Any, tmp_path: Path) -> None:
    unet = make_unet(block_out_channels=(32, 96))
    floats = sum(4 * p.numel() for p in unet.parameters())
    save_quantized(
        network_of(calibrated(unet, QuantConfig(4, 8), True)), tmp_path / "m", QuantConfig(4, 8), HASH, SETTINGS, table()
    )
    size = (tmp_path / "m").stat().st_size
    assert size < 0.2 * floats, f"{size} of {floats} bytes"


@pytest.fixture(scope="module")
def saved(make_unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_quantized(network_of(calibrated(make_unet(), QuantConfig(4, 8), True)), path, QuantConfig(4, 8), HASH, SETTINGS, table())
    return path


def test_another_base_is_refused(make_unet: Any, saved: Path) -> None:
    unet = make_unet()
    with pytest.raises(ValueError) as caught:
        load_quantized_(network_of(unet), saved, "f" * 64)
    assert str(caught.value) == f"{saved}: made from a base model with weights 0123456789ab, this one has ffffffffffff"
    assert not quant_layers(unet)


@pytest.mark.parametrize("part", [0.0, 4, 8, 60, 0.01, 0.1, 0.5, 0.99, -1])
def test_cut_files_are_refused(make_unet: Any, saved: Path, tmp_path: Path, part: float) -> None:
    content, path = saved.read_bytes(), tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    start = f"{path}: not a whole quantized checkpoint (cut off or of another kind): "
    for read in (peek_quantized, lambda p: load_quantized_(network_of(make_unet()), p)):
        with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
            read(path)


def test_other_files_are_refused(make_unet: Any, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(path))}: no such quantized checkpoint$"):
        peek_quantized(path)
    path.write_text("a text file that is long enough to hold a header's length")
    with pytest.raises(ValueError, match="not a whole quantized checkpoint"):
        peek_quantized(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: format None; allowed is qncd-1$"):
        peek_quantized(path)
    header = {"format": "qncd-1", "config": "{}", "base_hash": HASH}
    for damage in ({}, {"settings": "{"}, {"settings": "{}", "config": '{"weight_bitz": 4}'}):
        save_file({"a": torch.zeros(1)}, path, {**header, **damage})
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: damaged header: "):
            peek_quantized(path)
    tensors, head = load_file(saved), {"indices": [1, 3], "images": 9, "target": "paper"}

    def write(tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        save_file(tensors, path, {**header, "settings": "{}", "noise_table": json.dumps(head)})

    write(tensors, head)
    assert peek_quantized(path).records.keys() == {"noise_table"}
    for name in TABLE_TENSORS:
        write({key: value for key, value in tensors.items() if key != f"noise_table.{name}"}, head)
        with pytest.raises(ValueError, match=rf"damaged header: '{name}'$"):
            peek_quantized(path)
    for name in head:
        write(tensors, {key: value for key, value in head.items() if key != name})
        with pytest.raises(ValueError, match=rf"damaged header: '{name}'$"):
            peek_quantized(path)
    # A table as files held it before there was a regression.
    old = {key: value for key, value in tensors.items() if not key.startswith("noise_table.coefficients")}
    write({**old, "noise_table.mean": torch.zeros(2, 3)}, {"indices": [1], "target": "paper"})
    with pytest.raises(ValueError, match=r"damaged header: "):
        peek_quantized(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (16, 24)}, r"does not fit this model: "),
        ({"layers_per_block": 2}, r"has no tensor \S+: made from another architecture$"),
        ({"in_channels": 1, "out_channels": 1}, r"does not fit this model: "),
        (
            {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
            r"tensors that this model has no place",
        ),
        ({"resnet_time_scale_shift": "scale_shift"}, r"does not fit this model: "),
    ],
)
def test_another_architecture_is_refused(make_unet: Any, saved: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(saved))}: .*{message}"):
        load_quantized_(network_of(make_unet(**config)), saved)


@pytest.mark.parametrize("bits", [(4, 8), (4, None)])
def test_only_calibrated_models_are_saved(make_unet: Any, tmp_path: Path, bits: tuple[int, int | None]) -> None:
    config = QuantConfig(*bits)
    for unet in (make_unet(), quantize_(make_unet(), config).module):
        with pytest.raises(ValueError, match=r"^only a calibrated model can be saved$"):
            save_quantized(network_of(unet), tmp_path / "m", config, HASH, {})
    assert not (tmp_path / "m").exists()


def test_a_failed_write_leaves_the_old_file(make_unet: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files, "_raw", full_disk)
    unet = calibrated(make_unet(seed=3), QuantConfig(8, 8))
    with pytest.raises(ValueError) as caught:
        save_quantized(network_of(unet), path, QuantConfig(8, 8), HASH, {})
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert path.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_does_not_fit_leaves_the_network_as_it_was(make_unet: Any, tmp_path: Path) -> None:
    path, x = tmp_path / "q.safetensors", torch.randn(2, 3, 8, 8)
    wide = make_unet(block_out_channels=(16, 48))
    quantize_(wide, QuantConfig(4, 8))
    calibrate_(wide, CalibrationSet(x, torch.tensor([3, 500])), QuantConfig(4, 8))
    save_quantized(network_of(wide), path, QuantConfig(4, 8), "h", {})
    unet = make_unet()
    before, names = unet(x, 10).sample, [name for name, _ in unet.named_parameters()]
    with pytest.raises(ValueError, match="does not fit this model"):
        load_quantized_(network_of(unet), path)
    assert not quant_layers(unet) and [name for name, _ in unet.named_parameters()] == names
    assert torch.equal(unet(x, 10).sample, before)


def test_equal_runs_write_equal_bytes(make_unet: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        source = calibrated(make_unet(), QuantConfig(4, 8), True)
        save_quantized(network_of(source), tmp_path / name, QuantConfig(4, 8), HASH, SETTINGS, TABLE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


TABLE = table()
CONV = "down_blocks.0.resnets.0.conv1"


def at(value: Tensor, wrong: float) -> Tensor:
    """The tensor with another first number."""
    changed = value.clone()
    changed.view(-1)[0] = wrong
    return changed


def rewrite(source: Path, target: Path, changes: dict[str, Tensor], **metadata: str) -> None:
    """Write a checkpoint again with other tensors or other texts in the header."""
    with safe_open(source, "pt") as file:
        header = file.metadata()
    tensors = {**load_file(source), **{name: value.contiguous() for name, value in changes.items()}}
    save_file(tensors, target, {**header, **metadata})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{CONV}.weight_scale", lambda v: at(v, 0), "holds 0, allowed are numbers above 0"),
        (f"{CONV}.weight_scale", lambda v: at(v, -1), "holds -1, allowed are numbers above 0"),
        (f"{CONV}.weight_scale", lambda v: at(v, torch.nan), "holds NaN or infinity"),
        (f"{CONV}.weight_scale", lambda v: v[:1], "shape (1, 1), expected (16, 1)"),
        (f"{CONV}.weight_scale", lambda v: v.long(), "torch.int64, expected floating point numbers"),
        (f"{CONV}.bias", lambda v: v[:1], "shape (1,), expected (16,)"),
        (f"{CONV}.bias", lambda v: at(v, torch.inf), "holds NaN or infinity"),
        ("down_blocks.0.resnets.0.conv2.smoothing", lambda v: at(v, -1), "holds -1, allowed are numbers above 0"),
        (f"{CONV}.weight_packed", lambda v: v[1:], "shape (1151,), expected (1152,)"),
        (f"{CONV}.weight_packed", lambda v: v.to(torch.int8), "torch.int8, expected torch.uint8"),
        ("conv_in.weight_codes", lambda v: v.float(), "torch.float32, expected torch.int8"),
        (f"{CONV}.act.scale", lambda v: at(v, torch.inf), "holds NaN or infinity"),
        (f"{CONV}.act.scale", lambda v: v.view(()), "shape (), expected (1,)"),
        (f"{CONV}.act.zero_point", lambda v: at(v, 256), "holds 256, allowed are 0 to 255"),
        (f"{CONV}.act.zero_point", lambda v: at(v, 0.5), "holds numbers that are not whole"),
        ("conv_norm_out.weight", lambda v: at(v, torch.nan), "holds NaN or infinity"),
        ("conv_norm_out.weight", lambda v: v[:1], "shape (1,), expected (16,)"),
    ],
)
def test_tensors_that_do_not_do(make_unet: Any, saved: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    path, unet = tmp_path / "q.safetensors", make_unet()
    rewrite(saved, path, {name: change(load_file(saved)[name])})
    with pytest.raises(ValueError) as caught:
        load_quantized_(network_of(unet), path)
    assert str(caught.value) == f"{path}: does not fit this model: {name}: {message}"
    assert not quant_layers(unet)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rotation", torch.tensor([16, 16]), "{}: shape (2,), expected (1,)"),
        ("rotation", torch.tensor([16.0]), "{}: torch.float32, expected torch.int64"),
        ("rotation", torch.tensor([32]), "{}: holds 32, allowed are 2 to 16"),
        ("rotation", torch.tensor([12]), "rotations of 12 channels: allowed are powers of two that divide 16"),
        ("up", torch.ones(16), f"{CONV}.down: shape (2, 16, 3, 3), expected (16, 16, 3, 3)"),
        ("up", torch.full((16, 2), torch.nan).half(), "{}: holds NaN or infinity"),
        ("down", torch.ones(2, 16, 3, 1).half(), "{}: shape (2, 16, 3, 1), expected (2, 16, 3, 3)"),
    ],
)
def test_rotations_and_branches_that_do_not_do(
    make_unet: Any, saved: Path, tmp_path: Path, name: str, value: Tensor, message: str
) -> None:
    path, unet, key = tmp_path / "q.safetensors", make_unet(), f"{CONV}.{name}"
    whole = {f"{CONV}.down": torch.ones(2, 16, 3, 3).half(), f"{CONV}.up": torch.ones(16, 2).half()}
    rewrite(saved, path, {**whole, key: value})
    with pytest.raises(ValueError) as caught:
        load_quantized_(network_of(unet), path)
    assert str(caught.value) == f"{path}: does not fit this model: {message.format(key)}"
    assert not quant_layers(unet)


def test_fp8_codes_are_in_the_file_as_numbers(make_unet: Any, tmp_path: Path) -> None:
    path, config, name = tmp_path / "q.safetensors", QuantConfig(8, None, weight_format="fp8"), f"{CONV}.weight_codes"
    source = calibrated(make_unet(), config)
    save_quantized(network_of(source), path, config, HASH, SETTINGS)
    codes, scale = load_file(path)[name], load_file(path)[f"{CONV}.weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float() * scale[..., None, None], quant_layers(source)[CONV].weight)
    rewrite(path, tmp_path / "bad", {name: at(codes.view(torch.int8), 127).view(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{name}: holds NaN or infinity$"):
        load_quantized_(network_of(make_unet()), tmp_path / "bad")


def test_scales_of_groups_take_two_bytes(make_unet: Any, tmp_path: Path) -> None:
    """Codes and scales of 4-bit weights in groups are as large in the file as the mean bits say."""
    config = QuantConfig(4, None, edge_bits=None, weight_granularity="group32")
    source = calibrated(make_unet(block_out_channels=(32, 96)), config)
    save_quantized(network_of(source), tmp_path / "q", config, HASH, SETTINGS)
    parts = {
        name: value for name, value in load_file(tmp_path / "q").items() if name.endswith((".weight_packed", ".weight_scale"))
    }
    assert {value.dtype for name, value in parts.items() if name.endswith(".weight_scale")} == {torch.float16}
    size, weights = sum(value.nbytes for value in parts.values()), sum(m.weight.numel() for m in quant_layers(source).values())
    found = mean_bits(network_of(source), CalibrationSet(torch.zeros(1, 3, 8, 8), torch.tensor([1]))).weight_bits
    assert 8 * size / weights == pytest.approx(found, rel=1e-3) and 4.5 < found < 4.6


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_beyond_their_bits(make_unet: Any, tmp_path: Path, bits: int) -> None:
    path, config, name = tmp_path / "q.safetensors", QuantConfig(bits, None), f"{CONV}.weight_packed"
    save_quantized(network_of(calibrated(make_unet(), config)), path, config, HASH, SETTINGS)
    rewrite(path, tmp_path / "bad", {name: at(load_file(path)[name], 0x07)})
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with pytest.raises(ValueError, match=rf"{name}: holds 7, allowed are {low} to {high}$"):
        load_quantized_(network_of(make_unet()), tmp_path / "bad")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", "[]", "config: expected names with values"),
        ("config", "[" * 100_000, "config: no JSON (maximum recursion depth exceeded"),
        ("config", '{"weight_bits": "4"}', "config: weight_bits '4': allowed are whole numbers, 2 to 8"),
        ("config", '{"weight_bitz": 4}', "config: QuantConfig.__init__() got an unexpected keyword argument 'weight_bitz'"),
        ("settings", "3", "settings: expected names with values"),
        ("settings", '{"times": [1, "2"]}', "settings: times: expected a list of numbers, 0 or more"),
        ("settings", '{"times": [NaN]}', "settings: times: expected a list of numbers, 0 or more"),
        ("settings", '{"recipe": 3}', "settings: recipe: expected names with values"),
        ("settings", '{"recipe": {"mod": "qncd"}}', "settings: unknown option 'mod': did you mean mode?"),
        ("settings", '{"sampler": [1]}', "settings: sampler: expected names with values"),
        ("settings", '{"guidance": "7"}', "settings: guidance: expected a number"),
        ("noise_table", "[]", "noise_table: list indices must be integers or slices, not str"),
        ("noise_table", '{"indices": [1], "images": 48, "target": "paper"}', "noise_table: indices of 1 steps for a table of 2"),
        ("noise_table", '{"indices": [1, -3], "images": 48, "target": "paper"}',
         "noise_table: indices -3: allowed are whole numbers, 0 or more"),
        ("noise_table", '{"indices": [1, 3], "images": 0, "target": "paper"}',
         "noise_table: images 0: allowed are whole numbers, 1 or more"),
        ("noise_table", '{"indices": [1, 3], "images": 48, "target": "x"}',
         "noise_table: target 'x': allowed are consistent, paper"),
    ],
)  # fmt: skip
def test_headers_that_do_not_do(saved: Path, tmp_path: Path, key: str, value: str, message: str) -> None:
    path = tmp_path / "q.safetensors"
    rewrite(saved, path, {}, **{key: value})
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{path}: damaged header: {message}')}"):
        peek_quantized(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("spread", lambda v: at(v, torch.nan), "spread: expected finite floating point numbers"),
        ("spread", lambda v: v[:, :1], "spread of shape (2, 1), expected (2, 3)"),
        ("variance", lambda v: v[:1], "variance of shape (1,), expected (2,)"),
        ("coefficients", lambda v: v[..., :2], "coefficients of shape (2, 3, 2), expected (2, 3, 3)"),
    ],
)
def test_records_that_do_not_do(saved: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    path, key = tmp_path / "q.safetensors", f"noise_table.{name}"
    rewrite(saved, path, {key: change(load_file(saved)[key])})
    with pytest.raises(ValueError) as caught:
        peek_quantized(path)
    assert str(caught.value) == f"{path}: damaged header: noise_table: {message}"


def test_a_record_of_other_channels(make_unet: Any, tmp_path: Path) -> None:
    path, config = tmp_path / "q.safetensors", QuantConfig(8, None)
    gray = make_unet(in_channels=1, out_channels=1)
    save_quantized(network_of(calibrated(gray, config)), path, config, HASH, SETTINGS, TABLE)
    with pytest.raises(ValueError, match=r"noise_table: made for 3 channels, the model has 1$"):
        load_quantized_(network_of(make_unet(in_channels=1, out_channels=1)), path)
