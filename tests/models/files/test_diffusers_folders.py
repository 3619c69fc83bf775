"""Folders of diffusers: both kinds of UNet, weights in parts, and folders that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qncd.models.files.diffusers_folders import KINDS, cannot_tell, load_component, load_unet_folder, local_path, whole_folder
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
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="names no files of this folder"):
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


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), whole_folder(target, "made") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    (tmp_path / "deep" / "folder.part").mkdir()  # of a run that was killed
    (tmp_path / "deep" / "folder.part" / "half").write_text("")
    for content in ("1", "2"):  # the second replaces its own
        with whole_folder(target, "made") as folder:
            assert list(folder.iterdir()) == []
            (folder / "made").write_text(content)
    assert (target / "made").read_text() == "2"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with whole_folder(tmp_path / "mine", "made"):
        pass
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with (
        pytest.raises(ValueError, match=r"mine: not empty, and not made by this command"),
        whole_folder(tmp_path / "mine", "made"),
    ):
        pass
    with pytest.raises(ValueError, match=r"thesis\.txt: is a file"), whole_folder(tmp_path / "mine" / "thesis.txt", "made"):
        pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_checkpoint_names_are_no_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert local_path("models/sd-v1-4.ckpt") == Path("models/sd-v1-4.ckpt")
    assert local_path("a/b/c") == Path("a/b/c")
    assert asked == []
    assert local_path("CompVis/stable-diffusion-v1-4") == tmp_path
    assert set(asked) == {"CompVis/stable-diffusion-v1-4"}
