"""Read checkpoints without running anything that is in them.

A checkpoint is a pickle, and a pickle may name any function and call it. Published LDM and Stable Diffusion files need
more than `torch.load(weights_only=True)` allows (Lightning callbacks, old numpy scalars), and `torch.load` with another
`pickle_module` still hands TorchScript archives to the TorchScript interpreter. So the two containers that `torch.save`
writes (zip, and the older sequence of pickles) are read here, by an unpickler that knows tensors and plain containers
and replaces every other global with an inert class.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from qncd.models.files.safetensors_files import read_safetensors

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGE_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# What reading a damaged or hostile stream can end in, from pickle, zipfile, struct, numpy and torch.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, zipfile.BadZipFile, struct.error, LookupError, AttributeError, TypeError, ValueError,
    ArithmeticError, MemoryError, RecursionError, NotImplementedError, RuntimeError, OSError,
)  # fmt: skip


class Inert:
    """Stands for an object of a class that is not rebuilt: accepts every argument and state, and keeps none of it."""

    origin = ""  # "module.name" in the pickle

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take the place of list.append in a pickled list subclass."""

    def extend(self, items: Iterable[Any]) -> None:
        """Take the place of list.extend in a pickled list subclass."""

    def add(self, item: Any) -> None:
        """Take the place of set.add in a pickled set subclass."""

    def __repr__(self) -> str:
        return f"<inert {self.origin}>"


class _Allowed:
    """A function that a pickle may call. Not the function itself, so that a pickle cannot set attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a function")


class _StorageType:
    """The class of a storage, e.g. torch.FloatStorage, as far as it matters: its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a storage type")


class _NumpyDtype:
    """A numpy dtype of plain numbers, booleans or strings; object and record dtypes hold pointers and are refused."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">", "=") else "="

    def build(self) -> np.dtype:
        if not re.fullmatch(r"[biufcSU]\d{1,9}", self.code):
            raise pickle.UnpicklingError(f"numpy dtype {self.code!r} is not read")
        return np.dtype(self.order + self.code)


class _Array(np.ndarray):
    """An array whose pickled state is checked before numpy sees it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.build(), fortran, _as_bytes(data)))


def _as_bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _numpy_scalar(dtype: _NumpyDtype, data: bytes | str) -> Any:
    return np.frombuffer(_as_bytes(data), dtype.build(), count=1)[0]


