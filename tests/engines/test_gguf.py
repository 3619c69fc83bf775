"""GGUF files: read back by the package gguf and by diffusers, they hold exactly the weights that were calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from script_runs import run_in_process
from small_pipelines import KINDS, image_unet, kandinsky, made, stable, text_model, unet, xl_unet
from torch import Tensor

import qncd
from qncd.engines.gguf import PREFIX, blocks_of, names_of, write_gguf
from qncd.granularity import PerGroup
from qncd.models.network import Network, network_of
from qncd.models.original.unet_names import stable_diffusion_key_map
from qncd.ptq.checkpoint import load_quantized_, save_quantized
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.ranges import round_
from qncd.quant.affine import IntegerRange
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import LayerConfig, QuantLinear
from qncd.recipe import GGUF, QuantConfig, Recipe

BITS = {"q4_0": 4, "q8_0": 8}
SIZES = {"block_out_channels": (32, 64), "norm_num_groups": 8}


def network(kind: str) -> Any:
    """A small UNet, whose rows are blocks of 32 but those of the first linear layers."""
    torch.manual_seed(0)
    made = unet(cross_attention_dim=32, **SIZES) if kind == "SD1" else xl_unet(**SIZES)
    return made.eval().requires_grad_(False)


def inputs(kind: str, rows: int = 12) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    given = {"encoder_hidden_states": torch.randn(rows, 5, 32, generator=generator)}
    if kind == "SDXL":
        given["added_cond_kwargs.text_embeds"] = torch.randn(rows, 16, generator=generator)
        given["added_cond_kwargs.time_ids"] = torch.full((rows, 6), 8.0)
    return CalibrationSet(torch.randn(rows, 4, 8, 8, generator=generator), torch.arange(rows) * 80, given)


@dataclass(frozen=True)
class Written:
    """A network on GGUF's grid, and the file of it."""

    network: Network
    path: Path
    type: str
    kind: str
    config: QuantConfig
    folder: Path  # of the UNet's settings, as diffusers has them


def write(kind: str, form: str, gptq: bool, folder: Path) -> Written:
    found, config = network_of(network(kind)), QuantConfig(BITS[form], None, gptq=gptq, weight_grid=GGUF)
    found.module.save_config(folder)
    calibrate_(quantize_(found, config), inputs(kind), config, 4)
    path = folder / f"unet-{form}.gguf"
    write_gguf(found, path, form, "abc")
    return Written(found, path, form, kind, config, folder)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """SD1 in q4_0, rounded by GPTQ."""
    return write("SD1", "q4_0", True, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """SDXL in q8_0, rounded to nearest, biases corrected."""
    return write("SDXL", "q8_0", False, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(params=["solved", "nearest"])
def written(request: pytest.FixtureRequest) -> Written:
    found: Written = request.getfixturevalue(request.param)
    return found


def test_the_package_gguf_reads_the_very_weights(written: Written) -> None:
    reader, parameters = gguf.GGUFReader(written.path), dict(written.network.module.named_parameters())
    tensors, table = {tensor.name: tensor for tensor in reader.tensors}, stable_diffusion_key_map(written.network.module)
    assert tensors.keys() == {PREFIX + key for key in table}
    assert {layout.names[0] for layout in table.values()} == parameters.keys()
    on_grid = {f"{name}.weight" for name in quant_layers(written.network.module)}
    assert len(on_grid) >= 20
    for key, layout in table.items():
        (name,) = layout.names
        tensor, expected = tensors[PREFIX + key], parameters[name].detach()
        form = written.type.upper() if name in on_grid else "F16" if expected.ndim > 1 else "F32"
        assert tensor.tensor_type.name == form and tuple(reversed(tensor.shape.tolist())) == tuple(expected.shape), name
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)).view(expected.shape)
        assert torch.equal(found, expected.half().float() if form == "F16" else expected), name


