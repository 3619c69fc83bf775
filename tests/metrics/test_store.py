"""The cache of features: found by content, rebuilt when damaged, bounded; images read ahead in order and in little memory."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qncd.metrics.networks.extraction import extract, rows_to_statistics
from qncd.metrics.networks.features import FashionMnistFeatures
from qncd.metrics.networks.prefetch import LOOKAHEAD, prepared_batches
from qncd.metrics.networks.store import FeatureCache, FeatureWriter, Rows
from qncd.metrics.report.sources import open_source

ROOT = Path(__file__).parents[2]


class Counting(FashionMnistFeatures):
    """Counts the images that reach the network."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return super().__call__(images)


def test_features_are_found_by_content(tmp_path, make_images):
    make_images(tmp_path / "a", 7, 1)
    cache, network = FeatureCache(tmp_path / "cache"), Counting()
    first = extract(open_source(tmp_path / "a"), network, cache, 3)
    assert network.seen == 7 and first.count == 7 and set(first.layers) == {"features", "spatial", "logits"}
    (tmp_path / "a").rename(tmp_path / "moved")
    for i, path in enumerate(sorted((tmp_path / "moved").iterdir())):
        path.rename(path.with_name(f"{i}.png"))
    again = extract(open_source(tmp_path / "moved"), network, cache, 5)
    assert network.seen == 7
    torch.testing.assert_close(again.layers["features"].read(), first.layers["features"].read(), rtol=0, atol=0)
    make_images(tmp_path / "moved", 1, 2)
    assert extract(open_source(tmp_path / "moved"), network, cache, 5).count == 8 and network.seen == 15
    network.identity += " other weights"
    extract(open_source(tmp_path / "moved"), network, cache, 5)
    assert network.seen == 23
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_damaged_entry_is_made_again(tmp_path, make_images, caplog):
    make_images(tmp_path / "a", 4, 1)
    cache, network = FeatureCache(tmp_path / "cache"), Counting()
    entry = extract(open_source(tmp_path / "a"), network, cache).folder
    nan, whole = np.array([np.nan], np.float32).tobytes(), (entry / "features.npy").read_bytes()
    damages = {
        "features.npy": [whole[:-5], b"no array", whole.replace(b"<f4", b"|O4"), whole[:-4] + nan],
        "entry.json": [b"", b"[]", b'{"count": 4, "layers": ["../x"]}', b'{"count": "4", "layers": ["logits"]}', b"[" * 5000],
        "logits.npy": [None],
    }
    for name, contents in damages.items():
        for content in contents:
            (entry / name).unlink() if content is None else (entry / name).write_bytes(content)
            before = network.seen
            caplog.clear()
            assert extract(open_source(tmp_path / "a"), network, cache).count == 4 and network.seen == before + 4, content
            (told,) = caplog.messages
            assert told.startswith(f"damaged features in the cache, computed again: {entry}") and "\n" not in told


def test_without_a_cache_nothing_stays(tmp_path, make_images):
    make_images(tmp_path / "a", 4, 1)
    found = extract(open_source(tmp_path / "a"), FashionMnistFeatures(), FeatureCache(None))
    folder, rows = found.folder, found.layers["features"]
    del found
    assert rows.read().shape == (4, 128)  # rows keep their folder
    del rows
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, make_images, caplog):
    make_images(tmp_path / "a", 4, 1)
    (tmp_path / "file").write_text("")
    assert extract(open_source(tmp_path / "a"), FashionMnistFeatures(), FeatureCache(tmp_path / "file" / "cache")).count == 4
    assert [message.partition(":")[0] for message in caplog.messages] == ["no cache of features"]


def test_the_cache_is_bounded(tmp_path, make_images):
    make_images(tmp_path / "a", 4, 1)
    network = FashionMnistFeatures()
    size = None
    for number in range(4):
        network.identity = str(number)
        cache = FeatureCache(tmp_path / "cache", limit=10**9 if size is None else 2 * size + 100)
        entry = extract(open_source(tmp_path / "a"), network, cache).folder
        size = size or sum(path.stat().st_size for path in entry.iterdir())
        time.sleep(0.02)
    kept = {json.loads((path / "entry.json").read_text())["identity"] for path in (tmp_path / "cache").iterdir()}
    assert kept == {"2", "3"}


