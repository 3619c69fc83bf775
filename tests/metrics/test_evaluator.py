"""The evaluator as a command: every source, every edge case, one line and exit status 2 where there is no right value."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluator
from qncd.app.commands import evaluate
from qncd.metrics.networks.features import EXTRACTORS, FashionMnistFeatures
from qncd.metrics.networks.text import ANTONYMS
from qncd.metrics.report.sources import DATASET_NAMES, FASHION_MNIST_STATISTICS
from qncd.metrics.report.table import Score
from qncd.metrics.statistics.moments import features_to_statistics, frechet_distance, inception_score

ROOT = Path(__file__).parents[2]
COUNT = 12


@pytest.fixture
def folders(tmp_path, make_images):
    make_images(tmp_path / "real", seed=1)
    make_images(tmp_path / "synth", seed=2)
    return tmp_path / "real", tmp_path / "synth"


def call(capsys, *arguments: object, features: str = "fashion_mnist") -> dict:
    """The numbers of a call that succeeds."""
    evaluator.main([*map(str, arguments), "--features", features, "--json", "-"])
    return json.loads(capsys.readouterr().out)


def fail(capsys, *arguments: object, features: str = "fashion_mnist") -> str:
    """The one line of a call that is refused."""
    with pytest.raises(SystemExit) as stopped:
        evaluator.main([*map(str, arguments), "--features", features])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert ": error: " in captured.err and captured.err.count("\n") == 1
    return captured.err


def test_subprocess_prints_every_number_with_its_convention(folders, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, ROOT / "evaluator.py", *folders, "--features", "fashion_mnist", "--precision_recall"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "scores.json"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    labels = ["FID", "sFID", "IS", "IS", "precision", "recall", "PSNR", "PSNR(MSE)", "PSNR(5%)", "PSNR<20"]
    labels += ["SSIM", "MSE"]
    rows, remarks = lines[: len(labels)], lines[len(labels) + 1 :]
    assert [line.split()[0] for line in rows] == labels and lines[len(labels)] == "" and max(map(len, rows)) < 40
    assert [line.split(":")[0] for line in remarks[:2]] == ["FID", "sFID"]
    assert all("12 real against 12 synthetic images" in line for line in remarks[:2])
    assert "10 contiguous splits" in remarks[2]
    assert len([line for line in remarks if "test accuracy" in line and "no resize" in line]) == 1  # once for all
    assert "biased upwards at 12 images (fewer than 2048)" in lines[-2]
    assert "no LPIPS: --metrics lpips downloads alexnet" in lines[-1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores['fid']:.6g}" in lines[0] and scores["pairs"] == COUNT


def test_subprocess_error_is_one_line_and_debug_shows_the_traceback(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, ROOT / "evaluator.py", "nowhere", "nowhere", "--features", "fashion_mnist"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("evaluator.py: error: nowhere: no such file or folder, and no data set of that name (known: ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr and "FileNotFoundError: nowhere" in done.stderr


def test_help_names_all_extractors():
    done = subprocess.run([sys.executable, ROOT / "evaluator.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and set(evaluate.FEATURES) == set(EXTRACTORS) and set(evaluate.IQA) == set(ANTONYMS)
    assert all(name in done.stdout for name in EXTRACTORS)


def test_numbers_equal_the_functions(capsys, tmp_path, make_images):
    real, synth = (make_images(tmp_path / name, COUNT, seed) for name, seed in (("a", 1), ("b", 2)))
    scores = call(capsys, tmp_path / "a", tmp_path / "b", "--batch_size", 5, "--is_splits", 3)
    outputs = [FashionMnistFeatures()(torch.from_numpy(images[..., None])) for images in (real, synth)]
    for key, layer in (("fid", "features"), ("sfid", "spatial")):
        statistics = [features_to_statistics(output[layer]) for output in outputs]
        assert scores[key] == pytest.approx(frechet_distance(*statistics), rel=1e-4)
    assert scores["inception_score_mean"] == pytest.approx(inception_score(outputs[1]["logits"], 3).mean, rel=1e-5)
    error = ((real.astype(float) - synth) ** 2).mean((1, 2))
    assert scores["mse"] == pytest.approx(error.mean())
    assert scores["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean())


def test_equal_folders(capsys, folders):
    scores = call(capsys, folders[0], folders[0])
    assert scores["fid"] == pytest.approx(0, abs=1e-6) and scores["mse"] == 0 and scores["psnr"] == "inf"


def test_nested_folders_and_other_formats(capsys, tmp_path, make_images):
    images = make_images(tmp_path / "flat")
    for i, image in enumerate(images):
        folder = tmp_path / "nested" / str(i % 3) / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.WEBP", lossless=True)
    (tmp_path / "nested" / "._0.png").write_bytes(b"left by another system")
    (tmp_path / "nested" / "readme.txt").write_text("no image")
    scores = call(capsys, tmp_path / "flat", tmp_path / "nested")
    assert scores["count_synthetic"] == COUNT and scores["fid"] == pytest.approx(0, abs=1e-6)
    assert scores["psnr"] is None and scores["pairs"] == 0


def test_arrays_statistics_and_the_name_in_the_box(capsys, folders, tmp_path):
    images = np.stack([np.array(Image.open(path)) for path in sorted(folders[1].iterdir())])
    np.savez(tmp_path / "synth.npz", images[..., None].repeat(3, -1))  # ADM's files hold RGB
    np.savez_compressed(tmp_path / "compressed.npz", images[..., None])
    from_folders = call(capsys, *folders, "--save_statistics", tmp_path / "real.npz")
    for real in (folders[0], tmp_path / "real.npz"):
        for synth in ("synth.npz", "compressed.npz"):
            scores = call(capsys, real, tmp_path / synth, "--batch_size", 5)
            for key in ("fid", "sfid", "inception_score_mean"):
                assert scores[key] == pytest.approx(from_folders[key], rel=1e-4)
            assert (scores["count_real"], scores["count_synthetic"]) == (COUNT, COUNT)
    both = call(capsys, tmp_path / "real.npz", tmp_path / "real.npz")
    assert both["fid"] == pytest.approx(0, abs=1e-6) and both["inception_score_mean"] is None
    assert any("no inception score" in note for note in both["notes"])
    assert call(capsys, "fashion_mnist", folders[1])["count_real"] == 60000
    # ADM's reference files hold images and statistics: statistics as REAL, images as SYNTH.
    with np.load(tmp_path / "real.npz") as file:
        np.savez(tmp_path / "both.npz", arr_0=images[..., None], mu=file["mu"], sigma=file["sigma"])
    scores = call(capsys, tmp_path / "both.npz", tmp_path / "both.npz")
    assert scores["fid"] == pytest.approx(from_folders["fid"], rel=1e-4)
    assert scores["count_real"] is None and scores["sfid"] is None


def test_grey_and_rgb_count_as_the_same_where_channels_are_equal(capsys, tmp_path, make_images):
    images = make_images(tmp_path / "grey")
    for mode in ("RGB", "RGBA", "LA", "P"):
        folder = tmp_path / mode
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).convert(mode).save(folder / f"{i:06d}_seed{1234 + i}.png")
        scores = call(capsys, tmp_path / "grey", folder)
        assert scores["mse"] == 0 and scores["fid"] == pytest.approx(0, abs=1e-6), mode


def test_colour_is_refused_for_grey_features(capsys, folders, tmp_path, make_images):
    make_images(tmp_path / "colour", shape=(32, 32, 3))
    assert "000000_seed1234.png: a colour image, these features take grey ones" in fail(capsys, tmp_path / "colour", folders[1])


def test_paths_that_are_no_text_are_printed(capsys, folders):
    odd = folders[1].with_name("synth\udcff")
    folders[1].rename(odd)
    (odd / "notes.txt").write_text("")
    evaluator.main([str(folders[0]), str(odd), "--features", "fashion_mnist", "--metrics", "psnr", "--compare", str(odd)])
    printed = capsys.readouterr().out
    assert f"baseline {folders[1]}\\udcff:" in printed and f"note: {folders[1]}\\udcff: 1 file of another kind" in printed


def test_what_is_left_out_is_told(capsys, folders):
    (folders[1] / "latest").symlink_to(".")
    (folders[1] / "notes.txt").write_text("")
    scores = call(capsys, *folders)
    assert scores["count_synthetic"] == COUNT and scores["pairs"] == COUNT
    expected = "1 file of another kind is no image: .txt 1; 1 link to folders that are read anyway or lie above left out"
    assert f"{folders[1]}: {expected}" in scores["notes"]


def test_pairs_are_matched_by_path_and_suffix(capsys, tmp_path, make_images):
    images = make_images(tmp_path / "a", 4)
    for name in ("b", "c", "d"):
        for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
            place = tmp_path / name / {"b": f"{i}/x.png", "c": f"{3 - i}/x.png", "d": f"{i}/x.bmp"}[name]
            place.parent.mkdir(parents=True)
            Image.open(path).save(place)
    error = np.square(images.astype(float) - images[::-1]).mean()
    assert call(capsys, tmp_path / "b", tmp_path / "c", "--metrics", "psnr")["mse"] == pytest.approx(error)
    message = fail(capsys, tmp_path / "b", tmp_path / "d", "--metrics", "psnr")
    assert f"{tmp_path}/d: no paired figures: 0 names of 4 and 4 are the same, not all" in message
    np.savez(tmp_path / "b.npz", images[..., None])
    message = fail(capsys, tmp_path / "b", tmp_path / "b.npz", "--metrics", "fid", "ssim")
    assert f"{tmp_path}/b.npz: no paired figures: they need two folders with the same file names" in message


def test_a_damaged_image_is_named_where_only_pairs_are_wanted(capsys, folders):
    path = folders[1] / "000005_seed1239.png"
    path.write_bytes(path.read_bytes()[:-300])
    assert f"{path}: not an image, or damaged" in fail(capsys, *folders, "--metrics", "psnr")


def test_transparency_and_16_bit_are_refused(capsys, folders, tmp_path, make_images):
    make_images(tmp_path / "alpha", shape=(32, 32, 4))
    assert "000000_seed1234.png: transparent pixels" in fail(capsys, tmp_path / "alpha", folders[1])
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep" / "a.png")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep" / "b.png")
    assert "only 8-bit images are read" in fail(capsys, tmp_path / "deep", folders[1])


def test_corrupt_images_are_named(capsys, folders):
    path = folders[1] / "000005_seed1239.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2], whole[:60] + bytes(40) + whole[100:]):
        path.write_bytes(content)
        assert f"{path}: not an image, or damaged" in fail(capsys, *folders)


def test_missing_empty_and_mixed(capsys, folders, tmp_path, make_images):
    assert "nowhere: no such file or folder" in fail(capsys, tmp_path / "nowhere", folders[1])
    (tmp_path / "empty").mkdir()
    assert "empty: no images (.bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp)" in fail(
        capsys, folders[0], tmp_path / "empty"
    )
    Image.new("L", (32, 48)).save(folders[1] / "odd.png")
    message = fail(capsys, *folders)
    assert "000000_seed1234.png is 32x32, odd.png is 32x48" in message
    make_images(tmp_path / "large", shape=(64, 48))
    assert "large: images of 48x64: the Fashion-MNIST features take 32x32" in fail(capsys, tmp_path / "large", folders[0])


def test_one_image_still_has_paired_figures(capsys, tmp_path):
    for name, value in (("a", 100), ("b", 110)):
        (tmp_path / name).mkdir()
        Image.new("L", (32, 32), value).save(tmp_path / name / "only.png")
    scores = call(capsys, tmp_path / "a", tmp_path / "b")
    assert scores["mse"] == 100 and scores["psnr"] == pytest.approx(10 * math.log10(255**2 / 100))
    assert scores["fid"] is None and scores["inception_score_mean"] is None
    assert any("no FID: a covariance needs at least 2 images" in note for note in scores["notes"])
    (tmp_path / "b" / "only.png").rename(tmp_path / "b" / "other.png")
    assert "a: 1 image: FID needs at least 2" in fail(capsys, tmp_path / "a", tmp_path / "b")


def test_names_that_agree_in_part_give_a_note(capsys, folders):
    (folders[1] / "000000_seed1234.png").rename(folders[1] / "000000_seed9999.png")
    scores = call(capsys, *folders)
    assert scores["psnr"] is None and any("11 names of 12 and 12 are the same" in note for note in scores["notes"])


def test_statistics_that_do_not_fit(capsys, folders, tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    assert f"{path}: statistics of 2048 dimensions, the features fashion_mnist have 128" in fail(capsys, path, folders[1])
    np.savez(path, mu=np.zeros(128), sigma=np.eye(128), mu_s=np.zeros(7), sigma_s=np.eye(7))
    assert f"{path}: sFID: statistics of 7 and of 256 dimensions" in fail(capsys, path, folders[1])
    np.savez(path, mu=np.full(128, np.nan), sigma=np.eye(128))
    assert f"{path}: no usable statistics: the statistics hold NaN" in fail(capsys, path, folders[1])
    np.savez(path, mu=np.zeros(128))
    assert f"{path}: statistics without the array 'sigma'" in fail(capsys, path, folders[1])
    np.savez(path, other=np.zeros(3))
    assert "no images (arr_0) and no statistics (mu, sigma)" in fail(capsys, path, folders[1])
    np.savez(path, arr_0=np.zeros((4, 32, 32, 1), np.float32))
    assert f"error: {path}: arr_0 is float32" in fail(capsys, folders[0], path)
    path.write_bytes(b"no archive")
    assert f"{path}: not a folder of images or a .npz file, or damaged" in fail(capsys, path, folders[1])
    message = fail(capsys, FASHION_MNIST_STATISTICS, folders[1], features="inception")
    assert "statistics of the features fashion_mnist, not inception" in message


@pytest.mark.parametrize("levels", [2, 256])  # bits flipped in compressed data, or in data that could not be compressed
def test_damaged_archives_are_refused(capsys, folders, tmp_path, levels):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, np.random.default_rng(0).integers(0, levels, (200, 32, 32, 1), np.uint8))
    whole = path.read_bytes()
    for start in (100, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:start] + bytes(255 - byte for byte in whole[start : start + 100]) + whole[start + 100 :])
        assert str(path) in fail(capsys, folders[0], path)


def test_nan_from_the_network_is_refused(capsys, folders, tmp_path):
    from safetensors.torch import save_file

    state = FashionMnistFeatures().network.state_dict()
    state["head.bias"] = state["head.bias"] * math.nan
    save_file(state, tmp_path / "nan.safetensors")
    assert "NaN" in fail(capsys, *folders, "--weights", tmp_path / "nan.safetensors")
    state["late.0.weight"] = state["late.0.weight"] * math.nan
    save_file(state, tmp_path / "nan.safetensors")
    assert f"{folders[0]}: the features hold NaN" in fail(capsys, *folders, "--weights", tmp_path / "nan.safetensors")


def test_a_figure_is_never_nan():
    with pytest.raises(ValueError, match=r"^LPIPS is NaN$"):
        Score("lpips", "LPIPS", math.nan, "")


def test_options_are_checked_first(capsys, folders, tmp_path):
    assert "--json" in fail(capsys, *folders, "--json", tmp_path / "none" / "a.json")
    assert "--save_statistics" in fail(capsys, *folders, "--save_statistics", tmp_path / "none" / "a.npz")
    assert "--json x" in fail(capsys, *folders, "--json", "x" * 300)
    assert "--save_statistics /dev/null: a pipe, a device or a socket" in fail(capsys, *folders, "--save_statistics", "/dev/null")
    np.savez(tmp_path / "in.npz", np.zeros((4, 32, 32, 1), np.uint8))
    message = fail(capsys, folders[0], tmp_path / "in.npz", "--json", tmp_path / "in.npz")
    assert f"--json {tmp_path}/in.npz: that is {tmp_path}/in.npz, which is read" in message
    assert "--device nonsense" in fail(capsys, *folders, "--device", "nonsense")
    with pytest.raises(SystemExit):
        evaluator.main([*map(str, folders), "--is_splits", "0"])
    assert "--is_splits 0: allowed are whole numbers, 1 or more" in capsys.readouterr().err


def test_flags_that_contradict_are_refused(capsys, folders, tmp_path):
    message = fail(capsys, *folders, "--convention", "clean-fid")
    assert "--convention clean-fid is about Inception, not about --features fashion_mnist" in message
    assert "--cache and --no_cache exclude one another" in fail(capsys, *folders, "--no_cache", "--cache", tmp_path)


def test_metrics_are_chosen(capsys, folders):
    scores = call(capsys, *folders, "--metrics", "kid", "precision_recall")
    assert scores["fid"] is None and scores["inception_score_mean"] is None
    assert -1 < scores["kid"] < 1 and 0 <= scores["precision"] <= 1 and scores["kid_std"] < 1e-9
    assert any("KID from subsets of 12 images" in note for note in scores["notes"])
    scores = call(capsys, *folders, "--metrics", "psnr")  # no network at all
    assert scores["network"] == "none" and scores["fid"] is None and scores["psnr"] > 0


def test_data_sets_by_name(capsys, tmp_path):
    from qncd.io.fashion_mnist import DEBIAN_PATH
    from qncd.metrics.report.sources import open_source

    assert {"fashion_mnist", "fashion_mnist_test", "scenes", "scenes_test"} <= set(DATASET_NAMES)
    scenes = open_source("scenes_test")
    assert (scenes.count, scenes.height, scenes.width) == (1000, 64, 64) and scenes.digest() == open_source(
        "scenes_test"
    ).digest()
    if DEBIAN_PATH.is_dir():
        scores = call(capsys, "fashion_mnist", "fashion_mnist_test", "--metrics", "fid", "--batch_size", 500)
        assert scores["fid"] < 0.05 and scores["count_synthetic"] == 10000


def test_intervals_and_the_difference_of_two_sets(capsys, folders, tmp_path, make_images):
    real = np.stack([np.array(Image.open(path)) for path in sorted(folders[0].iterdir())]).astype(int)
    for name, amount in (("near", 4), ("far", 40)):
        make_images(tmp_path / name, COUNT, 5)
        noise = np.random.default_rng(0).normal(size=real.shape) * amount
        for image, path in zip((real + noise).clip(0, 255).astype(np.uint8), sorted((tmp_path / name).iterdir()), strict=True):
            Image.fromarray(image).save(path)
    options = ["--bootstrap", 200, "--metrics", "fid", "is", "kid", "precision_recall", "psnr", "ssim"]
    scores = call(capsys, folders[0], tmp_path / "far", "--compare", tmp_path / "near", *options)
    expected = {"fid", "inception_score_mean", "inception_score_adm", "kid", "precision", "recall", "psnr", "ssim", "mse"}
    expected |= {"psnr_of_mean", "poor"}
    assert set(scores["intervals"]) == expected and set(scores["difference"]["figures"]) == expected | {"psnr_p5"}
    for key, (low, high) in scores["intervals"].items():
        assert low <= scores[key] + 1e-9 and scores[key] - 1e-9 <= high, key
    difference = scores["difference"]["figures"]["psnr"]
    assert difference["value"] == pytest.approx(scores["psnr"] - scores["baseline"]["psnr"])
    assert difference["interval"][0] < difference["value"] < difference["interval"][1] < 0
    assert "paired: same file names" in scores["difference"]["how"]
    # Pairs of the same noise differ by less than independent draws do.
    own = np.subtract(*scores["intervals"]["psnr"][::-1]) + np.subtract(*scores["baseline"]["intervals"]["psnr"][::-1])
    assert difference["interval"][1] - difference["interval"][0] < own
    evaluator.main([*map(str, (folders[0], tmp_path / "far")), "--features", "fashion_mnist", "--compare", str(tmp_path / "near"),
                    "--bootstrap", "50"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("PSNR") and "differs from 0" in line for line in lines)
    assert any(f"{tmp_path / 'far'} less {tmp_path / 'near'}" in line and "paired: same file names" in line for line in lines)
    assert sum(line.startswith("FID: pooled features") for line in lines) == 1


def test_named_metrics_alone(capsys, folders):
    for names, found in (
        (["fid"], ["FID"]),
        (["ssim"], ["SSIM"]),
        (["psnr"], ["PSNR", "PSNR(MSE)", "PSNR(5%)", "PSNR<20", "MSE"]),
    ):
        evaluator.main([*map(str, folders), "--features", "fashion_mnist", "--metrics", *names])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[: lines.index("")]] == found


def test_other_names_are_not_paired(capsys, folders, tmp_path):
    (folders[1] / "000000_seed1234.png").rename(folders[1] / "000000_seed9999.png")
    scores = call(capsys, "fashion_mnist", folders[0], "--compare", folders[1], "--bootstrap", 50, "--metrics", "fid")
    assert "not paired" in scores["difference"]["how"] and scores["difference"]["figures"]["fid"]["interval"] is not None


def test_statistics_of_another_convention_are_refused(capsys, folders, tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), network="inception", preprocessing="pil_bicubic, (x - 128) / 128")
    message = fail(capsys, path, folders[1], features="inception")
    assert "statistics after another resize (pil_bicubic, (x - 128) / 128) than that of the convention adm" in message


def test_offline_one_line_names_file_url_and_place(capsys, folders, tmp_path, monkeypatch):
    from urllib.error import URLError

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    message = fail(capsys, *folders, features="inception")
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity",
        str(tmp_path),
        "--weights",
    ):
        assert part in message