def test_the_header_is_what_readers_look_for(written: Written) -> None:
    reader = gguf.GGUFReader(written.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == written.kind.lower()
    assert gguf.LlamaFileType(fields["general.file_type"]).name == f"MOSTLY_{written.type.upper()}"
    assert fields["qncd.version"] == qncd.__version__ and fields["qncd.base_hash"] == "abc"
    assert max(len(tensor.name) for tensor in reader.tensors) < 128  # what ComfyUI-GGUF and stable-diffusion.cpp hold


def test_diffusers_loads_it_and_predicts_the_same(written: Written) -> None:
    loaded = UNet2DConditionModel.from_single_file(
        str(written.path),
        config=str(written.folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    data, ours = inputs(written.kind, 4), network(written.kind)
    # diffusers multiplies scale and code in float16, and the file has all other weights of matrices in it.
    parameters = dict(written.network.module.named_parameters())
    ours.load_state_dict({k: v.half().float() if v.ndim > 1 else v for k, v in parameters.items()}, assign=True)
    with torch.no_grad():
        networks = (network_of(ours), network_of(loaded), written.network)
        expected, found, exact = (one.predict(data.x, data.t, data.inputs) for one in networks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found - exact).square().mean()) < 1e-5 * float(exact.square().mean())


def test_codes_and_scales_are_kept_in_a_checkpoint(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    save_quantized(written.network, path, written.config, "abc", {})
    other = network_of(network(written.kind))
    load_quantized_(other, path, "abc")
    again = tmp_path / "again.gguf"
    write_gguf(other, again, written.type, "abc")
    assert again.read_bytes() == written.path.read_bytes()


@pytest.mark.parametrize(("form", "bits"), BITS.items())
def test_blocks_are_those_of_ggml(form: str, bits: int) -> None:
    """The codes and scales of the package's own quantizer, packed here, are its bytes."""
    kind = gguf.GGMLQuantizationType[form.upper()]
    layer = grouped(bits, "mse")
    expected = gguf.quants.quantize(layer.weight.numpy(), kind)
    values = torch.from_numpy(gguf.quants.dequantize(expected, kind)).view(50, 3, 32)
    scale = torch.from_numpy(expected.reshape(50, 3, -1)[..., :2].copy()).view(torch.float16)[..., 0].float()
    layer.set_weight_codes((values / scale[..., None]).round().view(50, 96), scale)
    data, name = blocks_of("layer", layer)
    assert name == kind.name and np.array_equal(data, expected)


@pytest.mark.parametrize(("form", "bits"), BITS.items())
def test_the_nearest_codes_are_those_of_ggml(form: str, bits: int) -> None:
    """In mode linear. ggml rounds before its scale is float16, and half away from 0; at 8 bits it has no code -128."""
    kind = gguf.GGMLQuantizationType[form.upper()]
    layer = grouped(bits, "max")
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(layer.weight.numpy(), kind), kind))
    errors = [float((weight - layer.weight).square().mean()) for weight in (layer.rounded_weight(), expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.06)
    clipped = grouped(bits, "mse")
    assert float((clipped.rounded_weight() - clipped.weight).square().mean()) < errors[1]


def grouped(bits: int, weight_range: str) -> QuantLinear:
    """A layer whose scales are known, 96 inputs to 50 outputs, and codes still to be rounded."""
    torch.manual_seed(0)
    config = LayerConfig(IntegerRange(bits, True), None, weight_range, "max", weight_granularity=PerGroup(32), new_bias=False)
    layer = QuantLinear.from_float(torch.nn.Linear(96, 50).requires_grad_(False), config)
    layer.search_weight_range_()
    return layer


def output_errors(reference: Any, quantized: Any, data: CalibrationSet) -> dict[str, float]:
    """Mean square error of each layer's output on the reference's own activations, in proportion to the output's."""
    found: dict[str, float] = {}
    layers, handles = quant_layers(quantized), []
    for name in layers:

        def hook(_: Any, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            found[name] = float((layers[name](args[0]) - output).square().mean() / output.square().mean())

        handles.append(reference.get_submodule(name).register_forward_hook(hook))
    network_of(reference).predict(data.x, data.t, data.inputs)
    for handle in handles:
        handle.remove()
    return found


def test_gptq_on_the_blocks_beats_the_nearest_of_ggml(solved: Written) -> None:
    """On the calibration inputs, in nearly every layer; biases are not made where there are none."""
    reference, rough, form = network("SD1"), network("SD1"), gguf.GGMLQuantizationType.Q4_0
    for layer in quant_layers(quantize_(rough, solved.config).module).values():
        rounded = gguf.quants.dequantize(gguf.quants.quantize(layer.weight.numpy(), form), form)
        layer.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)
    ours, theirs = (output_errors(reference, net, inputs("SD1")) for net in (solved.network.module, rough))
    ratios = torch.tensor([ours[name] / theirs[name] for name in ours])
    assert float(ratios.median()) < 0.6 and float((ratios < 1).float().mean()) > 0.95, ratios
    biases = {name for name, _ in reference.named_parameters() if name.endswith(".bias")}
    assert {name for name, _ in solved.network.module.named_parameters() if name.endswith(".bias")} == biases


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("SD3", "sd3"), ("Qwen-Image", "qwen_image"), pytest.param("bundled", "sd3", marks=pytest.mark.slow)],
)
def test_transformers(name: str, architecture: str, tmp_path: Path) -> None:
    """Quantized through a pipeline's calls, written under the release's names, and read by diffusers: the very weights."""
    pipe = qncd.load("configs/scenes_mmdit.yaml") if name == "bundled" else made(name)
    given = {"prompts": ["a large red circle"] * 2} if name == "bundled" else {"calls": [KINDS[name].call]}
    qncd.quantize(pipe, "W4A32", mode="qncd+", weight_grid=GGUF, tracking=False, steps=2, samples=2, **given)
    file, module = qncd.export_gguf(pipe, tmp_path / "q4_0.gguf"), pipe.transformer
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == architecture
    on_grid = sum(tensor.tensor_type.name == "Q4_0" for tensor in reader.tensors)
    assert on_grid >= (30 if name == "bundled" else 4)
    module.save_config(tmp_path / "config")
    loaded = type(module).from_single_file(
        str(file), config=str(tmp_path / "config"), quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )  # fmt: skip
    expected, found = module.state_dict(keep_vars=True), loaded.state_dict(keep_vars=True)
    layers, compared = quant_layers(module), 0
    for key, value in found.items():
        weight = expected[key].detach()
        rows = dequantize_gguf_tensor(value).float() if hasattr(value, "quant_type") else value.detach()
        # diffusers multiplies scale and code in float16, and matrices beside the grid are float16 in the file.
        exact = weight.half().float() if weight.ndim > 1 else weight
        torch.testing.assert_close(rows, exact, rtol=1e-3, atol=1e-6)
        compared += key.removesuffix(".weight") in layers
    assert compared == len(layers)


