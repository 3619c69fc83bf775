#!/usr/bin/env python3
"""Damage files of every format that the package reads, and look whether its readers refuse them in one line.

    python tools/fuzz.py --seconds 60                              # all readers in turn
    python tools/fuzz.py --seconds 60 --reader torch --seed 7      # one reader, from another seed on
    python tools/fuzz.py --reader torch --seed 4711 --count 1 --keep DIR    # one input again, its file kept in DIR

A reader has to succeed, or to raise a ValueError or FileNotFoundError of one line that names the file, within the limits of
time and memory. Everything else is a fault: another exception, a text of several lines, a process that dies. Inputs are made from
the files in tests/data/fuzz, one folder a reader, by changes of bytes, of the members of archives and of the values of JSON. An
input depends on its reader and its own seed alone; the seeds count up from --seed. Exit status 1 if there are faults.

Needs os.fork, that is Linux or macOS: torch is imported once, and a forked process reads inputs until one of them ends it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "data" / "fuzz"
MEMORY = 2 << 30  # bytes that reading one input may take
BATCH = 200  # inputs that one forked process reads, at most
LONGEST_MESSAGE = 1000
EXTREMES = (0, 1, 127, 128, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
PIECES = (
    b"\x80\x02", b".", b"(", b"t", b"R", b"b", b"q\x00", b"h\x00", b"\x85", b"]", b"}", b"s", b"u", b"e", b"a", b"Q", b"0", b"2",
    b"\x81", b"\x93", b"\x94", b"\x8b\xff\xff\xff\x7f", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\ndtype\n", b"cos\nsystem\n", b"NaN", b"Infinity", b"-1", b"1e999",
    b"[" * 200, b"{", b"null", b"true", b"&a [*a, *a]", b"<<: *a",
    b"!!python/name:os.system", b": ", b"\n", b"\r", b"\x00", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\xff\xfe",
)  # fmt: skip
VALUES = (
    None,
    True,
    0,
    -1,
    1 << 70,
    1.5,
    float("nan"),
    "",
    "x" * 300,
    "../x",
    [],
    {},
    [[]],
    [0, -1],
    {"a": 1},
    "F32",
    "\u2028\n",
)


def read_torch(path: Path) -> None:
    """A checkpoint of torch or safetensors, and all that is in it."""
    import torch

    from qncd.models.files.unpickle import load_checkpoint

    pending, seen = [load_checkpoint(path)], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.numel() <= 1 << 20:
                value.clone()
        elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))
            pending.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)


def read_state_dict(path: Path) -> None:
    """An original checkpoint of the latent models."""
    from qncd.models.original.compvis import read_state_dict as read

    read(path)


def read_quantized(path: Path) -> None:
    """A quantized checkpoint of this package, into the network that it was made from."""
    from qncd.models.network import network_of
    from qncd.ptq.checkpoint import load_quantized_

    load_quantized_(network_of(quantized_base()), path)


def quantized_base() -> Any:
    """The network of the quantized checkpoint in the corpus."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)  # fmt: skip


def read_calibration(path: Path) -> None:
    """A calibration set."""
    from qncd.ptq.data import load_calibration

    load_calibration(path, 1, 1)


def read_config(path: Path) -> None:
    """The yaml of a model."""
    from qncd.models.configs import read_config as read

    read(path)


def read_recipe(path: Path) -> None:
    """A recipe in yaml."""
    from qncd.recipe import Recipe

    Recipe.from_yaml(path)


def read_run(path: Path) -> None:
    """The run.json of a run that is resumed."""
    from qncd.io.runs import Run

    path.rename(path.with_name("run.json"))
    _ = Run(path.parent).record


def read_prompts(path: Path) -> None:
    """A file of prompts."""
    from qncd.io.prompts import read_prompts as read

    read(path)


def read_statistics(path: Path) -> None:
    """Statistics of reference images."""
    from qncd.metrics.statistics.saved_statistics import SavedStatistics

    SavedStatistics.open(path)


def read_image(path: Path) -> None:
    """An image that is evaluated."""
    from qncd.metrics.report.image_files import read_image as read

    read(path)


READERS: dict[str, Callable[[Path], None]] = {
    "torch": read_torch,
    "safetensors": read_torch,
    "state_dict": read_state_dict,
    "quantized": read_quantized,
    "calibration": read_calibration,
    "config": read_config,
    "recipe": read_recipe,
    "run": read_run,
    "prompts": read_prompts,
    "statistics": read_statistics,
    "image": read_image,
}


