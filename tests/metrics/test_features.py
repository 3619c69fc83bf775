"""The networks: Inception against stored outputs of random weights, the classifier in the box against its stated accuracy."""

import math
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qncd.io.fashion_mnist import DEBIAN_PATH, load_fashion_mnist
from qncd.metrics.fashion_mnist_classifier import CLASSIFIER_PATH, load_classifier
from qncd.metrics.features import (
    EXTRACTORS,
    INCEPTION_FILE,
    INCEPTION_URL,
    FashionMnistFeatures,
    InceptionFeatures,
    find_inception_weights,
)
from qncd.metrics.sources import FASHION_MNIST_STATISTICS, SavedStatistics

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def random_inception_state(seed: int = 5000) -> dict[str, torch.Tensor]:
    """Random weights by the recipe behind metrics_inception.npz: one generator for each key, keys in sorted order."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            pass

    original, torch.load = torch.load, lambda *_, **__: None
    try:
        shapes = Unloaded("unloaded", ["2048"], feature_extractor_weights_path="unused").state_dict()
    finally:
        torch.load = original
    state = {}
    for i, key in enumerate(sorted(shapes)):
        value = shapes[key]
        generator = torch.Generator().manual_seed(seed + i)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(value)
        elif key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) * 0.5 + 0.75
        else:
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 4:
                state[key] = noise * math.sqrt(2 / value[0].numel())
            elif value.ndim == 2:
                state[key] = noise / math.sqrt(value.shape[1])
            else:
                state[key] = 1 + 0.1 * noise if key.endswith("bn.weight") else 0.1 * noise
    return state


def test_inception_equals_the_reference(tmp_path):
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    torch.save(random_inception_state(), path)
    count = 4
    with np.load(GOLDEN / "metrics_inception.npz") as file:
        expected = {name: file[name][:count] for name in file.files}
    extractor = InceptionFeatures(path)
    outputs = extractor(torch.from_numpy(expected["images_uint8"].transpose(0, 2, 3, 1).copy()))
    np.testing.assert_allclose(outputs["features"], expected["pool_2048"], atol=1e-4)
    np.testing.assert_allclose(outputs["logits"], expected["logits_unbiased"], atol=1e-4)
    spatial = expected["spatial_mixed6_first7_NCHW"].transpose(0, 2, 3, 1).reshape(count, 2023)
    np.testing.assert_allclose(outputs["spatial"], spatial, atol=1e-4)
    with pytest.raises(ValueError, match="expected uint8 NHWC with 3 channels"):
        extractor(torch.zeros(1, 32, 32, 1, dtype=torch.uint8))


def test_inception_refuses_a_file_of_something_else(tmp_path):
    for content in (b"", b"no weights", b"PK\x03\x04broken"):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"not the weights of Inception v3 \\({INCEPTION_FILE}\\)"):
            InceptionFeatures(path)
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not the weights of Inception v3"):
        InceptionFeatures(path)


def test_inception_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=r"other\.pth: no such file"):
        find_inception_weights(tmp_path / "other.pth")
    cached = tmp_path / "checkpoints" / INCEPTION_FILE
    with pytest.raises(FileNotFoundError) as caught:
        find_inception_weights()
    message = str(caught.value)
    assert "no network" in message and INCEPTION_URL in message and str(cached) in message and "\n" not in message
    cached.touch()
    assert find_inception_weights() == cached


def test_download_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: calls.append((args, options)))
    path = find_inception_weights()
    assert calls == [((INCEPTION_URL, str(path)), {"hash_prefix": "6726825d", "progress": False})]


def test_classifier_in_the_box_has_its_stated_accuracy():
    if not DEBIAN_PATH.is_dir():
        pytest.skip("Fashion-MNIST is not installed")
    assert CLASSIFIER_PATH.stat().st_size < 1_000_000
    network, metadata = load_classifier()
    assert float(metadata["test_accuracy"]) >= 91
    images, labels = load_fashion_mnist("test")
    outputs = [FashionMnistFeatures()(batch)["logits"] for batch in torch.from_numpy(images[:2000]).split(500)]
    accuracy = 100 * (torch.cat(outputs).argmax(1).numpy() == labels[:2000]).mean()
    assert accuracy == pytest.approx(float(metadata["test_accuracy"]), abs=2)
    assert not network.training


def test_fashion_mnist_features_have_the_shapes_of_the_statistics_in_the_box():
    statistics = SavedStatistics.open(FASHION_MNIST_STATISTICS)
    extractor = FashionMnistFeatures()
    outputs = extractor(torch.randint(0, 256, (3, 32, 32, 1), dtype=torch.uint8))
    assert statistics.count == 60000 and statistics.network == extractor.name == "fashion_mnist"
    assert outputs["features"].shape == (3, statistics.features.dimension) == (3, extractor.dimension)
    assert statistics.spatial is not None
    assert outputs["spatial"].shape == (3, statistics.spatial.dimension)
    assert outputs["logits"].shape == (3, 10)
    assert "test accuracy" in extractor.convention
    with pytest.raises(ValueError, match="images of 28x28"):
        extractor(torch.zeros(1, 28, 28, 1, dtype=torch.uint8))


def test_classifier_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        load_classifier(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not the weights of the Fashion-MNIST classifier"):
        load_classifier(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not the weights of the Fashion-MNIST classifier"):
        load_classifier(path)


def test_extractors_are_registered_under_their_names():
    assert {name: kind.name for name, kind in EXTRACTORS.items()} == {name: name for name in EXTRACTORS}
