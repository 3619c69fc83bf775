"""Loading of networks: every source gives the same network, every fault has its line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qncd.models import loading
from qncd.models.loading import load_config, load_ddim, load_unet_folder, state_dict_hash
from qncd.models.original.ddim import build_ddim_unet, to_ddim_state_dict

CONFIG: dict[str, Any] = {
    "data": {"dataset": "CIFAR10", "image_size": 8},
    "model": {
        "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
        "num_groups": 4, "ema": True, "dropout": 0.5, "resamp_with_conv": True,
    },
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_ddim_unet(CONFIG)


@pytest.fixture
def folder(unet: Any, tmp_path: Path) -> Path:
    unet.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(**model: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["model"].update(model)
    return config


def test_every_source_gives_the_same_network(unet: Any, folder: Path, tmp_path: Path) -> None:
    state = unet.state_dict()
    original = to_ddim_state_dict(state, CONFIG)
    zeros = {key: torch.zeros_like(value) for key, value in original.items()}
    torch.save(original, tmp_path / "bare.ckpt")
    torch.save(original, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([{f"module.{k}": v for k, v in zeros.items()}, {}, 1, 2, original], tmp_path / "training.pth")
    torch.save(state, tmp_path / "ours.pt")
    save_file({key: value.contiguous() for key, value in original.items()}, tmp_path / "original.safetensors")
    save_file(state, tmp_path / "ours.safetensors")
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "unet")
    expected = state_dict_hash(unet)
    sources = ["bare.ckpt", "old.pth", "training.pth", "ours.pt", "original.safetensors", "ours.safetensors"]
    for source in [*sources, "pipeline", "pipeline/unet"]:
        loaded = load_ddim(CONFIG, tmp_path / source)
        assert state_dict_hash(loaded) == expected, source
        assert not loaded.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_half_precision_folders_become_float32(unet: Any, tmp_path: Path) -> None:
    copy.deepcopy(unet).half().save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_ddim(CONFIG, tmp_path / "half")
    assert state_dict_hash(loaded) == state_dict_hash(unet.half().float())


def test_attention_names_of_old_folders(unet: Any, folder: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    for new, old in names.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in state
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert state_dict_hash(load_ddim(CONFIG, folder)) == state_dict_hash(unet)


def test_folder_and_config_must_agree(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model: in_channels is 3, the config says 1$"):
        load_ddim(changed(in_channels=1), folder)
    with pytest.raises(ValueError, match=r"model: out_channels is 3, the config says 6$"):
        load_ddim(changed(out_ch=6), folder)
    with pytest.raises(ValueError, match=r"model: sample_size is 8, the config says 16$"):
        load_ddim({**CONFIG, "data": {"image_size": 16}}, folder)


def edit_weights(folder: Path, **changes: Any) -> None:
    state = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_in__bias": torch.full((8,), torch.nan)}, r"conv_in\.bias holds NaN or infinite values$"),
        ({"conv_in__bias": torch.full((8,), torch.inf)}, r"conv_in\.bias holds NaN or infinite values$"),
        ({"conv_in__bias": None}, r": 1 keys are missing: conv_in\.bias$"),
        ({"extra": torch.zeros(1)}, r": 1 keys belong to no layer: extra$"),
        ({"conv_in__bias": torch.zeros(9)}, r": 1 tensors have another shape than their layer: conv_in\.bias$"),
        ({"conv_in__bias": torch.zeros(8, dtype=torch.int8)}, r"conv_in\.bias holds torch\.int8, expected floating point"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_weights(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_unet_folder(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_faulty_folders(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty: not a diffusers folder \(no config\.json"):
        load_ddim(CONFIG, empty)
    settings = json.loads((folder / "config.json").read_text())
    for text, message in (
        ("{", "not JSON"),
        ("[]", r"the whole \[\]: allowed are mappings of keys to values"),
        (json.dumps({**settings, "_class_name": "UNet2DConditionModel"}), "the model is a UNet2DConditionModel"),
        (json.dumps({**settings, "down_block_types": ["NoBlock", "NoBlock"]}), "no UNet2DModel can be built from it"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            load_ddim(CONFIG, folder)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    with pytest.raises(ValueError, match=r"safetensors: truncated, or not a checkpoint"):
        load_ddim(CONFIG, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model: no weights \(looked for "):
        load_ddim(CONFIG, folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: \d+ of \d+ keys are missing in the checkpoint: conv_in\.bias"):
        load_ddim(CONFIG, tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt: no such file$"):
        load_ddim(CONFIG, tmp_path / "gone.ckpt")


def test_bundled_models(folder: Path, monkeypatch: pytest.MonkeyPatch, unet: Any) -> None:
    monkeypatch.setattr(loading, "ASSETS", folder.parent)
    assert state_dict_hash(load_ddim(changed(weights="model"))) == state_dict_hash(unet)
    fashion = changed(weights="model") | {"data": {"dataset": "FASHION_MNIST", "image_size": 8}}
    assert state_dict_hash(load_ddim(fashion, use_pretrained=True)) == state_dict_hash(unet)
    with pytest.raises(ValueError, match=r"^model\.weights 'other' is no bundled model: allowed are model$"):
        load_ddim(changed(weights="other"))
    with pytest.raises(ValueError, match=r"^no weights: give --ckpt PATH or --use_pretrained"):
        load_ddim(CONFIG)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"dataset": "CIFAR10"}, "ema_diffusion_cifar10"),
        ({"dataset": "LSUN", "category": "bedroom"}, "ema_diffusion_lsun_bedroom"),
        ({"dataset": "LSUN", "category": "church_outdoor"}, "ema_diffusion_lsun_church"),
    ],
)
def test_published_weights_by_data_set(
    data: dict[str, str], expected: str, unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "published.ckpt"
    torch.save(to_ddim_state_dict(unet.state_dict(), CONFIG), path)
    asked: list[str] = []
    monkeypatch.setattr(loading, "fetch", lambda name, **_: asked.append(name) or path)
    load_ddim({**CONFIG, "data": {**data, "image_size": 8}}, use_pretrained=True)
    assert asked == [expected]


def test_data_sets_without_published_weights() -> None:
    with pytest.raises(ValueError, match=r"^no published weights for the data set 'celeba' \(there are ema_diffusion_cifar10"):
        load_ddim({**CONFIG, "data": {"dataset": "CELEBA", "image_size": 8}}, use_pretrained=True)


def test_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch, unet: Any) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert state_dict_hash(load_ddim(CONFIG, "google/ddpm-cifar10-32")) == state_dict_hash(unet)
    assert asked == ["google/ddpm-cifar10-32"]
    monkeypatch.chdir(folder.parent.parent)
    load_ddim(CONFIG, f"{folder.parent.name}/model")  # a local path of the same form is not asked for
    assert len(asked) == 1

    def offline(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_ddim(CONFIG, "google/none")
    assert str(caught.value) == (
        "google/none: no such path here, and not to be had from the hub (no connection): "
        "download its folder and name that with --ckpt PATH"
    )


def test_state_dict_hash_sees_every_part() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    variants = [
        base,
        {"c": base["a"], "b": base["b"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "a": base["a"] + torch.eye(2, 3)},
    ]
    assert len({state_dict_hash(variant) for variant in variants}) == len(variants)
    assert state_dict_hash({"b": base["b"], "a": base["a"].T.contiguous().T}) == state_dict_hash(base)
    assert state_dict_hash({"x": torch.zeros(0), "y": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"not a yaml file at line \d+: "),
        ("- 1", "holds a list, expected sections"),
        ("", r"no model section \(found: nothing\)"),
        ("model: ${nothing.there}", "Interpolation key 'nothing.there' not found"),
        ("data: {}", r"no model section \(found: data\)"),
        ("{}", r"no model section \(found: nothing\)"),
        ("model: 3", "no model section"),
        ("\x00", "not a yaml file"),
    ],
)
def test_config_faults(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_config_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.yml: no such config file$"):
        load_config(tmp_path / "gone.yml")
    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "fashion_mnist.yml")
    assert config["model"]["weights"] == "fashion_mnist_ddim"


def test_a_config_is_read_as_the_original_code_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  eps: 1e-05\n  size: 64\n  again: ${model.size}\n")
    assert load_config(path)["model"] == {"eps": 1e-5, "size": 64, "again": 64}
