"""What the settings of a model may be: one rule for each key, of the originals' yaml files and of diffusers' JSON files.

The limits are far above every published model. They are there so that a number cannot ask for memory or time without end.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_LONGEST = 60  # characters of a value in an error


class Rule(Protocol):
    """What a value may be."""

    @property
    def text(self) -> str:
        """What is allowed, in words."""

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, no boolean."""

    low: int
    high: int

    @property
    def text(self) -> str:
        return f"whole numbers from {self.low} to {self.high}"

    def allows(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, or strictly between the two; a text such as "1e-4", as PyYAML reads one, counts as one."""

    low: float
    high: float
    strictly: bool = False

    @property
    def text(self) -> str:
        return f"numbers {'between' if self.strictly else 'from'} {self.low:g} {'and' if self.strictly else 'to'} {self.high:g}"

    def allows(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return False
        return self.low < number < self.high if self.strictly else self.low <= number <= self.high


@dataclass(frozen=True)
class Flag:
    """true or false."""

    text: str = "true, false"

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text:
    """A text, one of `choices` where there are any."""

    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return ", ".join(self.choices) or "texts"

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and (not self.choices or value in self.choices)


@dataclass(frozen=True)
class Name:
    """The name of a file or folder, without a way out of where it is looked for."""

    text: str = "names of letters, digits, dots, dashes and underscores"

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and _NAME.fullmatch(value) is not None


@dataclass(frozen=True)
class Items:
    """A list of values of one kind."""

    of: Rule
    low: int
    high: int

    @property
    def text(self) -> str:
        return f"lists of {self.low} to {self.high} {self.of.text}"

    def allows(self, value: Any) -> bool:
        items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None
        return items is not None and self.low <= len(items) <= self.high and all(map(self.of.allows, items))


@dataclass(frozen=True)
class Map:
    """A mapping of any names, one at least, to values of one kind."""

    of: Rule

    @property
    def text(self) -> str:
        return f"mappings of names to {self.of.text}"

    def allows(self, value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) > 0


@dataclass(frozen=True)
class Either:
    """A value that one of several rules allows."""

    rules: tuple[Rule, ...]

    @property
    def text(self) -> str:
        return ", or ".join(rule.text for rule in self.rules)

    def allows(self, value: Any) -> bool:
        return any(rule.allows(value) for rule in self.rules)


@dataclass(frozen=True)
class Nothing:
    """Null."""

    text: str = "null"

    def allows(self, value: Any) -> bool:
        return value is None


@dataclass(frozen=True)
class Section:
    """A mapping: rules of its keys, `required` ones first; keys without a rule are not looked at."""

    required: dict[str, Rule] = field(default_factory=dict)
    optional: dict[str, Rule] = field(default_factory=dict)
    absent: tuple[Any, ...] = ()  # values that stand for no such section

    text: str = "mappings of keys to values"

    @property
    def keys(self) -> frozenset[str]:
        """All that have a rule."""
        return frozenset((*self.required, *self.optional))

    def allows(self, value: Any) -> bool:
        return isinstance(value, Mapping)


def check(value: Any, rule: Rule, path: str = "") -> None:
    """Raise ValueError where a value is not what the rule allows: one line with the key's path, the value, what is allowed."""
    if isinstance(rule, Section) and (value is None or isinstance(value, str)) and value in rule.absent:
        return
    if not rule.allows(value):
        raise ValueError(f"{path or 'the whole'} {shown(value)}: allowed are {rule.text}")
    if isinstance(rule, Map):
        for key, item in value.items():
            check(item, rule.of, f"{path}.{one_line(key)}")
    if isinstance(rule, Section):
        for key, below in {**rule.required, **rule.optional}.items():
            inside = f"{path}.{key}" if path else key
            if key in value:
                check(value[key], below, inside)
            elif key in rule.required:
                raise ValueError(f"{inside} is missing: allowed are {below.text}")


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "with keys and values"
    return "null" if value is None else one_line(repr(value))


def one_line(value: object) -> str:
    """A value's text without line breaks, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _maybe(*rules: Rule) -> Either:
    return Either((*rules, Nothing()))


_CHANNELS, _WIDTH, _SIDE, _BLOCKS, _LEVELS = Whole(1, 1024), Whole(1, 8192), Whole(1, 8192), Whole(1, 32), 10
_STEPS, _VARIANCE, _SHARE = Whole(1, 100_000), Number(0, 1, strictly=True), Number(0, 1)
_MULTIPLIERS, _RESOLUTIONS = Items(Whole(1, 64), 1, _LEVELS), Items(Whole(1, 8192), 0, 32)
_HEADS, _GROUPS, _DEPTH, _CONTEXT = Whole(-1, 1024), Whole(1, 8192), Whole(1, 32), Whole(1, 65_536)
SCALE = Number(0, 1e6, strictly=True)
"""What latents are multiplied by."""

_CALL: dict[str, Rule] = {"scale": Number(0, 1e6), "timesteps": _STEPS, "max_sequence_length": Whole(0, 65_536)}
_SAMPLING = Section(optional={"batch_size": Whole(1, 65_536), **_CALL}, absent=(None,))
_DATA: dict[str, Rule] = {"dataset": Text(), "category": Text(), "channels": _CHANNELS}

DIFFUSION = Section({"beta_schedule": Text(), "beta_start": _VARIANCE, "beta_end": _VARIANCE, "num_diffusion_timesteps": _STEPS})
"""The noise schedule of ermongroup/ddim."""

DDIM = Section(
    {
        "data": Section({"image_size": _SIDE}, _DATA),
        "model": Section(
            {
                "in_channels": _CHANNELS, "out_ch": _CHANNELS, "ch": _WIDTH, "ch_mult": _MULTIPLIERS,
                "num_res_blocks": _BLOCKS, "attn_resolutions": _RESOLUTIONS,
            },
            {
                "type": Text(("simple",)), "num_groups": _GROUPS, "dropout": _SHARE, "ema": Flag(), "ema_rate": _SHARE,
                "var_type": Text(("fixedlarge", "fixedsmall")), "resamp_with_conv": Flag(), "weights": _maybe(Name()),
            },
        ),
    },
    {
        "diffusion": dataclasses.replace(DIFFUSION, absent=(None,)),
        "sampling": _SAMPLING,
    },
)  # fmt: skip
"""Configs of ermongroup/ddim."""

TEXT_CONFIG = Section(
    {},
    {
        "vocab_size": Whole(1, 1_000_000), "hidden_size": _WIDTH, "intermediate_size": Whole(1, 65_536),
        "projection_dim": _maybe(Whole(1, 65_536)), "num_hidden_layers": Whole(1, 128), "num_attention_heads": Whole(1, 1024),
        "max_position_embeddings": Whole(1, 65_536), "layer_norm_eps": _VARIANCE, "hidden_act": Text(),
        "bos_token_id": _maybe(Whole(0, 1_000_000)), "eos_token_id": _maybe(Whole(0, 1_000_000)),
        "pad_token_id": _maybe(Whole(0, 1_000_000)),
    },
    absent=(None,),
)  # fmt: skip
"""Fields of transformers' CLIPTextConfig."""

CLASSES = Section({"embed_dim": _CONTEXT}, {"n_classes": Whole(2, 1_000_000)})
"""Params of LDM's ClassEmbedder."""

CLASS_FOLDER = Section(CLASSES.required | CLASSES.optional)
"""config.json of a class embedding in a pipeline's folder."""

UNET_PARAMS = Section(
    {
        "in_channels": _CHANNELS, "out_channels": _CHANNELS, "model_channels": _WIDTH, "num_res_blocks": _BLOCKS,
        "attention_resolutions": _RESOLUTIONS,
    },
    {
        "image_size": _maybe(_SIDE), "channel_mult": _MULTIPLIERS, "dropout": _SHARE, "num_heads": _HEADS,
        "num_head_channels": Whole(-1, 8192), "num_heads_upsample": _HEADS, "use_scale_shift_norm": Flag(),
        "resblock_updown": Flag(), "num_groups": _GROUPS, "use_new_attention_order": Flag(),
        "use_spatial_transformer": Flag(), "transformer_depth": _DEPTH, "context_dim": _maybe(_CONTEXT),
        "use_linear_in_transformer": Flag(), "use_checkpoint": Flag(), "use_fp16": Flag(), "legacy": Flag(),
    },
)  # fmt: skip
"""Params of CompVis' UNetModel."""

DDCONFIG = Section(
    {
        "z_channels": _CHANNELS, "resolution": _SIDE, "in_channels": _CHANNELS, "out_ch": _CHANNELS, "ch": _WIDTH,
        "ch_mult": _MULTIPLIERS, "num_res_blocks": _BLOCKS, "attn_resolutions": _RESOLUTIONS,
    },
    {"double_z": Flag(), "dropout": _SHARE, "num_groups": _GROUPS, "attn_type": Text()},
)  # fmt: skip
FIRST_STAGE_PARAMS = Section({"embed_dim": _WIDTH, "ddconfig": DDCONFIG}, {"n_embed": Whole(1, 10_000_000)})
FIRST_STAGE = Section({"target": Text(), "params": FIRST_STAGE_PARAMS})
"""The section of an autoencoder of LDM."""

CONDITION = Section(
    {"target": Text()},
    {"params": Section(absent=(None,))},
    absent=(None, "__is_unconditional__"),
    text="a target with params, __is_unconditional__",
)
"""The section of what CompVis' LatentDiffusion is conditioned on."""

SCHEDULE = Section(
    {},
    {"linear_start": _VARIANCE, "linear_end": _VARIANCE, "timesteps": _STEPS, "beta_schedule": Text()},
)
"""The noise schedule among the params of CompVis' LatentDiffusion."""

COMPVIS = Section(
    {
        "model": Section(
            {
                "params": Section(
                    {
                        "unet_config": Section({"params": UNET_PARAMS}, {"target": Text()}),
                    },
                    {
                        "first_stage_config": FIRST_STAGE,  # a UNet alone does without
                        **SCHEDULE.optional,
                        "image_size": _maybe(_SIDE), "channels": _CHANNELS, "scale_factor": SCALE, "scale_by_std": Flag(),
                        "use_ema": Flag(), "parameterization": Text(), "conditioning_key": _maybe(Text()),
                        "cond_stage_config": CONDITION,
                    },
                ),
            },
            {"target": Text(), "pretrained": _maybe(Text()), "weights": _maybe(Name())},
        ),
    },
    {"data": Section({}, {**_DATA, "image_size": _SIDE}, absent=(None,)), "sampling": _SAMPLING},
)  # fmt: skip
"""Configs of CompVis' latent-diffusion and Stable Diffusion v1."""

_BUNDLED = Section({"target": Text(), "weights": Name()})
DIFFUSERS = Section({"model": _BUNDLED}, {"data": Section(absent=(None,)), "sampling": _SAMPLING})
"""Configs of bundled pipelines of diffusers: the class, `diffusers.NAME`, and the folder."""

_FEW = Items(_DEPTH, 1, _LEVELS)
NETWORK = Section(
    {"_class_name": Text()},
    {
        "sample_size": _maybe(_SIDE, Items(_SIDE, 1, 2)), "in_channels": _CHANNELS, "out_channels": _CHANNELS,
        "block_out_channels": Items(_WIDTH, 1, _LEVELS), "layers_per_block": Either((_BLOCKS, Items(_BLOCKS, 1, _LEVELS))),
        "down_block_types": Items(Text(), 1, _LEVELS), "up_block_types": Items(Text(), 1, _LEVELS),
        "norm_num_groups": _maybe(_GROUPS), "norm_eps": _VARIANCE, "dropout": _SHARE,
        "cross_attention_dim": _maybe(_CONTEXT, Items(_CONTEXT, 1, _LEVELS)),
        "attention_head_dim": _maybe(_WIDTH, Items(_WIDTH, 1, _LEVELS)),
        "num_attention_heads": _maybe(_WIDTH, Items(_WIDTH, 1, _LEVELS)),
        "transformer_layers_per_block": Either((_DEPTH, Items(Either((_DEPTH, _FEW)), 1, _LEVELS))),
        "reverse_transformer_layers_per_block": _maybe(Items(Either((_DEPTH, _FEW)), 1, _LEVELS)),
        "encoder_hid_dim": _maybe(_CONTEXT), "num_class_embeds": _maybe(Whole(1, 1_000_000)),
        "addition_time_embed_dim": _maybe(_CONTEXT), "time_embedding_dim": _maybe(_CONTEXT),
        "projection_class_embeddings_input_dim": _maybe(_CONTEXT), "time_cond_proj_dim": _maybe(_CONTEXT),
        "num_train_timesteps": _maybe(_STEPS), "attn_norm_num_groups": _maybe(_GROUPS),
        "conv_in_kernel": Whole(1, 31), "conv_out_kernel": Whole(1, 31), "freq_shift": Number(0, 1e4),
        "downsample_padding": Whole(0, 16), "latent_channels": _CHANNELS, "num_vq_embeddings": Whole(1, 10_000_000),
        "vq_embed_dim": _maybe(_WIDTH), "scaling_factor": _maybe(SCALE), "flip_sin_to_cos": Flag(),
    },
)  # fmt: skip
"""config.json of a network of diffusers: UNet2DModel, UNet2DConditionModel, VQModel or AutoencoderKL."""

SCHEDULER = Section(
    {"_class_name": Text()},
    {
        "num_train_timesteps": _STEPS, "beta_start": _VARIANCE, "beta_end": _VARIANCE, "beta_schedule": Text(),
        "trained_betas": _maybe(Items(_VARIANCE, 1, _STEPS.high)), "prediction_type": Text(), "clip_sample": Flag(),
        "set_alpha_to_one": Flag(), "steps_offset": Whole(0, 1000), "thresholding": Flag(), "skip_prk_steps": Flag(),
        "timestep_spacing": Text(), "rescale_betas_zero_snr": Flag(), "variance_type": _maybe(Text()),
    },
)  # fmt: skip
"""scheduler_config.json of diffusers."""

WEIGHT_INDEX = Section({"weight_map": Map(Text())})
"""*.index.json of weights in several files."""

PIPELINE = Section({}, {"_class_name": Text()})
"""model_index.json of a pipeline of diffusers."""


_NAMES = (
    (DDIM, "of a DDIM model, for scripts/sample_diffusion_ddim.py"),
    (COMPVIS, "in CompVis' layout, for scripts/sample_diffusion_ldm.py or scripts/txt2img.py"),
    (DIFFUSERS, "of a pipeline of diffusers, for scripts/sample_diffusion_ldm.py or scripts/txt2img.py"),
    (None, "of no model that is known here"),
)
_DDIM_KEYS = frozenset({"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "out_ch"})


def layout_of(config: Mapping[str, Any]) -> Section | None:
    """The layout that a config is in: CompVis', ermongroup/ddim's, that of a pipeline of diffusers, or none of them."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return None
    if str(model.get("target")).startswith("diffusers."):
        return DIFFUSERS
    if model.keys() & {"params", "target"}:
        return COMPVIS
    return DDIM if model.keys() & _DDIM_KEYS else None


def expect_layout(config: Mapping[str, Any], source: object, *allowed: Section) -> None:
    """Raise ValueError where a config is in none of the layouts; `source` is the file that is named."""
    found = layout_of(config)
    if not any(found is layout for layout in allowed):
        of, wanted = (" or ".join(name for layout, name in _NAMES if layout in kinds) for kinds in ((found,), allowed))
        raise ValueError(f"{source}: a yaml {of}; expected is one {wanted}")
