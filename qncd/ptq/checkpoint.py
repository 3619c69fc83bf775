"""The quantized checkpoint: one safetensors file with integer weights, scales, and all that made them.

Layout, for a layer `L` of the UNet: `L.weight_codes` (int8, shape of the weight) or `L.weight_packed` (uint8, two
4-bit codes a byte), or `L.weight_codes` (float8_e4m3fn) in fp8, with `L.weight_scale` (O, K), float16 where they are those of
groups, and, where codes are asymmetric, `L.weight_zero_point`; `L.bias`; `L.smoothing` (C,); `L.rotation` (1,), the channels of a
block that is rotated; `L.down` (r, I, ...) and `L.up` (O, r), a low-rank branch in 16 bits; `Q.scale`, `Q.zero_point` (K,) for
every activation quantizer Q that is calibrated, (S, K) with `Q.times` (S,) where there is a range for each of S time steps; all
other parameters under their own names. `noise_table.*` is the full-precision control, `offline.*` the statistics of an offline
correction, `tracking.*` the filters of trajectory tracking.
The header's metadata carries the configuration, the SHA-256 of the base model's weights, in mixed precision `act_bits`, the
number of bits of each activation quantizer, and where it was measured `layers`, what each layer got (`layer_record`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qncd.models.files.diffusers_folders import parts_of, read_parts
from qncd.models.files.safetensors_files import read_metadata, read_safetensors, read_safetensors_part, write_safetensors
from qncd.models.network import Network, without_memory
from qncd.models.seen import seen_constants, seen_inputs, set_seen, settings_of
from qncd.ptq.checkpoint_schema import (
    check_tensors,
    read_act_bits,
    read_config,
    read_field,
    read_inputs,
    read_layers,
    read_settings,
    shortened,
)
from qncd.ptq.heap import trim_heap
from qncd.ptq.layer_record import NetworkRecord
from qncd.ptq.stages.prepare import quantize_
from qncd.quant.inspection import (
    act_quantizers,
    calibrated_quantizers,
    quant_layers,
    replace_quantizers_,
    set_act_bits_,
    set_stage,
)
from qncd.quant.layers import QuantLayer
from qncd.quant.packing import pack4, unpack4
from qncd.quant.quantizers import ActQuantizer, Stage
from qncd.quant.stepwise import StepwiseActQuantizer, make_stepwise, select_steps_on_call
from qncd.recipe import QuantConfig
from qncd.sampling.corrector import Record
from qncd.sampling.correctors.registry import CORRECTORS

FORMAT = "qncd-1"
BARE_FILE = "quantized.safetensors"  # of a network that is no model of diffusers, in a folder of `qncd.save`
_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of one that is
_LAYER_TENSORS = ("smoothing", "rotation", "down", "up", "weight_packed", "weight_codes", "weight_scale", "weight_zero_point")


def record_kinds() -> dict[str, type[Any]]:
    """What corrections know, by the prefixes of its tensors: no part of the network."""
    return {kind.prefix: kind.record for kind in CORRECTORS.values() if kind.record is not None}


@dataclass(frozen=True)
class QuantizedInfo:
    """What a quantized checkpoint says of itself.

    Attributes:
        config: of the quantization.
        smoothed: whether layers are smoothed.
        base_hash: SHA-256 of the full-precision weights (`qncd.models.loading.state_dict_hash`).
        settings: what else the calibration depended on (time steps, seeds, ...), as plain JSON values.
        records: what corrections know, by their prefixes, where the file has it.
        act_bits: of each activation quantizer, where the precision is mixed.
        inputs: shape of one row and dtype of all that the network is called with, by name, where the file says so.
        layers: what each layer got, and its error, where the file says so.
        call_settings: what else than tensors it is called with, by name (`qncd.models.seen.settings_of`).
    """

    config: QuantConfig
    smoothed: bool
    base_hash: str
    settings: dict[str, Any]
    records: dict[str, Record] = field(default_factory=dict)
    act_bits: dict[str, int] | None = None
    inputs: dict[str, Any] | None = None
    layers: NetworkRecord | None = None
    call_settings: dict[str, Any] = field(default_factory=dict)


def _weight_tensors(name: str, layer: QuantLayer) -> dict[str, Tensor]:
    if layer.codes is None or layer.weight_scale is None or layer.config.weight_codes is None:
        return {f"{name}.weight": layer.weight.detach()}
    codes, form = layer.weight_codes(), layer.config.weight_codes
    key, value = ("weight_packed", pack4(codes)) if form.bits <= 4 else ("weight_codes", codes.view(form.file_dtype))
    scale = layer.weight_scale.half() if layer.config.grouped else layer.weight_scale  # which holds the same numbers
    tensors = {f"{name}.{key}": value, f"{name}.weight_scale": scale}
    return tensors if layer.weight_zero_point is None else tensors | {f"{name}.weight_zero_point": layer.weight_zero_point}


def save_quantized(
    network: Network,
    path: Path,
    config: QuantConfig,
    base_hash: str,
    settings: dict[str, Any],
    record: Record | None = None,
    layers: NetworkRecord | None = None,
) -> None:
    """Write the calibrated model, whole or not at all; the same model and settings give the same bytes.

    Args:
        config: of the quantization.
        base_hash: of the full-precision weights.
        settings: what else the calibration depended on, as plain JSON values.
        record: what the correction knows.
        layers: what each of them got, for reports.

    Raises:
        ValueError: the model is not calibrated, or the file cannot be written.
    """
    tensors, metadata = content_of(network, config, base_hash, settings, record)
    if layers is not None:
        metadata["layers"] = json.dumps(layers.to_json())
    write_safetensors(tensors, path, metadata)


def content_of(
    network: Network, config: QuantConfig, base_hash: str, settings: dict[str, Any], record: Record | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_quantized` writes: the tensors, and the header. Raises ValueError: the model is not calibrated."""
    module = network.module
    layers, quantizers = quant_layers(module), act_quantizers(module)
    rounded = all(layer.config.weight_codes is None or layer.codes is not None for layer in layers.values())
    if not layers or not rounded or any(q.stage is not Stage.QUANTIZE for q in quantizers.values()):
        raise ValueError("only a calibrated model can be saved")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= _weight_tensors(name, layer)
        if layer.smoothing is not None:
            tensors[f"{name}.smoothing"] = layer.smoothing.flatten()
        if layer.rotation is not None:
            tensors[f"{name}.rotation"] = torch.tensor([layer.rotation])
        if layer.down is not None and layer.up is not None:
            tensors |= {f"{name}.down": layer.down.to(layer.branch_dtype), f"{name}.up": layer.up.to(layer.branch_dtype)}
    for name, quantizer in calibrated_quantizers(module).items():
        tensors |= {f"{name}.scale": quantizer.scale, f"{name}.zero_point": quantizer.zero_point}
        if isinstance(quantizer, StepwiseActQuantizer):
            tensors[f"{name}.times"] = quantizer.times
    taken = {f"{name}.weight" for name in layers}
    tensors |= {name: p.detach() for name, p in module.named_parameters() if name not in taken}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "base_hash": base_hash,
        "settings": json.dumps(settings),
    }
    if (seen := seen_inputs(module)) is not None:
        metadata["inputs"] = json.dumps(seen)
        if call_settings := settings_of(module, seen_constants(module), strict=False):
            metadata["call_settings"] = json.dumps(call_settings)
    if config.bit_allocation:
        metadata["act_bits"] = json.dumps(
            {name: quantizer.codes.bits for name, quantizer in quantizers.items() if quantizer.codes}
        )
    if record is not None:
        prefix = next(prefix for prefix, kind in record_kinds().items() if isinstance(record, kind))
        fields, metadata[prefix] = record.to_tensors()
        tensors |= {f"{prefix}.{name}": value for name, value in fields.items()}
    return tensors, metadata


