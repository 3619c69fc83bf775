"""Downloads: resumed, checked, and one clear line where there is no network."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qncd.io.files import read_json
from qncd.models.files.registry import Download, _SafeRedirects, cache_dir, check_sha256, fetch, load_registry

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data`; each request may be cut after so many bytes."""

    cuts: list[int]
    ranges: list[str | None]
    data = DATA
    etag: str | None = None
    tells_length = True
    location: str | None = None
    honours_ranges = True
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.server.location is not None:
            self.send_response(302)
            self.send_header("Location", self.server.location)
            self.end_headers()
            return
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = 0
        if asked and self.server.honours_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(self.server.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.server.data)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(self.server.data) - 1}/{len(self.server.data)}")
        else:
            self.send_response(200)
        body = self.server.data[start:]
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.cuts, server.ranges = [], []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def entry(server: Server, **fields: Any) -> dict[str, Download]:
    return {"m": Download(url=f"http://127.0.0.1:{server.server_port}/m", file="folder/m.ckpt", **fields)}


def test_a_download_is_kept(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    registry = entry(server, sha256=SHA256, size=len(DATA))
    path = fetch("m", registry)
    assert path == cache_dir() / "folder" / "m.ckpt"
    assert path.read_bytes() == DATA
    assert [file.name for file in path.parent.iterdir()] == ["m.ckpt"]
    assert fetch("m", registry) == path
    assert len(server.ranges) == 1
    assert capsys.readouterr().err == ""


def test_without_a_record_the_hash_is_printed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch("m", entry(server, md5=MD5))
    assert capsys.readouterr().err == f"{path}: no SHA-256 is on record for it; this one has {SHA256}\n"


def test_a_cut_download_goes_on(server: Server) -> None:
    server.cuts = [1000, 5000]
    path = fetch("m", entry(server, sha256=SHA256))
    assert server.ranges == [None, "bytes=1000-", "bytes=6000-"]
    assert path.read_bytes() == DATA


def test_a_later_call_goes_on(server: Server) -> None:
    part = cache_dir() / "folder" / "m.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:777])
    assert fetch("m", entry(server, sha256=SHA256)).read_bytes() == DATA
    assert server.ranges == ["bytes=777-"]


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_a_whole_part_is_not_fetched_again(server: Server, size: int | None) -> None:
    part = cache_dir() / "folder" / "m.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA)
    assert fetch("m", entry(server, sha256=SHA256, size=size)).read_bytes() == DATA
    assert server.ranges == ([f"bytes={len(DATA)}-"] if size is None else [])


@pytest.mark.parametrize(("length", "honours"), [(len(DATA) + 5, True), (500, False)])
def test_a_part_that_cannot_go_on_starts_anew(server: Server, length: int, honours: bool) -> None:
    server.honours_ranges = honours
    part = cache_dir() / "folder" / "m.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * length)
    assert fetch("m", entry(server, sha256=SHA256)).read_bytes() == DATA


def test_a_server_that_sends_nothing_is_given_up(server: Server) -> None:
    server.cuts = [0] * 20
    with pytest.raises(FileNotFoundError, match=r"the connection was cut"):
        fetch("m", entry(server, sha256=SHA256))


def test_a_member_of_a_zip_archive(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", DATA)
    server.data = buffer.getvalue()
    server.cuts = [50]
    digest = hashlib.sha256(server.data).hexdigest()
    for sha256 in (digest, None):
        path = fetch("m", entry(server, sha256=sha256, member="model.ckpt"))
        assert path.read_bytes() == DATA
        assert sorted(item.name for item in path.parent.iterdir()) == ["m.ckpt", "m.ckpt.sha256.json"]
        asked = len(server.ranges)
        assert fetch("m", entry(server, sha256=digest, member="model.ckpt")) == path
        assert len(server.ranges) == asked  # it is in the cache
        path.unlink()
        (path.parent / "m.ckpt.sha256.json").unlink()
    assert capsys.readouterr().err == f"{path}: no SHA-256 is on record for it; this one has {SHA256}\n"
    with pytest.raises(ValueError, match=r"m \(http.*\): not a zip archive with other\.ckpt"):
        fetch("m", entry(server, sha256=digest, member="other.ckpt"))
    for damaged in (DATA, buffer.getvalue()[:60] + b"xxxxxxxx" + buffer.getvalue()[68:]):
        server.data = damaged
        with pytest.raises(ValueError, match=r"not a zip archive with model\.ckpt"):
            fetch("m", entry(server, member="model.ckpt"))
        assert list((cache_dir() / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sha256": "0" * 64}, f"SHA-256 {SHA256}, m has {'0' * 64}"),
        ({"md5": "0" * 32}, f"MD5 {MD5}, m has {'0' * 32}"),
        ({"size": 12}, f"{len(DATA)} bytes, m has 12"),
    ],
)
def test_wrong_files_are_refused(server: Server, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch("m", entry(server, **fields))
    assert list((cache_dir() / "folder").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused(server: Server) -> None:
    path = fetch("m", entry(server, sha256=SHA256))
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"m\.ckpt: SHA-256 "):
        fetch("m", entry(server, sha256=SHA256))


def test_the_first_download_is_what_later_ones_are_compared_with(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch("m", entry(server))
    record = path.with_name("m.ckpt.sha256.json")
    assert read_json(record) == {"url": entry(server)["m"].url, "sha256": SHA256}
    capsys.readouterr()
    assert fetch("m", entry(server)) == path
    assert (capsys.readouterr().err, len(server.ranges)) == ("", 1)
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"m\.ckpt: SHA-256 \w+, the first download had {SHA256} \(.*\): delete the file to"):
        fetch("m", entry(server))
    path.unlink()
    server.data = DATA[::-1]
    with pytest.raises(ValueError, match=rf"m\.ckpt: SHA-256 \w+, the first download had {SHA256}"):
        fetch("m", entry(server))
    assert not path.exists()  # what was refused is not there for the next call
    server.data = DATA
    assert fetch("m", entry(server)).read_bytes() == DATA


@pytest.mark.parametrize("fields", [{}, {"sha256": SHA256}, {"md5": MD5}])
def test_a_pinned_digest(server: Server, fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"m\.ckpt: SHA-256 {SHA256}, --sha256 says {'0' * 64}$"):
        fetch("m", entry(server, **fields), sha256="0" * 64)
    path = fetch("m", entry(server, **fields), sha256=SHA256.upper())
    assert path.read_bytes() == DATA
    with pytest.raises(ValueError, match=r"--sha256 says 0{64}: delete the file to download it anew$"):
        fetch("m", entry(server, **fields), sha256="0" * 64)
    check_sha256(path, SHA256)
    with pytest.raises(ValueError, match=rf"^{path}: SHA-256 {SHA256}, --sha256 says {'0' * 64}$"):
        check_sha256(path, "0" * 64)
    with pytest.raises(ValueError, match=r"^--sha256 pins one file, and .* is none$"):
        check_sha256(path.parent, SHA256)


@pytest.mark.parametrize("tag", ['"2"', 'W/"2"', None])
def test_a_part_of_another_file_is_not_gone_on_with(server: Server, tag: str | None) -> None:
    """The server's file changed after the download was cut off: its ETag, or at least its size, tells."""
    server.etag, server.cuts = '"1"', [1000, *[0] * 9]
    with pytest.raises(FileNotFoundError, match="the connection was cut"):
        fetch("m", entry(server))
    part = cache_dir() / "folder" / "m.ckpt.part"
    assert part.stat().st_size == 1000
    server.etag, server.cuts, server.data = tag, [], DATA[::-1] + b"more"
    assert fetch("m", entry(server)).read_bytes() == DATA[::-1] + b"more"
    assert sorted(item.name for item in part.parent.iterdir()) == ["m.ckpt", "m.ckpt.sha256.json"]


def test_a_part_of_unknown_origin_is_not_gone_on_with(server: Server) -> None:
    part = cache_dir() / "folder" / "m.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 777)
    assert fetch("m", entry(server)).read_bytes() == DATA
    assert server.ranges == [None]


def test_a_file_of_unknown_length_and_digest_is_refused(server: Server) -> None:
    server.tells_length = False
    with pytest.raises(FileNotFoundError, match="the server does not say how long the file is"):
        fetch("m", entry(server))
    assert fetch("m", entry(server, sha256=SHA256)).read_bytes() == DATA


def test_a_file_of_another_size_is_not_transferred(server: Server) -> None:
    with pytest.raises(ValueError, match=rf"/m: {len(DATA)} bytes, m has 12$"):
        fetch("m", entry(server, size=12))
    assert not (cache_dir() / "folder" / "m.ckpt.part").exists()


def test_redirects_stay_encrypted(server: Server) -> None:
    handler, url = _SafeRedirects(), "http://127.0.0.1:1/m"
    encrypted = urllib.request.Request("https://example.org/m")
    for target in (url, "ftp://example.org/m", "file:///etc/passwd"):
        with pytest.raises(urllib.error.URLError, match=rf"it redirects to {target}, which is not encrypted"):
            handler.redirect_request(encrypted, None, 302, "", {}, target)
    assert handler.redirect_request(encrypted, None, 302, "", {}, "https://example.com/m").full_url == "https://example.com/m"
    other = entry(server)["m"].url.replace("/m", "/n")
    server.location = other
    with pytest.raises(FileNotFoundError, match="redirect"):  # to itself, until urllib gives up: redirects are followed
        fetch("m", entry(server))


def test_without_network(server: Server) -> None:
    url = "http://127.0.0.1:1/m"
    with pytest.raises(FileNotFoundError) as caught:
        fetch("m", {"m": Download(url=url, file="folder/m.ckpt")})
    line = str(caught.value)
    assert line.startswith(f"m.ckpt (m) cannot be downloaded from {url} (")
    assert line.endswith(f"): put it at {cache_dir() / 'folder' / 'm.ckpt'}, or name it with --ckpt PATH")
    assert "\n" not in line


def test_a_refusing_server(server: Server) -> None:
    server.status = 404
    with pytest.raises(FileNotFoundError, match=r"\(Not Found\)"):
        fetch("m", entry(server))
    assert len(server.ranges) == 1


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"^no published weights are named 'x': allowed are ema_diffusion_cifar10, "):
        fetch("x")


def test_the_registry_is_well_formed() -> None:
    registry = load_registry()
    assert {"ema_diffusion_cifar10", "ema_diffusion_lsun_bedroom", "ldm_cin256_v2", "sd_v1_4"} <= registry.keys()
    assert len({item.url for item in registry.values()}) == len({item.file for item in registry.values()}) == len(registry)
    for item in registry.values():
        assert item.url.startswith("https://")
        assert item.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", item.sha256)
        assert item.md5 is None or re.fullmatch(r"[0-9a-f]{32}", item.md5)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNCD_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "qncd"
