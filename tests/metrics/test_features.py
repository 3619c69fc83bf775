"""The networks: Inception against stored outputs of random weights, the classifier in the box against its stated accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qncd.io.fashion_mnist import DEBIAN_PATH, load_fashion_mnist
from qncd.metrics.networks.fashion_mnist_classifier import CLASSIFIER_PATH, load_classifier
from qncd.metrics.networks.features import EXTRACTORS, FashionMnistFeatures, InceptionFeatures
from qncd.metrics.networks.weights import INCEPTION
from qncd.metrics.report.conventions import CONVENTIONS, DEFAULT_CONVENTION, METRICS, Convention
from qncd.metrics.report.sources import FASHION_MNIST_STATISTICS
from qncd.metrics.statistics.saved_statistics import SavedStatistics

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_inception_equals_the_reference(inception_weights):
    count = 4
    with np.load(GOLDEN / "metrics_inception.npz") as file:
        expected = {name: file[name][:count] for name in file.files}
    extractor = InceptionFeatures(inception_weights)
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
        with pytest.raises(ValueError, match=f"not the weights of Inception v3 \\({INCEPTION.names[0]}\\)"):
            InceptionFeatures(path)
    for other in ({"conv.weight": torch.zeros(3)}, {"a": {"b": torch.zeros(3)}}, [torch.zeros(3)]):
        torch.save(other, path)
        with pytest.raises(ValueError, match="not the weights of Inception v3"):
            InceptionFeatures(path)


def test_identity_tells_convention_and_weights(inception_weights, tmp_path):
    preprocessings = {name: preset.preprocessing for name, preset in CONVENTIONS.items()}
    assert preprocessings["adm"] == preprocessings["torch-fidelity"] and len(set(preprocessings.values())) == 3
    mine = InceptionFeatures(inception_weights, convention=CONVENTIONS["clean-fid"]).identity
    assert preprocessings["clean-fid"] in mine
    state = torch.load(inception_weights, weights_only=True)
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    assert InceptionFeatures(tmp_path / "other.pth", convention=CONVENTIONS["clean-fid"]).identity != mine


def test_conventions_are_checked():
    assert DEFAULT_CONVENTION in CONVENTIONS and all(set(preset.metrics) <= set(METRICS) for preset in CONVENTIONS.values())
    with pytest.raises(ValueError, match="convention mine: unknown nearest"):
        Convention("mine", "nearest", "128", ("fid",), None, None, "nobody")


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
