"""Two processes under Lightning Fabric reconstruct as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qncd.distributed import OneProcess, start_processes

ROOT = Path(__file__).parents[3]


def reconstruct(folder: Path, devices: int, broken: bool) -> None:
    """Quantize a tiny network with both phases and write codes, scales and errors; run by every process."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    from qncd.models.network import network_of
    from qncd.ptq.data import CalibrationSet
    from qncd.ptq.observing import find_ranges_
    from qncd.ptq.stages.activation_steps import learn_steps_
    from qncd.ptq.stages.prepare import quantize_
    from qncd.ptq.stages.ranges import round_
    from qncd.ptq.stages.reconstruction import reconstruct_
    from qncd.quant.inspection import act_quantizers, quant_layers
    from qncd.recipe import QuantConfig, ReconstructionConfig

    processes = start_processes("cpu", devices)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    models: list[Any] = [
        UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(40, 3, 8, 8, generator=generator), torch.randint(0, 1000, (40,), generator=generator)
    if broken:  # in the second batch of 8, which the second process holds
        x[9] = 1e30
    config = ReconstructionConfig(iterations=50, batch_size=8, inputs=None, act_iterations=20, lr=1e-2)
    unet, reference = (quantize_(m.eval().requires_grad_(False), QuantConfig(4, 8)).module for m in models)
    seen: list[float] = []
    data, blocks_folder = CalibrationSet(x, t), folder / "blocks"
    with processes.quiet_failure():
        results = reconstruct_(
            network_of(unet),
            network_of(reference),
            data,
            config,
            lambda done, total, left: seen.append(left),
            blocks_folder,
            (),
            processes,
        )
        find_ranges_(network_of(unet), data, 8)
        round_(network_of(unet))
        steps = learn_steps_(network_of(unet), network_of(reference), data, config, None, blocks_folder, processes)
    tensors = {name: layer.weight_codes() for name, layer in quant_layers(unet).items()}
    tensors |= {f"{name}.scale": quantizer.scale.clone() for name, quantizer in act_quantizers(unet).items()}
    save_file(tensors, folder / f"{processes.rank}.safetensors")
    if processes.is_first:
        (folder / "errors.json").write_text(
            json.dumps({name: [[r.before, r.after] for r in found] for name, found in (("weights", results), ("steps", steps))})
        )


def start(folder: Path, devices: int, broken: bool = False) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, __file__, str(folder), str(devices), *(["broken"] if broken else [])]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_two_processes_reconstruct_as_one(tmp_path: Path) -> None:
    for devices in (1, 2):
        done = start(tmp_path / str(devices), devices)
        assert done.returncode == 0, done.stderr
    one, two, other = (load_file(tmp_path / name) for name in ("1/0.safetensors", "2/0.safetensors", "2/1.safetensors"))
    assert all(torch.equal(two[name], other[name]) for name in two), "both processes end with the same network"
    codes = [name for name in one if not name.endswith(".scale")]
    same = torch.cat([(one[name] == two[name]).flatten() for name in codes]).float().mean()
    assert same >= 0.999, float(same)
    errors = [json.loads((tmp_path / name / "errors.json").read_text()) for name in ("1", "2")]
    weights, steps = ([torch.tensor(e[phase]) for e in errors] for phase in ("weights", "steps"))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)
    assert (weights[0][:, 1] < weights[0][:, 0]).float().mean() > 0.5, "and it is worth something"
    # A quantized activation jumps where the last bit of a sum puts it over a boundary, so the scales part after some blocks.
    torch.testing.assert_close(steps[0][:4], steps[1][:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(steps[0], steps[1], rtol=0.1, atol=0)
    assert {path.name for path in (tmp_path / "1/blocks").iterdir()} == {path.name for path in (tmp_path / "2/blocks").iterdir()}


@pytest.mark.slow
def test_what_fails_in_one_process_ends_both_with_the_blocks_name(tmp_path: Path) -> None:
    done = start(tmp_path / "broken", 2, broken=True)
    assert done.returncode != 0
    assert done.stderr.count("ValueError: reconstruction of conv_in: an activation of 1e+30 is too large") == 1, done.stderr


def test_one_process_is_its_own_average() -> None:
    processes, value = OneProcess(), torch.tensor([1.0, 2.0])
    assert processes.average_(value) is value and processes.first(lambda: 3) == 3
    processes.agree(None)
    with pytest.raises(ValueError, match=r"^broken$"):
        processes.agree("broken")


if __name__ == "__main__":
    reconstruct(Path(sys.argv[1]), int(sys.argv[2]), "broken" in sys.argv)
