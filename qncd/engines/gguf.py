"""GGUF files of Stable Diffusion, SD3, FLUX and Qwen-Image: what stable-diffusion.cpp, ComfyUI-GGUF and diffusers load.

A row of a weight is cut into blocks of 32 inputs, each a float16 scale d and 32 codes q that stand for q d:

    q8_0: 34 bytes, d and q as int8
    q4_0: 18 bytes, d and 16 bytes with q + 8 in half a byte each, inputs 0 to 15 in the low halves, 16 to 31 in the high ones

That is the grid which `QuantConfig.weight_grid` "gguf" calibrates weights on: the file holds exactly the calibrated codes,
nothing is rounded again. Names are those of the authors' releases, of UNets with `model.diffusion_model.` in front. Weights that
are not on the grid are float16 in their own shape, vectors float32: a convolution has no other form that all three readers take.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qncd import __version__
from qncd.engines.packages import require
from qncd.engines.registry import GGUF_TYPES
from qncd.granularity import PerGroup
from qncd.io.files import whole_file
from qncd.models.network import Network
from qncd.models.original.key_tables import Layout
from qncd.models.original.transformer_names import TRANSFORMERS
from qncd.models.original.unet_names import stable_diffusion_key_map
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.recipe import GGUF, GGUF_GROUP, QuantConfig

PREFIX = "model.diffusion_model."


def type_of(config: QuantConfig) -> str:
    """The type that weights quantized so have in a file. Raises ValueError where they are on another grid."""
    if config.weight_grid != GGUF:
        raise ValueError(
            f"{config.label}: GGUF has one scale for each {GGUF_GROUP} inputs of linear layers: "
            "quantize with --weight_grid gguf --weight_only"
        )
    return next(kind for kind, bits in GGUF_TYPES.items() if bits == config.weight_bits)


def write_gguf(network: Network, path: Path, kind: str, base_hash: str = "") -> None:
    """Write a network, whole or not at all; the same network gives the same bytes.

    Args:
        network: in floating point, or on the grid of `kind`.
        kind: one of GGUF_TYPES, which the header tells.
        base_hash: of the full-precision weights, for the header.

    Raises:
        ValueError: a package is missing, the network is of another kind or not calibrated, a weight is not finite, or a layer
            computes what no file can tell: its input is divided by smoothing factors.
    """
    gguf = require("gguf", "gguf")
    architecture, table = names_of(network.module)
    on_grid = {f"{name}.weight": layer for name, layer in quant_layers(network.module).items()}
    with whole_file(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        writer.add_string("qncd.version", __version__)
        writer.add_string("qncd.base_hash", base_hash)
        for key, layout in table.items():
            parts = [_data(network.module, name, on_grid.get(name)) for name in layout.names]
            if len({form for _, form in parts}) > 1:
                told = ", ".join(f"{name} {form}" for name, (_, form) in zip(layout.names, parts, strict=True))
                raise ValueError(f"{key}: its parts are of several types: {told}")
            whole = layout.join(tuple(torch.from_numpy(data) for data, _ in parts))
            writer.add_tensor(key, whole.numpy(), raw_dtype=gguf.GGMLQuantizationType[parts[0][1]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def names_of(module: nn.Module) -> tuple[str, dict[str, Layout]]:
    """What a file calls the architecture, and its keys with the tensors that each has.

    Raises:
        ValueError: the network is of another kind.
    """
    if (known := TRANSFORMERS.get(type(module).__name__)) is not None:
        architecture, key_map = known
        return architecture, key_map(module)
    try:
        table = stable_diffusion_key_map(module)
    except ValueError as error:
        raise ValueError(f"{error}; GGUF files are written of those and of {', '.join(TRANSFORMERS)}") from None
    return "sdxl" if any(key.startswith("label_emb.") for key in table) else "sd1", {
        PREFIX + key: layout for key, layout in table.items()
    }


def _data(module: nn.Module, name: str, layer: QuantLayer | None) -> tuple[np.ndarray, str]:
    """A tensor as it is written, rows first, and its type."""
    if layer is not None:
        return blocks_of(name, layer)
    place, _, own = name.rpartition(".")
    return _plain(name, getattr(module.get_submodule(place), own).detach())


def blocks_of(name: str, layer: QuantLayer) -> tuple[np.ndarray, str]:
    """A weight's blocks, uint8 (O, bytes of a row), and the type of the tensor. Raises ValueError naming the layer."""
    if layer.smoothing is not None:
        raise ValueError(f"{name}: its input is divided by smoothing factors, which no reader of GGUF does")
    if layer.weight_scale is None or layer.config.weight_granularity != PerGroup(GGUF_GROUP) or layer.config.weight_codes is None:
        raise ValueError(f"{name}: not calibrated on GGUF's grid")
    codes = layer.weight_codes().cpu().unflatten(1, (-1, GGUF_GROUP))  # (O, G, 32)
    scale = layer.weight_scale.cpu().half()
    if not torch.equal(scale.to(layer.weight_scale), layer.weight_scale.cpu()):
        raise ValueError(f"{name}: a scale is no float16 number")
    steps = scale[..., None].view(torch.uint8)  # (O, G, 2)
    if layer.config.weight_codes.bits == GGUF_TYPES["q8_0"]:
        return torch.cat([steps, codes.view(torch.uint8)], -1).flatten(1).numpy(), "Q8_0"
    low, high = (codes + 8).view(torch.uint8).chunk(2, -1)
    return torch.cat([steps, low | (high << 4)], -1).flatten(1).numpy(), "Q4_0"


def _plain(name: str, value: Tensor) -> tuple[np.ndarray, str]:
    """A parameter that is not on the grid: float16 where it is a matrix or a convolution and float16 holds it, else float32."""
    value = value.cpu().float().contiguous()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: a weight is NaN or infinite")
    if value.ndim > 1 and bool(torch.isfinite(half := value.half()).all()):
        return half.numpy(), "F16"
    return value.numpy(), "F32"
