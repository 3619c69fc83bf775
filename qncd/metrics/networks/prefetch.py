"""Reading images beside the network: threads decode the next batches while the current one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from qncd.metrics.report.sources import THREADS, ImageSource, Loader

LOOKAHEAD = 2  # batches in memory beyond the current one


def prepared_batches(
    source: ImageSource,
    batch_size: int,
    channels: int,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[np.ndarray]:
    """The images of a source in order, stacked; at most LOOKAHEAD batches are read ahead.

    Args:
        source: images.
        batch_size: images in a batch; the last one may be shorter.
        channels: 1 or 3.
        prepare: what is done to each image by the thread that decoded it; None for nothing.
        shard: (r, n): the batches r, r + n, r + 2 n, ... only.

    Raises:
        ValueError: an image cannot be read; after the batches before it.
    """
    batches = source.loaders(batch_size, channels, shard)

    def load(loader: Loader) -> np.ndarray:
        return loader() if prepare is None else prepare(loader())

    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as reader:
        pending: deque[Future[list[Future[np.ndarray]] | None]] = deque()

        def submit() -> list[Future[np.ndarray]] | None:
            loaders = next(batches, None)  # reads the file of an ImageArray
            return None if loaders is None else [pool.submit(load, loader) for loader in loaders]

        try:
            for _ in range(LOOKAHEAD + 1):
                pending.append(reader.submit(submit))
            while (futures := pending.popleft().result()) is not None:
                batch = np.stack([future.result() for future in futures])
                pending.append(reader.submit(submit))
                yield batch
        finally:
            reader.shutdown(wait=True, cancel_futures=True)  # first: it hands work to the other pool
            pool.shutdown(wait=False, cancel_futures=True)
