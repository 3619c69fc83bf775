"""What the method knows of a network: calls taken apart and put together again, and parts that it does not know."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.resnet import ResnetBlock2D
from quantized_networks import CONTEXT
from torch import Tensor, nn

from qncd.models.families.unet import UNet
from qncd.models.network import Network, network_of
from qncd.ptq.data import CalibrationSet
from qncd.ptq.pipeline import calibrate_
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smoothing_factors
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig, SmoothingConfig


class Recorder(nn.Module):
    """A denoiser of no family that keeps what it is called with and predicts twice as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.seen: dict[str, Any] = {}

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        extra: dict[str, Any] | None = None,
        residuals: tuple[Tensor, ...] | None = None,
        strength: float = 1.0,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        self.seen = {
            "x": x,
            "timesteps": timesteps,
            "context": context,
            "extra": extra,
            "residuals": residuals,
            "strength": strength,
        }
        return (self.last(self.first(x)),)


def noisy(channels: int = 4, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, channels, 8, 8, generator=generator)
    return x, torch.tensor([500, 20, 700, 999])[:count], torch.randn(count, 5, 12, generator=generator)


def test_a_call_is_taken_apart_and_put_together_again() -> None:
    module = Recorder()
    network, (x, t, context) = network_of(module), noisy(3)
    extra = {"ids": torch.rand(2, 6), "images": [torch.rand(2, 1, 4), torch.rand(2, 3, 4)]}
    residuals = (torch.rand(2, 8), torch.rand(2, 9))
    call = network.bind((x, t, context), {"extra": extra, "residuals": residuals, "strength": 0.5, "return_dict": False})
    assert call.x is x and torch.equal(call.t, t)
    assert list(call.inputs) == ["context", "extra.ids", "extra.images.0", "extra.images.1", "residuals.0", "residuals.1"]
    assert call.constants == {"strength": 0.5, "return_dict": False}
    out = network.predict(call.x, call.t, call.inputs, **call.constants)
    torch.testing.assert_close(out, module(x, t)[0][:, :3])  # without the learned variance
    network.predict(call.x, call.t, call.inputs, **call.constants)
    seen = module.seen
    assert seen["x"] is x and seen["context"] is context and seen["strength"] == 0.5
    assert seen["extra"].keys() == extra.keys() and seen["extra"]["ids"] is extra["ids"]
    assert [a is b for a, b in zip(seen["extra"]["images"], extra["images"], strict=True)] == [True] * 2
    assert [a is b for a, b in zip(seen["residuals"], residuals, strict=True)] == [True] * 2


def test_what_holds_no_tensor_stays_as_it_is() -> None:
    network, (x, t, _) = network_of(Recorder()), noisy(3)
    call = network.bind((x,), {"timesteps": 7, "context": None, "extra": {"scale": 0.5}})
    assert call.inputs == {} and call.constants == {"extra": {"scale": 0.5}}
    assert call.t.tolist() == [7, 7] and call.t.dtype == torch.int64
    assert network.bind((x, torch.tensor([0.25])), {}).t.tolist() == [0.25] * 2
    both = network.predict(x, t, {"extra.ids": t}, extra={"scale": 0.5})
    assert network.module.seen["extra"] == {"scale": 0.5, "ids": t} and both.shape == x.shape
    with pytest.raises(ValueError, match=r"^Recorder was called without timesteps$"):
        network.bind((x,), {})


def test_a_unet_gets_residuals_and_added_conditions_as_it_was_called(make_cross_unet: Any) -> None:
    unet = make_cross_unet()
    network, (x, t, context) = network_of(unet), noisy()
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    given = {
        "encoder_hidden_states": context,
        "down_block_additional_residuals": tuple(torch.randn(shape) for shape in shapes),
        "mid_block_additional_residual": torch.randn(2, 32, 4, 4),
        "cross_attention_kwargs": {},
    }
    expected = unet(x, t, **given).sample
    assert not torch.allclose(expected, unet(x, t, context).sample)
    call = network.bind((x, t), given)
    assert "down_block_additional_residuals.3" in call.inputs and "mid_block_additional_residual" in call.inputs
    assert torch.equal(network.predict(call.x, call.t, call.inputs, **call.constants), expected)


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "time"])
def test_names_of_the_time_step(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, hidden_states, mask, {name}): return (hidden_states + {name}.view(-1, 1),)", namespace)
    kind = type("Denoiser", (nn.Module,), {"forward": namespace["forward"]})
    module = kind()
    module.layer = nn.Linear(2, 2)
    network = network_of(module)
    assert (network.sample_name, network.time_name) == ("hidden_states", name)
    x, t = torch.zeros(2, 3), torch.tensor([4, 5])
    call = network.bind((x, None, t), {})
    assert torch.equal(call.t, t) and torch.equal(network.times_of((x, None), {name: t}), t)
    assert network.predict(x, t, {"mask": x}).tolist() == [[4.0] * 3, [5.0] * 3]


