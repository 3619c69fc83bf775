"""What the method knows of diffusion transformers: blocks, edges, attention by its sites, smoothing from AdaLN."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from small_pipelines import KINDS, made
from torch import Tensor

from qncd.models.calls import Call, in_one
from qncd.models.network import Network, network_of
from qncd.models.seen import remember_inputs
from qncd.models.traceable import Traceable, pairs_of
from qncd.ptq.observing import observe_
from qncd.ptq.pipeline_runs import PipelineRuns
from qncd.ptq.stages.prepare import quantize_
from qncd.ptq.stages.smoothing import smooth_, smoothing_factors
from qncd.quant.inspection import act_quantizers
from qncd.recipe import CalibrationConfig, QuantConfig, SmoothingConfig
from qncd.sampling.pipeline import denoiser_of

PLACES = {  # blocks, first and last layer, attention products, a layer of the embedding
    "DiT": (2, "pos_embed.proj", "proj_out_2", 2, "transformer_blocks.0.norm1.linear"),
    "PixArt alpha": (2, "pos_embed.proj", "proj_out", 4, "adaln_single.linear"),
    "SD3": (2, "pos_embed.proj", "proj_out", 3, "transformer_blocks.1.norm1_context.linear"),
    "FLUX": (2, "x_embedder", "proj_out", 2, "single_transformer_blocks.0.norm.linear"),
    "Chroma": (2, "x_embedder", "proj_out", 2, "distilled_guidance_layer.in_proj"),
    "AuraFlow": (2, "pos_embed.proj", "proj_out", 2, "time_step_proj.linear_1"),
    "Lumina2": (4, "x_embedder", "norm_out.linear_2", 4, "layers.1.norm1.linear"),
    "HunyuanDiT": (2, "pos_embed.proj", "proj_out", 4, "time_extra_emb.extra_embedder.linear_2"),
    "Qwen-Image": (2, "img_in", "proj_out", 2, "transformer_blocks.1.txt_mod.1"),
    "Z-Image": (4, "all_x_embedder.2-1", "all_final_layer.2-1.linear", 4, "t_embedder.mlp.2"),
    "Wan": (2, "condition_embedder.time_embedder.linear_1", "proj_out", 4, "condition_embedder.time_proj"),
}
SMOOTHED = ("DiT", "PixArt alpha", "SD3", "FLUX", "Lumina2", "Qwen-Image", "Z-Image", "Wan")


@pytest.fixture(scope="module")
def calibrated() -> Callable[[str], tuple[Network, Any]]:
    """calibrated(kind): a network and its calibration set, made once; copy before changing."""

    @functools.cache
    def make(kind: str) -> tuple[Network, Any]:
        pipe = made(kind)
        runs = PipelineRuns(pipe, [KINDS[kind].call] * 2, CalibrationConfig(steps=2, samples=4), 2)
        data = runs.calibration_set()
        remember_inputs(runs.network, data.x, data.t, data.inputs, data.constants)
        return runs.network, data

    def fresh(kind: str) -> tuple[Network, Any]:
        network, data = make(kind)
        return network_of(copy.deepcopy(network.module), network.prediction), data

    return fresh


def predicted(network: Network, data: Any) -> Tensor:
    x, t, inputs = next(data.batches(4))
    return network.predict(x, t, inputs, **data.constants)


@pytest.mark.parametrize("kind", PLACES)
def test_places(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    network = network_of(denoiser_of(made(kind))[1])
    blocks, first, last, products, embedded = PLACES[kind]
    units = network.blocks()
    assert sum(network.is_block(unit) for unit in units.values()) == blocks
    assert network.edges() == (first, last)
    assert len(network.attentions()) == products
    assert embedded in network.embedding() and last not in network.embedding()
    assert not [name for name in network.embedding() if ".attn" in name or ".ff" in name]
    left = (
        ["1 layers compute what is not known here and stay in floating point: patch_embedding (Conv3d)"] if kind == "Wan" else []
    )
    assert [record.getMessage() for record in caplog.records] == left


@pytest.mark.parametrize("kind", SMOOTHED)
def test_in_floating_point_nothing_changes(kind: str, calibrated: Any) -> None:
    """Prepared, smoothed, not yet quantized: what it was, and every operand of attention was seen."""
    network, data = calibrated(kind)
    exact = predicted(network, data)
    quantize_(network, QuantConfig())
    factors = smoothing_factors(network, data.t.unique().tolist(), SmoothingConfig(floor=0.5), data.inputs)
    smooth_(network, factors)
    assert len(factors) >= 8 and any(float((factor - 1).abs().max()) > 0.05 for factor in factors.values())
    assert float((predicted(network, data) - exact).abs().max()) < 2e-5 * float(exact.abs().max())
    seen = observe_(network, data, 4)
    assert {name for name in act_quantizers(network.module) if name.endswith((".q", ".softmax"))} <= set(seen)


@pytest.mark.parametrize(
    ("kind", "layer"), [("SD3", "transformer_blocks.0.attn.to_q"), ("FLUX", "transformer_blocks.0.ff_context.net.0.proj")]
)
def test_the_factor_is_what_stretches_the_input(kind: str, layer: str, calibrated: Any) -> None:
    """Of a layer's input without its shift, over the same input normalized: |1 + scale|, in the mean over time steps."""
    network, data = calibrated(kind)
    block: Any = network.module.get_submodule(".".join(layer.split(".")[:2]))
    norm = block.norm1 if layer.endswith("to_q") else block.norm1_context
    part = 1 if layer.endswith("to_q") else 4
    scales: list[Tensor] = []
    handle = norm.linear.register_forward_hook(
        lambda _, __, out: scales.append((1 + out.chunk(out.shape[1] // 16, 1)[part]).abs())
    )
    times = sorted(data.t.unique().tolist())
    for t in times:
        x, _, inputs = next(data.subset(torch.arange(4)).batches(4))
        network.predict(x, torch.full((4,), t), inputs, **data.constants)
    handle.remove()
    rows = {name: value[:4] for name, value in data.inputs.items()}
    found = network.stretch(times, rows)[layer]
    torch.testing.assert_close(found, torch.stack(scales).mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_an_unknown_processor_stays_in_floating_point(caplog: pytest.LogCaptureFixture) -> None:
    class Own(FluxAttnProcessor):
        pass

    network = network_of(made("FLUX").transformer)
    attention: Any = network.module.get_submodule("transformer_blocks.0.attn")
    attention.set_processor(Own())
    with caplog.at_level(logging.WARNING):
        assert list(network.attentions()) == ["single_transformer_blocks.0.attn"]
    assert (
        "1 attention products compute what is not known here and stay in floating point: transformer_blocks.0.attn (Own)"
        in caplog.text
    )


def test_flux_samples_are_images_and_back() -> None:
    """As the pipeline unpacks its latents."""
    network = network_of(made("FLUX").transformer)
    tokens = torch.randn(2, 6, 16)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    call = Call(tokens, torch.zeros(2), constants={"img_ids": ids})
    images = network.to_images(tokens, call)
    torch.testing.assert_close(images, diffusers.FluxPipeline._unpack_latents(tokens, 4, 6, 1), rtol=0, atol=0)
    assert torch.equal(network.to_samples(images, tokens), tokens)


@pytest.mark.parametrize("kind", ["Chroma", "HunyuanDiT", "Lumina2", "Qwen-Image", "Z-Image"])
def test_what_is_traced_is_what_is_called(kind: str, calibrated: Any) -> None:
    """A form that an exporter follows computes the same, on captions of several lengths too, with and without idle tokens."""
    network, data = calibrated(kind)
    constants = {name: value for name, value in data.constants.items() if not isinstance(value, Tensor)}
    shared = {name: value for name, value in data.constants.items() if isinstance(value, Tensor)}
    rows = {name: value.clone() for name, value in data.subset(torch.arange(3)).inputs.items()}
    for name, shorter in (("cap_tokens", 5), ("encoder_attention_mask", 0), ("encoder_hidden_states_mask", 0)):
        if name in rows:
            rows[name][1, ... if name == "cap_tokens" else slice(4, None)] = shorter
    x, t = data.x[:3], data.t[:3]
    with torch.no_grad():
        expected = network.call(x, t, rows, **data.constants)
        with network.traced(constants) as call, Traceable():
            for inputs in ({**rows, **shared}, network.trimmed({**rows, **shared})):
                torch.testing.assert_close(call(x, t, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*PLACES, "Sana"])
def test_what_is_traced_stays_on_its_device(kind: str, calibrated: Any) -> None:
    """Nothing is taken from the CPU as it runs, so that a call can be recorded on a GPU; shapes alone show it."""
    network, data = calibrated(kind)
    network.module.to("meta")
    constants = {name: value for name, value in data.constants.items() if not isinstance(value, Tensor)}
    shared = {name: value for name, value in data.constants.items() if isinstance(value, Tensor)}
    given = {**data.subset(torch.arange(2)).inputs, **shared}
    inputs = {name: value.to("meta") for name, value in network.trimmed(given).items()}
    with torch.no_grad(), network.traced(constants) as call, Traceable():
        out = call(data.x[:2].to("meta"), data.t[:2].to("meta"), inputs)
    assert out.device.type == "meta" and len(out) == 2


def test_pairs_are_complex_numbers() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64)
    with Traceable():
        product = torch.view_as_complex(torch.view_as_real(a)) * pairs_of(b).unsqueeze(1)  # of pairs
        found = torch.view_as_real(product)
    torch.testing.assert_close(found, torch.view_as_real(a * b.unsqueeze(1)))
    with pytest.raises(ValueError, match="dim -1: allowed are numbers from the front"):
        pairs_of(b).unsqueeze(-1)


def test_z_image_takes_lists() -> None:
    """Captions of different lengths become rows of one length and back; what the module gives is what it gives by itself."""
    pipe = made("Z-Image")
    network, generator = network_of(pipe.transformer), torch.Generator().manual_seed(0)
    x = [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(3)]
    captions = [torch.randn(length, 16, generator=generator) for length in (5, 40, 12)]
    t = torch.tensor([0.1, 0.1, 0.1])
    call = network.bind((x, t), {"cap_feats": captions, "return_dict": False})
    assert call.x.shape == (3, 4, 8, 8) and call.inputs["cap_feats"].shape == (3, 512, 16)
    assert call.inputs["cap_tokens"].tolist() == [5, 40, 12]
    expected = torch.stack(pipe.transformer(x, t, captions).sample).squeeze(2)
    torch.testing.assert_close(network.call(call.x, call.t, call.inputs, **call.constants), expected, rtol=0, atol=0)
    torch.testing.assert_close(network.predict(call.x, call.t, call.inputs, **call.constants), -expected, rtol=0, atol=0)
    rows = {name: value[1:] for name, value in call.inputs.items()}
    torch.testing.assert_close(network.call(call.x[1:], call.t[1:], rows), expected[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="samples of several sizes: allowed are images of one size"):
        network.bind(([x[0], torch.zeros(4, 1, 8, 16)], t[:2]), {"cap_feats": captions[:2]})
    with pytest.raises(ValueError, match="was called with a list of samples: allowed is a tensor"):  # images beside the prompt
        network.bind(([[x[0]], [x[1]]], t[:2]), {"cap_feats": [[caption] for caption in captions[:2]]})


def test_qwen_image_takes_texts_of_different_lengths() -> None:
    """They become rows of one length and back; what the module gives is what it gives by itself."""
    pipe = made("Qwen-Image")
    network, generator = network_of(pipe.transformer), torch.Generator().manual_seed(0)
    x, texts = torch.randn(3, 16, 16, generator=generator), torch.randn(3, 20, 16, generator=generator)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 7:] = 0
    common = {"timestep": torch.full((3,), 0.5), "img_shapes": [[(1, 4, 4)]] * 3, "return_dict": False}
    for given in ({"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask}, {"encoder_hidden_states": texts[:, :7]}):
        call = network.bind((x,), {**given, **common})
        assert (
            call.inputs["encoder_hidden_states"].shape == (3, 512, 16)
            and call.inputs["encoder_hidden_states_mask"].dtype is torch.bool
        )
        assert call.constants["img_shapes"] == [[(1, 4, 4)]]
        expected = pipe.transformer(x, **given, **common)[0]
        torch.testing.assert_close(network.call(call.x, call.t, call.inputs, **call.constants), expected, rtol=0, atol=0)


def test_qwen_image_is_calibrated_with_other_lengths_and_guidance() -> None:
    call = {**KINDS["Qwen-Image"].call, "prompt": ["a cat", "a very long prompt about two dogs"]}
    guided = {**call, "negative_prompt": [" ", " "]}
    for calls in ([call, {**call, "prompt": ["b"]}], [guided]):
        runs = PipelineRuns(made("Qwen-Image"), calls, CalibrationConfig(steps=2, samples=4), 2)
        assert len(runs.calibration_set()) == (6 if calls[0] is call else 8)


def test_what_all_samples_share_is_no_row() -> None:
    """FLUX's ids, even where there are as many tokens as samples."""
    network = network_of(made("FLUX").transformer)
    given = {"encoder_hidden_states": torch.zeros(4, 4, 16), "txt_ids": torch.zeros(4, 3), "img_ids": torch.zeros(16, 3)}
    call = network.bind((), {"hidden_states": torch.zeros(4, 16, 16), "timestep": torch.ones(4), **given})
    assert set(call.inputs) == {"encoder_hidden_states"} and set(call.constants) == {"txt_ids", "img_ids"}


def test_sana_keeps_linear_attention_in_floating_point(caplog: pytest.LogCaptureFixture) -> None:
    network = network_of(made("Sana").transformer)
    assert set(network.attentions()) == {f"transformer_blocks.{i}.attn2" for i in range(2)}
    assert "2 attention products compute what is not known here" in caplog.text and "SanaLinearAttnProcessor2_0" in caplog.text
    assert network.edges() == ("patch_embed.proj", "proj_out")


def test_calls_that_cannot_be_taken_apart() -> None:
    """A list of samples, and a time step for each token (Wan 2.2)."""
    network = network_of(made("Wan").transformer)
    with pytest.raises(ValueError, match="WanTransformer3DModel was called with a list of samples: allowed is a tensor"):
        network.bind((), {"hidden_states": [torch.zeros(4, 1, 2, 2)], "timestep": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"timestep of shape \(2, 3\) for 2 samples: expected one for each, or one for all"):
        network.bind((), {"hidden_states": torch.zeros(2, 4, 1, 2, 2), "timestep": torch.zeros(2, 3)})


def test_two_calls_are_one_with_guidance() -> None:
    """Those of the same samples with other texts, without condition first; anything else is refused."""
    x, t = torch.randn(2, 3), torch.ones(2)
    cond, uncond = (Call(x, t, {"text": torch.full((2, 4), value)}) for value in (1.0, 0.0))
    both = in_one([cond, uncond])
    assert torch.equal(both.x, torch.cat([x, x])) and both.inputs["text"].mean(1).tolist() == [0, 0, 1, 1]
    for other in (Call(x, t, {"text": torch.zeros(2, 5)}), Call(x + 1, t, {"text": torch.zeros(2, 4)})):
        with pytest.raises(ValueError, match="the network was called 2 times for a step: allowed is 1, or 2 with conditions of"):
            in_one([cond, other])
