"""Checkpoints are read in full, and nothing that is in them runs."""

from __future__ import annotations

import builtins
import io
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import sys
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


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """The same pickles do run in pickle.loads, so the test above tests something."""
    marker = tmp_path / "marker"
    pickles = attacks(marker)
    for name in (
        "os.system",
        "subprocess",
        "eval",
        "getattr",
        "attrgetter",
        "runpy",
        "nested",
        "torch.hub",
        "opcode INST",
        "opcode STACK_GLOBAL",
    ):
        pickle.loads(pickles[name])
        assert marker.exists(), name
        marker.unlink()


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
