"""First stages of latent-diffusion become diffusers autoencoders that compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from qncd.models.files.diffusers_folders import cannot_tell
from qncd.models.original.autoencoders import FirstStage, build_first_stage, first_stage_key_map
from qncd.models.original.key_tables import check_original, from_original, network_with_weights, shapes_of, to_original

NEAR = Path(__file__).resolve().parents[2] / "data" / "golden"
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config_of(kl: bool = False, embed_dim: int = 3, **dd: Any) -> dict[str, Any]:
    settings = {
        "double_z": kl, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "num_groups": 4, **dd,
    }  # fmt: skip
    params: dict[str, Any] = {"embed_dim": embed_dim, "ddconfig": settings, "lossconfig": {"target": "torch.nn.Identity"}}
    target = "ldm.models.autoencoder." + ("AutoencoderKL" if kl else "VQModelInterface")
    if not kl:
        params["n_embed"] = 16
    return {"model": {"params": {"first_stage_config": {"target": target, "params": params}}}}


ARCHITECTURES = {
    "vq": config_of(),
    "vq, codes of another width": config_of(embed_dim=2, in_channels=1, out_ch=1),
    "vq, attention": config_of(attn_resolutions=[16, 8], num_res_blocks=2, ch_mult=[2, 1, 3]),
    "vq, no attention at all": config_of(attn_type="none", attn_resolutions=[8]),
    "vq, f1": config_of(ch_mult=[1]),
    "kl": config_of(kl=True, ch_mult=[1, 2, 2]),
    "kl, attention": config_of(kl=True, attn_resolutions=[8], embed_dim=4, z_channels=4, num_res_blocks=2),
    "kl, moments of another width": config_of(kl=True, embed_dim=2),
}


class Reference:
    """Encoder and Decoder written from their keys, without diffusers."""

    def __init__(self, state: dict[str, Tensor], dd: dict[str, Any]) -> None:
        self.state, self.dd = state, dd

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.dd["num_groups"], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **options})

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.state:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (N, C, L)
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def middle(self, name: str, h: Tensor) -> Tensor:
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", h)))

    def encode(self, x: Tensor) -> Tensor:
        h, levels = self.conv("encoder.conv_in", x), len(self.dd["ch_mult"])
        for i in range(levels):
            for j in range(self.dd["num_res_blocks"]):
                h = self.attention(f"encoder.down.{i}.attn.{j}", self.block(f"encoder.down.{i}.block.{j}", h))
            if i < levels - 1:
                h = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self.norm("encoder.norm_out", self.middle("encoder.mid", h))
        return self.conv("quant_conv", self.conv("encoder.conv_out", F.silu(h)))

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for i in reversed(range(len(self.dd["ch_mult"]))):
            for j in range(self.dd["num_res_blocks"] + 1):
                h = self.attention(f"decoder.up.{i}.attn.{j}", self.block(f"decoder.up.{i}.block.{j}", h))
            if i:
                h = self.conv(f"decoder.up.{i}.upsample.conv", F.interpolate(h, scale_factor=2))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)))

    def quantize(self, z: Tensor) -> Tensor:
        codes = self.state["quantize.embedding.weight"]
        distance = (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1)
        return codes[distance.argmin(-1)].permute(0, 3, 1, 2)


def randomized(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    network = build_first_stage(config)
    for parameter in network.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parity_with_a_reference(name: str) -> None:
    config = ARCHITECTURES[name]
    dd = config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
    network, table = randomized(config), first_stage_key_map(config)
    original = to_original(network.state_dict(), table, "model")
    reference, stage = Reference(original, dd), FirstStage(network, scale=0.5)
    assert stage.factor == 2 ** (len(dd["ch_mult"]) - 1)
    images = torch.randn(2, dd["in_channels"], 16, 16)
    z = torch.randn(2, stage.latent_channels, 16 // stage.factor, 16 // stage.factor)
    moments = reference.encode(images)
    assert (stage.encode(images) - moments[:, : stage.latent_channels] * 0.5).abs().max() < 1e-5
    decoded = reference.decode(reference.quantize(z / 0.5) if stage.quantizes else z / 0.5)
    assert (stage.decode(z) - decoded).abs().max() < 1e-5 * max(1, decoded.abs().max())
    if stage.quantizes:
        assert (stage.decode(z, force_not_quantize=True) - reference.decode(z / 0.5)).abs().max() < 2e-5
    else:
        mean, logvar = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
        sample = (mean + noise * torch.exp(0.5 * logvar.clamp(-30, 20))) * 0.5
        assert (stage.encode(images, torch.Generator().manual_seed(7)) - sample).abs().max() < 2e-5
    assert bool(cannot_tell(network)) == (name == "kl, moments of another width")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_the_same(name: str) -> None:
    config = ARCHITECTURES[name]
    table, network = first_stage_key_map(config), randomized(config)
    original = to_original(network.state_dict(), table, "model")
    state = dict(original)
    check_original(state, table, shapes_of(lambda: build_first_stage(config)), "model")
    loaded = network_with_weights(lambda: build_first_stage(config), from_original(state, table), "x").state_dict()
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "manifest"),
    [("cin256-v2", "ldm_cin256_v2"), ("lsun_beds256", "ldm_lsun_beds256_released"), ("sd-v1-inference", "sd_v1")],
)
def test_full_size_keys_and_shapes(name: str, manifest: str) -> None:
    shapes = json.loads((NEAR / f"manifest_{manifest}.json").read_text())
    prefix = "first_stage_model."
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        original = {key.removeprefix(prefix): torch.empty(shape) for key, shape in shapes.items() if key.startswith(prefix)}
        network = build_first_stage(config)
    table, expected = first_stage_key_map(config), {key: value.shape for key, value in network.state_dict().items()}
    check_original(original, table, expected, "model")
    converted = dict(from_original(dict(original), table))
    assert {key: value.shape for key, value in converted.items()} == expected
    back = to_original(converted, table, "model")
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in original.items()}


def changed(section: str, **values: Any) -> dict[str, Any]:
    config = copy.deepcopy(config_of())
    stage = config["model"]["params"]["first_stage_config"]
    {"stage": stage, "params": stage["params"], "dd": stage["params"]["ddconfig"]}[section].update(values)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("stage", target="ldm.models.IdentityFirstStage"), "IdentityFirstStage is not supported: allowed are VQModel"),
        (changed("stage", params=None), r"model\.params\.first_stage_config\.params null: allowed are mappings"),
        (changed("params", colour=1), "first_stage_config has parameters that are not supported: colour"),
        (changed("params", remap="file"), "first_stage_config.remap file is not supported: allowed is None"),
        (changed("dd", use_linear_attn=True), "ddconfig.use_linear_attn True is not supported: allowed is False"),
        (changed("dd", attn_type="linear"), "attn_type 'linear' is not supported: allowed are vanilla, none"),
        (changed("dd", double_z=True), "double_z True does not fit the target"),
        (changed("dd", num_groups=3), r"num_groups 3 must divide every width: \[8, 16\]"),
        ({"model": {"params": {}}}, r"^model\.params\.first_stage_config is missing: allowed are mappings"),
        (
            {"model": {"params": {**config_of()["model"]["params"], "scale_factor": 0}}},
            r"^model\.params\.scale_factor 0: allowed are numbers between 0 and 1e\+06$",
        ),
    ],
)
def test_config_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_first_stage(config)
