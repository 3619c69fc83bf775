"""The exported network as a file: build it, write it with what made it, read that back.

`DIR/model.onnx` is a standard ONNX model in QDQ form (opset 21). Its inputs are named as the arguments of the network's forward:
of a UNet `sample` (N, C, H, W) float32, `timestep` (N,) int64 and, where the network takes one, `encoder_hidden_states` (N, L, D)
float32 or `class_labels` (N,) int64. What lies inside a dictionary or a list has a dotted name, as `added_cond_kwargs.time_ids`.
The output is named `noise`. The model's metadata_props say how it was quantized, from which weights, and what calls have to
give that is no tensor: it is fixed. Where activations have a range for each time step, that of a call's first input chooses for
all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qncd import __version__
from qncd.engines.network import InputSpec, check_kernels, in_float32
from qncd.engines.packages import require
from qncd.io.files import reading, regular_file, whole_file
from qncd.models.loading import state_dict_hash
from qncd.models.network import Network, network_of
from qncd.models.seen import seen_constants, settings_of
from qncd.quant.inspection import UnpackedState, act_quantizers, quant_layers
from qncd.quant.quantizers import Stage
from qncd.recipe import QuantConfig

if TYPE_CHECKING:
    import onnx_ir as ir

FILE, DATA = "model.onnx", "model.onnx.data"
FORMAT = "qncd-onnx-1"
LARGEST_FILE = 1_900_000_000  # bytes of weights above which they go beside the model: a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class OnnxInfo:
    """What an exported model says of itself.

    Attributes:
        config: of the quantization; None for a full-precision network.
        base_hash: SHA-256 of the full-precision weights that it comes from.
        network_hash: SHA-256 of the network's state as it was exported: weights on their grid, scales, zero points.
        settings: what else is known of the calibration, as plain JSON values.
        call_settings: what calls have to give beside tensors (`qncd.models.seen.settings_of`).
    """

    config: QuantConfig | None
    base_hash: str
    network_hash: str
    settings: dict[str, Any]
    call_settings: dict[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """As metadata_props."""
        return {
            "qncd.format": FORMAT,
            "qncd.version": __version__,
            "qncd.recipe": json.dumps(self.config and dataclasses.asdict(self.config)),
            "qncd.base_hash": self.base_hash,
            "qncd.network_hash": self.network_hash,
            "qncd.settings": json.dumps(self.settings),
            "qncd.call": json.dumps(self.call_settings),
        }

    @property
    def one_step_a_call(self) -> bool:
        """Whether all inputs of a call need the same time step, because its ranges are chosen for the call."""
        return self.config is not None and (self.config.stepwise_activations or self.config.stepwise_embedding)

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], source: Path) -> OnnxInfo:
        """Raises ValueError for a model that this package did not export."""
        if metadata.get("qncd.format") != FORMAT:
            raise ValueError(
                f"{source}: format {metadata.get('qncd.format')!r}; allowed is {FORMAT}, as scripts/export.py writes it"
            )
        try:
            config = json.loads(metadata["qncd.recipe"])
            settings = json.loads(metadata["qncd.settings"])
            quantized = None if config is None else QuantConfig(**config)
            call_settings = json.loads(metadata.get("qncd.call", "{}"))  # older files have none
            return cls(quantized, metadata["qncd.base_hash"], metadata["qncd.network_hash"], settings, call_settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: damaged metadata: {error}") from None


def build_onnx(network: Network, info: OnnxInfo | None = None, shape: Sequence[int] | None = None) -> ir.Model:
    """The network as an ONNX model in memory. What it computes in half precision is float32 there.

    Args:
        network: in floating point, or quantized and calibrated.
        shape: of one sample, (C, H, W); by default the network's own.

    Raises:
        ValueError: a package is missing, the model is not calibrated, or a part of it has no form in ONNX.
    """
    if any(quantizer.stage is not Stage.QUANTIZE for quantizer in act_quantizers(network.module).values()):
        raise ValueError("only a calibrated model can be exported")
    if any(
        layer.config.weight_codes is not None and layer.weight_scale is None for layer in quant_layers(network.module).values()
    ):
        raise ValueError("only a calibrated model can be exported: its weights are not rounded yet")
    check_kernels(network, "an ONNX model")
    require("onnxscript")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    from qncd.engines.onnx.lowering import lower_
    from qncd.engines.onnx.tracing import trace

    network = in_float32(network)
    model = trace(network, shape)
    lower_(model, network)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "qncd", __version__
    if info is not None:
        model.metadata_props.update(info.to_metadata())
    return model


def save_onnx(model: ir.Model, folder: Path) -> Path:
    """Write DIR/model.onnx, whole or not at all; weights beyond 1.9 GB lie beside it.

    Raises:
        ValueError: it can't be written.
    """
    import onnx_ir as ir

    path = folder / FILE
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    with whole_file(path) as part:
        if weights > LARGEST_FILE:
            path.unlink(missing_ok=True)  # it must never stand beside the weights of another model
        ir.save(model, part, external_data=DATA if weights > LARGEST_FILE else None)
    return path


def export_network(
    network: Network | nn.Module,
    folder: Path,
    config: QuantConfig | None,
    base_hash: str,
    settings: dict[str, Any] | None = None,
    shape: Sequence[int] | None = None,
) -> Path:
    """Write the network to DIR/model.onnx; returns the path. Raises as `build_onnx` and `save_onnx`.

    Args:
        config: of the quantization; None for a full-precision network.
        base_hash: SHA-256 of the full-precision weights (`qncd.models.loading.state_dict_hash`).
        settings: what else is known of the calibration, as plain JSON values.
        shape: of one sample, (C, H, W); by default the network's own.
    """
    network = network_of(network)
    own = state_dict_hash(UnpackedState(network.module))
    call_settings = settings_of(network.module, seen_constants(network.module))
    info = OnnxInfo(config, base_hash, own, settings or {}, call_settings)
    return save_onnx(build_onnx(network, info, shape), folder)


def read_onnx(folder: Path) -> tuple[ir.Model, OnnxInfo]:
    """The model of DIR/model.onnx and what it says of itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, or another package's.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such model; scripts/export.py writes it")
    require("onnxscript")
    import onnx_ir as ir

    with reading(regular_file(path), "a whole ONNX model"):
        model = ir.load(path)
    return model, OnnxInfo.from_metadata(model.metadata_props, path)


