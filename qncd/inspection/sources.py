"""What a folder of a run or a quantized checkpoint says of the layers of its network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qncd.io.files import regular_file
from qncd.io.runs import RUN_FILE
from qncd.models.files.diffusers_folders import parts_of
from qncd.models.files.safetensors_files import read_metadata
from qncd.ptq.checkpoint import QuantizedInfo, peek_quantized, places_in, read_tensors
from qncd.ptq.layer_record import LAYERS_FILE, PRODUCT, LayerRecord, NetworkRecord, range_of
from qncd.quant.affine import IntegerRange

UNKNOWN = "layer"  # its kind, where the weights' shape is not in the file


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run."""
    return (path / RUN_FILE).is_file()


def checkpoint_in(source: Path) -> Path | None:
    """The quantized checkpoint that a path names: a file, or that of a folder of `qncd.save`; None where there is none.

    Raises:
        ValueError: a damaged .safetensors file.
        FileNotFoundError: a part of one in parts is missing.
    """
    places = [source]
    if source.is_dir():
        places = places_in(source, *sorted(inner.name for inner in source.iterdir() if inner.is_dir()))
    return next((place for place in places if place.is_file() and _is_checkpoint(place)), None)


def _is_checkpoint(path: Path) -> bool:
    if path.suffix not in (".safetensors", ".json"):
        return False
    try:
        first = next(iter(parts_of(path))) if path.suffix == ".json" else path
        return first.suffix == ".safetensors" and "base_hash" in read_metadata(regular_file(first))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def record_of_run(folder: Path) -> NetworkRecord:
    """What its layers.json says. Raises ValueError where there is none, or it is damaged."""
    record = NetworkRecord.open(folder / LAYERS_FILE)
    if record is None:
        raise ValueError(f"{folder}: has no {LAYERS_FILE}: a run in full precision, or of an older version")
    return record


def record_of_checkpoint(path: Path) -> NetworkRecord:
    """What its header says, else bits and ranges as far as its tensors tell: without time steps then.

    Raises:
        ValueError: it is damaged.
    """
    info = peek_quantized(path)
    return info.layers or NetworkRecord(tuple(_by_tensors(info, read_tensors(path))))


def _by_tensors(info: QuantizedInfo, tensors: dict[str, Tensor]) -> list[LayerRecord]:
    """A layer for each weight that is quantized or has a range in front of it, and the operands of products behind them."""
    found: dict[str, LayerRecord] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind == "weight_packed":
            bits = info.config.weight_bits
            found[name] = _with_range(info, tensors, name, UNKNOWN, 2 * tensor.numel(), bits)
        elif kind == "weight_codes" or (kind == "weight" and f"{name}.act.scale" in tensors):
            shape = "Conv2d" if tensor.ndim == 4 else "Linear"
            bits = _code_bits(info) if kind == "weight_codes" else None
            found[name] = _with_range(info, tensors, name, shape, tensor.numel(), bits)
    products = [key.removesuffix(".scale") for key in tensors if key.endswith(".scale")]
    operands = sorted(name for name in products if name.removesuffix(".act") not in found)
    return [found[name] for name in sorted(found)] + [_with_range(info, tensors, name, PRODUCT, 0, None) for name in operands]


def _code_bits(info: QuantizedInfo) -> int | None:
    """Of weights that are stored as whole bytes: those of the first and last layer, or of all; None where that differs."""
    config = info.config
    widths = {config.edge_bits or config.weight_bits} | ({config.weight_bits} if (config.weight_bits or 0) > 4 else set())
    return next(iter(widths)) if len(widths) == 1 else None


def _act_bits(info: QuantizedInfo, quantizer: str) -> int | None:
    """Of an input: by the header where the precision is mixed, else what all of them have; None where they differ."""
    if info.act_bits is not None:
        return info.act_bits.get(quantizer)
    config = info.config
    widths = {config.act_bits, config.edge_bits or config.act_bits, config.softmax_bits}
    return config.act_bits if len(widths) == 1 else None


def _with_range(
    info: QuantizedInfo, tensors: dict[str, Tensor], name: str, kind: str, weights: int, bits: int | None
) -> LayerRecord:
    quantizer = name if kind == PRODUCT else f"{name}.act"
    act_bits, scale = _act_bits(info, quantizer), tensors.get(f"{quantizer}.scale")
    if scale is None or act_bits is None:
        return LayerRecord(name, kind, weights, bits, None, None, None, 1)
    codes = IntegerRange(act_bits, info.config.act_symmetric and kind != PRODUCT)
    low, high = range_of(codes, scale, tensors[f"{quantizer}.zero_point"])
    ranges = len(scale) if f"{quantizer}.times" in tensors else 1
    return LayerRecord(name, kind, weights, bits, act_bits, low, high, ranges)
