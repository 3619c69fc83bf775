"""Weights of a small network of this package from its safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from qncd.io.files import reading, regular_file

Network = TypeVar("Network", bound=nn.Module)


def load_weights(network: Network, path: Path, name: str) -> tuple[Network, dict[str, str]]:
    """The network with the file's weights, in evaluation mode, in float32, without gradients, and the file's metadata.

    Args:
        name: of the network, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, or not of this network.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file (weights of the {name})")
    with reading(path, f"the weights of the {name}"):
        with safe_open(regular_file(path), framework="pt") as stream:
            metadata = stream.metadata() or {}
            names = stream.keys()
            state = {name: stream.get_tensor(name) for name in names}
        network.load_state_dict(state)
    return network.eval().requires_grad_(False), metadata
