"""DDIM checkpoints become diffusers UNets that compute the same."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qncd.models.loading import load_ddim
from qncd.models.original.ddim import build_ddim_unet, convert_ddim_state_dict, ddim_key_map, ddim_weights, to_ddim_state_dict

NEAR = Path(__file__).resolve().parents[2] / "data" / "golden"
FAR = Path(__file__).resolve().parents[3].parent / "shared" / "golden"  # data too large for the repository

# The settings of the published models (ermongroup/ddim, configs/*.yml).
FULL_SIZE = {
    "cifar10": {"size": 32, "ch_mult": [1, 2, 2, 2]},
    "celeba": {"size": 64, "ch_mult": [1, 2, 2, 2, 4]},
    "lsun_bedroom": {"size": 256, "ch_mult": [1, 1, 2, 2, 4, 4]},
}


def ddim_config(size: int = 8, ch: int = 8, ch_mult: list[int] | None = None, **model: Any) -> dict[str, Any]:
    settings = {"in_channels": 3, "out_ch": 3, "ch": ch, "ch_mult": ch_mult or [1, 2], "num_res_blocks": 2}
    return {
        "data": {"dataset": "CIFAR10", "image_size": size},
        "model": {**settings, "attn_resolutions": [16], "resamp_with_conv": True, **model},
    }


TINY = ddim_config(num_res_blocks=1, attn_resolutions=[4], num_groups=4, ema=True)


def original_weights(config: dict[str, Any] = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return to_ddim_state_dict(build_ddim_unet(config).state_dict(), config)


@pytest.mark.parametrize("name", ["ddim_unet", "ddim_unet_small"])
def test_parity_with_the_original_network(name: str) -> None:
    folder = next((folder for folder in (NEAR, FAR) if (folder / f"{name}.ckpt").is_file()), None)
    if folder is None:
        pytest.skip("the larger golden files are not here")
    unet = load_ddim(yaml.safe_load((folder / f"{name}.yml").read_text()), folder / f"{name}.ckpt")
    with np.load(folder / f"{name}_io.npz") as data, torch.no_grad():
        seen: dict[str, torch.Tensor] = {}
        unet.conv_in.register_forward_hook(lambda _m, _i, out: seen.update(conv_in=out))
        unet.down_blocks[0].resnets[0].register_forward_hook(lambda _m, _i, out: seen.update(down0_block0=out))
        unet.mid_block.register_forward_hook(lambda _m, _i, out: seen.update(mid_out=out))
        seen["eps"] = unet(torch.from_numpy(data["x"]), torch.from_numpy(data["t"])).sample
        for key, value in seen.items():
            assert np.abs(value.numpy() - data[key]).max() < 1e-5 * max(1, np.abs(data[key]).max()), key
        assert np.abs(seen["eps"].numpy() - data["eps"]).max() < 1e-5


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_and_shapes(name: str) -> None:
    manifest = json.loads((NEAR / f"manifest_ddim_{name}.json").read_text())
    config = ddim_config(ch=128, **FULL_SIZE[name])
    with torch.device("meta"):
        original = {key: torch.empty(shape) for key, shape in manifest.items()}
        unet = build_ddim_unet(config)
    converted = convert_ddim_state_dict(original, config)
    expected = {key: value.shape for key, value in unet.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == expected
    back = to_ddim_state_dict(converted, config)
    assert {key: list(value.shape) for key, value in back.items()} == manifest


@pytest.mark.parametrize("attention", [[], [4], [8, 4]])
@pytest.mark.parametrize(("ch_mult", "blocks"), [([1], 1), ([1, 2], 2), ([2, 1, 4], 3)])
def test_the_key_map_is_one_to_one(ch_mult: list[int], blocks: int, attention: list[int]) -> None:
    config = ddim_config(ch_mult=ch_mult, num_res_blocks=blocks, attn_resolutions=attention, num_groups=4)
    with torch.device("meta"):
        expected = build_ddim_unet(config).state_dict().keys()
    mapped = ddim_key_map(config)
    assert len(set(mapped.values())) == len(mapped)
    assert set(mapped.values()) == set(expected)


def test_there_and_back_is_the_same() -> None:
    original = original_weights()
    back = to_ddim_state_dict(convert_ddim_state_dict(original, TINY), TINY)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in back)
    assert original["mid.attn_1.q.weight"].shape == (16, 16, 1, 1)


def training_list(model: Any, ema: Any) -> list[Any]:
    return [OrderedDict((f"module.{key}", value) for key, value in model.items()), {"state": {}}, 7, 1000, ema]


def test_training_checkpoints_give_their_ema_weights() -> None:
    model, ema = original_weights(seed=0), original_weights(seed=1)
    without_ema = {**TINY, "model": {**TINY["model"], "ema": False}}
    key = "conv_in.weight"
    assert torch.equal(ddim_weights(training_list(model, ema), TINY)[key], ema[key])
    assert torch.equal(ddim_weights(training_list(model, ema), without_ema)[key], model[key])
    assert torch.equal(ddim_weights(training_list(model, ema)[:4], TINY)[key], model[key])
    assert torch.equal(ddim_weights({f"module.{k}": v for k, v in model.items()}, TINY)[key], model[key])


@pytest.mark.parametrize("checkpoint", [[], 3, [1, 2], {}, {1: torch.zeros(1)}])
def test_other_things_are_refused(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint (is an empty list|holds a \w+), expected"):
        ddim_weights(checkpoint, TINY)


def test_keys_that_do_not_fit_are_named() -> None:
    original = original_weights()
    count = len(original)
    missing = {key: value for key, value in original.items() if not key.startswith("temb.")}
    with pytest.raises(ValueError) as caught:
        convert_ddim_state_dict(missing, TINY)
    keys = "temb.dense.0.bias, temb.dense.0.weight, temb.dense.1.bias and 1 more"
    assert str(caught.value) == f"4 of {count} keys are missing in the checkpoint: {keys}"
    with pytest.raises(ValueError, match=r"^1 keys that a DDIM model of this config lacks: extra\.weight$"):
        convert_ddim_state_dict({**original, "extra.weight": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"^1 tensors of another shape than the config's: conv_in\.bias \(3,\) for \(8,\)$"):
        convert_ddim_state_dict({**original, "conv_in.bias": torch.zeros(3)}, TINY)
    with pytest.raises(ValueError, match=r"^1 keys that hold no tensor: conv_in\.bias$"):
        convert_ddim_state_dict({**original, "conv_in.bias": None}, TINY)
    with pytest.raises(ValueError, match=r"^1 keys that a DDIM model of this config lacks: x$"):
        to_ddim_state_dict({**build_ddim_unet(TINY).state_dict(), "x": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=rf"^{count} of {count} keys are missing in the state dict: conv_in\.bias, "):
        to_ddim_state_dict({}, TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, r"num_groups 3 must divide every width: \[8, 16\]"),
        ({"resamp_with_conv": False}, "resamp_with_conv false is not supported"),
        ({"ch": "wide"}, r"^model\.ch 'wide': allowed are whole numbers from 1 to 8192$"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_ddim_unet({**TINY, "model": {**TINY["model"], **changes}})
    with pytest.raises(ValueError, match=r"^data is missing: allowed are mappings"):
        build_ddim_unet({"model": TINY["model"]})
