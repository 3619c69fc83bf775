"""Read .safetensors files one mapping for each tensor, so that a tensor's memory goes with it and what is not used costs nothing.

`safetensors.torch.load_file` makes one buffer of the whole file: a model cast or copied from it needs twice its memory.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, read from disk when they are first touched; changing one does not change the file.

    Raises:
        ValueError: the file is damaged, or has a tensor of a dtype that is not known.
    """
    try:
        with safe_open(path, framework="pt") as checked:  # the library checks the header against the file
            names = set(checked.keys())
    except SafetensorError as error:
        raise ValueError(error) from None
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: _tensor(path, 8 + length, header[name]) for name in header if name in names}


def _tensor(path: Path, data: int, entry: dict) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not read")
    dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    raw: np.ndarray = np.memmap(path, np.uint8, mode="c", offset=data + start, shape=(end - start,))
    if (data + start) % dtype.itemsize:  # not aligned
        raw = np.array(raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"])
