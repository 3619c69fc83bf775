"""Readers of files of strangers, on inputs that Hypothesis draws: what is written comes back, what is odd is one line."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from qncd.io.files import read_json, read_lines
from qncd.io.npz import read_array
from qncd.io.prompts import read_prompts
from qncd.io.yaml_files import read_yaml
from qncd.metrics.report.image_files import read_image
from qncd.models.files.safetensors_files import read_safetensors, write_safetensors
from qncd.models.files.unpickle import load_checkpoint

# The same inputs in every run: a test that fails now and then stops nobody from breaking it.
drawn = settings(max_examples=40, deadline=None, derandomize=True, database=None)

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60)
PLAIN = st.recursive(
    SCALARS | FINITE | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=10,
)
DTYPES = st.sampled_from(["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"])
ARRAYS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, max_side=4)))


def written(content: bytes, suffix: str = "") -> Path:
    """A file with this content; the folder goes with the process."""
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False, dir=FOLDER.name) as file:
        file.write(content)
    return Path(file.name)


FOLDER = tempfile.TemporaryDirectory(prefix="qncd-properties-")


@drawn
@given(PLAIN)
def test_json_comes_back(value: Any) -> None:
    assert read_json(written(json.dumps(value).encode())) == value


@drawn
@given(
    st.dictionaries(NAMES, st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NAMES, st.lists), max_size=4)
)
def test_yaml_comes_back(value: Any) -> None:
    assert read_yaml(written(yaml.safe_dump(value).encode())) == value


@drawn
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1, max_size=12), min_size=1))
def test_prompts_come_back(prompts: list[str]) -> None:
    if prompts[0].startswith("\ufeff"):
        prompts = ["x", *prompts]
    for end in ("", "\n", "\n\n"):
        assert read_prompts(written(("\n".join(prompts) + end).encode())) == [prompt.strip() for prompt in prompts]


@drawn
@given(ARRAYS)
def test_arrays_come_back(array: np.ndarray) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=array)
    found = read_array(written(stream.getvalue(), ".npz"), "a")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@drawn
@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=3))
def test_tensors_come_back(content: dict[str, np.ndarray]) -> None:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)) for name, array in content.items()}
    path = written(b"", ".safetensors")
    write_safetensors(tensors, path)
    pickled = written(b"", ".pt")
    torch.save({"state_dict": OrderedDict(tensors)}, pickled)
    for found in (read_safetensors(path), load_checkpoint(pickled)["state_dict"]):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


@drawn
@given(arrays.arrays("uint8", st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_images_come_back(pixels: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(stream, "PNG")
    np.testing.assert_array_equal(read_image(written(stream.getvalue(), ".png")), pixels)


READERS: dict[str, Callable[[Path], Any]] = {
    "json": read_json, "yaml": read_yaml, "lines": read_lines, "prompts": read_prompts,
    "npz": lambda path: read_array(path, "a"), "safetensors": load_checkpoint, "checkpoint": load_checkpoint,
    "image": read_image,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@drawn
@given(
    content=st.binary(max_size=200)
    | TEXTS.map(str.encode)
    | PLAIN.map(pickle.dumps)
    | PLAIN.map(lambda v: json.dumps(v).encode())
)
def test_anything_is_read_or_refused_in_one_line(reader: str, content: bytes) -> None:
    path = written(content, f".{reader}")
    try:
        READERS[reader](path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
