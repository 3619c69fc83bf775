"""Activations of one block over a calibration set: in memory, or in a file past a budget."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # members of config.CACHES


class ActivationStore:
    """Rows of one activation, appended batch by batch, read in any order.

    Args:
        rows: how many there will be.
        dtype: in which they are kept; floating point ones are read back as float32.
        folder: where a file holds them; None for memory.
    """

    def __init__(self, rows: int, dtype: torch.dtype = torch.float16, folder: Path | None = None) -> None:
        self.rows, self.dtype, self.folder = rows, dtype, folder
        self.data: Tensor | None = None
        self.filled = 0

    def append(self, batch: Tensor) -> None:
        """Add rows (n, ...). Raises ValueError for more rows than announced, or values that the dtype cannot hold."""
        if self.data is None:
            self.data = self._allocate((self.rows, *batch.shape[1:]))
        if self.filled + len(batch) > self.rows:
            raise ValueError(f"{self.filled + len(batch)} rows for a store of {self.rows}")
        kept = batch.detach().to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            if not bool(torch.isfinite(batch).all()):
                raise ValueError("an activation is NaN or infinite")
            largest, name = float(batch.abs().max()), next(n for n, dtype in DTYPES.items() if dtype == self.dtype)
            limit = torch.finfo(self.dtype).max
            raise ValueError(
                f"an activation of {largest:.3g} is too large for a cache in {name} (up to {limit:.6g}): allowed is bf16"
            )
        self.data[self.filled : self.filled + len(batch)] = kept.cpu()
        self.filled += len(batch)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (n,) int64 -> (n, ...) float32."""
        return self.batch(rows, "cpu")

    def batch(self, rows: Tensor, device: torch.device | str) -> Tensor:
        """Rows (n,) int64 -> (n, ...) on `device`; they travel in the dtype that they are kept in."""
        assert self.data is not None
        batch = self.data[rows].to(device)
        return batch.float() if batch.is_floating_point() else batch

    def _allocate(self, shape: Sequence[int]) -> Tensor:
        if self.folder is None:
            return torch.empty(tuple(shape), dtype=self.dtype)
        count = int(torch.Size(shape).numel())
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".activations") as file:
            # The mapping keeps the file's space; without a name it goes when the process ends, however it ends.
            return torch.from_file(file.name, shared=True, size=count, dtype=self.dtype).view(tuple(shape))


class CallStore:
    """What a module is called with, over a calibration set: its tensors row by row, everything else as it is.

    Args:
        rows: of all batches together.
        spill: (bytes needed) -> folder for files, or None for memory.
        dtype: in which floating point tensors are kept; others keep their own.
    """

    def __init__(self, rows: int, spill: Callable[[int], Path | None], dtype: torch.dtype = torch.float16) -> None:
        self.rows, self.spill, self.dtype = rows, spill, dtype
        self.stores: dict[int, ActivationStore] = {}  # by the place among all arguments, those inside of others included
        self.plain: dict[int, Any] = {}
        self.structure: TreeSpec | None = None

    def append(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Add one batch's arguments. Tensors whose first dimension is not that of the first one are kept once, as they are."""
        values, self.structure = tree_flatten((tuple(args), kwargs))
        size = next(len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0)
        for place, value in enumerate(values):
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size:
                if place not in self.stores:
                    dtype = self.dtype if value.is_floating_point() else value.dtype
                    folder = self.spill(dtype.itemsize * self.rows * value[0].numel())
                    self.stores[place] = ActivationStore(self.rows, dtype, folder)
                self.stores[place].append(value)
            else:
                self.plain[place] = value

    def batch(self, rows: Tensor, device: torch.device | str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for some rows on `device`, floating point ones in float32."""
        assert self.structure is not None
        values = self.plain | {place: store.batch(rows, device) for place, store in self.stores.items()}
        args, kwargs = tree_unflatten([values[place] for place in range(len(values))], self.structure)
        return args, kwargs
