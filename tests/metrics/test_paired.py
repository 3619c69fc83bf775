"""SSIM against torchmetrics, LPIPS against the package with the same weights."""

import numpy as np
import pytest
import torch

from qncd.metrics.statistics.paired import Lpips, paired_ssim


def images(channels: int = 3, size: tuple[int, int] = (24, 31)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (4, *size, channels), np.uint8)
    noise = np.array([0, 5, 20, 60]).reshape(4, 1, 1, 1) * rng.normal(size=a.shape)
    return a, (a + noise).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_torchmetrics(channels):
    reference = pytest.importorskip("torchmetrics.functional").structural_similarity_index_measure
    a, b = images(channels)
    x, y = (torch.from_numpy(side).permute(0, 3, 1, 2).double() for side in (a, b))
    _, whole = reference(x, y, data_range=255.0, reduction="none", return_full_image=True)
    expected = whole[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))  # it averages over windows that reach beyond the image too
    ours = paired_ssim(a, b)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert ours[0] == pytest.approx(1) and (np.diff(ours) < 0).all()


def test_ssim_refuses_small_images():
    with pytest.raises(ValueError, match="11x11 or larger"):
        paired_ssim(*(np.zeros((1, 10, 20, 3), np.uint8),) * 2)


@pytest.mark.parametrize("name", ["alex", "vgg"])
@pytest.mark.filterwarnings("ignore")
def test_lpips_equals_the_package(tmp_path, name):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    reference = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    state = {f"features.{key.split('.', 1)[1]}": value for key, value in reference.net.state_dict().items()}
    path = tmp_path / "backbone.pth"
    torch.save({**state, "classifier.6.weight": torch.zeros(3)}, path)
    a, b = images(size=(64, 64))
    x, y = (torch.from_numpy(side).permute(0, 3, 1, 2).float() / 127.5 - 1 for side in (a, b))
    ours = Lpips(path)(a, b)
    np.testing.assert_allclose(ours, reference(x, y).detach().flatten(), rtol=1e-4, atol=1e-6)
    assert ours[0] == pytest.approx(0, abs=1e-6) and ours[3] > 0


def test_lpips_refuses_other_weights(tmp_path):
    pytest.importorskip("lpips")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of AlexNet or VGG16 of torchvision: no features"):
        Lpips(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Lpips(tmp_path / "none.pth")
