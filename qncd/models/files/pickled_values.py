"""What a pickle may hold beside plain containers: tensors, numpy arrays, dtypes, and inert stands for everything else.

Arguments come from the pickle: every function here looks at their types and sizes before it uses or prints them.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

STORAGE_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_MOST_DIMENSIONS = 64
_SHOWN = 60  # characters of a value in a message


class Inert:
    """Stands for an object of a class that is not rebuilt: accepts every argument and state, and keeps none of it."""

    origin = ""  # "module.name" in the pickle

    def __repr__(self) -> str:
        return f"<inert {shown(self.origin)}>"


class Known:
    """A function that a pickle may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class StorageType:
    """The class of a storage, e.g. torch.FloatStorage, as far as it matters: its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class NumpyDtype:
    """A numpy dtype of plain numbers, booleans or strings; object and record dtypes hold pointers and are refused."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU][1-9]\d{0,8}", code):
            raise pickle.UnpicklingError(f"numpy dtype {shown(code)} is not read")
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        self.order = order if isinstance(order, str) and order in ("<", ">") else "="

    def build(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class Array(np.ndarray):
    """An array that is empty until its state comes, once."""


def shown(value: Any) -> str:
    """A value of a pickle for a message: short, on one line, and nothing but the type of what could be large."""
    if value is None or isinstance(value, bool | float | str | bytes):
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    elif isinstance(value, int):
        text = str(value) if abs(value) < 1 << 128 else "a number of more than 128 bits"
    elif isinstance(value, tuple) and len(value) <= 8 and all(isinstance(item, int) for item in value):
        text = f"({', '.join(map(shown, value))})"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}..."


def bytes_of(data: Any) -> bytes:
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError(f"numpy data that are {shown(data)}, not bytes")
    return bytes(data)


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    """A tuple of whole numbers from 0 to 2^63 - 1: shapes and strides."""
    if not isinstance(value, tuple | list) or len(value) > _MOST_DIMENSIONS or not all(map(is_size, value)):
        raise pickle.UnpicklingError(f"a tensor of {what} {shown(value)}")
    return tuple(value)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def numpy_values(dtype: Any, data: Any, shape: Any, fortran: bool = False) -> np.ndarray:
    """An array of a pickle. Raises UnpicklingError where its bytes are not those of its shape."""
    if not isinstance(dtype, NumpyDtype):
        raise pickle.UnpicklingError(f"numpy dtype {shown(dtype)} is not read")
    sizes, kind, raw = _sizes(shape, "shape"), dtype.build(), bytes_of(data)
    if math.prod(sizes) * kind.itemsize != len(raw):
        raise pickle.UnpicklingError(f"an array of shape {shown(sizes)} and {kind} with {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(sizes, order="F" if fortran else "C")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    return numpy_values(dtype, data, (1,))[0]


def _numpy_array(*_: Any) -> Array:
    return np.ndarray.__new__(Array, (0,), np.uint8)


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return numpy_values(dtype, data, shape, fortran=isinstance(order, str) and order == "F").copy()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(encoding, str) or encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"text encoding {shown(encoding)} is not read")
    return text.encode("latin1")


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a 1-D storage; `requires_grad` and hooks of the pickled tensor are dropped.

    Raises:
        UnpicklingError: it is no storage, or does not hold the view.
    """
    if not isinstance(storage, torch.Tensor) or storage.ndim != 1:
        raise pickle.UnpicklingError("a tensor without a storage")
    size, stride = _sizes(size, "size"), _sizes(stride, "strides")
    if len(size) != len(stride) or not is_size(offset):
        raise pickle.UnpicklingError(f"a tensor of size {shown(size)}, strides {shown(stride)} at {shown(offset)}")
    if math.prod(size) >= 1 << 60:
        raise pickle.UnpicklingError(f"a tensor of size {shown(size)}")
    if not math.prod(size):
        return storage.new_empty(size)
    if offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= storage.numel():
        raise pickle.UnpicklingError(f"a tensor of size {shown(size)} reaches past its storage of {storage.numel()} elements")
    return storage.as_strided(size, stride, offset)


def _rebuild_tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(storage, torch.Tensor) or storage.ndim != 1 or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    return rebuild_tensor(storage.view(dtype) if len(storage) else torch.empty(0, dtype=dtype), offset, size, stride)


def _first(data: Any, *_: Any) -> Any:
    return data


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(_sizes(values, "size"))


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or len(kind) > _SHOWN or not (index is None or is_size(index)):
        raise pickle.UnpicklingError(f"device {shown(kind)} {shown(index)}")
    return torch.device(kind if index is None else f"{kind}:{index}")


def _complex(real: Any = 0, imag: Any = 0) -> complex:
    if not all(isinstance(part, int | float) for part in (real, imag)):
        raise pickle.UnpicklingError(f"complex number {shown(real)}, {shown(imag)}")
    return complex(real, imag)


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    # The factory is dropped: it could be anything, and nothing reads missing keys of a checkpoint.
    ("collections", "defaultdict"): lambda *_: defaultdict(None),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("numpy", "dtype"): NumpyDtype,
    **{(module, "complex"): _complex for module in ("builtins", "__builtin__")},
}
for _package in ("numpy.core", "numpy._core"):  # before and after numpy 2.0
    KNOWN[f"{_package}.multiarray", "scalar"] = _numpy_scalar
    KNOWN[f"{_package}.multiarray", "_reconstruct"] = _numpy_array
    KNOWN[f"{_package}.numeric", "_frombuffer"] = _numpy_frombuffer
TENSORS: frozenset[Callable[..., Any]] = frozenset({rebuild_tensor, _rebuild_tensor_v3})
