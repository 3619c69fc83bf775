"""Names of transformers in their authors' releases, which GGUF files have to this day, and in diffusers' classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qncd.models.original.key_tables import Layout, Renamed, parameter_shapes, refuse

Modules = Mapping[str, tuple[str, ...]]  # original module -> those of diffusers whose rows it has, one after another


@dataclass(frozen=True)
class Rows:
    """One tensor with the rows of several: q, k and v, or what a block computes of the same input.

    Attributes:
        sizes: how many rows each has.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.split(self.sizes)

    def join(self, values: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(values)


class Exchanged(Renamed):
    """The same tensor with its halves exchanged: shift and scale of the last norm, which diffusers has the other way round."""

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(value.chunk(2)[::-1]),)

    def join(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.split(values[0])[0]


def _qkv(attention: str, layers: tuple[str, str, str] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(f"{attention}.{layer}" for layer in layers)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_LAST = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
_FLUX_TOP: Modules = {
    **{
        f"{old}.{end}_layer": (f"time_text_embed.{new}.linear_{number}",)
        for old, new in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
        for end, number in (("in", 1), ("out", 2))
    },
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
}
_FLUX_DOUBLE: Modules = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": _qkv("attn"),
    "txt_attn.qkv": _qkv("attn", _ADDED),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_FLUX_SINGLE: Modules = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*_qkv("attn"), "proj_mlp"),
    "linear2": ("proj_out",),
}
_FLUX_SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
_SD3_TOP: Modules = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **{
        f"{old}.mlp.{place}": (f"time_text_embed.{new}.linear_{number}",)
        for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
        for place, number in ((0, 1), (2, 2))
    },
    "final_layer.linear": ("proj_out",),
}
_SD3_BLOCK: Modules = {
    "x_block.attn.qkv": _qkv("attn"),
    "x_block.attn2.qkv": _qkv("attn2"),
    "context_block.attn.qkv": _qkv("attn", _ADDED),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_SD3_NORMS = {
    "x_block.attn.ln_q.weight": "attn.norm_q.weight",
    "x_block.attn.ln_k.weight": "attn.norm_k.weight",
    "x_block.attn2.ln_q.weight": "attn2.norm_q.weight",
    "x_block.attn2.ln_k.weight": "attn2.norm_k.weight",
    "context_block.attn.ln_q.weight": "attn.norm_added_q.weight",
    "context_block.attn.ln_k.weight": "attn.norm_added_k.weight",
}


def _inside(old: str, new: str, modules: Modules) -> Modules:
    return {f"{old}.{key}": tuple(f"{new}.{name}" for name in names) for key, names in modules.items()}


def _names_inside(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{key}": f"{new}.{name}" for key, name in names.items()}


def _table(module: nn.Module, modules: Modules, parameters: Mapping[str, str], exchanged: Mapping[str, str]) -> dict[str, Layout]:
    """Original key -> layout, for what of all that the module has. Raises ValueError for a tensor without a name.

    Args:
        parameters: original key -> parameter, or buffer that the release has.
    """
    shapes, buffers = parameter_shapes(module), dict(module.named_buffers())
    shapes |= {name: buffers[name].shape for name in parameters.values() if name in buffers}
    found: dict[str, Layout] = {key: Renamed(name) for key, name in parameters.items() if name in shapes}
    for kind in ("weight", "bias"):
        found |= {f"{key}.{kind}": Exchanged(f"{name}.{kind}") for key, name in exchanged.items() if f"{name}.{kind}" in shapes}
        for key, parts in modules.items():
            names = tuple(f"{part}.{kind}" for part in parts)
            if all(name in shapes for name in names):
                sizes = tuple(shapes[name][0] for name in names)
                found[f"{key}.{kind}"] = Rows(names, sizes) if len(names) > 1 else Renamed(names[0])
    named = {name for layout in found.values() for name in layout.names}
    refuse(f"tensors of a {type(module).__name__} have no name in the original", shapes.keys() - named)
    return found


def flux_key_map(module: nn.Module) -> dict[str, Layout]:
    """Every key of FLUX.1's release -> tensors of a FluxTransformer2DModel. Raises ValueError where one has no name there."""
    modules, norms = dict(_FLUX_TOP), dict[str, str]()
    for i in range(len(module.get_submodule("transformer_blocks"))):  # type: ignore[arg-type]
        modules |= _inside(f"double_blocks.{i}", f"transformer_blocks.{i}", _FLUX_DOUBLE)
        norms |= _names_inside(f"double_blocks.{i}", f"transformer_blocks.{i}", _FLUX_DOUBLE_NORMS)
    for i in range(len(module.get_submodule("single_transformer_blocks"))):  # type: ignore[arg-type]
        modules |= _inside(f"single_blocks.{i}", f"single_transformer_blocks.{i}", _FLUX_SINGLE)
        norms |= _names_inside(f"single_blocks.{i}", f"single_transformer_blocks.{i}", _FLUX_SINGLE_NORMS)
    return _table(module, modules, norms, _LAST)


def sd3_key_map(module: nn.Module) -> dict[str, Layout]:
    """Every key of Stable Diffusion 3's release -> tensors of an SD3Transformer2DModel. Raises as `flux_key_map`."""
    modules, norms = dict(_SD3_TOP), {"pos_embed": "pos_embed.pos_embed"}
    count = len(module.get_submodule("transformer_blocks"))  # type: ignore[arg-type]
    for i in range(count):
        modules |= _inside(f"joint_blocks.{i}", f"transformer_blocks.{i}", _SD3_BLOCK)
        norms |= _names_inside(f"joint_blocks.{i}", f"transformer_blocks.{i}", _SD3_NORMS)
    last = f"joint_blocks.{count - 1}.context_block.adaLN_modulation.1"
    (exchanged,) = modules.pop(last)
    return _table(module, modules, norms, {**_LAST, last: exchanged})


def own_names(module: nn.Module) -> dict[str, Layout]:
    """Of classes whose release has diffusers' names."""
    return {name: Renamed(name) for name in parameter_shapes(module)}


# Class of diffusers -> the name of its architecture in GGUF files, and the names of its tensors there.
TRANSFORMERS: dict[str, tuple[str, Callable[[nn.Module], dict[str, Layout]]]] = {
    "FluxTransformer2DModel": ("flux", flux_key_map),
    "SD3Transformer2DModel": ("sd3", sd3_key_map),
    "QwenImageTransformer2DModel": ("qwen_image", own_names),
}
