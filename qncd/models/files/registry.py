"""Published weights by name: where they are, how to know them, and a download that goes on where it was cut off."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20  # bytes read at a time
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 5  # requests in a row that bring nothing new before the download is given up


@dataclass(frozen=True)
class Download:
    """One published file.

    Args:
        url: where it is.
        file: its path below the cache folder, named as the original code names it.
        sha256, md5: hex digests, None where nobody published one. MD5 is no protection against an attacker; it is what
            the DDIM authors published, and finds a damaged file.
        size: bytes, None where unknown.
        member: the file inside a zip archive, where `url` is one; the digests and the size are then the archive's.
    """

    url: str
    file: str
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    member: str | None = None


def load_registry(path: str | Path | None = None) -> dict[str, Download]:
    """The named downloads of `registry.json`."""
    source = Path(path) if path else Path(__file__).with_name("registry.json")
    return {name: Download(**entry) for name, entry in json.loads(source.read_text(encoding="utf-8")).items()}


def cache_dir() -> Path:
    """`$QNCD_CACHE`, or `~/.cache/qncd`."""
    return Path(os.environ.get("QNCD_CACHE") or Path.home() / ".cache" / "qncd").expanduser()


def fetch(name: str, registry: Mapping[str, Download] | None = None) -> Path:
    """The named file, from the cache or downloaded into it.

    The download is kept in `FILE.part` and goes on from there after an interruption; it gets its name once its size and
    digest are right. A file already in the cache is checked too, so one that was put there by hand is as good. Where no
    SHA-256 is on record, the computed one is printed to stderr. An archive goes once its member is out of it.

    Raises:
        ValueError: the name is unknown, or the file has another size or digest than the record.
        FileNotFoundError: the file is not in the cache and cannot be downloaded.
    """
    entries = load_registry() if registry is None else registry
    if name not in entries:
        raise ValueError(f"no published weights are named {name!r}: allowed are {', '.join(sorted(entries))}")
    entry = entries[name]
    path = cache_dir() / entry.file
    if path.is_file():
        if entry.member is None:  # what is on record of an archive says nothing about the file from it
            _verify(path, entry, name)
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(entry, part)
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise FileNotFoundError(
            f"{Path(entry.file).name} ({name}) cannot be downloaded from {entry.url} ({reason}): "
            f"put it at {path}, or name it with --ckpt PATH"
        ) from None
    try:
        digest = _verify(part, entry, name)
    except ValueError:
        part.unlink()  # going on from wrong bytes would never end well
        raise
    if entry.member is None:
        os.replace(part, path)
    else:
        _extract(part, entry.member, path, f"{name} ({entry.url})")
        part.unlink()
    if entry.sha256 is None:
        of = "" if entry.member is None else " for its archive"
        print(f"{path}: no SHA-256 is on record for it; this one has {digest}{of}", file=sys.stderr)
    return path


def _extract(archive: Path, member: str, path: Path, name: str) -> None:
    """Write one file of a zip archive to `path`, whole or not at all. Raises ValueError where the archive is damaged."""
    partial = path.with_name(path.name + ".unzipped")
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)  # checks the member's CRC on the way
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, zlib.error) as error:
        partial.unlink(missing_ok=True)
        archive.unlink()
        raise ValueError(f"{name}: not a zip archive with {member} ({error})") from None
    os.replace(partial, path)


def _download(entry: Download, part: Path) -> None:
    """Fill `part`; an interrupted transfer is taken up again as long as each request brings something."""
    idle = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        if entry.size is not None and before == entry.size:
            return
        try:
            if _transfer(entry.url, part, before):
                return
            error: Exception = OSError("the connection was cut")
        except urllib.error.HTTPError as refused:
            refused.close()
            if refused.code == 416 and before:
                if refused.headers.get("Content-Range") == f"bytes */{before}":
                    return  # nothing is left to send: the last run ended between the transfer and the check
                part.unlink()  # longer than the file: of something else
            elif refused.code < 500:
                raise
            else:
                time.sleep(1)
            error = refused
        except (OSError, http.client.HTTPException) as cut:
            error = cut
        after = part.stat().st_size if part.is_file() else 0
        idle = 0 if after > before else idle + 1
        if idle and isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
            raise error  # no route, no name, refused: trying again at once does not help
        if idle >= _ATTEMPTS:
            raise error


def _transfer(url: str, part: Path, start: int) -> bool:
    """One request, appended to the first `start` bytes; whether the file is complete."""
    request = urllib.request.Request(url, headers={"User-Agent": "qncd"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        resumed = start and response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not resumed and response.status == 206:
            raise OSError(f"the server sent {response.headers.get('Content-Range')!r} for bytes from {start}")
        length = response.headers.get("Content-Length")
        expected = None if length is None else int(length)
        received = 0
        with part.open("ab" if resumed else "wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
                received += len(block)
    return expected is None or received >= expected


def _verify(path: Path, entry: Download, name: str) -> str:
    """The SHA-256 of the file; raises ValueError where the record says something else."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        raise ValueError(f"{path}: {size} bytes, {name} has {entry.size} ({entry.url})")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    for kind, found, expected in (("SHA-256", sha256.hexdigest(), entry.sha256), ("MD5", md5.hexdigest(), entry.md5)):
        if expected is not None and found != expected.lower():
            raise ValueError(f"{path}: {kind} {found}, {name} has {expected} ({entry.url})")
    return sha256.hexdigest()
