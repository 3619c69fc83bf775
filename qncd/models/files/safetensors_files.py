"""Read and write .safetensors files.

Reading maps each tensor of its own, so that a tensor's memory goes with it and what is not used costs nothing;
`safetensors.torch.load_file` makes one buffer of the whole file, and a model cast or copied from it needs twice its memory.
Writing gives the same bytes for the same content, where the library writes the metadata in a random order.

The format: 8 bytes, the length of the header; the header, JSON with `dtype`, `shape` and `data_offsets` of each tensor by name,
and texts by name below `__metadata__`; the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.io.files import regular_file, whole_file

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as the format says
_MOST_DIMENSIONS = 64
_METADATA = "__metadata__"
_SMALL = 1 << 16  # bytes: less than that is copied, as a process has a limited number of maps
_ALIGNED = 16  # bytes, of the largest element
_SHOWN = 80  # characters of a name in a message


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: from byte `start` of the file, `size` bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, read from disk when they are first touched; changing one does not change the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has a tensor of a dtype that is not known.
    """
    return {name: _tensor(path, entry) for name, entry in _header(regular_file(path))[0].items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts by name that a .safetensors file has beside its tensors. Raises as `read_safetensors`."""
    return _header(regular_file(path))[1]


def read_safetensors_part(path: Path, prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """The tensors of a .safetensors file whose names begin with one of the prefixes, the names of all, and the metadata.

    Raises:
        FileNotFoundError, ValueError: as `read_safetensors`.
    """
    entries, metadata = _header(regular_file(path))
    return {name: _tensor(path, entry) for name, entry in entries.items() if name.startswith(prefixes)}, list(entries), metadata


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all; the same content gives the same bytes.

    Args:
        tensors: on any device, of any layout in memory.
        metadata: texts by name.

    Raises:
        ValueError: a dtype that the format lacks; the file cannot be written.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all of them are aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or name == _METADATA:
            raise ValueError(f"{path}: {name} of {tensor.dtype}: allowed are {', '.join(map(str, _NAMES))}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, part.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            stream.write(_raw(tensors[name]))


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the order of its elements. Flat first: one without dimensions cannot be viewed as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def mapped(path: Path, start: int, size: int) -> np.ndarray:
    """Bytes of a file, uint8 (size,), that may be changed without changing the file, aligned for elements of any dtype.

    A map of its own, so that its memory goes with it; a copy where there is little of it, or it does not lie aligned.
    """
    if not size:
        return np.empty(0, np.uint8)
    if size < _SMALL or start % _ALIGNED:
        return np.fromfile(path, np.uint8, size, offset=start)
    return np.memmap(path, np.uint8, mode="c", offset=start, shape=(size,))


def elements(raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Bytes, uint8 (n,), as a 1-D tensor that shares their memory."""
    return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)


def _tensor(path: Path, entry: _Entry) -> Tensor:
    return elements(mapped(path, entry.start, entry.size), entry.dtype).reshape(entry.shape)


def _header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """What the header says, checked: entries by name, and the metadata. Raises ValueError."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        text = stream.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header: {ascii(str(error)[:_SHOWN])[1:-1]}") from None
    if not isinstance(header, dict):
        raise ValueError("header: no names of tensors")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"header: {_METADATA} that are no texts by name")
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise ValueError(f"header: tensors overlap or leave a gap at byte {min(end, entry.start)}")
        end += entry.size
    if end != size:
        raise ValueError(f"tensors of {end - 8 - length} bytes, the file has {size - 8 - length} for them")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)[:_SHOWN]!r} is there twice")
    return result


def _entry(name: str, value: Any, data: int) -> _Entry:
    told = f"tensor {name[:_SHOWN]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{told}: expected dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{told}: dtype {kind[:_SHOWN] if isinstance(kind, str) else type(kind)!r} is not read")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{told}: a shape that is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{told}: data_offsets that are no start and end")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _DTYPES[kind].itemsize != size:
        raise ValueError(f"{told}: {size} bytes for shape {tuple(shape)} of {kind}")
    return _Entry(_DTYPES[kind], tuple(shape), data + offsets[0], size)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value)
