"""YAML of strangers: read as OmegaConf reads it, without running anything, and never larger than it looks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qncd.io.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
KINDS = """
a: 1_000
b: 1e5
c: .5
d: 0x10
e: 010
f: 1:30
g: yes
h: 2001-01-01
i: 0o17
j: 1e-4
k: '1e-4'
l: +1.5e3
m: null
n: ~
o: 1.
p: 1e+3
q: 1:30.5
r: -.inf
s: .5e3
t: -.5
u: "null"
v: [1, 2.5, {x: y}]
w: &w {one: 1, two: 2}
x: {<<: *w, two: 3}
y: *w
"""
REFERENCES = """
size: 64
model: {size: '${size}', sizes: ['${size}', 2], name: 'x${size}y${size}', again: '${model.size}'}
copy: ${model}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


@pytest.mark.parametrize("text", [KINDS, REFERENCES])
def test_as_omegaconf_reads_it(path: Path, text: str) -> None:
    path.write_text(text)
    found, expected = read_yaml(path), OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "configs").iterdir())])
def test_the_configs_are_read_as_omegaconf_reads_them(name: str) -> None:
    path = ROOT / "configs" / name
    assert read_yaml(path) == OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def test_a_reference_into_a_list_and_a_byte_order_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbfa: [1, 2]\r\nb: ${a.1}\r\n")
    assert read_yaml(path) == {"a": [1, 2], "b": 2}


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{letter}: &{letter} [{','.join(['*' + before] * 9)}]\n" for before, letter in zip("abcdefgh", "bcdefghi", strict=True)
)
DOUBLING = "a0: [1]\n" + "".join(f"a{i + 1}: ['${{a{i}}}', '${{a{i}}}']\n" for i in range(60))
LONGER = "a0: xxxxxxxxxx\n" + "".join(f"a{i + 1}: ${{a{i}}}${{a{i}}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "not a yaml file at line 5: more than 20000 values"),
        (DOUBLING, "a1[0-9].*: more than 20000 values with what references stand for"),
        (LONGER, "a10: longer than 10000 characters with what references stand for"),
        ("a: &a [*a]", r"not a yaml file at line 1: \*a stands inside what it stands for"),
        ("a: &a {b: 1, c: *a}", r"not a yaml file at line 1: \*a stands inside what it stands for"),
        ("a: " + "[" * 51 + "]" * 51, "not a yaml file at line 1: nested deeper than 50 levels"),
        ("[" * 200_000, "not a yaml file at line 1: nested deeper than 50 levels"),
        ("a: b\n" * 60_000, r"300000 bytes, a yaml file here has at most 262144"),
        ("- \n" * 30_000, "not a yaml file at line 20000: more than 20000 values"),
        ("a: !!python/object/apply:os.system [ls]", "the tag tag:yaml.org,2002:python/object/apply:os.system is not read"),
        ("a: !!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system is not read"),
        ("a: !thing 3", "not a yaml file at line 1: the tag !thing is not read"),
        ("a: !!set {x}", "the tag tag:yaml.org,2002:set is not read"),
        ("a: 1\nb: 2\na: 3", "not a yaml file at line 3: the key 'a' is there twice"),
        ("1: 2", "not a yaml file at line 1: the key 1 is no text"),
        ("yes: 2", "the key yes is no text"),
        ("? [a]\n: 2", "the key that is a list or a mapping is no text"),
        ("a: {<<: {1: 2}}", "not a yaml file at line 1: the key 1 is no text|a: the key 1 is no text"),
        ("a: 0x" + "f" * 5000, "a: a whole number of more than 64 bits"),
        ("a: " + "9" * 5000, "not a yaml file: Exceeds the limit"),
        ("a: !!int x", "not a yaml file: invalid literal"),
        ("a: ${a}", r"a: the reference \$\{a\} leads back to itself"),
        ("a: ${b}\nb: ${a}", r"a: the reference \$\{b\} leads back to itself"),
        ("a: {b: '${a}'}", r"a.b.b: the reference \$\{a\} leads back to itself"),
        ("a: ${b}", "a: Interpolation key 'b' not found"),
        ("a: ${oc.env:HOME}", r"a: the reference \$\{oc.env:HOME\} is not read: allowed are keys, as in \$\{model.params\}"),
        ("b: c\na: ${${b}}", r"a: '\$\{\$\{b\}\}' has a reference that does not end, or one inside another"),
        ("a: ${b", r"a: '\$\{b' has a reference that does not end"),
        ("b: {c: 1}\na: x${b}", r"a: the reference \$\{b\} is to a section, inside a text"),
        ("a: [1", r"not a yaml file at line \d+: "),
        ("a:\tb", "not a yaml file at line 1: "),
        ("---\na\n---\nb", "not a yaml file at line 3: but found another document"),
        ("\x00", "not a yaml file: unreadable"),
    ],
)
def test_what_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"^{path}: (?:not a yaml file at line 1: )?(?:{message})") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_files_that_are_none(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"c\.yaml: no such file$"):
        read_yaml(path)
    with pytest.raises(ValueError, match="a folder, expected a file"):
        read_yaml(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"c\.yaml: not a text file in UTF-8 \(byte 0\)$"):
        read_yaml(path)