def checkpoint_bytes(network: Network, config: QuantConfig, record: Record | None = None) -> int:
    """Bytes of the tensors that `save_quantized` writes. Raises ValueError: the model is not calibrated."""
    return sum(value.nbytes for value in content_of(network, config, "", {}, record)[0].values())


def peek_quantized(path: Path) -> QuantizedInfo:
    """What a quantized checkpoint says of itself, without reading its weights.

    Args:
        path: the file, or the *.index.json of one that diffusers wrote in parts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such quantized checkpoint")
    try:
        fields, names, metadata = _content(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a whole quantized checkpoint (cut off or of another kind): {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format {shortened(repr(metadata.get('format')))}; allowed is {FORMAT}")
    try:
        config = read_config(path, metadata)
        smoothed = any(name.endswith(".smoothing") for name in names)
        bits = read_act_bits(path, metadata) if config.bit_allocation else None
        settings = read_settings(path, metadata)
        seen = read_inputs(path, metadata) if "inputs" in metadata else None
        records = _records(path, fields, metadata)
        layers = read_layers(path, metadata) if "layers" in metadata else None
        call_settings = read_field(path, metadata, "call_settings") if "call_settings" in metadata else {}
        return QuantizedInfo(config, smoothed, metadata["base_hash"], settings, records, bits, seen, layers, call_settings)
    except KeyError as error:
        raise ValueError(f"{path}: damaged header: {error}") from None


def _content(path: Path) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """What corrections know, the names of all tensors, and the header, which is that of every part of a file in parts."""
    prefixes = tuple(f"{prefix}." for prefix in record_kinds())
    if path.suffix != ".json":
        return read_safetensors_part(path, prefixes)
    first, *others = map(read_metadata, parts_of(path))
    if any(other != first for other in others):
        raise ValueError("its parts are of different checkpoints")
    tensors = read_tensors(path)
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}, list(tensors), first


def places_in(folder: Path, *networks: str) -> list[Path]:
    """Where the quantized checkpoint of a folder that `qncd.save` wrote may lie.

    Args:
        networks: names of the folders of a pipeline's networks.
    """
    below = [*(folder / name for name in networks), folder]
    return [folder / BARE_FILE, *(place / name for place in below for name in (f"{_WEIGHTS}.index.json", _WEIGHTS))]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a quantized checkpoint, in one file or in parts."""
    return read_parts(path, read_safetensors) if path.suffix == ".json" else read_safetensors(path)


