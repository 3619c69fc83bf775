"""Integer kernels against the fake-quantized network that they replace: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import collections
import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from quantized_networks import TIMES, assert_same_in_integers, call, called_pipeline, inputs, prepared
from small_pipelines import KINDS, made
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qncd
from qncd.engines.engine import check_engine
from qncd.engines.network import EngineNetwork, in_float32
from qncd.granularity import PER_ROW
from qncd.models.loading import load_config, load_ddim
from qncd.models.network import network_of
from qncd.models.seen import seen_inputs
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.temporal import set_all_stepwise_
from qncd.quant.affine import IntegerRange
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.dynamic import DynamicActQuantizer
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantConv2d, QuantLayer
from qncd.quant.quantizers import Stage
from qncd.recipe import QuantConfig

pytest.importorskip("triton")
from qncd.engines.triton import kernels
from qncd.engines.triton.blocks import IntegerResnetBlock, attend_on_codes
from qncd.engines.triton.engine import open_triton
from qncd.engines.triton.grids import Grids
from qncd.engines.triton.layers import IntegerConv2d, IntegerLinear
from qncd.engines.triton.network import IntegerNetwork
from qncd.engines.triton.operands import Grid, Norm, Ranges, TokenGrid, padded_channels

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPWISE = QuantConfig(4, 6, stepwise_activations=True, bit_allocation=True)
OF_TOKENS = {"act_granularity": "token", "quantize_attention": False}
TOKENS = QuantConfig(8, 6, act_granularity="token", quantize_attention=False)
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


@pytest.fixture(autouse=True)
def exact_reference() -> Any:
    """PyTorch's convolutions in float32: on a GPU they are in TF32 as they come."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def grid(scale: float, codes: IntegerRange, zero: int, smoothing: Tensor | None = None) -> Grid:
    stored = zero - codes.qmin - 128 if codes.bits == 8 else 0
    row = torch.zeros((), dtype=torch.int32, device=DEVICE)
    return Grid(torch.tensor([scale], device=DEVICE), row, codes.qmin - zero, codes.qmax - zero, stored, smoothing)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("unet", QuantConfig(8, 8)), ("unet", STEPWISE), ("cross_unet", QuantConfig(4, 8, softmax_bits=16))],
    ids=lambda value: getattr(value, "label", value),
)
def test_every_layer_and_the_network(kind: str, config: QuantConfig, make_unet: Any, make_cross_unet: Any) -> None:
    """Each layer gives the same up to float32 rounding on the inputs that it gets; the network is as near as engines are."""
    full = (make_unet if kind == "unet" else make_cross_unet)()
    stepwise = set_all_stepwise_ if config.stepwise_activations else None
    unet = prepared(copy.deepcopy(full), config, stepwise).to(DEVICE)
    engine = open_triton(unet)
    assert engine.one_step_a_call == bool(stepwise)
    assert_same_in_integers(full.to(DEVICE), unet, engine, count=2)

    left = [m for m in engine.session.network.module.modules() if isinstance(m, ResnetBlock2D | Transformer2DModel | QuantLayer)]
    assert not left  # every block is fused

    grids, seen, worst = Grids(unet.device), dict[str, tuple[Tensor, Tensor]](), 0.0
    for name, layer in quant_layers(unet).items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    call(unet, inputs(unet, 1))
    for name, layer in quant_layers(unet).items():
        kind_ = IntegerConv2d if isinstance(layer, QuantConv2d) else IntegerLinear
        integer = kind_(name, layer, grids, torch.float32)
        x, expected = seen[name]
        worst = max(worst, float((integer(x) - expected).norm() / expected.norm()))
    assert worst < 1e-5


@pytest.mark.slow
def test_the_bundled_model() -> None:
    """With real weights, and with what is not quantized in half precision too."""
    box = load_ddim(load_config(ROOT / "configs" / "fashion_mnist.yml"), None, False)
    unet = prepared(copy.deepcopy(box), QuantConfig(8, 8)).to(DEVICE)
    for precision in ("fp32", "fp16"):
        assert_same_in_integers(box.to(DEVICE), unet, open_triton(unet, precision), count=1)
    assert all(p.dtype == torch.float32 for p in unet.parameters())


