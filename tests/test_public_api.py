"""The public names exist, and the README's Python example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qncd

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize("name", qncd.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(qncd, name) is not None
    assert name in dir(qncd)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        qncd.quantise_  # noqa: B018


@pytest.mark.slow
def test_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with fewer steps and samples: near full precision, and saved as it is."""
    pytest.importorskip("openvino")
    example = re.search(r"```python\n(import qncd\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example
    text = re.sub(r"steps=20", "steps=2", example[1].replace("samples=64", "samples=4"))
    assert text != example[1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert len(names["images"]) == len(names["prompts"]) == 2 and (tmp_path / "out").is_dir()
    assert names["fast"].unet is not names["pipe"].unet and "W4A8 qncd+" in str(names["report"])

    def latents(pipe: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipe(names["prompts"], num_inference_steps=2, generator=generators, output_type="latent").images

    images, fresh = latents(names["pipe"]), qncd.load("configs/scenes.yaml")
    exact = latents(fresh)
    assert 0 < (images - exact).norm() < 0.3 * exact.norm()
    qncd.load_quantized(fresh, "out/scenes_w4a8")
    assert torch.equal(latents(fresh), images)
