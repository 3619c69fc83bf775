"""The models' yaml files: where the package carries its own, and which file a name or a checkpoint means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qncd.io.yaml_files import read_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel has the files inside the package, a checkout in the folder beside it.
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE / "configs")

ASSETS = _PACKAGE / "assets"
INDEX = "model_index.json"  # of a pipeline of diffusers, in its folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
YAML = (".yml", ".yaml")


def names_pipeline(config: str | Path) -> bool:
    """Whether a --config is the folder, or the hub id, of a pipeline of diffusers: no yaml, and no path of something else."""
    path = Path(config)
    return path.is_dir() or (not path.exists() and path.suffix not in YAML and HUB_ID.fullmatch(str(config)) is not None)


def find_config(name: str | Path) -> Path:
    """The file that a --config means: a path that exists, else `configs/NAME` or `NAME` among the package's own.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parts in ((path.name,), ("configs", path.name)) and (CONFIGS / path.name).is_file():
        return CONFIGS / path.name
    raise FileNotFoundError(f"{name}: no such config file")


def bundled_folder(config: Mapping[str, Any]) -> Path:
    """The folder of a bundled pipeline that a yaml names. Raises ValueError where there is none."""
    name = config["model"]["weights"]
    if not (ASSETS / name / INDEX).is_file():
        bundled = sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))
        raise ValueError(f"model.weights {name!r} is no bundled pipeline: allowed are {', '.join(bundled) or '(none)'}")
    return ASSETS / name


def read_config(path: Path) -> dict[str, Any]:
    """What a model's yaml holds, below its sections not checked yet. Raises ValueError where it is none of a model."""
    config = read_yaml(path) or {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, expected sections such as model: and data:")
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: no model section (found: {', '.join(config) or 'nothing'})")
    return config


def config_beside(checkpoint: Path) -> Path:
    """The yaml that lies beside a checkpoint: of the same name, config.yaml, or the only one.

    Raises:
        ValueError: it is not clear which.
    """
    for own in (checkpoint.with_suffix(".yaml"), checkpoint.with_name("config.yaml")):
        if own.is_file():
            return own
    candidates = sorted(checkpoint.parent.glob("*.yaml"))
    if len(candidates) != 1:
        raise ValueError(f"{checkpoint}: which yaml describes it? {len(candidates)} lie beside it: name one with --config")
    return candidates[0]