def test_a_network_without_a_time_step_is_no_denoiser() -> None:
    with pytest.raises(
        ValueError, match=r"^Linear: no denoiser, its forward has no argument named timestep, timesteps, t, time$"
    ):
        network_of(nn.Linear(2, 2))


def test_one_line_says_what_the_plain_family_goes_without(caplog: pytest.LogCaptureFixture, make_unet: Any) -> None:
    module, data = Recorder(), noisy(3, 4)
    with caplog.at_level(logging.WARNING, "qncd"):
        for _ in range(3):
            network = network_of(module)
        quantize_(module, QuantConfig(4, 8))
        calibrate_(network, CalibrationSet(data[0], data[1]), QuantConfig(4, 8))
    assert [r.getMessage().partition(" has no family here: ")[0] for r in caplog.records] == ["Recorder"]
    assert type(network) is Network and list(quant_layers(module)) == ["first", "last"]
    assert network.edges() == ("first", "last") or quant_layers(module)["first"].config.weight_codes.bits == 8
    caplog.clear()
    assert type(network_of(make_unet())) is UNet and not caplog.records


class Renamed(nn.Linear):
    """Computes what nn.Linear does."""


class Doubled(nn.Linear):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Conv2d):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_subclassed_layers(make_cross_unet: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet = make_cross_unet()
    linear = {name: layer for name, layer in unet.named_modules() if type(layer) is nn.Linear}
    for layer in linear.values():
        layer.__class__ = Renamed
    own = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "time_embedding.linear_2"]
    for name in own:
        unet.get_submodule(name).__class__ = Doubled
    unet.conv_out.__class__ = Shifted
    x, t, context = noisy()
    expected = unet(x, t, context).sample
    with caplog.at_level(logging.WARNING, "qncd"):
        quantize_(unet, QuantConfig(4, 8))
    torch.testing.assert_close(unet(x, t, context).sample, expected, rtol=1e-4, atol=1e-5)
    assert set(linear) - set(quant_layers(unet)) == set(own)
    assert all(type(unet.get_submodule(name)) is Doubled for name in own) and type(unet.conv_out) is Shifted
    lines = [r.getMessage() for r in caplog.records]
    assert any(line.startswith("3 layers compute what is not known here and stay in floating point: ") for line in lines)
    assert all(f"{name} (Doubled)" in " ".join(lines) for name in own) and "conv_out (Shifted)" in " ".join(lines)


def test_layers_that_stay_are_told(make_unet: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With a forward of the layer's own, in several places, or a convolution of another dimension: none is quietly replaced."""
    unet = make_unet()
    own, shared = unet.conv_in, unet.mid_block.resnets[0]
    own._conv_forward = lambda x, weight, bias: nn.functional.conv2d(nn.functional.pad(x, [1] * 4, "circular"), weight, bias)
    unet.mid_block.resnets[1].conv2 = shared.conv2
    unet.further = nn.Conv1d(2, 2, 1)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    expected = unet(x, t).sample
    with caplog.at_level(logging.WARNING, "qncd"):
        quantize_(unet, QuantConfig(4, 8))
    torch.testing.assert_close(unet(x, t).sample, expected, rtol=1e-4, atol=1e-5)
    assert unet.conv_in is own and unet.mid_block.resnets[1].conv2 is shared.conv2 is unet.mid_block.resnets[0].conv2
    lines = " ".join(record.getMessage() for record in caplog.records)
    assert all(name in lines for name in ("conv_in (Conv2d)", "resnets.0.conv2 (Conv2d in 2 places)", "further (Conv1d)"))


def test_a_grouped_shortcut_behind_a_concatenation(make_unet: Any) -> None:
    unet = make_unet()
    resnet = unet.up_blocks[1].resnets[0]
    name = "up_blocks.1.resnets.0.conv_shortcut"
    assert name in network_of(unet).splits()
    resnet.conv_shortcut = nn.Conv2d(resnet.in_channels, 16, 1, groups=2).requires_grad_(False)
    assert name not in network_of(unet).splits()
    x, t, _ = noisy(3, 4)
    exact = unet(x, t).sample
    for config in (QuantConfig(8, 8), QuantConfig(8, 8, gptq=True)):
        twin = copy.deepcopy(unet)
        quantize_(twin, config)
        calibrate_(twin, CalibrationSet(x, t), config)
        assert quant_layers(twin)[name].config.segments is None
        assert 0 < (twin(x, t).sample - exact).square().mean() < 0.01 * exact.square().mean()


def with_processors(unet: Any, make: Callable[[str, int], Any]) -> Any:
    torch.manual_seed(3)
    found = {
        name: make(name, unet.get_submodule(name.removesuffix(".processor")).to_q.in_features) for name in unet.attn_processors
    }
    unet.set_attn_processor(found)
    return unet.eval().requires_grad_(False)


def custom_diffusion(name: str, width: int) -> Any:
    cross = "attn2" in name
    return processors.CustomDiffusionAttnProcessor(
        train_kv=cross, train_q_out=False, hidden_size=width, cross_attention_dim=12 if cross else None
    )


def perturbed(name: str, width: int) -> Any:
    own = "mid" in name and "attn1" in name
    return processors.PAGIdentitySelfAttnProcessor2_0() if own else processors.AttnProcessor2_0()


def image_prompts(name: str, width: int) -> Any:
    if "attn2" not in name:
        return processors.AttnProcessor2_0()
    return processors.IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=12, num_tokens=(4,))


