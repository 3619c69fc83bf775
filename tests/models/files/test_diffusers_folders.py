"""Folders of diffusers: both kinds of UNet, weights in parts, and folders that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import text_model

from qncd.models.files.diffusers_folders import (
    KINDS,
    cannot_tell,
    check_replaceable,
    load_component,
    load_unet_folder,
    local_path,
    read_weights,
)
from qncd.models.loading import state_dict_hash

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_unets_with_cross_attention(make_cross_unet: Any, tmp_path: Path) -> None:
    unet = make_cross_unet()
    unet.save_pretrained(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        loaded = load_unet_folder(folder)
        assert state_dict_hash(loaded) == state_dict_hash(unet)
        assert not loaded.training
    x, t, context = torch.randn(1, unet.config.in_channels, 8, 8), torch.tensor([5]), torch.randn(1, 3, 12)
    assert torch.equal(loaded(x, t, context).sample, unet(x, t, context).sample)
    with pytest.raises(ValueError, match=r"config\.json: the model is a UNet2DConditionModel, expected a UNet2DModel$"):
        load_unet_folder(tmp_path, ("UNet2DModel",))


def test_unets_of_sdxl(make_cross_unet: Any, tmp_path: Path) -> None:
    """Text and time embeddings added to the time step, several depths of transformers, linear projections."""
    unet = make_cross_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    loaded = load_unet_folder(tmp_path)
    extra = {"text_embeds": torch.randn(1, 8), "time_ids": torch.zeros(1, 6)}
    inputs = (torch.randn(1, unet.config.in_channels, 8, 8), torch.tensor([5]), torch.randn(1, 3, 12))
    assert torch.equal(loaded(*inputs, added_cond_kwargs=extra).sample, unet(*inputs, added_cond_kwargs=extra).sample)
    assert state_dict_hash(loaded) == state_dict_hash(unet)


def test_weights_in_parts(make_unet: Any, tmp_path: Path) -> None:
    unet = make_unet()
    unet.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / part)
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    assert state_dict_hash(load_unet_folder(tmp_path)) == state_dict_hash(unet)
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)  # as in diffusers, the index comes before a single file
    assert state_dict_hash(load_unet_folder(tmp_path)) == state_dict_hash(unet)
    (tmp_path / WEIGHTS).unlink()
    variant = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(variant)
    assert state_dict_hash(load_unet_folder(tmp_path)) == state_dict_hash(unet)
    variant.rename(index)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map\.a '\.\./a\.safetensors': allowed are names of files of this folder$"
    ):
        load_unet_folder(tmp_path)


@pytest.mark.parametrize(("library", "stem"), [("diffusers", "diffusion_pytorch_model"), ("transformers", "model")])
def test_a_single_file_beside_parts(library: str, stem: str, make_unet: Any, tmp_path: Path) -> None:
    """diffusers takes the parts, transformers the single file: so do we."""
    network = make_unet() if library == "diffusers" else text_model()
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / f"{stem}.safetensors.index.json").is_file()
    state = {key: torch.full_like(value, 0.5) for key, value in network.state_dict().items()}
    save_file(state, tmp_path / f"{stem}.safetensors", {"format": "pt"})
    expected = type(network).from_pretrained(tmp_path)
    assert state_dict_hash(read_weights(tmp_path, stem)[1]) == state_dict_hash(expected)
    assert (state_dict_hash(expected) == state_dict_hash(state)) == (library == "transformers")


@pytest.fixture
def parts(make_unet: Any, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with weights in one.safetensors and two.safetensors, and the weight_map of its index."""
    make_unet().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    places = {key: ("one", "two")[i % 2] + ".safetensors" for i, key in enumerate(sorted(state))}
    for part in ("one.safetensors", "two.safetensors"):
        save_file({key: state[key] for key in state if places[key] == part}, tmp_path / part)
    return tmp_path, places


NONE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda places: places | {"a": "/etc/one.safetensors"},
            r"weight_map\.a '/etc/one\.safetensors': allowed are names of files",
        ),
        (lambda places: places | {"a": "one.exe"}, r"weight_map\.a 'one\.exe': allowed are names of files of this folder$"),
        (lambda places: places | {"a": 3}, r"weight_map\.a 3: allowed are texts$"),
        (lambda places: NONE, "weight_map with keys and values: allowed are mappings of names to texts$"),
        (lambda places: places | {"a": "one.safetensors"}, r"1 keys are not in one\.safetensors, where the index has them: a$"),
        (lambda places: dict(list(places.items())[1:]), r"1 keys are in \w+\.safetensors and the index says otherwise: \S+$"),
    ],
)
def test_an_index_and_its_files(parts: tuple[Path, dict[str, str]], change: Any, message: str) -> None:
    folder, places = parts
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    load_unet_folder(folder)
    index.write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(ValueError, match=rf"^{index}: {message}"):
        load_unet_folder(folder)


