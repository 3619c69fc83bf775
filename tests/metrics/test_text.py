"""CLIP score and CLIP-IQA with a small random model: against its own parts and torchmetrics' formula."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import evaluator
from qncd.metrics.networks.text import ANTONYMS, ClipFeatures, clip_iqa, find_prompts
from qncd.metrics.report.sources import ImageFolder, open_source

PROMPTS = ("a red ball", "two cats on a sofa", "a red ball", "rain")


@pytest.fixture
def samples(tmp_path, make_images):
    """A folder as txt2img.py writes it."""
    make_images(tmp_path / "images", 4, 1, (40, 32, 3), smooth=True)
    with (tmp_path / "prompts.jsonl").open("w") as stream:
        for i, prompt in enumerate(PROMPTS):
            line = {
                "index": i,
                "file": f"images/{i:06d}_seed{1234 + i}.png",
                "seed": 1234 + i,
                "prompt_index": i,
                "prompt": prompt,
            }
            stream.write(json.dumps(line) + "\n")
    return tmp_path / "images"


def refuse(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluator.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def test_scores_equal_the_parts(samples, clip_folder, capsys):
    import open_clip

    model = f"local-dir:{clip_folder}"
    options = ["--metrics", "clip_score", "clip_iqa", "--clip_model", model, "--iqa", "quality", "sharpness", "--bootstrap", "50"]
    evaluator.main(["-", str(samples), *options, "--json", "-"])
    scores = json.loads(capsys.readouterr().out)
    network, preprocess = open_clip.create_model_from_pretrained(model)
    network.eval()
    tokenizer = open_clip.get_tokenizer(model)
    with torch.no_grad():
        texts = network.encode_text(tokenizer([*PROMPTS, *ANTONYMS["quality"], *ANTONYMS["sharpness"]]), normalize=True)
        images = [preprocess(Image.open(path))[None] for path in sorted(samples.iterdir())]
        embeddings = torch.cat([network.encode_image(image, normalize=True) for image in images])
    expected = (100 * (embeddings * texts[:4]).sum(1)).clamp(min=0)
    assert scores["clip_score"] == pytest.approx(expected.mean().item(), rel=1e-4)
    for i, key in enumerate(("clip_iqa", "clip_iqa_sharpness")):
        pair = texts[4 + 2 * i : 6 + 2 * i]
        probability = (100 * embeddings @ pair.T).softmax(1)[:, 0]
        assert scores[key] == pytest.approx(probability.mean().item(), rel=1e-3)
    low, high = scores["intervals"]["clip_score"]
    assert expected.min() <= low <= scores["clip_score"] <= high <= expected.max()
    assert scores["network"] == "none" and scores["fid"] is None and str(clip_folder) in scores["how"]["clip_score"]


def test_iqa_equals_torchmetrics():
    formula = pytest.importorskip("torchmetrics.functional.multimodal.clip_iqa")
    rows = torch.nn.functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    theirs = formula._clip_iqa_compute(rows[:5], rows[5:], ["quality"])
    np.testing.assert_allclose(clip_iqa(rows[:5], rows[5], rows[6]), theirs, rtol=1e-5)


def test_texts_are_encoded_in_their_order(clip_folder):
    clip = ClipFeatures(f"local-dir:{clip_folder}")
    rows = clip.embed_texts(PROMPTS)
    torch.testing.assert_close(rows[0], rows[2])
    torch.testing.assert_close(rows[3], clip.embed_texts(["rain"])[0])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_prompts_are_found(samples, tmp_path):
    source = ImageFolder.open(samples)
    assert find_prompts(source) == list(PROMPTS)
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(PROMPTS) + "\n")
    assert find_prompts(source, text) == list(PROMPTS)
    np.savez(tmp_path / "images.npz", np.zeros((4, 32, 32, 3), np.uint8))
    assert find_prompts(open_source(tmp_path / "images.npz"), tmp_path / "prompts.jsonl") == list(PROMPTS)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\r", "\x00"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_only_line_feeds_separate_prompts(samples, tmp_path, separator, name):
    """In a file with a byte-order mark and Windows' ends of lines."""
    prompts = [f"{prompt}{separator}again" for prompt in PROMPTS]
    lines = prompts
    if name.endswith("jsonl"):
        files = [f"images/{path.name}" for path in sorted(samples.iterdir())]
        lines = [
            json.dumps({"file": file, "prompt": prompt}, ensure_ascii=False) for file, prompt in zip(files, prompts, strict=True)
        ]
    (tmp_path / name).write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    assert find_prompts(ImageFolder.open(samples), tmp_path / name) == prompts


