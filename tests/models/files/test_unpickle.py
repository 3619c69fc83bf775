"""Checkpoints are read in full, and nothing that is in them runs."""

from __future__ import annotations

import builtins
import io
import json
import operator
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qncd.models.files.unpickle import Inert, load_checkpoint

GOLDEN = Path(__file__).resolve().parents[3].parent / "shared" / "golden"
LEGACY = {"_use_new_zipfile_serialization": False}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args

    def __call__(self) -> None:
        """Only so that pickle takes the result of one call as the function of another."""


def zip_file(path: Path, pickled: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy_file(path: Path, pickled: bytes) -> Path:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    path.write_bytes(b"".join([*head, pickled, pickle.dumps([], 2)]))
    return path


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles, each of which makes the marker file where it is loaded with pickle.load."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    script = marker.with_name("script.py")
    script.write_text(code)
    calls = {
        "os.system": Call(os.system, touch),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "open": Call(builtins.open, str(marker), "w"),
        "getattr": Call(Call(builtins.getattr, Call(__import__, "os"), "system"), touch),
        "attrgetter": Call(Call(Call(operator.attrgetter, "system"), Call(__import__, "os")), touch),
        "runpy": Call(runpy.run_path, str(script)),
        "copy": Call(shutil.copyfile, str(script), str(marker)),
        "nested": Call(pickle.loads, pickle.dumps(Call(os.system, touch), 2)),
        "torch.hub": Call(torch.hub.download_url_to_file, script.as_uri(), str(marker)),
        "torch.save": Call(torch.save, [1], str(marker)),
        "numpy": Call(np.save, str(marker), [1]),
    }
    pickles = {name: pickle.dumps({"state_dict": {}, "x": call}, 2) for name, call in calls.items()}
    shell = f"(S'{touch}'\n".encode()
    pickles["opcode INST"] = shell + b"ios\nsystem\n."
    pickles["opcode OBJ"] = b"(cos\nsystem\nS'" + touch.encode() + b"'\no."
    pickles["opcode NEWOBJ"] = b"\x80\x02csubprocess\nPopen\n(S'" + touch.encode() + b"'\nI-1\nNNNNNI1\nI1\nt\x81."
    pickles["opcode STACK_GLOBAL"] = (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."
    )
    # A dotted name that walks from an allowed module to a function.
    pickles["dotted"] = b"\x80\x04\x8c\x0ctorch._utils\x8c\x0fsys.modules.get\x93\x8c\x02os\x85R."
    # Changes what an allowed function does instead of calling something else.
    pickles["BUILD on a function"] = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__cos\nsystem\ns\x86b."
    return pickles


@pytest.mark.parametrize("container", [zip_file, legacy_file])
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, container: Callable[[Path, bytes], Path]) -> None:
    marker = tmp_path / "marker"
    for name, pickled in attacks(marker).items():
        path = container(tmp_path / "evil.ckpt", pickled)
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error), name
        assert not marker.exists(), name