def _records(path: Path, fields: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Record]:
    """What corrections know, by their prefixes. Raises KeyError for what is missing, and ValueError."""
    records: dict[str, Record] = {}
    for prefix, kind in record_kinds().items():
        if prefix in metadata:
            try:
                records[prefix] = kind.from_tensors(_below(f"{prefix}.", fields), metadata[prefix])
            except (TypeError, ValueError, IndexError, RecursionError) as error:
                raise ValueError(f"{path}: damaged header: {prefix}: {shortened(str(error))}") from None
    return records


def _is_record(name: str) -> bool:
    return name.startswith(tuple(f"{prefix}." for prefix in record_kinds()))


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def load_quantized_(network: Network, path: Path, base_hash: str | None = None, packed: bool = False) -> QuantizedInfo:
    """Turn a full-precision network into the saved quantized model, in place; images come out bit-identical.

    Args:
        network: the base model, in floating point.
        base_hash: of its weights; refused where the file was made from others.
        packed: keep the codes of the weights alone (`QuantLayer.pack_weight_`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, of another kind, or was made from another base model. The network is then as before.
    """
    return _load_(network, path, None, base_hash, packed)


@torch.no_grad()
def load_weights_(network: Network, path: Path, config: QuantConfig, base_hash: str | None = None) -> QuantizedInfo:
    """Prepare a full-precision network for `config` and take the saved weights and biases, with what is done to inputs, in place.

    The activations stay in floating point: later stages find their ranges, without another bias correction.

    Args:
        config: its weights as in the file, its activations as wanted.

    Raises:
        FileNotFoundError, ValueError: as `load_quantized_`; the file's weights were quantized otherwise.
    """
    return _load_(network, path, config, base_hash)


def check_quantized(network: Network, path: Path, base_hash: str | None = None, config: QuantConfig | None = None) -> None:
    """Raise what `load_quantized_` would raise, or with `config` what `load_weights_` would; the network stays as it is."""
    _checked(network, path, config, base_hash)


def _load_(
    network: Network, path: Path, config: QuantConfig | None, base_hash: str | None, packed: bool = False
) -> QuantizedInfo:
    """Load everything, or with `config` the weights alone."""
    info, tensors = _checked(network, path, config, base_hash)
    _take_over(network, tensors, info, config, packed)
    set_seen(network.module, info.inputs, info.call_settings)
    return info