def test_equal_file_names_in_several_folders(tmp_path, make_images):
    """Paths tell them apart; where there are only file names, nothing is guessed."""
    for part in "ab":
        make_images(tmp_path / "images" / part, 1)
    source, listing = ImageFolder.open(tmp_path / "images"), tmp_path / "prompts.jsonl"

    def write(*files: str) -> None:
        listing.write_text("".join(json.dumps({"file": file, "prompt": f"of {file}"}) + "\n" for file in files))

    name = "000000_seed1234.png"
    for front in ("", "images/"):
        write(f"{front}b/{name}", f"{front}a/{name}")
        assert find_prompts(source, listing) == [f"of {front}a/{name}", f"of {front}b/{name}"]
    for files in ([name], [f"x/{name}", f"y/{name}"]):
        write(*files)
        with pytest.raises(ValueError, match=f"no line for a/{name}, and several lines or images with the file name {name}"):
            find_prompts(source, listing)
    listing.write_text("".join(json.dumps({"file": f"a/{name}", "prompt": prompt}) + "\n" for prompt in ("one", "two")))
    with pytest.raises(ValueError, match=f"prompts.jsonl: two prompts for a/{name}"):
        find_prompts(source, listing)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.png", "prompt": 3}', 'line 3 is no JSON object with "file" and "prompt"'),
        ("[" * 50000, 'line 3 is no JSON object with "file" and "prompt"'),
        ('{"file": "a.png", "prompt": "\\ud800"}', r"line 3: '\\ud800' at character 1 is no text in UTF-8"),
    ],
)
def test_lines_that_hold_no_prompt_are_named(samples, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('\n{"file": "a.png", "prompt": ""}\n' + line)
    with pytest.raises(ValueError, match=f"a.jsonl: {message}"):
        find_prompts(ImageFolder.open(samples), tmp_path / "a.jsonl")


def test_prompts_that_do_not_fit_are_refused(samples, tmp_path, clip_folder, capsys):
    call = ["-", samples, "--clip_model", f"local-dir:{clip_folder}", "--prompts"]
    text = tmp_path / "prompts.txt"
    text.write_text("one\ntwo\n")
    assert "prompts.txt: 2 prompts for 4 images" in refuse(capsys, *call, text)
    assert "nowhere.txt: no such file" in refuse(capsys, *call, tmp_path / "nowhere.txt")
    (tmp_path / "bad.jsonl").write_text('{"file": "a.png"}\n')
    assert 'bad.jsonl: line 1 is no JSON object with "file" and "prompt"' in refuse(capsys, *call, tmp_path / "bad.jsonl")
    (tmp_path / "few.jsonl").write_text('{"file": "000000_seed1234.png", "prompt": "a"}\n')
    assert "few.jsonl: no prompt for 000001_seed1235.png" in refuse(capsys, *call, tmp_path / "few.jsonl")
    (tmp_path / "prompts.jsonl").unlink()
    assert "no prompts.jsonl in this folder or above it: name one with --prompts" in refuse(
        capsys, "-", samples, "--metrics", "clip_score", "--clip_model", f"local-dir:{clip_folder}"
    )


def test_prompts_are_looked_at_before_clip_is_loaded(samples, tmp_path, capsys):
    call = ["-", samples, "--metrics", "clip_score", "--clip_model", "local-dir:nowhere", "--prompts", tmp_path / "none.txt"]
    assert "none.txt: no such file" in refuse(capsys, *call)
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    message = refuse(capsys, samples, tmp_path / "s.npz", "--metrics", "clip_iqa", "--clip_model", "local-dir:nowhere")
    assert "s.npz: CLIP metrics need images, not statistics" in message


def test_models_that_cannot_be_had_are_one_line(samples, capsys):
    call = ["-", samples, "--metrics", "clip_iqa"]
    assert "--clip_model ViT-Q: unknown to open_clip" in refuse(capsys, *call, "--clip_model", "ViT-Q")
    message = refuse(capsys, *call, "--clip_model", "ViT-B-32", "--clip_weights", "nonsense")
    assert "--clip_weights takes a file or one of openai" in message
    assert "no such folder" in refuse(capsys, *call, "--clip_model", "local-dir:nowhere")


def test_offline_the_line_names_url_and_option(samples, capsys, monkeypatch):
    import open_clip

    def fail(*_: object, **__: object) -> None:
        logging.error("no network, as open_clip says it too")
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", fail)
    message = refuse(capsys, "-", samples, "--metrics", "clip_iqa")
    assert "CLIP ViT-B-32 openai cannot be loaded (no network): get https://" in message and "--clip_weights PATH" in message


def test_what_open_clip_says_is_kept_where_it_loads(samples, clip_folder, monkeypatch, caplog):
    import open_clip

    load = open_clip.create_model_from_pretrained

    def warn(*given: object, **named: object) -> object:
        logging.error("another activation than the weights'")
        return load(*given, **named)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", warn)
    ClipFeatures(f"local-dir:{clip_folder}")
    assert caplog.messages == ["another activation than the weights'"]


def test_real_may_only_be_missing_for_clip(samples, capsys):
    assert "REAL is -: only --metrics clip_score clip_iqa" in refuse(capsys, "-", samples)
    assert "REAL is -: only" in refuse(capsys, "-", samples, "--metrics", "fid", "clip_iqa")
    message = refuse(capsys, samples, samples, "--metrics", "psnr", "--clip_model", "ViT-B-32")
    assert "--clip_model and --clip_weights are for --metrics clip_score clip_iqa" in message
