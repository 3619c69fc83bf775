"""UNets of latent-diffusion become diffusers UNets that compute the same."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from qncd.models.files.diffusers_folders import cannot_tell
from qncd.models.original.compvis import load_ldm_unet
from qncd.models.original.key_tables import (
    FusedHeads,
    Pointwise,
    check_original,
    from_original,
    network_with_weights,
    shapes_of,
    to_original,
)
from qncd.models.original.ldm import build_ldm_unet, ldm_betas, ldm_unet_key_map, unet_settings

NEAR = Path(__file__).resolve().parents[2] / "data" / "golden"
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config_of(**params: Any) -> dict[str, Any]:
    settings = {
        "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "attention_resolutions": [2],
        "num_res_blocks": 1, "channel_mult": [1, 2], "num_groups": 4, **params,
    }  # fmt: skip
    return {"model": {"params": {"unet_config": {"target": "a.b.UNetModel", "params": settings}}}}


SPATIAL = {"use_spatial_transformer": True, "context_dim": 12}
ARCHITECTURES = {
    "channels of a head": {"num_head_channels": 4, "attention_resolutions": [1, 2]},
    "one width with attention": {"num_heads": 4},
    "heads at several widths": {"num_heads": 2, "attention_resolutions": [1, 2]},
    "one head at several widths": {"num_heads": 1, "attention_resolutions": [1, 2], "channel_mult": [1, 3, 2]},
    "attention in the middle alone": {"num_heads": 2, "attention_resolutions": []},
    "q, k, v first": {"num_head_channels": 4, "use_new_attention_order": True},
    "not legacy": {"num_heads": 2, "legacy": False},
    "as churches": {
        "num_heads": 2, "use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": [1, 2],
        "channel_mult": [1, 2, 2], "num_res_blocks": 2,
    },
    "resblock_updown": {"num_head_channels": 8, "resblock_updown": True, "channel_mult": [1, 2, 3]},
    "scale and shift": {"num_head_channels": 8, "use_scale_shift_norm": True, "in_channels": 1, "out_channels": 2},
    "one level": {"num_head_channels": 8, "channel_mult": [1], "attention_resolutions": [1], "num_res_blocks": 3},
    "cross-attention": {"num_heads": 2, **SPATIAL},
    "deep transformers": {"num_head_channels": 4, "transformer_depth": 2, "attention_resolutions": [1, 4], **SPATIAL,
                          "channel_mult": [1, 2, 3], "num_res_blocks": 2},
    "linear projections": {"num_heads": 1, "use_linear_in_transformer": True, **SPATIAL},
    "scale and shift with contexts": {"num_heads": 4, "use_scale_shift_norm": True, "legacy": False, **SPATIAL},
}  # fmt: skip


def randomized(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 9
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5 + (parameter.ndim == 1) * 0.5
    return network.eval().requires_grad_(False)


class Reference:
    """UNetModel's forward pass written from its keys, without diffusers."""

    def __init__(self, state: dict[str, Tensor], params: dict[str, Any]) -> None:
        self.state, self.params, self.groups = state, params, params["num_groups"]

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.group_norm(x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def resblock(self, name: str, x: Tensor, emb: Tensor, resample: Any = None) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resample:
            h, x = resample(h), resample(x)
        h = self.conv(f"{name}.in_layers.2", h)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if self.params.get("use_scale_shift_norm"):
            scale, shift = e.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def heads(self, channels: int) -> int:
        per_head = self.params.get("num_head_channels", -1)
        return channels // per_head if per_head != -1 else self.params["num_heads"]

    def softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (..., L, d)
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v

    def attention_block(self, name: str, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        heads = self.heads(c)
        weight, bias = self.state[f"{name}.qkv.weight"], self.state[f"{name}.qkv.bias"]
        qkv = F.conv1d(self.norm(f"{name}.norm", x).reshape(n, c, -1), weight, bias)
        order = (n, 3, heads, c // heads, -1) if self.params.get("use_new_attention_order") else (n, heads, 3, c // heads, -1)
        qkv = qkv.reshape(order)
        qkv = qkv if self.params.get("use_new_attention_order") else qkv.transpose(1, 2)
        h = self.softmax(*(part.transpose(-1, -2) for part in qkv.unbind(1))).transpose(-1, -2).reshape(n, c, -1)
        h = F.conv1d(h, self.state[f"{name}.proj_out.weight"], self.state[f"{name}.proj_out.bias"])
        return x + h.reshape(n, c, height, width)

    def cross(self, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = (split(self.linear(f"{name}.to_{a}", y)) for a, y in (("q", x), ("k", context), ("v", context)))
        return self.linear(f"{name}.to_out.0", self.softmax(q, k, v).transpose(1, 2).flatten(2))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def spatial_transformer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        n, c, height, width = x.shape
        linear = bool(self.params.get("use_linear_in_transformer"))
        h = self.norm(f"{name}.norm", x, eps=1e-6)
        h = h if linear else self.conv(f"{name}.proj_in", h)
        h = h.flatten(2).transpose(1, 2)
        h = self.linear(f"{name}.proj_in", h) if linear else h
        for i in range(self.params.get("transformer_depth", 1)):
            block = f"{name}.transformer_blocks.{i}"
            y = self.layer_norm(f"{block}.norm1", h)
            h = h + self.cross(f"{block}.attn1", y, y, self.heads(c))
            h = h + self.cross(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), context, self.heads(c))
            value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
            h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        h = self.linear(f"{name}.proj_out", h) if linear else h
        h = h.transpose(1, 2).reshape(n, c, height, width)
        return x + (h if linear else self.conv(f"{name}.proj_out", h))

    def attend(self, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        return self.attention_block(name, x) if context is None else self.spatial_transformer(name, x, context)

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        base, blocks = self.params["model_channels"], self.params["num_res_blocks"]
        frequencies = torch.exp(-math.log(10000) * torch.arange(base // 2) / (base // 2))
        angles = t[:, None] * frequencies[None]
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb)))
        h, skips, index, last = self.conv("input_blocks.0.0", x), [], 1, len(self.params["channel_mult"]) - 1
        skips.append(h)
        updown = self.params.get("resblock_updown")
        for level in range(last + 1):
            attends = 2**level in self.params["attention_resolutions"]
            for _ in range(blocks):
                h = self.resblock(f"input_blocks.{index}.0", h, emb)
                h = self.attend(f"input_blocks.{index}.1", h, context) if attends else h
                skips.append(h)
                index += 1
            if level < last:
                name = f"input_blocks.{index}.0"
                half = lambda y: F.avg_pool2d(y, 2)  # noqa: E731
                h = self.resblock(name, h, emb, half) if updown else self.conv(f"{name}.op", h, stride=2)
                skips.append(h)
                index += 1
        h = self.resblock("middle_block.0", h, emb)
        h = self.resblock("middle_block.2", self.attend("middle_block.1", h, context), emb)
        for index in range((last + 1) * (blocks + 1)):
            level, j = last - index // (blocks + 1), index % (blocks + 1)
            h = self.resblock(f"output_blocks.{index}.0", torch.cat([h, skips.pop()], dim=1), emb)
            attends = 2**level in self.params["attention_resolutions"]
            h = self.attend(f"output_blocks.{index}.1", h, context) if attends else h
            if level and j == blocks:
                name = f"output_blocks.{index}.{2 if attends else 1}"
                double = lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
                h = self.resblock(name, h, emb, double) if updown else self.conv(f"{name}.conv", double(h))
        return self.conv("out.2", F.silu(self.norm("out.0", h)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parity_with_a_reference(name: str) -> None:
    config = config_of(**ARCHITECTURES[name])
    params = config["model"]["params"]["unet_config"]["params"]
    unet = randomized(build_ldm_unet(config))
    original = to_original(unet.state_dict(), ldm_unet_key_map(config), "model")
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, params["in_channels"], 8, 8, generator=generator), torch.tensor([3, 700])
    context = torch.randn(2, 5, 12, generator=generator) if params.get("context_dim") else None
    expected = Reference(original, params)(x, t, context)
    found = unet(x, t, *([] if context is None else [context])).sample
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_the_same(name: str) -> None:
    config = config_of(**ARCHITECTURES[name])
    table, unet = ldm_unet_key_map(config), randomized(build_ldm_unet(config))
    original = to_original(unet.state_dict(), table, "model")
    state = dict(original)
    check_original(state, table, shapes_of(lambda: build_ldm_unet(config)), "model")
    loaded = network_with_weights(lambda: build_ldm_unet(config), from_original(state, table), "x")
    assert state == {}
    own = loaded.state_dict()
    assert own.keys() == unet.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in unet.state_dict().items())
    assert all(torch.equal(value, original[key]) for key, value in to_original(own, table, "model").items())
    x, t = torch.randn(1, unet.config["in_channels"], 8, 8), torch.tensor([1])
    context = [torch.randn(1, 2, 12)] if "context_dim" in ARCHITECTURES[name] else []
    assert torch.equal(loaded(x, t, *context).sample, unet(x, t, *context).sample)


def test_what_a_folder_cannot_tell() -> None:
    said = {name: bool(cannot_tell(build_ldm_unet(config_of(**params)))) for name, params in ARCHITECTURES.items()}
    assert [name for name, hidden in said.items() if hidden] == ["heads at several widths", "as churches"]


def test_parity_with_the_original_network() -> None:
    config = yaml.safe_load((NEAR / "ldm_uncond_scale_shift.yaml").read_text())
    unet = load_ldm_unet(config, NEAR / "ldm_uncond_scale_shift.ckpt")
    with np.load(NEAR / "ldm_uncond_scale_shift_io.npz") as data, torch.no_grad():
        found = unet(torch.from_numpy(data["x"]), torch.from_numpy(data["t"])).sample
        assert np.abs(found.numpy() - data["eps"]).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "manifest"),
    [("cin256-v2", "ldm_cin256_v2"), ("lsun_beds256", "ldm_lsun_beds256_released"), ("sd-v1-inference", "sd_v1")],
)
def test_full_size_keys_and_shapes(name: str, manifest: str) -> None:
    shapes = json.loads((NEAR / f"manifest_{manifest}.json").read_text())
    prefix = "model.diffusion_model."
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        original = {key.removeprefix(prefix): torch.empty(shape) for key, shape in shapes.items() if key.startswith(prefix)}
        unet = build_ldm_unet(config)
    table, expected = ldm_unet_key_map(config), {key: value.shape for key, value in unet.state_dict().items()}
    check_original(original, table, expected, "model")
    converted = dict(from_original(dict(original), table))
    assert {key: value.shape for key, value in converted.items()} == expected
    back = to_original(converted, table, "model")
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in original.items()}


