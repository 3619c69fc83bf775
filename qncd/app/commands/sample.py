"""Which sampler a command line means: that of DDIM models, of latent models or of text-to-image models."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd.app import parser as cli
from qncd.io.files import read_json
from qncd.models.configs import CONFIGS, INDEX, bundled_folder, find_config, names_pipeline, read_config
from qncd.models.schema import COMPVIS, DIFFUSERS, PIPELINE, Section, check, layout_of

DEFAULT_CONFIG = CONFIGS / "fashion_mnist.yml"
NOTE = """
The flags depend on the model that --config, --ckpt or --prompt means: `qncd sample --config configs/fashion_mnist_ldm.yaml
--help` and `qncd sample --prompt TEXT --help` list those of the other samplers. Without any of the three the bundled DDIM model
(configs/fashion_mnist.yml) is sampled. -l, --logdir and --outdir all name the output folder.
"""

Choice = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None], list[str]]


@dataclass(frozen=True)
class Sampler:
    """What `qncd sample` and `qncd quantize` know of a sampler.

    Attributes:
        module: below `qncd.app.commands`, with `make_parser`, `main` and `run`.
        output: its flag for the output folder.
        count: the argument that makes no image when it is 0.
        image_flags: the flags that say how many images to make.
    """

    module: str
    output: str
    count: str
    image_flags: tuple[str, ...]

    def load(self) -> Any:
        """The sampler's module."""
        return importlib.import_module(f"qncd.app.commands.{self.module}")


SAMPLERS = {
    "ddim": Sampler("sample_ddim", "--logdir", "max_images", ("--max_images",)),
    "latent": Sampler("sample_ldm", "--logdir", "n_samples", ("-n", "--n_samples")),
    "text": Sampler("txt2img", "--outdir", "n_iter", ("--n_samples", "--n_iter")),
}


def kind_of_config(path: Path) -> str:
    """The kind of model that a yaml describes. Raises ValueError where it describes none."""
    content = read_config(path)
    layout = layout_of(content)
    if layout is not None:
        _check(path, content, layout)
    if layout is DIFFUSERS:
        return kind_of_checkpoint(str(bundled_folder(content)))
    if layout is not COMPVIS:
        return "ddim"
    condition = content["model"]["params"].get("cond_stage_config")
    target = condition["target"] if isinstance(condition, dict) else None
    return "text" if str(target).endswith("FrozenCLIPEmbedder") else "latent"


def _check(path: Path, content: Any, rules: Section) -> None:
    try:
        check(content, rules)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def kind_of_folder(index: Mapping[str, Any]) -> str:
    """The kind of model in a diffusers folder, by its model_index.json."""
    if "text_encoder" in index:
        return "text"
    return "latent" if "vae" in index or "vqvae" in index else "ddim"


def kind_of_checkpoint(name: str) -> str:
    """The kind of model in a diffusers folder or a checkpoint with its yaml beside it; what is neither counts as latent."""
    path = Path(name)
    listing = path / INDEX
    if listing.exists():
        index = read_json(listing)
        _check(listing, index, PIPELINE)
        return kind_of_folder(index)
    if (path / "config.json").is_file():  # a network without a pipeline around it: a DDIM model's UNet
        return "ddim"
    file = path / "model.ckpt" if path.is_dir() else path
    if not file.is_file():
        return "latent"
    from qncd.models.single_files import is_pipeline_file, yaml_of

    return "text" if is_pipeline_file(file) else kind_of_config(yaml_of(file))


def take_flags(words: Sequence[str], **flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The values of some flags, each under a keyword, and the other words as they stand."""
    parser = cli.OneLineParser(add_help=False, allow_abbrev=False)
    for name, spellings in flags.items():
        parser.add_argument(*spellings, dest=name)
    return parser.parse_known_args(list(words))


def choose_sampler(words: Sequence[str]) -> tuple[Sampler, list[str]]:
    """The sampler of the model that the words mean, and its own words.

    Raises:
        ValueError, FileNotFoundError: a yaml or a folder that the words name is not there, or describes no model.
    """
    model, _ = take_flags(
        words,
        config=("--config",),
        ckpt=("--ckpt", "-r", "--resume_base"),
        prompt=("--prompt",),
        from_file=("--from_file",),
    )
    if model.config is not None and not names_pipeline(model.config):
        kind = kind_of_config(find_config(model.config))
    elif model.prompt is not None or model.from_file is not None:
        kind = "text"
    else:
        kind = "ddim" if model.ckpt is None else kind_of_checkpoint(model.ckpt)
    sampler = SAMPLERS[kind]
    output, rest = take_flags(words, folder=("-l", "--logdir", "--outdir"))
    if output.folder is not None:
        rest += [sampler.output, output.folder]
    if kind == "ddim" and model.config is None and model.ckpt is None:
        rest += ["--config", str(DEFAULT_CONFIG)]
    return sampler, rest


def choose(words: Sequence[str]) -> Choice:
    """Parser, main and words of the sampler that the words mean. Raises as `choose_sampler` does."""
    sampler, rest = choose_sampler(words)
    module = sampler.load()
    return module.make_parser(f"{module.__doc__.rstrip()}\n{NOTE}"), module.main, rest
