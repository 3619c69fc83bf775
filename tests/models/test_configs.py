"""Which yaml file a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from qncd.models.configs import CONFIGS, config_beside, find_config


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["scenes.yaml", "configs/scenes.yaml", "./configs/scenes.yaml", CONFIGS / "scenes.yaml"])
def test_the_packages_own(name: str | Path) -> None:
    assert find_config(name) == CONFIGS / "scenes.yaml"


def test_a_path_that_exists_comes_first(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "scenes.yaml").write_text("model: {}")
    assert find_config("configs/scenes.yaml") == Path("configs/scenes.yaml")
    assert find_config("scenes.yaml") == CONFIGS / "scenes.yaml"


@pytest.mark.parametrize("name", ["nowhere.yml", "other/scenes.yaml", "/scenes.yaml", "../configs/scenes.yaml", "configs", ""])
def test_no_such_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{name}: no such config file$"):
        find_config(name)


def test_the_yaml_beside_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    with pytest.raises(ValueError, match=r"which yaml describes it\? 0 lie beside it"):
        config_beside(checkpoint)
    (tmp_path / "a.yaml").write_text("")
    assert config_beside(checkpoint) == tmp_path / "a.yaml"
    (tmp_path / "b.yaml").write_text("")
    with pytest.raises(ValueError, match=r"which yaml describes it\? 2 lie beside it: name one with --config"):
        config_beside(checkpoint)
    (tmp_path / "config.yaml").write_text("")
    assert config_beside(checkpoint) == tmp_path / "config.yaml"