def test_flux_has_the_names_of_its_release() -> None:
    """As diffusers' own conversion takes them, on rows of one number each: that knows FLUX.1's width alone."""
    config = {"attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 2, "num_single_layers": 2}
    with torch.device("meta"):
        module = FluxTransformer2DModel(**config, guidance_embeds=True)
    architecture, table = names_of(module)
    assert architecture == "flux"
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.rand(value.shape[0], generator=generator) for name, value in module.state_dict().items()}
    released = {key: layout.join(tuple(ours[name] for name in layout.names)) for key, layout in table.items()}
    assert {"double_blocks.1.txt_attn.qkv.bias", "single_blocks.0.linear1.weight", "guidance_in.in_layer.bias"} < released.keys()
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(released))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], value) for name, value in ours.items())
    for key, layout in table.items():
        assert all(torch.equal(a, ours[b]) for a, b in zip(layout.split(released[key]), layout.names, strict=True))


def test_parts_of_one_tensor_have_one_type(tmp_path: Path) -> None:
    module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    network = network_of(module)
    quantize_(network, QuantConfig(4, None, weight_grid=GGUF))
    round_(network)
    module.transformer_blocks[0].attn.to_k = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"x_block.attn.qkv.weight: its parts are of several types: .*to_q.weight Q4_0, .* F16"):
        write_gguf(network, tmp_path / "out.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_recipes() -> None:
    recipe = Recipe.of("qncd", "W4A32", weight_grid=GGUF)
    assert recipe.smoothing is None and recipe.reconstruction is not None and recipe.quant.weight_grid == GGUF
    with pytest.raises(ValueError, match="smoothing divides the inputs of convolutions"):
        Recipe.of("qncd", "W4A32", weight_grid=GGUF, smoothing=True)
    with pytest.raises(ValueError, match="weight_grid gguf with W4A8: allowed are W8A32 and W4A32"):
        Recipe.of("qncd+", "W4A8", weight_grid=GGUF)
    with pytest.raises(ValueError, match="with W6A32: allowed"):
        Recipe.of("qncd", "W6A32", weight_grid=GGUF)


def test_networks_that_no_reader_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"down_block_types .*, expected"):
        write_gguf(network_of(kandinsky().unet), tmp_path / "out.gguf", "f16")
    with pytest.raises(ValueError, match=r"AuraFlowTransformer2DModel: no UNet .*; GGUF files are written of those and of Flux"):
        write_gguf(network_of(made("AuraFlow").transformer), tmp_path / "out.gguf", "f16")
    with pytest.raises(ValueError, match=r"have no name in the original .*: time_embedding.cond_proj.weight"):
        write_gguf(network_of(unet(time_cond_proj_dim=8)), tmp_path / "out.gguf", "f16")
    odd = image_unet(block_out_channels=(16, 16))
    with pytest.raises(ValueError, match="no linear layer whose rows are blocks of 32"):
        quantize_(odd, QuantConfig(8, None, weight_grid=GGUF))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "sd1"
    stable(network("SD1"), text_encoder=text_model(32)).save_pretrained(path)
    return path