def _checked(
    network: Network, path: Path, config: QuantConfig | None, base_hash: str | None
) -> tuple[QuantizedInfo, dict[str, Tensor]]:
    """What the file says of itself, and its tensors, which fit the network."""
    info = peek_quantized(path)
    if base_hash is not None and base_hash != info.base_hash:
        raise ValueError(
            f"{path}: made from a base model with weights {shortened(info.base_hash[:12])}, this one has {base_hash[:12]}"
        )
    tensors = {name: value for name, value in read_tensors(path).items() if not _is_record(name)}
    twin = without_memory(network)  # a file that does not fit leaves the network as it was
    try:
        quantize_(twin, config or info.config)
        if config is None:
            set_act_bits_(twin.module, info.act_bits or {})
        check_tensors(twin.module, tensors, config is None)
        _check_channels(network, info.records)
    except KeyError as error:
        raise ValueError(f"{path}: has no tensor {error.args[0]}: made from another architecture") from None
    except ValueError as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from None
    return info, tensors


def _check_channels(network: Network, records: dict[str, Record]) -> None:
    """Raise ValueError for what a correction knows of predictions with other channels than the network's."""
    known = network.image_channels
    for prefix, record in records.items():
        channels = getattr(record, "channels", None)
        if known and channels is not None and channels not in known:
            raise ValueError(f"{prefix}: made for {channels} channels, the model has {min(known)}")


def _take_over(
    network: Network, tensors: dict[str, Tensor], info: QuantizedInfo, config: QuantConfig | None, packed: bool
) -> None:
    """Put tensors that are checked into the network: copies, as theirs is the file's memory, and the file may go."""
    module = quantize_(network, config or info.config).module
    for name, layer in quant_layers(module).items():
        _load_layer(name, layer, tensors)
        if packed:
            layer.pack_weight_()
        trim_heap()
    if config is None:
        set_act_bits_(module, info.act_bits or {})
        _make_stepwise_(network, tensors)
        for name, quantizer in calibrated_quantizers(module).items():
            quantizer.set_qparams(tensors[f"{name}.scale"], tensors[f"{name}.zero_point"])
    for name, layer in quant_layers(module).items():
        if layer.bias is None and f"{name}.bias" in tensors:  # made by bias correction
            layer.shift_bias_(torch.zeros(layer.weight_shape[0]))
    for name, parameter in module.named_parameters():
        if not (name.endswith(".weight") and isinstance(module.get_submodule(name[:-7]), QuantLayer)):
            parameter.data = _copy(tensors[name], parameter)
    if config is None:
        set_stage(module, Stage.QUANTIZE)


def _make_stepwise_(network: Network, tensors: dict[str, Tensor]) -> None:
    """Give a range for each step to the quantizers that have one in the file."""
    times = {key.removesuffix(".times"): value for key, value in tensors.items() if key.endswith(".times")}

    def replaced(name: str, quantizer: ActQuantizer) -> ActQuantizer:
        return make_stepwise(quantizer, times[name].clone()) if name in times else quantizer

    if times:
        replace_quantizers_(network.module, replaced)
        select_steps_on_call(network.module, network.times_of)


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype, copy=True)


def _load_layer(name: str, layer: QuantLayer, tensors: dict[str, Tensor]) -> None:
    own = {key: tensors[f"{name}.{key}"].clone() for key in _LAYER_TENSORS if f"{name}.{key}" in tensors}
    if "smoothing" in own:
        layer.smooth_(own["smoothing"])
    if "rotation" in own:
        layer.rotate_(int(own["rotation"]))
    if "up" in own:
        layer.split_off_(own["down"], own["up"])
    if layer.config.weight_codes is None:
        layer.weight.data = _copy(tensors[f"{name}.weight"], layer.weight)
        return
    if layer.config.weight_codes.bits <= 4:
        codes = unpack4(own["weight_packed"], layer.weight_shape)
    else:
        codes = own["weight_codes"].view(torch.int8)
    layer.set_weight_codes(codes, own["weight_scale"], own.get("weight_zero_point"))
