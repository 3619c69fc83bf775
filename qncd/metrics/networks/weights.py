"""Files of weights: looked for where they were named, in torch hub's cache, or downloaded there with a checked SHA-256."""

from __future__ import annotations

import hashlib
import io
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 1 << 20


@dataclass(frozen=True)
class WeightsFile:
    """One published file.

    Attributes:
        what: what it holds, for error messages.
        names: file names under which it lies in torch hub's cache; the first is the one it is downloaded to.
        url: where it is.
        sha256: of the whole file, or its first digits where no more is published.
    """

    what: str
    names: tuple[str, ...]
    url: str
    sha256: str


# torch-fidelity and pytorch-fid publish the same bytes under two names.
INCEPTION = WeightsFile(
    "Inception v3",
    ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
LPIPS_BACKBONES = {
    "alex": WeightsFile(
        "AlexNet (for LPIPS)",
        ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
    ),
    "vgg": WeightsFile(
        "VGG16 (for LPIPS)", ("vgg16-397923af.pth",), "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"
    ),
}


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_weights(file: WeightsFile) -> Path | None:
    """The file in torch hub's cache, None where it is not there."""
    return next((_cache() / name for name in file.names if (_cache() / name).is_file()), None)


def find_weights(file: WeightsFile, named: Path | None = None, option: str = "--weights") -> Path:
    """The file: `named`, one in torch hub's cache, or a download into that cache whose SHA-256 is checked.

    Args:
        file: what is looked for.
        named: a path that the user gave; taken as it is.
        option: the flag that takes such a path, for the error.

    Raises:
        FileNotFoundError: `named` does not exist, or nothing is in the cache and the download fails; the one line names
            the file, the URL and the place.
    """
    if named is not None:
        if not named.is_file():
            raise FileNotFoundError(f"{named}: no such file (weights of {file.what}, {file.url})")
        return named
    if found := cached_weights(file):
        return found
    folder = _cache()
    target = folder / file.names[0]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none, and a silent firewall would hold it for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(target), hash_prefix=file.sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no network or a refused request; another checksum
        raise FileNotFoundError(
            f"the weights of {file.what} are missing and could not be downloaded ({error}): get {file.names[0]} from "
            f"{file.url} and put it at {target}, or name it with {option}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return target


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def load_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """A state dict; nothing but plain tensors is unpickled.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
            raise ValueError("no dictionary of tensors")
    except Exception as error:  # what torch.load raises on a broken file depends on where it breaks
        raise ValueError(f"{path}: not the weights of {what}: {' '.join(str(error).split())[:160]}") from None
    return state


def to_stream(state: dict[str, torch.Tensor]) -> io.BytesIO:
    """The state dict as a file in memory, for constructors that load from a file without restrictions."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream
