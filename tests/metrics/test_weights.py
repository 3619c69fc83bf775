"""Where weights are looked for, and what is said when they cannot be had."""

from urllib.error import URLError

import pytest
import torch

from qncd.metrics.networks.weights import INCEPTION, LPIPS_BACKBONES, find_weights


def test_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=r"other\.pth: no such file"):
        find_weights(INCEPTION, tmp_path / "other.pth")
    cached, theirs = (tmp_path / "checkpoints" / name for name in INCEPTION.names)
    with pytest.raises(FileNotFoundError) as caught:
        find_weights(INCEPTION)
    message = str(caught.value)
    assert "no network" in message and INCEPTION.url in message and str(cached) in message and "\n" not in message
    theirs.touch()  # what pytorch-fid has downloaded serves too
    assert find_weights(INCEPTION) == theirs
    cached.touch()
    assert find_weights(INCEPTION) == cached


@pytest.mark.parametrize("file", [INCEPTION, *LPIPS_BACKBONES.values()])
def test_downloads_are_checked(tmp_path, monkeypatch, file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: calls.append((args, options)))
    path = find_weights(file)
    assert calls == [((file.url, str(path)), {"hash_prefix": file.sha256, "progress": False})]
    assert path.name.endswith(".pth") and file.sha256[:8] in path.name


def test_a_download_of_other_bytes_is_refused(tmp_path, monkeypatch):
    (tmp_path / "served.pth").write_bytes(b"other bytes")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = type(INCEPTION)("Inception v3", ("a.pth",), (tmp_path / "served.pth").as_uri(), INCEPTION.sha256)
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        find_weights(file)
    assert not (tmp_path / "hub" / "checkpoints" / "a.pth").exists()