@pytest.mark.parametrize(
    ("make", "kind", "left"),
    [
        (custom_diffusion, "CustomDiffusionAttnProcessor", 8),
        (perturbed, "PAGIdentitySelfAttnProcessor2_0", 1),
        (image_prompts, "IPAdapterAttnProcessor2_0", 4),
    ],
)
def test_attention_that_is_not_known_stays(
    make: Callable[[str, int], Any], kind: str, left: int, make_cross_unet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its projections are quantized all the same, and its name is told."""
    unet, (x, t, context) = with_processors(make_cross_unet(), make), noisy()
    given: dict[str, Any] = {"encoder_hidden_states": context}
    if make is image_prompts:
        projection = ImageProjection(cross_attention_dim=12, image_embed_dim=10, num_image_text_embeds=4)
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection]).eval().requires_grad_(False)
        unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        given["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 10)]}
    before = unet(x, t, **given).sample
    with caplog.at_level(logging.WARNING, "qncd"):
        network = quantize_(unet, QuantConfig(8, 8))
    after = unet(x, t, **given).sample
    assert (after - before).norm() < 1e-3 * before.norm()
    lines = [r.getMessage() for r in caplog.records if "attention products" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(f"{left} attention products compute what is not known here")
    assert kind in lines[0]
    found = list(unet.attn_processors.values())
    assert sum(type(p).__name__ == kind for p in found) == left
    assert sum(isinstance(p, QuantAttnProcessor) for p in found) == len(found) - left
    call = network.bind((x, t), given)
    caplog.clear()
    calibrate_(network, CalibrationSet(call.x, call.t, call.inputs, constants=call.constants), QuantConfig(8, 8))
    idle = [r.getMessage() for r in caplog.records if "never came up while calibrating" in r.getMessage()]
    assert bool(idle) is (make is custom_diffusion)  # its processor has projections of its own
    quantized = network.predict(call.x, call.t, call.inputs)
    assert 0 < (quantized - before).norm() < 0.3 * before.norm()


def xl(make_cross_unet: Any) -> Any:
    unet = make_cross_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 10,
        use_linear_projection=True, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.time_emb_proj.weight.mul_(8)
    return unet


def test_an_embedding_of_size_and_prompt_is_smoothed_by_the_calibration_inputs(make_cross_unet: Any) -> None:
    """Stable Diffusion XL: |factor| is the mean over the embeddings that the blocks receive, of time, size and prompt."""
    unet, (x, t, context) = xl(make_cross_unet), noisy(count=4)
    network = network_of(unet)
    added = {"text_embeds": torch.randn(4, 10), "time_ids": torch.randint(0, 1024, (4, 6)).float()}
    inputs = network.bind((x, t), {"encoder_hidden_states": context, "added_cond_kwargs": added}).inputs
    assert set(inputs) == {CONTEXT, "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
    data, times = CalibrationSet(x, t, inputs), [20, 500, 700]
    found = smoothing_factors(network, times, SmoothingConfig(floor=0.25), data.inputs)
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
    projected: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for name, block in blocks.items():
        block.time_emb_proj.register_forward_hook(lambda _m, _i, out, name=name: projected[name].append(out))
    for time in times:
        network.predict(x, torch.full((4,), time), inputs)
    for name, block in blocks.items():
        emb = torch.cat(projected[name]).double()
        grouped = emb.view(len(emb), 4, -1)
        deviation = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected = (deviation.view_as(emb) * block.norm2.weight).abs().mean(0)
        torch.testing.assert_close(found[f"{name}.conv2"].double(), expected.clamp(min=0.25), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^addition_embed_type 'text_time': smoothing needs an embedding of time and class alone$"
    ):
        network.stretch(times)


def test_a_network_with_added_conditions_is_calibrated(make_cross_unet: Any) -> None:
    unet, (x, t, context) = xl(make_cross_unet), noisy(count=4)
    added = {"text_embeds": torch.randn(4, 10), "time_ids": torch.randint(0, 1024, (4, 6)).float()}
    network = quantize_(unet, QuantConfig(8, 8))
    inputs = network.bind((x, t), {"encoder_hidden_states": context, "added_cond_kwargs": added}).inputs
    before = network.predict(x, t, inputs)
    calibrate_(network, CalibrationSet(x, t, inputs), QuantConfig(8, 8))
    after = unet(x, t, context, added_cond_kwargs=added).sample
    assert torch.equal(after, network.predict(x, t, inputs))
    assert 0 < (after - before).norm() < 0.3 * before.norm()