def test_what_an_index_misses(parts: tuple[Path, dict[str, str]]) -> None:
    folder, places = parts
    index = folder / f"{WEIGHTS}.index.json"
    for text, message in (("{}", "weight_map is missing"), ("[1]", r"the whole \[1\]"), ("{", "not JSON, or damaged")):
        index.write_text(text)
        with pytest.raises(ValueError, match=rf"^{index}: {message}"):
            load_unet_folder(folder)
    index.write_text(json.dumps({"weight_map": places}))
    state = load_file(folder / "two.safetensors")
    save_file({**state, **load_file(folder / "one.safetensors")}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"keys are in two\.safetensors and the index says otherwise: "):  # a tensor in two files
        load_unet_folder(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{index}: 1 of 2 files are missing, two\.safetensors first$"):
        load_unet_folder(folder)


def test_variants(make_unet: Any, tmp_path: Path) -> None:
    unet = make_unet()
    unet.save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(ValueError, match=r"; diffusion_pytorch_model\.non_ema\.safetensors is of a variant that is not read\)$"):
        load_unet_folder(tmp_path)
    unet.half().save_pretrained(tmp_path, variant="fp16")
    assert state_dict_hash(load_unet_folder(tmp_path)) == state_dict_hash(unet.float())
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: a folder, expected a file"):  # no other file in its place
        load_unet_folder(tmp_path)


def test_attention_of_convolutions(tmp_path: Path) -> None:
    """The same matrix as a 1x1 convolution (C, C, 1, 1), in which old autoencoders keep it."""
    torch.manual_seed(0)
    network = KINDS["AutoencoderKL"](block_out_channels=(8,), norm_num_groups=4)
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    state = load_file(tmp_path / WEIGHTS)
    attention = [key for key in state if ".attentions." in key and state[key].ndim == 2]
    save_file(state | {key: state[key][:, :, None, None].contiguous() for key in attention}, tmp_path / WEIGHTS)
    assert len(attention) == 8
    assert state_dict_hash(load_component(tmp_path, ("AutoencoderKL",))) == state_dict_hash(network)
    save_file(state | {"decoder.conv_out.bias": torch.zeros(1)}, tmp_path / WEIGHTS)  # would broadcast
    with pytest.raises(ValueError, match=r"1 tensors have another shape than their layer: decoder\.conv_out\.bias$"):
        load_component(tmp_path, ("AutoencoderKL",))


def test_a_config_that_asks_for_memory_without_end(make_unet: Any, tmp_path: Path) -> None:
    make_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("layers_per_block", 10**6), ("block_out_channels", [10**9, 10**9]), ("norm_num_groups", 0)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=rf"config\.json: {key} .*: allowed are "):
            load_unet_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": [4096, 8192]}))
    with pytest.raises(ValueError, match="tensors have another shape than their layer"):  # 20 GB, of which none is taken
        load_unet_folder(tmp_path)


def test_components(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for kind in ("VQModel", "AutoencoderKL"):
        network = KINDS[kind](block_out_channels=(8,), norm_num_groups=4)
        network.save_pretrained(tmp_path / kind)  # type: ignore[operator]
        assert state_dict_hash(load_component(tmp_path / kind, ("VQModel", "AutoencoderKL"))) == state_dict_hash(network)
        assert cannot_tell(network) == []
    with pytest.raises(ValueError, match=r"the model is a AutoencoderKL, expected a VQModel$"):
        load_component(tmp_path / "AutoencoderKL", ("VQModel",))
    with pytest.raises(ValueError, match=r"not a diffusers folder \(no config\.json in it\)"):
        load_component(tmp_path, ("VQModel",))


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    check_replaceable(mine, "made")
    mine.mkdir()
    check_replaceable(mine, "made")
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"mine: not empty, and not made by this command \(no made in it\): name another folder$"
    ):
        check_replaceable(mine, "made")
    with pytest.raises(ValueError, match=r"thesis\.txt: is a file, expected a folder$"):
        check_replaceable(mine / "thesis.txt", "made")
    (mine / "made").write_text("")
    check_replaceable(mine, "made")


def test_checkpoint_names_are_no_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert local_path("models/sd-v1-4.ckpt") == Path("models/sd-v1-4.ckpt")
    assert local_path("a/b/c") == Path("a/b/c")
    assert asked == []
    assert local_path("CompVis/stable-diffusion-v1-4") == tmp_path
    assert set(asked) == {"CompVis/stable-diffusion-v1-4"}
