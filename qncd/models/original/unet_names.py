"""Names of UNet modules: CompVis' `UNetModel`, which Stable Diffusion's files are in to this day, and diffusers' classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qncd.models.original.key_tables import Layout, Renamed, parameter_shapes, refuse

# Names inside a module: original -> diffusers.
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_LABELS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}  # SDXL's pooled text and sizes
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",  # only where a block changes the number of channels
}


@dataclass(frozen=True)
class Plan:
    """What of a UNet decides the names of its modules.

    Attributes:
        attends: of each level, from the full size down, whether its blocks have attention.
        blocks: residual blocks of a level on the way down.
        resblock_updown: residual blocks change the size, instead of a convolution.
    """

    attends: tuple[bool, ...]
    blocks: int
    resblock_updown: bool = False


def module_names(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """Original module -> diffusers module: (layers and residual blocks, attention blocks)."""
    modules, attentions = dict(_TOP), {}

    def resnet(original: str, ours: str) -> None:
        modules.update({f"{original}.{old}": f"{ours}.{new}" for old, new in _RESNET.items()})

    def resample(original: str, ours: str, convolution: str) -> None:
        if plan.resblock_updown:
            resnet(original, ours)
        else:
            modules[f"{original}.{convolution}"] = f"{ours}.conv"

    levels, per_level = len(plan.attends), plan.blocks + 1
    for i in range(levels):
        for j in range(plan.blocks):
            block = f"input_blocks.{1 + i * per_level + j}"
            resnet(f"{block}.0", f"down_blocks.{i}.resnets.{j}")
            if plan.attends[i]:
                attentions[f"{block}.1"] = f"down_blocks.{i}.attentions.{j}"
        if i < levels - 1:
            resample(f"input_blocks.{(i + 1) * per_level}.0", f"down_blocks.{i}.downsamplers.0", "op")
    resnet("middle_block.0", "mid_block.resnets.0")
    attentions["middle_block.1"] = "mid_block.attentions.0"
    resnet("middle_block.2", "mid_block.resnets.1")
    for u, attends in enumerate(reversed(plan.attends)):
        for j in range(per_level):
            block = f"output_blocks.{u * per_level + j}"
            resnet(f"{block}.0", f"up_blocks.{u}.resnets.{j}")
            if attends:
                attentions[f"{block}.1"] = f"up_blocks.{u}.attentions.{j}"
        if u < levels - 1:
            resample(f"output_blocks.{(u + 1) * per_level - 1}.{2 if attends else 1}", f"up_blocks.{u}.upsamplers.0", "conv")
    return modules, attentions


def renamed(modules: dict[str, str], names: set[str]) -> dict[str, Layout]:
    """Original parameter -> that of diffusers, for the weights and biases of these modules that are among the names."""
    pairs = ((f"{old}.{kind}", f"{new}.{kind}") for old, new in modules.items() for kind in ("weight", "bias"))
    return {old: Renamed(new) for old, new in pairs if new in names}


def renamed_inside(modules: dict[str, str], names: set[str]) -> dict[str, Layout]:
    """The same for modules in which both have the same names, such as SpatialTransformers."""
    return {
        f"{old}.{name.removeprefix(f'{new}.')}": Renamed(name)
        for old, new in modules.items()
        for name in sorted(names)
        if name.startswith(f"{new}.")
    }


def stable_diffusion_key_map(unet: nn.Module) -> dict[str, Layout]:
    """Every key of the original's state dict -> the parameter of a UNet2DConditionModel of Stable Diffusion 1, 2 or XL.

    Raises:
        ValueError: the network is of another kind: a block or a parameter has no name there.
    """
    config: Any = unet.config
    kind = f"{type(unet).__name__}: no UNet of Stable Diffusion 1, 2 or XL"
    if type(unet).__name__ != "UNet2DConditionModel":
        raise ValueError(kind)
    attends = tuple(name == "CrossAttnDownBlock2D" for name in config.down_block_types)
    expected = {
        "down_block_types": tuple("CrossAttnDownBlock2D" if at else "DownBlock2D" for at in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if at else "UpBlock2D" for at in reversed(attends)),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    for name, value in expected.items():
        found = config[name]
        if (tuple(found) if isinstance(value, tuple) else found) != value:
            raise ValueError(f"{kind}: {name} {found}, expected {value}")
    if not isinstance(config.layers_per_block, int):
        raise ValueError(f"{kind}: layers_per_block {config.layers_per_block}, expected one number")
    names = set(parameter_shapes(unet))
    modules, attentions = module_names(Plan(attends, config.layers_per_block))
    table = renamed(modules | _LABELS, names) | renamed_inside(attentions, names)
    refuse(f"parameters have no name in the original ({kind})", names - {layout.names[0] for layout in table.values()})
    return table