def _numpy_array(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _numpy_frombuffer(data: bytes, dtype: _NumpyDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(_as_bytes(data), dtype.build()).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoding {encoding!r} is not read")
    return text.encode("latin1")


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    """A view of a 1-D storage; `requires_grad` and hooks of the pickled tensor are dropped."""
    if not isinstance(storage, torch.Tensor) or storage.ndim != 1:
        raise pickle.UnpicklingError("a tensor without a storage")
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor of size {size}, strides {stride} at {offset}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.numel():
        raise pickle.UnpicklingError(f"a tensor of size {size} reaches past its storage of {storage.numel()} elements")
    return storage.as_strided(size, stride, offset) if math.prod(size) else storage.new_empty(size)


def _rebuild_tensor_v3(storage: Any, *args: Any) -> torch.Tensor:
    offset, size, stride, _requires_grad, _hooks, dtype = args[:6]
    return _rebuild_tensor(storage.view(dtype) if len(storage) else torch.empty(0, dtype=dtype), offset, size, stride)


def _rebuild_from_type(function: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    return function(*args) if isinstance(function, _Allowed) else Inert()


def _first(data: Any, *_: Any) -> Any:
    return data


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    # The factory is dropped: it could be anything, and nothing reads missing keys of a checkpoint.
    ("collections", "defaultdict"): lambda *_: defaultdict(None),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): lambda *where: torch.device(":".join(map(str, where))),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("numpy", "dtype"): _NumpyDtype,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
}
for _package in ("numpy.core", "numpy._core"):  # before and after numpy 2.0
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _numpy_scalar
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _numpy_array
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _numpy_frombuffer


class _SafeUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; no global of the stream is ever imported or called.

    Args:
        stream: the pickle.
        read_storage: (dtype, key, numel) -> 1-D tensor, the bytes behind a tensor.
    """

    def __init__(self, stream: BinaryIO, read_storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None) -> None:
        # Only Python 2 wrote byte strings as text; latin1 maps each byte to one character.
        super().__init__(stream, encoding="latin1")
        self._read_storage = read_storage
        self._globals: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._globals:
            self._globals[module, name] = self._substitute(module, name)
        return self._globals[module, name]

    @staticmethod
    def _substitute(module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _Allowed(_ALLOWED[module, name])
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module == "torch" and name in _TORCH_DTYPES:
            return _TORCH_DTYPES[name]
        return type(name, (Inert,), {"__module__": f"inert:{module}", "origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if self._read_storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("an external object that is no storage")
        _, kind, key, _location, numel, *view = pid
        if not isinstance(kind, _StorageType) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"storage {key} of an unknown type {getattr(kind, 'origin', kind)!r}")
        storage = self._read_storage(kind.dtype, str(key), numel)
        if view and view[0] is not None:  # the old format shares a storage between views: (key, offset, numel)
            _, offset, length = view[0]
            return _rebuild_tensor(storage, offset, (length,), (1,))
        return storage


def _unpickle(stream: BinaryIO, read_storage: Callable[[torch.dtype, str, int], torch.Tensor] | None = None) -> Any:
    """The next object of the stream, after a look over its opcodes without carrying them out.

    A single damaged byte in a memo index makes the C unpickler fill gigabytes with nothing; real indices count upwards.
    """
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
        if "PUT" in opcode.name and argument is not None and argument > count:
            raise pickle.UnpicklingError(f"memo index {argument} after {count} steps")
        if opcode.name.startswith("EXT"):
            raise pickle.UnpicklingError("a class by number, which depends on the running program")
    stream.seek(start)
    return _SafeUnpickler(stream, read_storage).load()


def load_checkpoint(path: str | Path) -> Any:
    """Read a .ckpt/.pth/.pt file of torch (zip or the old format), or a .safetensors file, without running its code.

    Tensors come on the CPU in the dtype of the file, without gradients; tensors of a zip or .safetensors file are read from disk
    when they are first touched, so what is not used costs nothing. Objects of unknown classes become `Inert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or none of these formats. One line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ValueError(f"{path}: the file is empty")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: not a checkpoint but a web page (a download that went wrong)")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return _load_zip(path) if head.startswith(b"PK") else _load_legacy(path)
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{path}: truncated, or not a checkpoint ({reason})") from None


def _storage(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The bytes as a 1-D tensor that shares their memory."""
    return torch.frombuffer(raw, dtype=dtype) if raw.size else torch.empty(0, dtype=dtype)


def _load_zip(path: Path) -> Any:
    data = np.memmap(path, np.uint8, mode="r")
    records: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {entry.filename} is compressed")
            name_length, extra_length = struct.unpack("<HH", bytes(data[entry.header_offset + 26 : entry.header_offset + 30]))
            start = entry.header_offset + 30 + name_length + extra_length
            if start + entry.file_size > data.size:
                raise ValueError(f"record {entry.filename} reaches past the end of the file")
            records[entry.filename.split("/", 1)[-1]] = start, entry.file_size
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which holds a program, not weights alone")
    if "data.pkl" not in records:
        raise ValueError("a zip file without data.pkl")

    def record(name: str) -> np.ndarray:
        if name not in records:
            raise ValueError(f"record {name} is missing")
        start, size = records[name]
        if not size:
            return np.empty(0, np.uint8)
        # One mapping for each tensor, so that its pages go with it. Copy on write: a tensor may be changed in place, the
        # file may not.
        return np.memmap(path, np.uint8, mode="c", offset=start, shape=(size,))

    if "byteorder" in records and bytes(record("byteorder")) != b"little":
        raise ValueError("written on a big-endian machine")
    storages: dict[str, torch.Tensor] = {}

    def read_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        if key not in storages:
            raw = record(f"data/{key}")
            if raw.size != numel * dtype.itemsize:
                raise ValueError(f"storage {key} has {raw.size} bytes, expected {numel * dtype.itemsize}")
            storages[key] = _storage(raw, dtype)
        return storages[key]

    return _unpickle(io.BytesIO(bytes(record("data.pkl"))), read_storage)


def _load_legacy(path: Path) -> Any:
    """torch.save before 1.6: pickles of a magic number, a version, the machine, the object and the storage keys, then bytes."""
    room = path.stat().st_size
    buffers: dict[str, np.ndarray] = {}
    storages: dict[str, torch.Tensor] = {}

    def read_storage(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        nonlocal room
        if key not in storages:
            room -= numel * dtype.itemsize
            if room < 0:  # before memory is taken for it
                raise ValueError(f"storage {key} of {numel} elements is larger than the file")
            # numpy owns the memory, so that no tensor method a pickle reaches can grow it.
            buffers[key] = np.zeros(numel * dtype.itemsize, np.uint8)
            storages[key] = _storage(buffers[key], dtype)
        return storages[key]

    with path.open("rb") as stream:
        if _unpickle(stream) != _LEGACY_MAGIC:
            raise ValueError("no magic number of torch.save")
        protocol, machine = _unpickle(stream), _unpickle(stream)
        if protocol != _LEGACY_PROTOCOL or not machine.get("little_endian", True):
            raise ValueError(f"protocol {protocol} of machine {machine}")
        result = _unpickle(stream, read_storage)
        for key in map(str, _unpickle(stream)):
            if key not in buffers:
                raise ValueError(f"storage {key} belongs to no tensor")
            numel = struct.unpack("<q", stream.read(8))[0]
            raw = buffers.pop(key)
            if numel != storages[key].numel() or stream.readinto(raw.data) != raw.size:
                raise ValueError(f"storage {key} is cut off")
        if buffers:
            raise ValueError(f"{len(buffers)} storages are missing, first {next(iter(buffers))}")
    return result