# Loads pickles in turn and says which of them made the marker file.
_LOAD = """
import json, os, pickle, sys
with open(sys.argv[1], "rb") as file:
    pickles = pickle.load(file)
done = []
for name, pickled in pickles.items():
    pickle.loads(pickled)
    if os.path.exists(sys.argv[2]):
        done.append(name)
        os.unlink(sys.argv[2])
print(json.dumps(done))
"""


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """The same pickles do run in pickle.loads, so the test above tests something. In a process that nothing else depends on."""
    marker, stored = tmp_path / "marker", tmp_path / "pickles"
    names = [
        "os.system", "subprocess", "eval", "getattr", "attrgetter", "runpy", "nested", "opcode INST", "opcode STACK_GLOBAL",
    ]  # fmt: skip
    pickles = attacks(marker)
    stored.write_bytes(pickle.dumps({name: pickles[name] for name in names}))
    command = [sys.executable, "-c", _LOAD, str(stored), str(marker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == names


def test_a_call_of_a_stub_returns_a_stub(tmp_path: Path) -> None:
    loaded = load_checkpoint(zip_file(tmp_path / "a.ckpt", pickle.dumps({"x": Call(os.system, "exit 3")}, 2)))
    assert isinstance(loaded["x"], Inert)
    assert type(loaded["x"]).origin in ("posix.system", "nt.system")


def state_dict() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    state = OrderedDict(
        weight=base,
        transposed=base.T,
        part=base[1:3, ::2],
        half=base.half(),
        bf16=base.bfloat16(),
        steps=torch.arange(5),
        flag=torch.tensor(True),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(base.clone()),
    )
    return state


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_what_torch_saves_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    state = state_dict()
    other = {"epoch": 3, "size": torch.Size([2, 3]), "device": torch.device("cpu"), "dtype": torch.float16, "set": {1, 2}}
    path = tmp_path / "a.pth"
    torch.save([state, other, None, 1.5, "text", b"bytes"], path, **options)
    read, others, *rest = load_checkpoint(path)
    assert list(read) == list(state)
    for key, expected in state.items():
        assert read[key].dtype == expected.dtype
        assert torch.equal(read[key], expected), key
        assert not read[key].requires_grad
    assert others == other
    assert rest == [None, 1.5, "text", b"bytes"]
    before = path.read_bytes()
    read["weight"].zero_()  # not the file's memory, which stays as it is
    assert path.read_bytes() == before
    assert torch.equal(load_checkpoint(path)[0]["weight"], state["weight"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")["a"], state["a"])


@pytest.mark.parametrize("old_names", [False, True])
def test_numpy_values_are_read(tmp_path: Path, old_names: bool) -> None:
    values = [np.float64(0.25), np.int64(7), np.float32(1.5), np.bool_(True), np.arange(6, dtype=np.int16).reshape(2, 3)]
    pickled = pickle.dumps(values, 2)
    if old_names:
        pickled = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    read = load_checkpoint(zip_file(tmp_path / "a.ckpt", pickled))
    for found, expected in zip(read, values, strict=True):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def test_numpy_objects_are_refused(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.ckpt", pickle.dumps(np.array([{}], object), 2))
    with pytest.raises(ValueError, match=r"a\.ckpt: truncated, or not a checkpoint \(numpy dtype 'O8' is not read\)"):
        load_checkpoint(path)


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_lightning_checkpoint_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.not_installed")
    kinds = {}
    for base in (object, dict, list, set):
        kind = type(f"Callback{base.__name__}", (base,), {"__module__": module.__name__})
        setattr(module, kind.__name__, kind)
        kinds[base] = kind
    sys.modules[module.__name__] = module
    callback, a_dict, a_list, a_set = kinds[object](), kinds[dict](a=1), kinds[list]([1, 2]), kinds[set]([1])
    callback.best = torch.tensor(1.0)
    state = {"model.weight": torch.ones(2)}
    try:
        checkpoint = {
            "callbacks": {kinds[object]: {"best_model_score": torch.tensor(0.5)}},
            "hyper_parameters": [callback, a_dict, a_list, a_set], "state_dict": state, "path": Path("/x"),
        }  # fmt: skip
        torch.save(checkpoint, tmp_path / "a.ckpt", **options)
    finally:
        del sys.modules[module.__name__]
    read = load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(read["state_dict"]["model.weight"], state["model.weight"])
    assert [value["best_model_score"].item() for value in read["callbacks"].values()] == [0.5]
    assert all(isinstance(value, Inert) for value in [*read["hyper_parameters"], read["path"]])


@pytest.mark.parametrize("name", ["ldm_class_cond.ckpt", "sd_txt2img.ckpt", "qdiff_ddim_w4a8.pth"])
def test_golden_checkpoints_load(name: str) -> None:
    if not (GOLDEN / name).is_file():
        pytest.skip("the larger golden files are not here")
    read = load_checkpoint(GOLDEN / name)
    state = read.get("state_dict", read)
    assert len(state) > 100
    assert all(isinstance(value, torch.Tensor) and torch.isfinite(value).all() for value in state.values())


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def torchscript() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/constants.pkl", b"N.")
    return stream.getvalue()


def compressed() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N.")
    return stream.getvalue()


TENSOR = {"a": torch.arange(1000.0)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", r"truncated, or not a checkpoint \("),
        (b"<!DOCTYPE html><html>", "not a checkpoint but a web page"),
        (saved(TENSOR)[:-2000], r"truncated, or not a checkpoint \(File is not a zip file\)"),
        (saved(TENSOR, **LEGACY)[:-100], r"truncated, or not a checkpoint \(storage \d+ is cut off\)"),
        (saved(TENSOR, **LEGACY)[:-2000], r"\(storage \d+ of 1000 elements is larger than the file\)"),
        (saved(TENSOR, **LEGACY)[:60], r"truncated, or not a checkpoint \("),
        (pickle.dumps({"a": 1}), r"truncated, or not a checkpoint \(no magic number of torch.save\)"),
        (torchscript(), "a TorchScript archive"),
        (compressed(), "record a/data.pkl is compressed"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"123456789")
    with pytest.raises(ValueError, match=r"bad\.safetensors: truncated, or not a checkpoint \("):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt: no such file"):
        load_checkpoint(tmp_path / "gone.ckpt")


def test_a_tensor_past_its_storage_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(4)))) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickled = records.pop("data.pkl").replace(b"K\x04\x85", b"K\x05\x85")
    with pytest.raises(ValueError, match=r"reaches past its storage of 4 elements"):
        load_checkpoint(zip_file(tmp_path / "a.pt", pickled, **{"data/0": records["data/0"]}))


def test_a_storage_larger_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    data = saved(torch.zeros(4), **LEGACY).replace(b"K\x04", b"J\xff\xff\xff\x7f")
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is larger than the file"):
        load_checkpoint(path)


@pytest.mark.parametrize("container", [zip_file, legacy_file])
def test_a_damaged_memo_index_takes_no_memory(tmp_path: Path, container: Callable[[Path, bytes], Path]) -> None:
    path = container(tmp_path / "a.ckpt", b"\x80\x02}r\xff\xff\xff\x7f.")  # LONG_BINPUT of 2**31 - 1
    with pytest.raises(ValueError, match=r"\(memo index 2147483647 after 3 steps\)$"):
        load_checkpoint(path)


def test_safetensors_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "half": torch.arange(3).half(), "odd": torch.arange(5, dtype=torch.uint8), "full": torch.arange(6.0).reshape(2, 3),
        "empty": torch.zeros(0, 2), "number": torch.tensor(3), "flags": torch.tensor([True]), "b": torch.ones(1).bfloat16(),
    }  # fmt: skip
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    loaded = load_checkpoint(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    loaded["full"].zero_()
    assert path.read_bytes() == content
    for cut in (4, 40, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"m\.safetensors: truncated, or not a checkpoint"):
            load_checkpoint(path)


def shared(opcode: bytes, levels: int = 60) -> bytes:
    """A container that holds the one before it twice, and so on: 2**levels elements, written out."""
    out = b"K\x01q\x00"
    for level in range(levels):
        out += b"0" + opcode.replace(b"?", b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return out


TUPLES, LISTS = shared(b"??\x86"), shared(b"(??l")
MANY_ONES = b"]q\x00(" + b"K\x01" * 50_000 + b"e0"
TENSOR_CALL = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
HOSTILE = {
    "shared tuples": (TUPLES, "shares its containers: too large unfolded"),
    "shared lists": (LISTS, "shares its containers: too large unfolded"),
    "shared tuples as a key": (b"}" + TUPLES + b"Ns", "asks for more work than its size allows"),
    "shared lists as a dtype": (b"cnumpy\ndtype\n" + LISTS + b"\x85R", "numpy dtype a list is not read"),
    "shared lists as a device": (b"ctorch\ndevice\n" + LISTS + b"\x85R", "device a list None"),
    "shared lists as a size": (
        TENSOR_CALL + b"(" + STORAGE + b"K\x00" + LISTS + b")tR", "a tensor of size a list",
    ),
    "shared lists as a storage": (
        b"(X\x07\x00\x00\x00storage" + LISTS + LISTS + b"K\x00K\x01tQ", "storage a list of an unknown type a list",
    ),
    "deep tuples": (b"N" + b"\x85" * 50_000, "nested deeper than 100 levels"),
    "deep tuples as a key": (b"}N" + b"\x85" * 50_000 + b"Ns", "key a tuple"),
    "deep lists": (b"]" * 50_000 + b"a" * 49_999, "nested deeper than 100 levels"),
    "a list in itself": (b"]q\x00h\x00a", "a container that holds itself"),
    "numbers of one hash": (b"}(" + b"\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Nu", "key 2305843009213693951"),
    "tuples of one hash": (
        b"(" + b"".join(b"(" + b"".join(b"I-%d\n" % (1 + (i >> k & 1)) for k in range(12)) + b"tN" for i in range(4096)) + b"d",
        "asks for more work than its size allows",
    ),
    "copies of a list": (
        MANY_ONES + b"cbuiltins\nset\nq\x01(" + b"h\x01h\x00\x85R" * 10_000 + b"t", "asks for more work than its size allows",
    ),
    "a long number": (b"\x8b" + (2000).to_bytes(4, "little") + b"1" * 2000, "a whole number of 1999 bytes"),
    "a number longer than the file": (b"\x8b\xff\xff\xff\x7f1", "not enough data in stream to read long4"),
    "many classes": (b"(" + b"".join(b"ca\nb%d\n" % i for i in range(3000)) + b"t", "names more than 2000 classes"),
    "BUILD on a tensor": (TENSOR_CALL + b"(" + STORAGE + b"K\x00(K\x01t(K\x01ttR(K\x01K\x02tb", "the pickle changes a Tensor"),
    "BUILD on a set": (b"cbuiltins\nset\n)R}b", "the pickle changes a set"),
    "BUILD on a dtype": (b"ctorch\nfloat16\n}b", "the pickle changes a dtype"),
    "BUILD on a complex number": (b"cbuiltins\ncomplex\n)R}b", "the pickle changes a complex"),
    "items of a tensor": (
        TENSOR_CALL + b"(" + STORAGE + b"K\x00(K\x01t(K\x01ttRK\x00K\x05s", "the pickle sets an item of a Tensor",
    ),
    "a tensor of 2**60 elements": (
        TENSOR_CALL + b"(" + STORAGE + b"K\x00(\x8a\x08" + (2**60).to_bytes(8, "little") + b"t(K\x00ttR",
        "a tensor of size (1152921504606846976)",
    ),
    "a tensor of a terabyte": (
        TENSOR_CALL + b"(" + STORAGE + b"K\x00(\x8a\x06" + (2**40).to_bytes(6, "little") + b"t(K\x00ttR",
        "tensors 64 times as large as the file, one of size (1099511627776)",
    ),
    "a negative size": (TENSOR_CALL + b"(" + STORAGE + b"K\x00(I-1\nt(K\x01ttR", "a tensor of size (-1)"),
    "65 dimensions": (
        TENSOR_CALL + b"(" + STORAGE + b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"ttR", "a tensor of size a tuple",
    ),
    "an array without bytes": (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(\x8a\x06" + (2**40).to_bytes(6, "little")
        + b"tcnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R\x89U\x08AAAAAAAAtb",
        "an array of shape (1099511627776) and float64 with 8 bytes",
    ),
    "a call of a tensor": (STORAGE + b")R", "a call of a Tensor"),
    "an extension": (b"\x82\x01", "opcode EXT1 is not read"),
    "nothing on the stack": (b"\x86", "takes values that are not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_at_once(tmp_path: Path, name: str) -> None:
    pickled, message = HOSTILE[name]
    path = zip_file(tmp_path / "a.ckpt", b"\x80\x02" + pickled + b".", **{"data/0": b"\0\0\0\0"})
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: truncated, or not a checkpoint ({message})"
    assert time.perf_counter() - start < 10  # far less on a machine that has nothing else to do


def test_what_a_file_says_is_shown_in_short(tmp_path: Path) -> None:
    key = "line\nfeed" + "x" * 10_000
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key.encode() + b"NK\x01tQ."
    with pytest.raises(ValueError) as caught:
        load_checkpoint(zip_file(tmp_path / "a.ckpt", b"\x80\x02" + pid))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_large_keys_that_pickles_have(tmp_path: Path) -> None:
    """Byte-pair merges are keyed by two texts: there are many, and that costs nothing."""
    value = {(f"a{i}", f"b{i}"): i for i in range(5000)}
    assert load_checkpoint(zip_file(tmp_path / "a.ckpt", pickle.dumps(value, 2))) == value


def test_a_state_cannot_hide_methods_of_a_dict(tmp_path: Path) -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00aK\x01s}X\x05\x00\x00\x00itemsK\x05sb."
    assert list(load_checkpoint(zip_file(tmp_path / "a.ckpt", pickled)).items()) == [("a", 1)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/data.pkl", "b/data.pkl"], "record b/data.pkl is there twice, or lies over another one"),
        (["a/data.pkl", "a/x", "a/x"], "record a/x is there twice, or lies over another one"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_that_are_there_twice(tmp_path: Path, names: list[str], message: str) -> None:
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"N.")
    with pytest.raises(ValueError, match=rf"\({re.escape(message)}\)$"):
        load_checkpoint(path)


def test_storages_that_do_not_lie_aligned_are_read(tmp_path: Path) -> None:
    """Tools that pack an archive again put records anywhere; vector instructions may end the process there."""
    with zipfile.ZipFile(io.BytesIO(saved(TENSOR))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for shift in range(4):
        path = tmp_path / f"{shift}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/" + "x" * shift, b"")
            for name, data in records.items():
                archive.writestr(name, data)
        found = load_checkpoint(path)["a"]
        assert torch.equal(found, TENSOR["a"]) and found.data_ptr() % 16 == 0


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: a pipe, a device or a socket, expected a file$"):
        load_checkpoint(tmp_path / "a.ckpt")
