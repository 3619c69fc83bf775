"""The quantized checkpoint: what is saved comes back bit for bit, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qncd.models.network import network_of
from qncd.ptq import checkpoint
from qncd.ptq.checkpoint import load_quantized_, pack4, peek_quantized, save_quantized, unpack4
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.quant.inspection import quant_layers
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
    tensors, head = load_file(saved), {"indices": [1], "images": 9, "target": "paper"}

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


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device"), r"No space left on device"),
        (SafetensorError("Error while serializing: I/O error"), r"^\S+model\.safetensors: cannot be written: Error while seri"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    make_unet: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())

    def fail(_tensors: dict[str, Tensor], target: Path, _metadata: dict[str, str]) -> None:
        Path(target).write_bytes(b"half a file")
        raise raised

    monkeypatch.setattr(checkpoint, "save_file", fail)
    unet = calibrated(make_unet(seed=3), QuantConfig(8, 8))
    with pytest.raises(OSError, match=message):
        save_quantized(network_of(unet), path, QuantConfig(8, 8), HASH, {})
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
