"""Networks in folders as diffusers saves them: read with every fault named, written whole or not at all, fetched from the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from qncd.io.files import first_line, read_json
from qncd.models.configs import HUB_ID
from qncd.models.files.unpickle import load_checkpoint
from qncd.models.original.key_tables import network_with_weights, refuse_in
from qncd.models.schema import NETWORK, WEIGHT_INDEX, Section, check, one_line, shown

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

KINDS: Mapping[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, VQModel, AutoencoderKL)
}
UNETS = ("UNet2DModel", "UNet2DConditionModel")

# Attention layers under the names that diffusers gave them before 0.17, as the google/ddpm-* files still have them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CHECKPOINT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers' and transformers' weights
_SUBFOLDERS = ("", "unet/", "vqvae/", "vae/", "text_encoder/", "class_embedder/")


_VARIANTS = ("", ".fp16")  # of the files' names, in the order of preference


def weight_files(stem: str = _STEMS[0]) -> tuple[str, ...]:
    """The names that a network's weights may have, in the order of preference."""
    return tuple(f"{stem}{variant}.{suffix}" for suffix in ("safetensors", "bin") for variant in _VARIANTS)


def read_settings(path: Path, rules: Section) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else, and for a value that the rules do not allow."""
    value = read_json(path)
    try:
        check(value, rules)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    settings: dict[str, Any] = value
    return settings


def read_weights(root: Path, stem: str = _STEMS[0]) -> tuple[str, dict[str, Any]]:
    """(the file, its state dict) of the weights in a folder; those in several parts are put together by their index.

    As in diffusers and transformers, .safetensors come before .bin; where there are both an index and a single file, diffusers
    takes the index and transformers (of other stems than diffusers') the file. The variant fp16 is taken where there is no other.

    Raises:
        ValueError: there are none, or they are damaged; an index and its files do not fit.
    """
    for name in weight_files(stem):
        base, suffix = name.removesuffix(f".{name.rpartition('.')[2]}"), name.rpartition(".")[2]
        variant = base.removeprefix(stem)
        index, file = root / f"{stem}.{suffix}.index{variant}.json", root / name
        ways: list[tuple[Path, Callable[[Path], dict[str, Any]]]] = [(index, _parts_together), (file, _state_dict)]
        for path, read in ways if stem == _STEMS[0] else reversed(ways):
            if path.exists():
                return str(path), read(path)
    others = sorted(path.name for suffix in ("safetensors", "bin") for path in root.glob(f"{stem}.*.{suffix}"))
    found = f"; {others[0]} is of a variant that is not read" if others else ""
    raise ValueError(f"{root}: no weights (looked for {', '.join(weight_files(stem))}{found})")


def _parts_together(index: Path) -> dict[str, Any]:
    return read_parts(index, _state_dict)


def parts_of(index: Path) -> dict[Path, set[str]]:
    """The files that a *.index.json names, and what each is said to hold.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index is damaged.
    """
    found: dict[Path, set[str]] = {}
    for key, part in read_settings(index, WEIGHT_INDEX)["weight_map"].items():
        if Path(part).name != part or not part.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index}: weight_map.{one_line(key)} {shown(part)}: allowed are names of files of this folder")
        found.setdefault(index.parent / part, set()).add(key)
    if missing := sorted(part.name for part in found if not part.is_file()):
        raise FileNotFoundError(f"{index}: {len(missing)} of {len(found)} files are missing, {missing[0]} first")
    return found


def read_parts(index: Path, read: Callable[[Path], Mapping[str, Value]]) -> dict[str, Value]:
    """What a function reads of the files of a *.index.json by the names in it, each from the file that it names and only there.

    Raises:
        FileNotFoundError, ValueError: as `parts_of`; a file holds something else than the index says.
    """
    state: dict[str, Value] = {}
    for part, wanted in sorted(parts_of(index).items()):
        found = read(part)
        refuse_in(str(index), f"keys are in {part.name} and the index says otherwise", found.keys() - wanted)
        refuse_in(str(index), f"keys are not in {part.name}, where the index has them", wanted - found.keys())
        state |= found
    return state


def _state_dict(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return dict(state)


def drain(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of a state dict, each taken out of it, so that its memory goes with the last user."""
    while state:
        yield state.popitem()


def network_builder(root: Path, allowed: Sequence[str]) -> Callable[[], nn.Module]:
    """What makes the network that a folder's config.json describes, with fresh weights; it is tried once without memory.

    Args:
        root: the folder with config.json.
        allowed: class names, of `KINDS`.

    Raises:
        ValueError: the folder describes no such network.
    """
    config_file = root / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{root}: not a diffusers folder (no config.json in it)")
    settings = read_settings(config_file, NETWORK)
    kind = settings["_class_name"]
    if kind not in allowed:
        raise ValueError(f"{config_file}: the model is a {kind}, expected a {' or '.join(allowed)}")

    def build() -> nn.Module:
        try:
            return KINDS[str(kind)].from_config(settings)  # type: ignore[attr-defined]
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            reason = first_line(error)
            raise ValueError(f"{config_file}: no {kind} can be built from it: {reason}") from None

    with torch.device("meta"):
        build()  # a faulty config is said before gigabytes are read
    return build


def load_component(root: Path, allowed: Sequence[str]) -> Any:
    """A network saved by diffusers, weights of any float dtype cast to float32; eval mode, on the CPU, no gradients.

    Args:
        root: the folder with config.json and the weights.
        allowed: class names, of `KINDS`.

    Raises:
        ValueError: the folder holds no such network, or its weights do not fit its config or are not finite.
    """
    build = network_builder(root, allowed)
    source, state = read_weights(root)
    return network_with_weights(build, ((_current_name(key), value) for key, value in drain(state)), source)


def load_unet_folder(folder: str | Path, allowed: Sequence[str] = UNETS) -> Any:
    """A UNet saved by diffusers (unconditional, or with cross-attention, SDXL's included), as `load_component`.

    Args:
        folder: with config.json and the weights, or a pipeline that has them in `unet/`.
        allowed: class names.

    Raises:
        ValueError: as `load_component`.
    """
    folder = Path(folder)
    root = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (root / "config.json").is_file():
        raise ValueError(f"{folder}: not a diffusers folder (no config.json in it or in its unet/)")
    return load_component(root, allowed)


def _current_name(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def local_path(source: str) -> Path:
    """The path that a source means; a hub id that is no path here is downloaded.

    Raises:
        FileNotFoundError: it is a hub id, and the folder cannot be had.
    """
    path = Path(source)
    if not path.exists() and HUB_ID.fullmatch(source) and path.suffix not in CHECKPOINT_SUFFIXES:
        return _download_hub_folder(source)
    return path


def _download_hub_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    settings = [
        "model_index.json",
        "scheduler_config.json",
        "scheduler/*.json",
        "tokenizer/*",
        *(f"{sub}config.json" for sub in _SUBFOLDERS),
    ]

    def weights(suffix: str) -> list[str]:
        names = [name for stem in _STEMS for name in weight_files(stem) if name.endswith(suffix) and ".fp16." not in name]
        names += [name + ".index.json" for name in names]
        names += [f"{stem}-*-of-*{suffix}" for stem in _STEMS]  # the parts of large ones
        return [sub + name for sub in _SUBFOLDERS for name in names]

    try:
        folder = Path(snapshot_download(repository, allow_patterns=settings + weights(".safetensors")))
        if not any(folder.glob("**/*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=settings + weights(".bin")))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = first_line(error)
        raise FileNotFoundError(
            f"{repository}: no such path here, and not to be had from the hub ({reason}): "
            "download its folder and name that with --ckpt PATH"
        ) from None
    if folder.parent.name == "snapshots":  # of the hub's cache
        logger.info("%s: revision %s", repository, folder.name)
    return folder


def cannot_tell(network: nn.Module) -> list[str]:
    """What a network computes with and its diffusers config does not tell: modules that the config alone builds otherwise.

    Such a network must not be saved as a folder: diffusers would load another one from it.
    """
    with torch.device("meta"):
        plain = dict(type(network).from_config(network.config).named_modules())  # type: ignore[attr-defined]

    def facts(module: Any) -> tuple[Any, ...]:
        shapes = tuple((key, value.shape) for key, value in module.named_parameters(recurse=False))
        return (getattr(module, "heads", None), shapes)

    return [name for name, module in network.named_modules() if name not in plain or facts(module) != facts(plain[name])]


def check_told(network: nn.Module) -> None:
    """Raise ValueError where a network's diffusers config does not tell all that it computes."""
    if hidden := cannot_tell(network):
        raise ValueError(
            f"diffusers' {type(network).__name__} cannot be told how {hidden[0]} ({len(hidden)} such modules) is made: "
            "this model runs from its original checkpoint, and has no diffusers folder"
        )


def check_replaceable(folder: Path, marker: str) -> None:
    """Raise ValueError unless there is nothing at `folder`, an empty folder, or one that has a file named `marker`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(f"{folder}: not empty, and not made by this command (no {marker} in it): name another folder")
