"""tools/check_full_size.py, on a tiny UNet with all that SDXL's has, and on a tiny transformer of SD3's kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TINY = {
    "block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2], "transformer_layers_per_block": [1, 1, 1],
    "cross_attention_dim": 12, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32, "norm_num_groups": 4,
    "layers_per_block": 1, "sample_size": 8,
}  # fmt: skip

TINY_SD3 = {
    "attention_head_dim": 8, "caption_projection_dim": 16, "joint_attention_dim": 12, "num_attention_heads": 2, "num_layers": 2,
    "pooled_projection_dim": 10, "pos_embed_max_size": 16, "sample_size": 8,
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, whose two processes are this one."""
    spec = importlib.util.spec_from_file_location("check_full_size", TOOLS / "check_full_size.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_full_size", module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "alone", lambda function, *arguments: function(*arguments))
    return module


@pytest.fixture
def arguments(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def parsed(*given: object, model: str = "sdxl", **changes: Any) -> Any:
        config = tmp_path / "config.json"
        file, tiny = ("sdxl_unet.json", TINY) if model == "sdxl" else ("sd3_transformer.json", TINY_SD3)
        config.write_text(json.dumps({**json.loads((TOOLS / file).read_text()), **tiny, **changes}))
        words = ["--model", model, "--config", config, "--size", 64, "--cali_n", 2, "--weight_range", "max", *given]
        monkeypatch.setattr(sys, "argv", ["check_full_size.py", *map(str, words)])
        return tool.parse_args()

    return parsed


def test_a_small_sdxl(
    tool: Any, arguments: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "memory", lambda field: 10**9)
    tool.main(arguments("--sample_size", 128, "--weight_bit", 4, "--json", tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"quantize to W4A8 qncd+", "2 PLMS steps, 128x128, quantized"} < figures["phases"].keys()
    assert figures["checkpoint_over_fp32"] < 1 and figures["largest_peak_over_fp32"] == 10**9 / figures["fp32_bytes"]
    out = capsys.readouterr().out
    assert "the loaded model holds the saved one's numbers" in out and "largest peak 1.00 GB" in out
    assert out.endswith("allowed are 20.00 GB: ok\n")


def test_a_small_sd3(tool: Any, arguments: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    tool.main(arguments("--scale", 1, "--engine", "openvino", model="sd3"))
    out = capsys.readouterr().out
    assert "the loaded model holds the saved one's numbers" in out
    assert all(f"\n{phase}" in out for phase in ("export ", "open on openvino ", "2 PLMS steps, 64x64, openvino "))


def test_weights_are_in_half_precision_and_activations_near_1(tool: Any, arguments: Callable[..., Any]) -> None:
    import torch

    args = arguments()
    diffusion, _ = tool.build(args)
    assert {str(p.dtype) for p in diffusion.network.module.parameters()} == {"torch.bfloat16"}
    assert sum(p.isnan().sum() for p in diffusion.network.module.parameters()) == 0
    out = diffusion.denoiser(tool.contexts(args, diffusion))(torch.randn(2, 4, 8, 8), 500.0)
    assert 0.01 < float(out.std()) < 10


def test_a_config_that_describes_no_network_is_refused(tool: Any, arguments: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.json: describes no network"):
        tool.main(arguments(down_block_types=["NoBlock"] * 3))
    with pytest.raises(ValueError, match=r"config\.json: allowed are networks of the class UNet2DConditionModel or SD3"):
        tool.main(arguments(_class_name="VQModel"))


@pytest.mark.parametrize(("model", "parameters"), [("sdxl", 2_567_463_684), ("sd3", 2_028_328_000)])
def test_models_have_their_published_numbers_of_parameters(model: str, parameters: int, tool: Any) -> None:
    import diffusers
    import torch

    config = json.loads(tool.MODELS[model].config.read_text())
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
