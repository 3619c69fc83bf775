"""Every key of a config has its rule: what breaks it is named with its path, its value and what is allowed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from latent_models import config_of

from qncd.models.latent import load_latent_model
from qncd.models.loading import load_config, load_ddim
from qncd.models.schema import (
    COMPVIS,
    DDIM,
    DIFFUSERS,
    NETWORK,
    SCHEDULER,
    Items,
    Name,
    Number,
    Rule,
    Section,
    Whole,
    check,
    expect_layout,
    layout_of,
    shown,
)

ROOT = Path(__file__).resolve().parents[2]
PIXELS: dict[str, Any] = load_config(ROOT / "configs" / "fashion_mnist.yml")


def test_the_layouts() -> None:
    assert layout_of(PIXELS) is DDIM
    assert layout_of(config_of("none")) is COMPVIS
    assert layout_of({"model": {"weights": "x"}}) is layout_of({"model": 3}) is layout_of({}) is None
    for path in sorted((ROOT / "configs").iterdir()):
        layout = layout_of(load_config(path))  # which looks at the keys
        pipelines = ("scenes_turbo", "scenes_mmdit", "fashion_mnist_dit")
        assert layout is (DDIM if path.suffix == ".yml" else DIFFUSERS if path.stem in pipelines else COMPVIS)


def test_another_layout_is_named() -> None:
    expect_layout(PIXELS, "x.yml", COMPVIS, DDIM)
    with pytest.raises(
        ValueError, match=r"^x\.yml: a yaml of a DDIM model, .*; expected is one in CompVis' layout, .* or of a pip"
    ):
        expect_layout(PIXELS, "x.yml", COMPVIS, DIFFUSERS)
    with pytest.raises(ValueError, match=r"^y: a yaml of no model that is known here; expected is one of a DDIM model"):
        expect_layout({}, "y", DDIM)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (Whole(1, 9), (1, 9), (0, 10, True, 1.0, "1", None, float("nan"))),
        (Number(0, 1), (0, 1, 0.5, "1e-4"), (-0.1, 1.1, True, "x", None, float("nan"), float("inf"), "nan", 10**400)),
        (Number(0, 1, strictly=True), (1e-30, "1e-4"), (0, 1, 0.0, 1.0)),
        (Items(Whole(1, 9), 1, 3), ([1], (1, 2, 3)), ([], [1] * 4, [0], "12", 1, {1: 2}, None)),
        (Name(), ("a", "fashion_mnist_ddim", "v1.5"), ("../a", "a/b", "/etc", "", ".", "..", "a\0", "a\n", 3, None)),
    ],
)
def test_rules(rule: Rule, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    assert all(rule.allows(value) for value in good)
    assert [value for value in bad if rule.allows(value)] == []


def test_values_are_shown_in_one_short_line() -> None:
    assert (shown(True), shown(None), shown("a"), shown({"a": 1})) == ("true", "null", "'a'", "with keys and values")
    assert "\n" not in shown("a\nb" * 50) and len(shown([1] * 500)) < 70


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The config with another value at a dotted path; without the key where the value is ..."""
    config = copy.deepcopy(config)
    section, parts = config, path.split(".")
    for part in parts[:-1]:
        section = section[part]
    if value is ...:
        del section[parts[-1]]
    else:
        section[parts[-1]] = value
    return config


UNET, STAGE = "model.params.unet_config.params.", "model.params.first_stage_config.params.ddconfig."
PIXEL_FAULTS: list[tuple[str, Any]] = [
    ("model.ch", 10**9), ("model.ch", "16"), ("model.ch", True), ("model.ch", 0), ("model.ch", ...), ("model.ch", 16.5),
    ("model.ch_mult", [1] * 60), ("model.ch_mult", []), ("model.ch_mult", 3), ("model.ch_mult", [1, -1]),
    ("model.ch_mult", {"a": 1}), ("model.num_res_blocks", 1_000_000), ("model.num_res_blocks", None),
    ("model.attn_resolutions", [0]), ("model.attn_resolutions", ["16"]), ("model.in_channels", -1), ("model.out_ch", 10**7),
    ("model.type", "bayesian"), ("model.var_type", "learned"), ("model.dropout", float("nan")), ("model.ema", "yes"),
    ("model.resamp_with_conv", 1), ("model.num_groups", 0), ("model.weights", "../../etc"), ("model.weights", "/etc/passwd"),
    ("model", []), ("data", ...), ("data", None), ("data.image_size", 10**7), ("data.image_size", True),
    ("data.image_size", ...), ("data.dataset", 3), ("diffusion", []), ("diffusion.beta_start", float("inf")),
    ("diffusion.beta_start", 0), ("diffusion.beta_end", 1.5), ("diffusion.beta_end", "high"), ("diffusion.beta_start", ...),
    ("diffusion.num_diffusion_timesteps", 10**12), ("diffusion.num_diffusion_timesteps", 1000.5),
    ("diffusion.beta_schedule", None), ("sampling.batch_size", 10**9), ("sampling", 3),
]  # fmt: skip
LATENT_FAULTS: list[tuple[str, Any]] = [
    (f"{UNET}num_res_blocks", 1_000_000), (f"{UNET}model_channels", 10**9), (f"{UNET}channel_mult", [1] * 60),
    (f"{UNET}attention_resolutions", 2), (f"{UNET}in_channels", "3"), (f"{UNET}transformer_depth", 10**6),
    (f"{UNET}context_dim", 10**9), (f"{UNET}use_spatial_transformer", "true"), (f"{UNET}num_heads", 10**9),
    (f"{UNET}dropout", 2), (f"{UNET}model_channels", ...), (f"{STAGE}ch", 10**9), (f"{STAGE}ch_mult", [1] * 60),
    (f"{STAGE}num_res_blocks", 10**6), (f"{STAGE}resolution", 10**7), (f"{STAGE}double_z", "no"), (f"{STAGE}z_channels", ...),
    ("model.params.first_stage_config.params.embed_dim", 10**9), ("model.params.first_stage_config.target", 3),
    ("model.params.timesteps", 10**12), ("model.params.linear_start", "low"), ("model.params.linear_end", float("nan")),
    ("model.params.scale_factor", float("inf")), ("model.params.scale_factor", -1), ("model.params.use_ema", 3),
    ("model.params.scale_by_std", "no"), ("model.params.image_size", 10**7), ("model.params.unet_config", None),
    ("model.params.unet_config", ...), ("model.params.cond_stage_config.params.n_classes", 10**12),
    ("model.params.cond_stage_config.params.embed_dim", True), ("model.params.cond_stage_config", []),
    ("model.params", 3), ("model.target", 5), ("model.params.conditioning_key", 5),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "path", "value"), [
    *(("pixel", *fault) for fault in PIXEL_FAULTS), *(("latent", *fault) for fault in LATENT_FAULTS),
])  # fmt: skip
def test_the_key_is_named(layout: str, path: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    config = PIXELS if layout == "pixel" else config_of("class")
    file.write_text(yaml.safe_dump(changed(config, path, value)))
    with pytest.raises(ValueError) as caught:
        load_config(file)
    line = str(caught.value)
    assert re.match(rf"{file}: ({re.escape(path)}\b|no model section)", line), line
    assert "\n" not in line
    assert "allowed are " in line or "found" in line


@pytest.mark.parametrize("name", ["../fashion_mnist_ddim", "/etc", "a/b", "..", 3])
def test_bundled_weights_are_no_path(name: Any, tmp_path: Path) -> None:
    """Neither in a file nor in a mapping that Python passes."""
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(changed(PIXELS, "model.weights", name)))
    message = rf"model\.weights {re.escape(repr(name))}: allowed are names of letters"
    with pytest.raises(ValueError, match=rf"^{file}: {message}"):
        load_config(file)
    with pytest.raises(ValueError, match=f"^{message}"):
        load_ddim(changed(PIXELS, "model.weights", name))
    latent = config_of("none")
    with pytest.raises(ValueError, match=f"^{message}"):
        load_latent_model({"model": {**latent["model"], "weights": name}})