@dataclass(frozen=True)
class Input:
    """A damaged file."""

    reader: str
    seed: int

    def make(self) -> tuple[str, bytes]:
        """Its name and its content."""
        draw = random.Random(f"{self.reader} {self.seed}")
        files = sorted((CORPUS / self.reader).iterdir())
        chosen = draw.choice(files)
        other = draw.choice(files).read_bytes()
        return f"input{chosen.suffix}", changed(chosen.read_bytes(), other, draw)

    def __str__(self) -> str:
        return f"--reader {self.reader} --seed {self.seed} --count 1"


def changed(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The content with a few changes, of its parts where it is of a format that has some and draws so, else of any bytes."""
    inside = draw.random() < 0.7
    if inside and content.startswith(b"PK"):
        return _changed_archive(content, other, draw)
    if inside and content.startswith(b"\x89PNG"):
        return _changed_png(content, draw)
    if inside and content[:1] == b"{":
        return json.dumps(_changed_tree(json.loads(content), draw)).encode()
    if inside and content[8:9] == b"{":
        return _changed_safetensors(content, draw)
    return _changed_bytes(content, other, draw)


def _changed_bytes(content: bytes, other: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 2, 4, 8, draw.randrange(1, 64)))
        kind = draw.randrange(8)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + draw.choice(PIECES) + content[at + draw.choice((0, length)) :]
        elif kind == 2:
            content = content[:at] + draw.randbytes(length) + content[at + length :]
        elif kind == 3:
            content = content[:at] + content[at + length :]
        elif kind == 4:
            content = content[:at] + content[at : at + length] * draw.choice((2, 2, 500)) + content[at + length :]
        elif kind == 5:
            start = draw.randrange(len(other) + 1)
            content = content[:at] + other[start : start + length] + content[at + length :]
        elif kind == 6 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        else:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(EXTREMES) % (1 << 8 * size)
            content = content[:at] + number.to_bytes(size, draw.choice(("little", "big"))) + content[at + size :]
    return content


def _changed_archive(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Members changed, left out, renamed or there twice, in an archive that is whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    small = [index for index, (_, data) in enumerate(members) if len(data) < 1 << 16]
    for _ in range(draw.choice((1, 1, 2))):
        index = draw.choice(small)
        entry, data = members[index]
        kind = draw.randrange(8)
        if kind == 0:
            members[index] = entry, b""
        elif kind == 1:
            entry.filename = draw.choice(members)[0].filename
        else:
            members[index] = entry, _changed_bytes(data, other, draw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for entry, data in members:
            new = zipfile.ZipInfo(entry.filename)
            new.compress_type = entry.compress_type
            archive.writestr(new, data)
    return stream.getvalue()


def _changed_png(content: bytes, draw: random.Random) -> bytes:
    """A chunk changed, with its checksum put right."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    index = draw.randrange(len(chunks))
    kind, data = chunks[index]
    chunks[index] = draw.choice((kind, kind, b"tEXt", b"IHDR", b"zTXt")), _changed_bytes(data, data, draw)
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _changed_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A value of the header changed, also inside the JSON that it holds as text, or bytes of the tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    if draw.random() < 0.3 and data:
        data = _changed_bytes(data, data, draw)[: len(data)].ljust(len(data), b"\0")
    elif metadata and draw.random() < 0.6:
        key = draw.choice(sorted(metadata))
        try:
            metadata[key] = json.dumps(_changed_tree(json.loads(metadata[key]), draw))
        except ValueError:
            metadata[key] = draw.choice(VALUES)
    else:
        header = _changed_tree(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _changed_tree(tree: Any, draw: random.Random) -> Any:
    """A value of a tree of lists and dicts replaced, or a key left out or renamed."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.1:
        return draw.choice(VALUES)
    keys: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = draw.choice(keys)
    kind = draw.randrange(6)
    if isinstance(tree, list):
        items = list(tree)
        items[key : key + 1] = [] if kind == 0 else [items[key]] * 2 if kind == 1 else [_changed_tree(items[key], draw)]
        return items
    value = tree[key]
    rest = {name: other for name, other in tree.items() if name != key}
    if kind == 0:
        return rest
    if kind == 1:
        return {**rest, draw.choice(("", "x", str(draw.choice(keys)))): value}
    return {**rest, key: _changed_tree(value, draw)}


def fault_of(read: Callable[[Path], None], path: Path) -> str:
    """What is wrong with the way in which a reader takes a file; empty for nothing."""
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if type(error) not in (ValueError, FileNotFoundError) and not type(error).__module__.startswith("qncd"):
            return f"{type(error).__name__}: {text[:200]!r}"
        if len(text.splitlines()) != 1 or not text.isprintable():
            return f"a message of several lines: {text[:200]!r}"
        if len(text) > LONGEST_MESSAGE:
            return f"a message of {len(text)} letters: {text[:200]!r}"
        if path.parent.name not in text:
            return f"a message that does not name the file: {text[:200]!r}"
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else ""
        return f"{type(error).__name__} in {where}: {str(error)[:200]!r}"
    return ""


def run_batch(inputs: Sequence[Input], report: int, limit: int | None, keep: Path | None) -> None:
    """Read inputs in this process, and write a line for each before and after it."""
    if limit is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit,) * 2)
    for case in inputs:
        os.write(report, b"begin\n")
        folder = Path(tempfile.mkdtemp(prefix="qncd-fuzz-"))
        try:
            name, content = case.make()
            (folder / name).write_bytes(content)
            if keep is not None:
                shutil.copy(folder / name, keep / f"{case.reader}-{case.seed}{Path(name).suffix}")
            fault = fault_of(READERS[case.reader], folder / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        os.write(report, f"end {json.dumps(fault)}\n".encode())


def run_forked(inputs: Sequence[Input], seconds: float, keep: Path | None, limit: int | None = MEMORY) -> list[tuple[Input, str]]:
    """(input, fault or "") for each of the inputs that was read; the last one may have ended the process.

    Args:
        seconds: that an input may take.
    """
    results: list[tuple[Input, str]] = []
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            run_batch(inputs, writing, limit, keep)
        finally:
            os._exit(0)
    os.close(writing)
    started, buffer, late = 0, b"", False
    with os.fdopen(reading, "rb", buffering=0) as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], seconds)
            if not ready:
                late = True
                os.kill(pid, signal.SIGKILL)
                break
            part = stream.read(1 << 16)
            if not part:
                break
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                if line == b"begin":
                    started += 1
                else:
                    results.append((inputs[started - 1], json.loads(line.removeprefix(b"end "))))
    _, status = os.waitpid(pid, 0)
    if started > len(results):
        how = f"takes more than {seconds:g} s" if late else f"ends the process, status {os.waitstatus_to_exitcode(status)}"
        results.append((inputs[started - 1], how))
    return results


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (default %(default)s)")
    parser.add_argument("--reader", choices=tuple(READERS), help="one reader only (default: all in turn)")
    parser.add_argument("--count", type=int, help="so many inputs of each reader instead of --seconds")
    parser.add_argument("--limit", type=float, default=20, help="seconds that an input may take (default %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep every input in this folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print faults and figures; the exit status."""
    args = parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)  # a fork of a process with threads may wait for one of them for ever
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    names = [args.reader] if args.reader else list(READERS)
    for name in names:  # imports what the reader needs
        for file in (CORPUS / name).iterdir():
            if fault := unchanged_fault(name, file):
                print(f"{file}: {fault}")
                return 1
    batch = BATCH if args.count is not None else max(5, min(BATCH, int(args.seconds * 4)))
    counts, faults, kinds = dict.fromkeys(names, 0), 0, dict[str, Input]()
    end, start = time.monotonic() + args.seconds, time.monotonic()
    while any(args.count is not None and counts[name] < args.count for name in names) or (
        args.count is None and time.monotonic() < end
    ):
        for name in names:
            size = batch if args.count is None else min(batch, args.count - counts[name])
            first = args.seed + counts[name]
            for case, fault in run_forked([Input(name, first + i) for i in range(size)], args.limit, args.keep):
                counts[name] += 1
                kind = f"{case.reader} {re.sub('[0-9]+', '0', fault)[:60]}"
                faults += bool(fault)
                if fault and kind not in kinds:
                    kinds[kind] = case
                    print(f"{case}: {fault}", flush=True)
            if args.count is None and time.monotonic() > end:
                break
    read = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{sum(counts.values())} inputs in {time.monotonic() - start:.0f} s, {faults} faults of {len(kinds)} kinds ({read})")
    return 1 if faults else 0


def unchanged_fault(reader: str, file: Path) -> str:
    """What is wrong with a file of the corpus itself, which has to be read; empty for nothing."""
    folder = Path(tempfile.mkdtemp(prefix="qncd-fuzz-"))
    try:
        copy = Path(shutil.copy(file, folder / f"input{file.suffix}"))
        READERS[reader](copy)
    except (ValueError, FileNotFoundError) as error:
        return f"is not read: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ""


if __name__ == "__main__":
    sys.exit(main())
