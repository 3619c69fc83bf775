"""An interpreter of pickles that knows tensors and plain containers, and imports and calls nothing else.

It carries out the opcodes of a pickle itself, over values whose types it knows, instead of letting Python's own unpickler act
on them: nothing is called but the functions of `KNOWN`, nothing gets a state but what `_set_state` lists, and no value of the
pickle is hashed, compared or printed before it is known to be small. So the time and the memory that a pickle takes are in
proportion to its length.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from qncd.models.files.pickled_values import (
    KNOWN,
    STORAGE_DTYPES,
    TENSORS,
    TORCH_DTYPES,
    Array,
    Inert,
    Known,
    NumpyDtype,
    StorageType,
    bytes_of,
    is_size,
    numpy_values,
    rebuild_tensor,
    shown,
)

DEEPEST = 100  # levels of containers in containers
_LARGEST_INT = 1024  # bytes: more digits than that Python does not print
_MOST_OPCODES = 3_000_000
_MOST_CLASSES = 2000  # that are not known, each of which takes a kilobyte
_EXPANDED, _EXPANSION = 256 << 20, 64  # bytes that tensors may come to, and for each byte of the file: they may share memory
_WORK, _WORK_PER_BYTE = 1 << 18, 4  # elements that may be hashed, copied or counted, and for each byte of the file
_LARGEST_KEY = 1 << 60  # larger numbers can be chosen to share a hash
_UNFOLDED = 1 << 24  # elements that the result may have, those counted again that it holds twice

_CONTAINERS = (dict, list, tuple, set, frozenset)
ReadStorage = Callable[[torch.dtype, str, int], torch.Tensor]


class PickleReader:
    """Reads the next pickle of a stream.

    Args:
        stream: must not allocate for more bytes than it has, whatever number it is asked for.
        size: bytes of the file, to which time and memory are in proportion.
        read_storage: (dtype, key, numel) -> 1-D tensor, the bytes behind a tensor.
    """

    def __init__(self, stream: BinaryIO, size: int, read_storage: ReadStorage | None = None) -> None:
        self._stream = stream
        self._read_storage = read_storage
        self._work = _WORK + _WORK_PER_BYTE * size
        self._most_bytes = _EXPANDED + _EXPANSION * size
        self._globals: dict[tuple[str, str], Any] = {}
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._collisions = 0  # keys that may share a hash

    def load(self) -> Any:
        """The object.

        Raises:
            UnpicklingError: an opcode that is not read, or more work or memory than a pickle of this size may ask for.
            LookupError, ValueError, TypeError, AttributeError, ...: the stream is damaged.
        """
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._stream), 1):
            name = opcode.name
            if name in _CONSTANTS:
                if isinstance(argument, int) and argument.bit_length() > 8 * _LARGEST_INT:
                    raise pickle.UnpicklingError(f"a whole number of {argument.bit_length() // 8} bytes")
                self._stack.append(argument)
            elif name in _PUTS:
                if argument > count:  # real indices count upwards
                    raise pickle.UnpicklingError(f"memo index {shown(argument)} after {count} steps")
                self._memo[argument] = self._stack[-1]
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise pickle.UnpicklingError(f"opcode {name} is not read")
            if count > _MOST_OPCODES:
                raise pickle.UnpicklingError(f"more than {_MOST_OPCODES} steps")
        result = self._stack.pop()
        self._check_size(result)
        return result

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def _top(self, count: int) -> list[Any]:
        """The last values, which go."""
        if len(self._stack) < count:
            raise pickle.UnpicklingError("takes values that are not there")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _drop(self, _: Any) -> None:
        self._marked()

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _dict(self, items: list[Any]) -> None:
        self._push({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set_item(self._stack[-1], key, value)

    def _instance(self, kind: Any, *args: Any) -> None:
        self._push(self._call(kind, args))

    def _object(self, kind: Any) -> None:
        """NEWOBJ: inert classes alone are made so, and drop the arguments."""
        if not (isinstance(kind, type) and issubclass(kind, Inert)):
            raise pickle.UnpicklingError(f"an object of {shown(kind)}")
        self._push(kind())

    def _spend(self, work: int) -> None:
        self._work -= work
        if self._work < 0:
            raise pickle.UnpicklingError("asks for more work than its size allows")

    def _find(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise pickle.UnpicklingError("a global whose name is no text")
        if (module, name) not in self._globals:
            if len(self._globals) >= _MOST_CLASSES:
                raise pickle.UnpicklingError(f"names more than {_MOST_CLASSES} classes")
            self._globals[module, name] = self._substitute(module, name)
        return self._globals[module, name]

    def _substitute(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return Known(KNOWN[module, name])
        if (module, name) == ("collections", "OrderedDict"):
            return Known(self._ordered_dict)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return Known(self._rebuild_from_type)
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return Known(self._set if name == "set" else self._frozenset)
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        return type("Inert", (Inert,), {"origin": f"{module}.{name}"})

    def _call(self, function: Any, args: Any) -> Any:
        if isinstance(function, type) and issubclass(function, Inert):
            return function()
        if isinstance(function, Inert):
            return function
        if not isinstance(function, Known):
            raise pickle.UnpicklingError(f"a call of {shown(function)}")
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError(f"a call with {shown(args)}")
        self._spend(sum(len(a) for a in args if isinstance(a, str | bytes | bytearray | list | tuple | dict | set | frozenset)))
        result = function.function(*args)
        if function.function in TENSORS:
            self._most_bytes -= result.numel() * result.element_size()
            if self._most_bytes < 0:
                raise pickle.UnpicklingError(
                    f"tensors {_EXPANSION} times as large as the file, one of size {shown(result.shape)}"
                )
        return result

    def _rebuild_from_type(self, function: Any, _type: Any, args: Any, _state: Any) -> Any:
        return self._call(function, args) if isinstance(function, Known) else Inert()

    def _ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        if not isinstance(items, list | tuple | dict):
            raise pickle.UnpicklingError(f"an OrderedDict of {shown(items)}")
        result: OrderedDict[Any, Any] = OrderedDict()
        for pair in items.items() if isinstance(items, dict) else items:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise pickle.UnpicklingError(f"an OrderedDict of {shown(pair)}")
            self._set_item(result, *pair)
        return result

    def _set(self, items: Any = ()) -> set[Any]:
        if not isinstance(items, list | tuple | set | frozenset):
            raise pickle.UnpicklingError(f"a set of {shown(items)}")
        for item in items:
            self._check_key(item)
        return set(items)

    def _frozenset(self, items: Any = ()) -> frozenset[Any]:
        return frozenset(self._set(items))

    def _check_key(self, key: Any) -> None:
        """Raise UnpicklingError unless a key of a dict or a set is hashed and compared in no time, whatever other keys are."""
        if type(key) is str or (type(key) is int and abs(key) < _LARGEST_KEY):  # nearly all
            return
        level, leaves = [key], list[Any]()
        for _ in range(DEEPEST):
            if not level:
                break
            inner = [item for container in level if isinstance(container, tuple | frozenset) for item in container]
            leaves += [item for item in level if not isinstance(item, tuple | frozenset)]
            self._spend(len(inner))
            level = inner
        if level or not all(map(_is_plain_key, leaves)):
            wrong = next((item for item in leaves if not _is_plain_key(item)), key)
            raise pickle.UnpicklingError(f"key {shown(wrong)}")
        if not all(isinstance(leaf, str | bytes) for leaf in leaves) and isinstance(key, tuple | frozenset | np.generic):
            self._collisions += 1  # they can be chosen to share a hash: each may be compared with all before
            self._spend(self._collisions * len(leaves))

    def _set_item(self, target: Any, key: Any, value: Any) -> None:
        if isinstance(target, dict):
            self._check_key(key)
            target[key] = value
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"the pickle sets an item of {shown(target)}")

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, set):
            target |= self._set(items)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"the pickle adds an item to {shown(target)}")

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"the pickle appends to {shown(target)}")

    def _set_state(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert | OrderedDict):  # a state dict's _metadata: versions of its modules, which nothing reads
            return
        if isinstance(target, NumpyDtype):
            target.set_state(state)
        elif isinstance(target, Array) and target.shape == (0,) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            values = numpy_values(dtype, data, shape)
            self._spend(len(data))
            target.__setstate__((1, values.shape, values.dtype, bool(fortran), bytes_of(data)))  # type: ignore[arg-type]
        else:
            raise pickle.UnpicklingError(f"the pickle changes {'a function' if isinstance(target, Known) else shown(target)}")

    def _external(self, pid: Any) -> torch.Tensor:
        """The storage that the pickle names."""
        if self._read_storage is None or not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise pickle.UnpicklingError("an external object that is no storage")
        _, kind, key, _location, numel, *view = pid
        if not isinstance(kind, StorageType) or not is_size(numel) or not isinstance(key, str | int):
            origin = getattr(kind, "origin", None)
            raise pickle.UnpicklingError(f"storage {shown(key)} of an unknown type {shown(origin if origin else kind)}")
        storage = self._read_storage(kind.dtype, key if isinstance(key, str) else shown(key), numel)
        if view and view[0] is not None:  # the old format shares a storage between views: (key, offset, numel)
            if not isinstance(view[0], tuple) or len(view[0]) != 3:
                raise pickle.UnpicklingError(f"storage {shown(key)} with a view that is {shown(view[0])}")
            return rebuild_tensor(storage, view[0][1], (view[0][2],), (1,))
        return storage

    def _check_size(self, result: Any) -> None:
        """Raise UnpicklingError where the result could not be walked through: too deep, in a circle, or shared without end."""
        known: dict[int, tuple[int, int]] = {}  # of each finished container: its levels, and its elements at all levels
        opened: set[int] = set()
        pending = [result]
        while pending:
            value = pending[-1]
            if id(value) in known or not isinstance(value, _CONTAINERS):
                pending.pop()
                continue
            children = [*value, *value.values()] if isinstance(value, dict) else list(value)
            inner = [child for child in children if isinstance(child, _CONTAINERS)]
            if id(value) not in opened:
                opened.add(id(value))
                self._spend(len(children))
                if any(id(child) in opened and id(child) not in known for child in inner):
                    raise pickle.UnpicklingError("a container that holds itself")
                if len(opened) - len(known) > DEEPEST:
                    raise pickle.UnpicklingError(f"nested deeper than {DEEPEST} levels")
                pending.extend(inner)
                continue
            levels = 1 + max((known[id(child)][0] for child in inner), default=0)
            elements = len(children) + sum(known[id(child)][1] for child in inner)
            if levels > DEEPEST or elements > _UNFOLDED + self._work:
                what = f"nested deeper than {DEEPEST} levels" if levels > DEEPEST else "shares its containers: too large unfolded"
                raise pickle.UnpicklingError(what)
            known[id(value)] = levels, elements
            pending.pop()


def _is_plain_key(key: Any) -> bool:
    if isinstance(key, int):
        return abs(key) < _LARGEST_KEY
    kinds = (str, bytes, float, np.generic, torch.Tensor, torch.dtype, torch.device, Inert)
    return key is None or isinstance(key, kinds) or (isinstance(key, type) and issubclass(key, Inert))


_CONSTANTS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT", "BINFLOAT",
})  # fmt: skip
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_STEPS: dict[str, Callable[[PickleReader, Any], None]] = {
    "NONE": lambda r, _: r._push(None),
    "NEWTRUE": lambda r, _: r._push(True),
    "NEWFALSE": lambda r, _: r._push(False),
    "MARK": lambda r, _: r._mark(),
    "POP": lambda r, _: r._pop(),
    "POP_MARK": PickleReader._drop,
    "DUP": lambda r, _: r._push(r._stack[-1]),
    "MEMOIZE": lambda r, _: r._memoize(),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda r, index: r._push(r._memo[index])),
    "EMPTY_LIST": lambda r, _: r._push([]),
    "LIST": lambda r, _: r._push(r._marked()),
    "APPEND": lambda r, _: r._append(r._top(1)),
    "APPENDS": lambda r, _: r._append(r._marked()),
    "EMPTY_TUPLE": lambda r, _: r._push(()),
    "TUPLE": lambda r, _: r._push(tuple(r._marked())),
    "TUPLE1": lambda r, _: r._push(tuple(r._top(1))),
    "TUPLE2": lambda r, _: r._push(tuple(r._top(2))),
    "TUPLE3": lambda r, _: r._push(tuple(r._top(3))),
    "EMPTY_DICT": lambda r, _: r._push({}),
    "DICT": lambda r, _: r._dict(r._marked()),
    "SETITEM": lambda r, _: r._set_items(r._top(2)),
    "SETITEMS": lambda r, _: r._set_items(r._marked()),
    "EMPTY_SET": lambda r, _: r._push(set()),
    "ADDITEMS": lambda r, _: r._add(r._marked()),
    "FROZENSET": lambda r, _: r._push(r._frozenset(r._marked())),
    "GLOBAL": lambda r, names: r._push(r._find(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda r, _: r._push(r._find(*r._top(2))),
    "REDUCE": lambda r, _: r._push(r._call(*r._top(2))),
    "BUILD": lambda r, _: r._set_state(*r._top(1)),
    "INST": lambda r, names: r._push(r._call(r._find(*names.split(" ", 1)), tuple(r._marked()))),
    "OBJ": lambda r, _: r._instance(*r._marked()),
    "NEWOBJ": lambda r, _: r._object(r._top(2)[0]),
    "NEWOBJ_EX": lambda r, _: r._object(r._top(3)[0]),
    "BINPERSID": lambda r, _: r._push(r._external(*r._top(1))),
}