@pytest.mark.parametrize("field", ["vocab_size", "num_hidden_layers", "hidden_size", "max_position_embeddings"])
def test_fields_of_a_text_model(field: str, tmp_path: Path) -> None:
    file, path = tmp_path / "c.yaml", f"model.params.cond_stage_config.params.text_config.{field}"
    file.write_text(yaml.safe_dump(changed(config_of("text"), path, 10**9)))
    with pytest.raises(ValueError, match=rf"{re.escape(path)} 1000000000: allowed are whole numbers from 1 to \d+$"):
        load_config(file)


@pytest.mark.parametrize(
    ("layout", "path", "value", "message"),
    [
        ("pixel", "model.num_groups", 3, r"model\.num_groups 3 must divide every width"),
        ("pixel", "data.image_size", 20, r"data\.image_size 20: allowed are multiples of 8, as 4 levels of model\.ch_mult"),
        ("pixel", "model.resamp_with_conv", False, r"model\.resamp_with_conv false is not supported"),
        ("latent", f"{UNET}num_heads", 3, r"unet_config\.num_heads 3 must divide"),
        ("latent", "model.params.beta_schedule", "cosine", r"model\.params\.beta_schedule 'cosine' is not supported"),
        ("latent", f"{STAGE}attn_type", "linear", r"ddconfig\.attn_type 'linear' is not supported"),
        ("latent", f"{STAGE}colour", 1, "ddconfig has parameters that are not supported: colour"),
        ("latent", "model.params.parameterization", "v", r"model\.params\.parameterization 'v' is not supported"),
        ("latent", "model.params.cond_stage_config.target", "a.BERTEmbedder", "BERTEmbedder is not supported"),
    ],
)
def test_settings_that_contradict_one_another(layout: str, path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    config = PIXELS if layout == "pixel" else config_of("class")
    file.write_text(yaml.safe_dump(changed(config, path, value)))
    with pytest.raises(ValueError, match=rf"^{file}: .*{message}"):
        load_config(file)


@pytest.mark.parametrize(
    ("rules", "settings", "message"),
    [
        (NETWORK, {"layers_per_block": 10**6}, "layers_per_block 1000000: allowed are whole numbers from 1 to 32, or lists"),
        (NETWORK, {"block_out_channels": [10**9]}, r"block_out_channels \[1000000000\]: allowed are lists of 1 to 10"),
        (NETWORK, {"block_out_channels": [8] * 60}, "block_out_channels"),
        (NETWORK, {"transformer_layers_per_block": [1, [2, 10**6]]}, "transformer_layers_per_block"),
        (NETWORK, {"sample_size": 10**7}, "sample_size 10000000: allowed are"),
        (NETWORK, {"num_vq_embeddings": 10**12}, "num_vq_embeddings"),
        (NETWORK, {"scaling_factor": "x"}, "scaling_factor 'x': allowed are numbers between 0 and 1e\\+06, or null"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps 1000000000000: allowed are whole numbers"),
        (SCHEDULER, {"trained_betas": [0.5, "x"]}, "trained_betas"),
        (SCHEDULER, {"beta_start": True}, "beta_start true: allowed are numbers between 0 and 1"),
        (SCHEDULER, {"clip_sample": "false"}, "clip_sample 'false': allowed are true, false"),
    ],
)
def test_settings_of_diffusers(rules: Section, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        check({"_class_name": "X", **settings}, rules)
