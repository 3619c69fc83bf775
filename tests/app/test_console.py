"""The command `qncd`: which command, which sampler, and how it ends."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qncd import __version__
from qncd.app import console
from qncd.app.commands import quantize, sample
from qncd.models.configs import CONFIGS

CONFIG = {
    "data": {"dataset": "NONE", "image_size": 16, "channels": 1},
    "model": {"in_channels": 1, "out_ch": 1, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
              "attn_resolutions": [8], "num_groups": 2},
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
}  # fmt: skip
EVERY = [name for name, command in console.COMMANDS.items() if command.below is None]
EVERY += [f"benchmark {name}" for name in console.COMMANDS["benchmark"].below or ()]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found by the folder that the tests run in, and messages name the program `qncd`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["qncd"])


def call(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> tuple[str, str]:
    """What a command line writes to stdout and stderr; its status is checked."""
    code: object = 0
    try:
        console.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    assert code == status, said.err
    return said.out, said.err


def test_help_lists_the_commands_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "--help")[0].splitlines()
    assert lines[0] == "usage: qncd COMMAND [FLAGS]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(console.COMMANDS)
    assert max(map(len, lines)) < 110
    below = call(capsys, "benchmark", "-h")[0].splitlines()
    assert [line.split()[0] for line in below if line.startswith("  ")] == ["quality", "speed"]
    assert call(capsys, "--version")[0] == f"qncd {__version__}\n"


@pytest.mark.parametrize("name", EVERY)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert call(capsys, *name.split(), "--help")[0].startswith(f"usage: qncd {name} [-h]")


def test_python_m_qncd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/qncd/__main__.py", "nothing"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("qncd", run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("qncd: error: nothing: no such command; allowed behind")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "qncd: error: a command is missing; allowed behind `qncd` are sample, quantize, "),
        (("resample",), "qncd: error: resample: no such command; allowed behind `qncd` are sample, "),
        (("--ptq",), "qncd: error: --ptq: no such command"),
        (("benchmark",), "qncd: error: a command is missing; allowed behind `qncd benchmark` are quality, speed"),
        (("benchmark", "taste"), "qncd: error: taste: no such command; allowed behind `qncd benchmark` are quality, speed"),
        (("sample",), "qncd sample: error: the following arguments are required: -l/--logdir"),
        (("sample", "--outdir"), "qncd: error: argument -l/--logdir/--outdir: expected one argument"),
        (("sample", "-l", "o", "--promt", "x"), "qncd sample: error: unrecognized arguments: --promt x"),
        (("sample", "-l", "o", "--max_images", "0"), "qncd: error: --max_images 0: allowed are whole numbers, 1 or more"),
        (("sample", "--config", "nowhere.yml"), "qncd: error: nowhere.yml: no such config file"),
        (("quantize",), "qncd: error: quantize writes the quantized network: name its file with --cali_ckpt"),
        (("export", "--out", "o"), "qncd: error: which model? Name it with --config, --ckpt or both"),
        (("evaluate", "a", "b", "--bootstrap", "-1"), "qncd: error: --bootstrap -1: allowed are whole numbers, 0 or more"),
        (("benchmark", "speed", "--rounds", "0"), "qncd: error: --rounds 0: allowed are whole numbers, 1 or more"),
        (("report",), "qncd report: error: the following arguments are required: RUN"),
        (("prompts",), "qncd prompts: error: the following arguments are required: --annotations, --out"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    out, err = call(capsys, *words, status=2)
    assert err.startswith(message) and err.count("\n") == 1 and out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    err = call(capsys, "sample", "--config", "nowhere.yml", "--debug", status=2)[1]
    assert err.startswith("Traceback") and err.splitlines()[-1] == "qncd: error: nowhere.yml: no such config file"


def test_a_command_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    out, _ = call(capsys, "prompts", "--annotations", tmp_path / "captions.json", "--n", 1, "--out", "p.txt")
    assert Path("p.txt").read_text() == "a cat\n" and out.startswith("1 prompts in p.txt")


def chosen(*words: object) -> str:
    return sample.choose_sampler([str(word) for word in words])[0].module


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("fashion_mnist.yml", "sample_ddim"),
        ("cifar10.yml", "sample_ddim"),
        ("fashion_mnist_ldm.yaml", "sample_ldm"),
        ("lsun_beds256.yaml", "sample_ldm"),
        ("cin256-v2.yaml", "sample_ldm"),
        ("scenes.yaml", "txt2img"),
        ("sd-v1-inference.yaml", "txt2img"),
    ],
)
def test_the_config_says_which_sampler(name: str, module: str) -> None:
    for config in (f"configs/{name}", name, CONFIGS / name):
        assert chosen("--config", config, "--prompt", "x") == module
        assert chosen(f"--config={config}") == module


def test_prompts_mean_text() -> None:
    assert chosen("--prompt", "a cat") == chosen("--from_file", "p.txt", "--ckpt", "CompVis/some-model") == "txt2img"


def test_the_checkpoint_says_which_sampler(tmp_path: Path) -> None:
    indices = {
        "sd": {"_class_name": "StableDiffusionPipeline", "vae": [], "text_encoder": []},
        "ldm": {"_class_name": "LDMPipeline", "vqvae": []},
        "ddim": {"_class_name": "DDPMPipeline", "unet": []},
    }
    for name, index in indices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "compvis").mkdir()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "compvis" / "model.ckpt")
    (tmp_path / "compvis" / "config.yaml").write_text((CONFIGS / "scenes.yaml").read_text())
    modules = {"sd": "txt2img", "ldm": "sample_ldm", "ddim": "sample_ddim", "unet": "sample_ddim", "compvis": "txt2img"}
    assert {name: chosen("--ckpt", tmp_path / name) for name in modules} == modules
    assert chosen("-r", tmp_path / "compvis" / "model.ckpt") == "txt2img"
    assert chosen("--ckpt", "google/some-model") == "sample_ldm"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yml", "model: [", "not a yaml file"),
        ("a.yml", "data: {}", "no model section"),
        ("model_index.json", "{", "not JSON"),
    ],
)
def test_files_that_say_nothing(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    words = ["--ckpt", str(tmp_path)] if name == "model_index.json" else ["--config", str(tmp_path / name)]
    with pytest.raises(ValueError, match=message):
        sample.choose_sampler(words)


def test_words_are_handed_on() -> None:
    """The bundled model without any other, the sampler's own flag for the output folder, the rest as it stands."""
    rest = sample.choose_sampler(["--max_images", "2", "--outdir", "o", "--seed", "-3"])[1]
    assert rest == ["--max_images", "2", "--seed", "-3", "--logdir", "o", "--config", str(CONFIGS / "fashion_mnist.yml")]
    rest = sample.choose_sampler(["--prompt", "x", "-l", "o", "--plms"])[1]
    assert rest == ["--prompt", "x", "--plms", "--outdir", "o"]
    assert sample.choose_sampler(["--ckpt", "a/b", "-lo", "-n", "4"])[1] == ["--ckpt", "a/b", "-n", "4", "--logdir", "o"]