def test_an_error_leaves_nothing_behind(tmp_path, make_images):
    make_images(tmp_path / "a", 9, 1)
    source = open_source(tmp_path / "a")  # reads the headers
    (tmp_path / "a" / "000007_seed1241.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"000007_seed1241\.png: not an image, or damaged"):
        extract(source, FashionMnistFeatures(), FeatureCache(tmp_path / "cache"), 4)
    assert not list((tmp_path / "cache").iterdir())


def test_rows_are_read_in_blocks_and_by_index(tmp_path):
    values = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    writer = FeatureWriter(tmp_path, 11)
    for part in values.split(4):
        writer.append({"a": part})
    writer.close()
    rows = Rows(tmp_path / "a.npy")
    assert (rows.count, rows.dimension) == (11, 3)
    torch.testing.assert_close(torch.cat(list(rows.blocks(2, 9, 3))), values[2:9])
    torch.testing.assert_close(rows.take(np.array([5, 0, 5])), values[[5, 0, 5]])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), values)


def test_a_full_disk_is_one_line(tmp_path, make_images, monkeypatch):
    make_images(tmp_path / "a", 4, 1)

    def full(stream, header):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(ValueError, match=r"the features cannot be written \(No space left on device\)"):
        extract(open_source(tmp_path / "a"), FashionMnistFeatures(), FeatureCache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_run_left_in_the_cache_goes(tmp_path, make_images):
    make_images(tmp_path / "a", 4, 1)
    code = "import os, sys; from qncd.io.files import scratch_folder as s; kept = s(sys.argv[1]); kept.__enter__(); os._exit(9)"
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len(list((tmp_path / "cache").iterdir())) == 1
    entry = extract(open_source(tmp_path / "a"), FashionMnistFeatures(), FeatureCache(tmp_path / "cache")).folder
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_statistics_of_many_rows_are_kept(tmp_path, caplog):
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    writer = FeatureWriter(tmp_path, 50)
    writer.append({"a": values})
    writer.close()
    first = rows_to_statistics(Rows(tmp_path / "a.npy"))
    np.testing.assert_allclose(first.sigma, np.cov(values.double().numpy(), rowvar=False))
    assert (tmp_path / "a.statistics.npz").is_file()
    again = rows_to_statistics(Rows(tmp_path / "a.npy"))
    np.testing.assert_array_equal(again.sigma, first.sigma)
    assert again.count == 50 and not caplog.messages
    np.savez(tmp_path / "other.npz", mu=first.mu[:3], sigma=first.sigma[:3, :3])
    for content in (b"broken", (tmp_path / "other.npz").read_bytes()):
        (tmp_path / "a.statistics.npz").write_bytes(content)
        caplog.clear()
        np.testing.assert_array_equal(rows_to_statistics(Rows(tmp_path / "a.npy")).sigma, first.sigma)
        assert [message.partition(":")[0] for message in caplog.messages] == ["damaged statistics in the cache, computed again"]


def test_images_come_in_order_and_not_all_at_once(tmp_path, make_images):
    images = make_images(tmp_path / "a", 40, 1)
    lock, loaded = threading.Lock(), 0

    def prepare(image: np.ndarray) -> np.ndarray:
        nonlocal loaded
        with lock:
            loaded += 1
        return image

    batches = prepared_batches(open_source(tmp_path / "a"), 4, 1, prepare)
    first = next(batches)
    time.sleep(0.3)
    assert 4 < loaded <= 4 * (LOOKAHEAD + 2)  # the next batches are read while this one is used, and no more
    rest = np.concatenate([first, *batches])
    np.testing.assert_array_equal(rest[..., 0], images)


@pytest.mark.parametrize("kind", ["folder", "array"])
def test_shards_share_the_batches(tmp_path, make_images, kind):
    images = make_images(tmp_path / "a", 11, 1)
    np.savez(tmp_path / "a.npz", images[..., None])
    source = open_source(tmp_path / ("a" if kind == "folder" else "a.npz"))
    shards = [list(prepared_batches(source, 2, 1, shard=(rank, 3))) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 2]
    ordered = [shards[i % 3][i // 3] for i in range(6)]
    np.testing.assert_array_equal(np.concatenate(ordered)[..., 0], images)