def input_specs(model: ir.Model) -> dict[str, InputSpec]:
    """What a model takes, by name: the sample and the time steps first."""
    import torch

    specs = {}
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        dtype = getattr(torch, str(value.dtype.numpy()))
        specs[value.name] = InputSpec(dtype, tuple(size if isinstance(size, int) else None for size in value.shape))
    return specs


def check_origin(folder: Path, base_hash: str, config: QuantConfig | None, shape: Sequence[int]) -> None:
    """Raise ValueError where DIR/model.onnx can't be a network's that is going to be quantized.

    Args:
        base_hash: of its full-precision weights.
        config: of the quantization; None for the full-precision network.
        shape: of one sample, (C, H, W).
    """
    model, info = read_onnx(folder)
    if info.base_hash != base_hash:
        raise ValueError(f"{folder / FILE}: made from weights {info.base_hash[:12]}, this model has {base_hash[:12]}")
    there, wanted = (made.label if made else "full precision" for made in (info.config, config))
    if there != wanted:
        raise ValueError(f"{folder / FILE}: {there}, asked for is {wanted}")
    _check_shape(folder, model, shape)


def _check_shape(folder: Path, model: ir.Model, shape: Sequence[int]) -> None:
    there = tuple(model.graph.inputs[0].shape or ())[1:]
    if there != tuple(shape):
        raise ValueError(
            f"{folder / FILE}: exported for samples {'x'.join(map(str, there))}, this run has {'x'.join(map(str, shape))}"
        )


def check_fits(folder: Path, network: Network | nn.Module, shape: Sequence[int]) -> None:
    """Raise ValueError unless DIR/model.onnx was exported from exactly this network, for samples of this shape, (C, H, W)."""
    model, info = read_onnx(folder)
    own = state_dict_hash(UnpackedState(network_of(network).module))
    if info.network_hash != own:
        raise ValueError(
            f"{folder / FILE}: exported from another network: its hash is {info.network_hash[:12]}, this one's {own[:12]}"
        )
    _check_shape(folder, model, shape)


def is_current(folder: Path, network: Network | nn.Module, shape: Sequence[int]) -> bool:
    """Whether DIR/model.onnx is there and fits."""
    try:
        check_fits(folder, network, shape)
    except (ValueError, OSError):
        return False
    return True