def test_quantize_fills_in_what_it_means() -> None:
    parser, _, rest = quantize.choose(["--cali_ckpt", "out/w4.safetensors", "--weight_bit", "4"])
    args = parser.parse_args(rest)
    assert args.ptq and args.logdir == Path("out/w4_run") and args.weight_bit == 4
    parser, _, rest = quantize.choose(["--prompt", "x", "--cali_ckpt", "w4.safetensors", "-l", "o"])
    assert parser.parse_args(rest).outdir == Path("o")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a tiny random DDIM model."""
    from qncd.models.original.ddim import build_ddim_unet

    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yml").write_text(yaml.safe_dump(CONFIG))
    torch.manual_seed(0)
    build_ddim_unet(CONFIG).save_pretrained(folder / "unet")
    flags = ("--timesteps", "3", "--cali_n", "4", "--cali_st", "2", "--device", "cpu", "--compare_fp", "--sample_reverse", "2")
    return ("--config", str(folder / "tiny.yml"), "--ckpt", str(folder / "unet"), *flags)


def test_quantize_then_sample(capsys: pytest.CaptureFixture[str], model: tuple[str, ...]) -> None:
    call(capsys, "quantize", *model, "--cali_ckpt", "q.safetensors")
    assert sorted(path.name for path in Path().rglob("*") if path.is_file()) == ["layers.json", "q.safetensors", "run.json"]
    assert "calibration_seconds" in json.loads(Path("q_run/run.json").read_text())["figures"]
    before = Path("q.safetensors").read_bytes()
    call(capsys, "sample", *model, "--ptq", "--cali_ckpt", "q.safetensors", "--resume", "--max_images", 2, "--outdir", "a")
    assert Path("q.safetensors").read_bytes() == before and len(list(Path("a/images").iterdir())) == 2
    call(capsys, "quantize", *model, "--cali_ckpt", "r.safetensors", "--max_images", 2, "-l", "b")
    images = [[path.read_bytes() for path in sorted(Path(name, "images").iterdir())] for name in "ab"]
    assert images[0] == images[1]


def test_quantizing_latent_models_samples_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where calibration would begin; a text model is calibrated on prompts."""
    from qncd.app import job

    counts = []
    monkeypatch.setattr(job.SamplingJob, "sample_and_finish", lambda self, *_, **__: counts.append(self.plan.count))
    words = ("quantize", "--cali_n", 4, "--cali_st", 1, "--device", "cpu", "--cali_ckpt", "q.safetensors")
    error = call(capsys, *words, "--config", "scenes.yaml", status=2)[1]
    assert "give either --prompt TEXT or --from_file FILE" in error
    call(capsys, *words, "--prompt", "a cat", "--skip_save", "--ddim_steps", 4)
    call(capsys, *words, "--config", "fashion_mnist_ldm.yaml", "-l", "ldm", "--custom_steps", 4)
    assert counts == [0, 0] and Path("q_run/prompts.jsonl").read_text() == ""
