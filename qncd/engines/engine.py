"""Engines: what runs a calibrated network instead of torch.

To add an engine, write a class with the attributes and methods of `Engine` in a new file, and add a line to
`qncd.engines.registry.ENGINES`. The file imports the packages that the engine needs where it uses them, because `check` has
to say that they are not there. An engine that runs the exported ONNX model derives from `qncd.engines.onnx.engine.OnnxEngine`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qncd.engines.network import EngineNetwork
from qncd.engines.registry import ENGINES, TORCH, engine_names
from qncd.models.network import Network, network_of
from qncd.recipe import QuantConfig


class Engine(Protocol):
    """What is known of an engine.

    Attributes:
        name: by which it is chosen.
        file: whether it runs an exported file.
        tokens: whether it has kernels for scales of tokens, which are found at run time.
        precisions: in which it can compute what is not quantized.
    """

    name: str
    file: bool
    tokens: bool
    precisions: Sequence[str]

    def check(self, precision: str) -> None:
        """Raise ValueError, in one line, where the packages or the device that it needs are not there."""

    def open(self, network: Network, folder: Path | None, *, precision: str, threads: int | None) -> EngineNetwork:
        """The network on this engine.

        Args:
            network: calibrated; it stays as it is.
            folder: holds the exported file; None for an engine that runs none.
            precision: one of `precisions`.
            threads: that it may use on a CPU; None for torch's number.

        Raises:
            ValueError: the engine refuses the network.
            FileNotFoundError: there is no such file.
        """


def engine_of(name: str) -> Engine:
    """The engine of a name. Raises ValueError for one that is not in the registry."""
    if name not in ENGINES:
        raise ValueError(f"backend {name!r}: allowed are {', '.join(engine_names())}")
    room, _, kind = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(room), kind)()
    return engine


def file_engines() -> list[str]:
    """Names of the engines that run an exported file."""
    return [name for name in ENGINES if engine_of(name).file]


def check_engine(name: str, precision: str = "fp32") -> None:
    """Raise ValueError where an engine, or what it needs here, is not there or does not have the precision; torch always is."""
    allowed = ("fp32",) if name == TORCH else engine_of(name).precisions
    if precision not in allowed:
        others = [other for other in ENGINES if precision in engine_of(other).precisions]
        more = f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} {precision}" if others else ""
        raise ValueError(f"engine precision {precision}: allowed with backend {name} is {', '.join(allowed)}{more}")
    if name != TORCH:
        engine_of(name).check(precision)


def open_engine(
    network: Network | nn.Module, folder: Path | None, name: str, precision: str = "fp32", threads: int | None = None
) -> EngineNetwork:
    """A calibrated network on an engine, to be called instead of the module that it comes from, which stays as it is.

    Args:
        folder: holds the exported file; not needed by an engine that runs none.
        name: of the engine.
        precision: of what is not quantized.
        threads: default: torch's.

    Raises:
        ValueError: what the engine needs is not there, or it refuses the network.
        FileNotFoundError: there is no exported file.
    """
    check_engine(name, precision)
    return engine_of(name).open(network_of(network), folder, precision=precision, threads=threads)


def export(
    network: Network | nn.Module,
    folder: Path,
    config: QuantConfig | None,
    base_hash: str = "",
    settings: dict[str, Any] | None = None,
    shape: Sequence[int] | None = None,
) -> Path:
    """Write the file that all file engines run; see `qncd.engines.onnx.model.export_network`."""
    from qncd.engines.onnx.model import export_network

    return export_network(network, folder, config, base_hash, settings, shape)