def test_time_steps_of_a_batch_are_called_one_by_one(make_unet: Any) -> None:
    """Each row gets the ranges of its own step."""
    unet = prepared(make_unet(), STEPWISE, set_all_stepwise_).to(DEVICE)
    engine, data = open_triton(unet), inputs(unet, 3)
    together = call(engine, data)
    for i in range(3):
        alone = engine(data.x[i : i + 1].to(DEVICE), TIMES[i]).sample.cpu()
        torch.testing.assert_close(together[i : i + 1], alone)


@on_gpu
def test_a_recorded_call_takes_new_inputs(make_unet: Any) -> None:
    unet = prepared(make_unet(), STEPWISE, set_all_stepwise_).to(DEVICE)
    network = IntegerNetwork(network_of(unet))
    for seed, time in ((0, 1), (1, 751), (2, 251)):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        given = {"sample": x, "timestep": torch.full((4,), time, device=DEVICE)}
        torch.testing.assert_close(network(given), network._run(given), rtol=0, atol=0)
    assert len(network.graphs) == 1


@pytest.mark.parametrize("shape", [(2, 12, 7, 5), (1, 160, 9, 9)])
def test_group_norms(shape: tuple[int, ...]) -> None:
    norm = nn.GroupNorm(4, shape[1]).to(DEVICE)
    nn.init.normal_(norm.weight)
    x = randn(*shape) * 3 + 50
    rows = x.permute(0, 2, 3, 1).contiguous()
    factor, term = kernels.group_norm(rows, 4, norm.weight, norm.bias, norm.eps)
    found = kernels.pointwise(rows, affine=(factor, term), act="silu", dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(found, F.silu(norm(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("smooth", [False, True])
def test_codes_of_everything_before_a_product(bits: int, smooth: bool) -> None:
    """Doubled and padded pixels, GEGLU, parts of the channels, layer norms: as torch computes them, then rounded."""
    codes, scale, zero = IntegerRange(bits, False), 0.11, 3

    def expected(x: Tensor, factors: Tensor | None) -> Tensor:
        """Codes less the zero point, (N, H, W, C)."""
        x = x if factors is None else x / factors
        return torch.clamp(torch.round(x / scale), codes.qmin - zero, codes.qmax - zero)

    def check(found: Tensor, exact: Tensor, g: Grid) -> None:
        assert found.dtype == torch.int8 and found.shape[-1] == padded_channels(exact.shape[-1])
        apart = (found[..., : exact.shape[-1]].float() - g.zero - exact).abs()
        assert float(apart.max()) <= 1 and float((apart > 0).float().mean()) < 1e-3

    x = randn(2, 5, 4, 40)
    factors = torch.linspace(0.5, 2, 40, device=DEVICE) if smooth else None
    g = grid(scale, codes, zero, factors)
    larger = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    padded = F.pad(larger, (0, 0, 1, 2, 0, 1))
    check(kernels.pointwise(x, g, up=True, pads=(0, 1, 1, 2)), expected(padded, factors), g)
    norm = nn.LayerNorm(40).to(DEVICE)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        check(kernels.normed(x, Norm(norm.eps, norm.weight, norm.bias), g), expected(norm(x), factors), g)
    some = None if factors is None else factors[:20].contiguous()
    g = grid(scale, codes, zero, some)
    check(kernels.pointwise(x, g, gated=True), expected(x[..., :20] * F.gelu(x[..., 20:]), some), g)
    check(kernels.pointwise(x, g, part=slice(20, 40)), expected(x[..., 20:], some), g)


@pytest.mark.parametrize("codes", [IntegerRange(8, False), IntegerRange(4, False), IntegerRange(8, True)], ids=str)
@pytest.mark.parametrize("of_images", [False, True])
def test_codes_of_ranges_found_at_run_time(codes: IntegerRange, of_images: bool) -> None:
    """As the quantizer of fake quantization has them: rows of one sign and of zeros, and what is padded."""
    x, factors = randn(2, 3, 4, 40), torch.linspace(0.5, 2, 40, device=DEVICE)
    x[0, 0, 0], x[0, 0, 1], x[1, 2] = 0.0, x[0, 0, 1].abs() + 1, -x[1, 2].abs()
    quantizer = DynamicActQuantizer(codes, PER_ROW, (-3, -2, -1) if of_images else (-1,))
    quantizer.set_stage(Stage.QUANTIZE)
    expected, g = quantizer(x / factors), TokenGrid(codes, factors)
    found = kernels.image_codes(x, g, (1, 0, 2, 1)) if of_images else kernels.token_codes(x, g)
    assert isinstance(found.grid, Ranges)
    scale, zero = ((v.view(2, 1, 1, 1) if of_images else v.view(2, 3, 4, 1)) for v in (found.grid.scale, found.grid.zero))
    values = (found.codes - zero).float() * scale
    if of_images:
        assert not values[:, :1].any() and not values[:, 4:].any() and not values[:, :, 4:].any()
        values = values[:, 1:4, :4]
    torch.testing.assert_close(values[..., :40], expected)
    assert found.codes.dtype == torch.int8 and found.codes.shape[-1] == padded_channels(40)


@pytest.mark.parametrize(("length", "keys", "depth"), [(70, 70, 24), (64, 128, 16), (20, 7, 40)])
@pytest.mark.parametrize("softmax_bits", [8, 16])
def test_attention(length: int, keys: int, depth: int, softmax_bits: int) -> None:
    """QuantAttnProcessor's products: numbers of keys and widths that no block fits, and wide softmax codes."""
    codes, wide = IntegerRange(8, False), IntegerRange(softmax_bits, False)
    processor = QuantAttnProcessor(codes, wide, "max").to(DEVICE)
    q, k, v = randn(2, length, 3 * depth), randn(2, keys, 3 * depth), randn(2, keys, 3 * depth)
    for quantizer, scale, zero in ((processor.q, 0.03, 120), (processor.k, 0.02, 128), (processor.v, 0.04, 100)):
        quantizer.set_qparams(torch.tensor([scale], device=DEVICE), torch.tensor([float(zero)], device=DEVICE))
    processor.softmax.set_qparams(torch.tensor([1 / wide.qmax], device=DEVICE), torch.zeros(1, device=DEVICE))
    for quantizer in (processor.q, processor.k, processor.v, processor.softmax):
        quantizer.set_stage(Stage.QUANTIZE)
    heads = [part.unflatten(2, (3, depth)).transpose(1, 2) for part in (processor.q(q), processor.k(k), processor.v(v))]
    expected = processor.attend(*heads, None, depth**-0.5, False).transpose(1, 2).flatten(2)
    grids = [grid(0.03, codes, 120), grid(0.02, codes, 128), grid(0.04, codes, 100)]
    whole = [kernels.pointwise(x[:, None], g, dtype=torch.float16)[:, 0] for x, g in zip((q, k, v), grids, strict=True)]
    found = kernels.attend(*whole, grids, grid(1 / wide.qmax, wide, 0), 3, depth**-0.5, torch.float32)
    one_code = float((heads[2].abs().sum(2) / wide.qmax).max())
    assert float((found - expected).abs().max()) <= one_code
    assert float((found - expected).norm() / expected.norm()) < (2e-3 if softmax_bits == 8 else 1e-4)


def test_attention_with_a_mask() -> None:
    """For each head and query, and one row for all; whole blocks of keys that nobody sees; minus infinity and large numbers."""
    codes, length, keys = IntegerRange(8, False), 20, 70
    processor = QuantAttnProcessor(codes, codes, "max").to(DEVICE)
    q, k, v = (randn(2, 3, tokens, 16) for tokens in (length, keys, keys))
    for quantizer, scale, zero in ((processor.q, 0.03, 120), (processor.k, 0.02, 128), (processor.v, 0.04, 100)):
        quantizer.set_qparams(torch.tensor([scale], device=DEVICE), torch.tensor([float(zero)], device=DEVICE))
    processor.softmax.set_qparams(torch.tensor([1 / 255], device=DEVICE), torch.zeros(1, device=DEVICE))
    for quantizer in (processor.q, processor.k, processor.v, processor.softmax):
        quantizer.set_stage(Stage.QUANTIZE)
    far = torch.arange(keys, device=DEVICE) < 65
    masks = {
        "bias": randn(2, 3, length, keys),
        "first keys": torch.zeros(keys, device=DEVICE).masked_fill(far, float("-inf")).expand(2, 3, 1, keys),
        "one image": torch.stack([torch.zeros(keys, device=DEVICE), -10000.0 * far]).view(2, 1, 1, keys),
    }
    integers = copy.deepcopy(processor)
    attend_on_codes("attn", integers, Grids(torch.device(DEVICE)), torch.float32)
    for name, mask in masks.items():
        whole = mask.expand(2, 3, length, keys)
        expected = processor.attend(processor.q(q), processor.k(k), processor.v(v), whole, 0.25, False)
        found = integers.attend(integers.q(q), integers.k(k), integers.v(v), whole, 0.25, False)
        assert float((found - expected).norm() / expected.norm()) < 3e-3, name
    blind = integers.attend(q, k, v, None, 0.25, False)
    assert float((blind - found).norm() / found.norm()) > 0.1


@pytest.mark.parametrize(
    ("kind", "width", "mode", "options"),
    [("DiT", "W4A4", "qncd+", {}), ("FLUX", "W8A8", "svdquant", {}), ("SD3", "W8A8", "linear", {}),
     ("Qwen-Image", "W8A8", "linear", {}), ("DiT", "W4A4", "qncd+", OF_TOKENS), ("Sana", "W8A8", "linear", OF_TOKENS),
     *(pytest.param(kind, "W8A8", "linear", {}, marks=pytest.mark.slow)
       for kind in ("PixArt alpha", "AuraFlow", "Chroma", "HunyuanDiT", "Lumina2", "Sana", "Wan", "Z-Image"))],
    ids=str,
)  # fmt: skip
def test_transformers(kind: str, width: str, mode: str, options: dict[str, Any]) -> None:
    """Joint and masked attention, rotary embeddings, rotations, branches, scales of tokens and lists give what torch does."""
    full, network, call = called_pipeline(kind, width, mode, DEVICE, **options)
    given = (call.x, call.t, call.inputs)
    with torch.no_grad():
        exact, expected = (part.call(*given, **call.constants) for part in (full, network))
        found = network_of(open_triton(network.module)).call(*given, **call.constants)
    assert (found - expected).square().mean() < 0.2 * (expected - exact).square().mean()  # ties tip
    assert (found - expected).abs().median() < 1e-5 * expected.abs().mean()


class Counted(TorchDispatchMode):
    """How often torch's operations are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["DiT", "FLUX", "SD3"])
def test_blocks_of_transformers_are_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No norm, activation, modulation or gate of a block is an operation of its own, and the result is the same without."""
    _, network, call = called_pipeline(kind, "W8A8", "linear", DEVICE)
    given = (call.x, call.t, call.inputs)
    engine, alone = network_of(open_triton(network.module)), network_of(open_triton(network.module))
    with torch.no_grad(), Counted() as fused:
        found = engine.call(*given, **call.constants)
    monkeypatch.setattr("qncd.engines.triton.network.Fusing", contextlib.nullcontext)
    with torch.no_grad(), Counted() as plain:
        expected = alone.call(*given, **call.constants)
    assert (found - expected).square().mean() < 1e-4 * expected.square().mean()  # ties tip
    assert (found - expected).abs().median() < 1e-5 * expected.abs().mean()
    names = ("native_layer_norm", "rms_norm", "gelu", "silu")
    assert sum(plain.counts[name] for name in names) > 10 and not any(fused.counts[name] for name in names)
    blocks = sum(
        len(part) for name, part in network.module.named_children() if isinstance(part, nn.ModuleList) and "blocks" in name
    )
    assert plain.counts["mul"] - fused.counts["mul"] >= 4 * blocks


def test_half_precision() -> None:
    """A pipeline in bfloat16, with what is not quantized in float32: as its float32 form in PyTorch."""
    pipe = made("SD3").to(DEVICE, torch.bfloat16)
    qncd.quantize(pipe, "W8A8", mode="linear", calls=[KINDS["SD3"].call] * 2, steps=2)
    network, generator = network_of(pipe.transformer), torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(2, *shape, generator=generator).to(DEVICE)
        for name, (shape, _) in (seen_inputs(network.module) or {}).items()
        if name not in (network.sample_name, network.time_name)
    }
    x, t = torch.randn(2, 4, 8, 8, generator=generator).to(DEVICE), torch.full((2,), 500.0, device=DEVICE)
    with torch.no_grad():
        expected = in_float32(network).call(x, t, inputs)
        found = network_of(open_triton(network.module)).call(x, t, inputs)
    assert found.dtype is torch.float32 and network.dtype is torch.bfloat16
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()  # ties tip
    assert (found - expected).abs().median() < 1e-4 * expected.abs().mean()


def test_rotations_and_branches_of_unets(make_cross_unet: Any) -> None:
    """Rotated layers stay fused; layers with a branch are computed one by one."""
    for config in (QuantConfig(8, 8, rotation=True), QuantConfig(8, 8, rank=2, branch_bits=4.0)):
        full = make_cross_unet()
        unet = prepared(copy.deepcopy(full), config).to(DEVICE)
        engine = open_triton(unet)
        assert_same_in_integers(full.to(DEVICE), unet, engine, count=2)
        fused = [m for m in engine.session.network.module.modules() if isinstance(m, IntegerResnetBlock)]
        assert bool(fused) == (config.rank == 0)


def test_attention_with_a_group_norm(make_unet: Any) -> None:
    """Of pixels, and of tokens that lie side by side already."""
    unet = prepared(make_unet(), QuantConfig(8, 8)).to(DEVICE)
    engine = open_triton(unet)
    name = next(name for name, module in unet.named_modules() if getattr(module, "group_norm", None) is not None)
    attn, integers = unet.get_submodule(name), engine.session.network.module.get_submodule(name)
    call(unet, inputs(unet, 1))
    for x in (randn(2, 32, 4, 4), randn(2, 16, 32)):
        with torch.no_grad():
            expected, found = attn(x), integers(x)
        assert (found - expected).norm() < 1e-3 * expected.norm()
        assert (found - expected).abs().median() < 1e-5 * expected.abs().mean()


def test_scales_of_tokens_in_unets(make_cross_unet: Any) -> None:
    """Those of convolutions are of images, in the halves of skip concatenations apart."""
    full = make_cross_unet()
    unet = prepared(copy.deepcopy(full), TOKENS).to(DEVICE)
    data = inputs(unet, 2)
    exact, expected, found = call(full.to(DEVICE), data), call(unet, data), call(open_triton(unet), data)
    assert (found - expected).square().mean() < 0.1 * (expected - exact).square().mean()  # ties tip
    assert (found - expected).abs().median() < 1e-5 * expected.abs().mean()


@on_gpu
def test_what_cannot_be_recorded_runs_all_the_same(caplog: pytest.LogCaptureFixture, make_unet: Any) -> None:
    unet = prepared(make_unet(), QuantConfig(8, 8)).to(DEVICE)
    network = IntegerNetwork(network_of(unet))
    plain = network._run

    def from_the_cpu(given: dict[str, Tensor]) -> Tensor:
        return plain({**given, "sample": given["sample"] + torch.ones(3, 1, 1).to(DEVICE)})

    network._run = from_the_cpu  # type: ignore[method-assign]
    given = {"sample": torch.zeros(1, 3, 8, 8, device=DEVICE), "timestep": torch.ones(1, device=DEVICE)}
    expected = from_the_cpu(given)
    for _ in range(2):
        torch.testing.assert_close(network(given), expected)
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1


def test_what_has_no_kernel_is_refused(make_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="conv_in: its activations are in floating point"):
        open_triton(prepared(make_unet(), QuantConfig(8, None)).to(DEVICE))
    unet = prepared(make_unet(), QuantConfig(8, 8)).to(DEVICE)
    quant_layers(unet)["conv_out"].act.set_bits(16)
    with pytest.raises(ValueError, match="conv_out: activations of 16 bits; backend triton has kernels for up to 8"):
        open_triton(unet)
    with pytest.raises(ValueError, match="weights are in floating point"):
        open_triton(quantize_(make_unet(), QuantConfig(8, 8)).module.to(DEVICE))
    unet = prepared(make_unet(), QuantConfig(8, 8)).to(DEVICE)
    quant_layers(unet)["conv_in"].dilation = (2, 2)
    with pytest.raises(ValueError, match="conv_in: groups of channels, dilation, two strides and named padding have no kernel"):
        open_triton(unet)
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="backend triton on --device cpu: allowed is cuda"):
            open_triton(prepared(make_unet(), QuantConfig(8, 8)))
    else:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="there is no CUDA device"):
            check_engine("triton")


def test_the_original_stays_as_it_is(make_unet: Any) -> None:
    unet = prepared(make_unet(), QuantConfig(8, 8)).to(DEVICE)
    data = inputs(unet, 1)
    before = call(unet, data)
    engine = open_triton(unet, "fp16")
    assert isinstance(engine, EngineNetwork)
    torch.testing.assert_close(call(unet, data), before, rtol=0, atol=0)
