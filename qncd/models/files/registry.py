"""Published weights by name: where they are, how to know them, and a download that goes on where it was cut off."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qncd.io.files import read_json, whole_file, write_json

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


def fetch(name: str, registry: Mapping[str, Download] | None = None, sha256: str | None = None) -> Path:
    """The named file, from the cache or downloaded into it.

    The download is kept in `FILE.part` and goes on from there after an interruption, unless the server has another file by
    then; it gets its name once its size and digest are right. A file already in the cache is checked too, so one that was put
    there by hand is as good. Where no SHA-256 of the file is published, that of the first one is written to `FILE.sha256.json`
    and told on stderr, and a later one must have it too. An archive goes once its member is out of it.

    Args:
        sha256: hex digest that the file (of an archive: the member) must have.

    Raises:
        ValueError: the name is unknown, or the file has another size or digest than the record, or than `sha256`.
        FileNotFoundError: the file is not in the cache and cannot be downloaded.
    """
    entries = load_registry() if registry is None else registry
    if name not in entries:
        raise ValueError(f"no published weights are named {name!r}: allowed are {', '.join(sorted(entries))}")
    entry = entries[name]
    path = cache_dir() / entry.file
    if not path.is_file():
        _fill_cache(path, entry, name)
        try:
            _check_cached(path, entry, name, sha256)
        except ValueError:
            path.unlink()
            raise
        return path
    try:
        _check_cached(path, entry, name, sha256)
    except ValueError as error:
        raise ValueError(f"{error}: delete the file to download it anew") from None
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError where a file's SHA-256 is not the one that --sha256 names."""
    if not path.is_file():
        raise ValueError(f"--sha256 pins one file, and {path} is none")
    if (found := _digests(path)[0]) != expected.lower():
        raise ValueError(f"{path}: SHA-256 {found}, --sha256 says {expected.lower()}")


def _fill_cache(path: Path, entry: Download, name: str) -> None:
    """Download the file to its place, checked by what is published of it."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(entry, part, name)
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise FileNotFoundError(
            f"{Path(entry.file).name} ({name}) cannot be downloaded from {entry.url} ({reason}): "
            f"put it at {path}, or name it with --ckpt PATH"
        ) from None
    _about(part).unlink(missing_ok=True)
    try:
        _verify(part, entry, name)
    except ValueError:
        part.unlink()  # going on from wrong bytes would never end well
        raise
    if entry.member is None:
        os.replace(part, path)
    else:
        _extract(part, entry.member, path, f"{name} ({entry.url})")
        part.unlink()


def _check_cached(path: Path, entry: Download, name: str, sha256: str | None) -> None:
    """Compare a file in the cache with all that is known of it; without a published SHA-256, make a record or compare with it."""
    # What is published of an archive says nothing about the file from it.
    found = _digests(path)[0] if entry.member else _verify(path, entry, name)
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{path}: SHA-256 {found}, --sha256 says {sha256.lower()}")
    if entry.sha256 is not None and entry.member is None:
        return
    record = path.with_name(path.name + ".sha256.json")
    if record.is_file():
        known = read_json(record)
        expected = known.get("sha256") if isinstance(known, dict) else None
        if found != expected:
            raise ValueError(f"{path}: SHA-256 {found}, the first download had {expected} ({record})")
        return
    write_json(record, {"url": entry.url, "sha256": found})
    if entry.sha256 is None:
        print(f"{path}: no SHA-256 is on record for it; this one has {found}", file=sys.stderr)


def _extract(archive: Path, member: str, path: Path, name: str) -> None:
    """Write one file of a zip archive to `path`, whole or not at all. Raises ValueError where the archive is damaged."""
    try:
        with whole_file(path) as part, zipfile.ZipFile(archive) as files, files.open(member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)  # checks the member's CRC on the way
    except ValueError as error:
        archive.unlink()
        reason = error.__cause__ or error
        raise ValueError(f"{name}: not a zip archive with {member} ({reason})") from None


def _download(entry: Download, part: Path, name: str) -> None:
    """Fill `part`; an interrupted transfer is taken up again as long as each request brings something."""
    if not (_about(part).is_file() or entry.sha256 or entry.md5):
        part.unlink(missing_ok=True)  # nothing would tell that the server has another file by now
    idle = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        if entry.size is not None and before == entry.size:
            return
        try:
            if _transfer(entry, part, before, name):
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


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects, but none that leaves encryption."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(req.full_url).scheme == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _about(part: Path) -> Path:
    """What the server said about the file that `part` begins: its ETag and its size."""
    return part.with_name(part.name + ".json")


def _transfer(entry: Download, part: Path, start: int, name: str) -> bool:
    """One request, appended to the first `start` bytes where the server still has that file; whether it is complete.

    Raises:
        ValueError: the server's file has another size than the published one.
        OSError, HTTPException: what happens to transfers; URLError where another try would not help.
    """
    request = urllib.request.Request(entry.url, headers={"User-Agent": "qncd"})
    about = read_json(_about(part)) if _about(part).is_file() else {}
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.build_opener(_SafeRedirects).open(request, timeout=_TIMEOUT) as response:
        where = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        resumed = bool(start) and response.status == 206 and where is not None and int(where[1]) == start
        if response.status == 206 and not resumed:
            raise OSError(f"the server sent {response.headers.get('Content-Range')!r} for bytes from {start}")
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        total = int(where[2]) if resumed and where and where[2].isdecimal() else None if resumed else expected
        now = {"url": entry.url, "etag": response.headers.get("ETag"), "size": total}
        if total is not None and entry.size not in (None, total):
            raise ValueError(f"{entry.url}: {total} bytes, {name} has {entry.size}")
        if resumed and about and about != now:
            part.unlink()  # the beginning is of another file: the next request asks for all of it
            raise OSError("the server has another file by now")
        if expected is None and not response.chunked and not (entry.size or entry.sha256 or entry.md5):
            raise urllib.error.URLError("the server does not say how long the file is")
        if not resumed:
            write_json(_about(part), now)
        received = 0
        with part.open("ab" if resumed else "wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
                received += len(block)
    return expected is None or received >= expected


def _verify(path: Path, entry: Download, name: str) -> str:
    """The SHA-256 of the file; raises ValueError where what is published says something else."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        raise ValueError(f"{path}: {size} bytes, {name} has {entry.size} ({entry.url})")
    sha256, md5 = _digests(path)
    for kind, found, expected in (("SHA-256", sha256, entry.sha256), ("MD5", md5, entry.md5)):
        if expected is not None and found != expected.lower():
            raise ValueError(f"{path}: {kind} {found}, {name} has {expected} ({entry.url})")
    return sha256


def _digests(path: Path) -> tuple[str, str]:
    """SHA-256 and MD5 of a file, in hex."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()