def test_full_size_parameter_counts() -> None:
    counts = {}
    for name in ("cin256-v2", "lsun_beds256", "lsun_churches256", "sd-v1-inference"):
        with torch.device("meta"):
            unet = build_ldm_unet(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        counts[name] = round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6)
    assert counts == {"cin256-v2": 401, "lsun_beds256": 274, "lsun_churches256": 295, "sd-v1-inference": 860}


def test_fused_heads_are_stored_head_by_head() -> None:
    value = torch.arange(12)[:, None, None]  # 2 heads of 2 channels: q0 q1 k0 k1 v0 v1, then the second head's
    layout = FusedHeads(("q", "k", "v"), heads=2)
    assert [part[:, 0].tolist() for part in layout.split(value)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert torch.equal(layout.join(layout.split(value)), value)
    assert torch.equal(layout.join(layout.split(value[:, 0, 0])), value[:, 0, 0])
    assert Pointwise("a", dims=1).join((torch.zeros(2, 3),)).shape == (2, 3, 1)


def test_the_schedule_is_linear_in_the_square_root(golden: Any) -> None:
    config = {"model": {"params": {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 4}}}
    expected = [0.00085, 0.012]
    betas = ldm_betas(config)
    assert betas.dtype == np.float64
    assert np.allclose(betas[[0, -1]], expected, rtol=1e-12)
    assert np.allclose(np.diff(np.sqrt(betas)), np.diff(np.sqrt(betas))[0])
    assert np.allclose(ldm_betas({"model": {"params": {}}})[[0, -1]], [1e-4, 2e-2])
    assert len(ldm_betas({"model": {"params": {}}})) == 1000


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_heads": 1, "colour": 1}, "unet_config has parameters that are not supported: colour"),
        ({}, "neither num_heads nor num_head_channels"),
        ({"num_heads": 1, "num_classes": 10}, "unet_config.num_classes 10 is not supported: allowed is None"),
        ({"num_heads": 1, "dims": 3}, "unet_config.dims 3 is not supported"),
        ({"num_heads": 1, "conv_resample": False}, "unet_config.conv_resample False is not supported"),
        ({"num_heads": 3}, "num_heads 3 must divide the width of each level with attention: 16"),
        ({"num_head_channels": 5}, "num_head_channels 5 must divide the width"),
        ({"num_heads": 1, "num_groups": 3}, r"num_groups 3 must divide every width: \[8, 16\]"),
        ({"num_heads": 1, "num_heads_upsample": 2}, "num_heads_upsample 2 is not supported: allowed is num_heads, 1"),
        ({"num_heads": 1, "context_dim": 4}, "use_spatial_transformer and context_dim need one another"),
        ({"num_heads": 1, "use_spatial_transformer": True}, "use_spatial_transformer and context_dim need one another"),
        ({"num_heads": 1, "resblock_updown": True, **SPATIAL}, "resblock_updown with use_spatial_transformer"),
        ({"num_heads": 1, "num_res_blocks": 0}, r"params\.num_res_blocks 0: allowed are whole numbers from 1 to 32$"),
        ({"num_heads": 1, "num_res_blocks": [1, 2]}, r"params\.num_res_blocks \[1, 2\]: allowed are whole numbers from 1 to 32$"),
        (
            {"num_heads": 1, "transformer_depth": "deep"},
            r"params\.transformer_depth 'deep': allowed are whole numbers from 1 to 32$",
        ),
        ({"num_heads": 0}, "num_heads 0, num_head_channels -1: allowed are whole numbers from 1"),
        ({"num_heads": 1, "channel_mult": [2, 1]}, r"channel_mult \[2, 1\]: allowed are lists that begin with 1"),
    ],
)
def test_config_errors(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        unet_settings(config_of(**params))
    assert "\n" not in str(caught.value)


def test_configs_of_other_models() -> None:
    with pytest.raises(ValueError, match=r"no model\.params\.unet_config\.params"):
        unet_settings({"model": {"ch": 3}})
    other = config_of(num_heads=1)
    other["model"]["params"]["unet_config"]["target"] = "ldm.modules.EncoderUNetModel"
    with pytest.raises(ValueError, match="EncoderUNetModel: allowed is"):
        unet_settings(other)
    missing = copy.deepcopy(config_of(num_heads=1))
    del missing["model"]["params"]["unet_config"]["params"]["model_channels"]
    with pytest.raises(
        ValueError,
        match=r"^model\.params\.unet_config\.params\.model_channels is missing: allowed are whole numbers from 1 to 8192$",
    ):
        unet_settings(missing)
    with pytest.raises(ValueError, match=r"beta_schedule 'cosine' is not supported: allowed is linear"):
        ldm_betas({"model": {"params": {"beta_schedule": "cosine"}}})
    with pytest.raises(ValueError, match=r"^model\.params\.linear_start 0\.0: allowed are numbers between 0 and 1$"):
        ldm_betas({"model": {"params": {"linear_start": 0.0}}})