@pytest.mark.slow
def test_commands(folder: Path, tmp_path: Path) -> None:
    """Weights calibrated through a pipeline's calls, or rounded to nearest without calibration; and what is refused."""
    model = ("--ckpt", str(folder))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    qncd.quantize(pipe, "W4A32", mode="qncd+", weight_grid=GGUF, prompts=["a cat"], steps=2, samples=2)
    qncd.save(pipe, tmp_path / "saved")
    checkpoint = tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors"
    told = run_in_process("export.py", *model, "--cali_ckpt", checkpoint, "--out", tmp_path / "q4.gguf", status=0)
    assert "not in the file: tracking" in told
    assert qncd.export_gguf(pipe, tmp_path / "python.gguf").read_bytes() == (tmp_path / "q4.gguf").read_bytes()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")  # whose weights are codes alone
    assert qncd.export_gguf(loaded, tmp_path / "loaded.gguf").read_bytes() == (tmp_path / "q4.gguf").read_bytes()
    run_in_process("export.py", *model, "--type", "q4_0", "--out", tmp_path / "nearest.gguf")
    run_in_process("export.py", *model, "--type", "f16", "--out", tmp_path / "f16.gguf")
    sizes = [(tmp_path / name).stat().st_size for name in ("q4.gguf", "nearest.gguf", "f16.gguf")]
    assert sizes[0] == sizes[1] < sizes[2]
    assert (tmp_path / "q4.gguf").read_bytes() != (tmp_path / "nearest.gguf").read_bytes()

    def refused(*flags: Any) -> str:
        return run_in_process("export.py", *model, *flags, status=2)

    assert "which --type? q8_0, q4_0, f16" in refused("--out", tmp_path / "x.gguf")
    assert "--type q4_0 is about FILE.gguf" in refused("--out", tmp_path / "x", "--type", "q4_0")
    wrong = refused("--out", tmp_path / "x.gguf", "--type", "q8_0", "--cali_ckpt", checkpoint)
    assert f"--type q8_0: the weights of --cali_ckpt {checkpoint} are q4_0" in wrong
    assert "one scale for each 32 inputs" in refused("--out", tmp_path / "onnx", "--cali_ckpt", checkpoint)
