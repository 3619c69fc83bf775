"""The evaluations that papers on quantized diffusion models report: model, sampler, number of images, reference, figures.

Published figures belong to the protocol of their source, which the `differs` of a row describes; two rows can be compared only
as far as these agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qncd.models.files.registry import Download

_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
REFERENCES = {  # of guided-diffusion (ADM), with the images and their statistics
    "adm_lsun_bedroom256": Download(f"{_ADM}lsun/bedroom/VIRTUAL_lsun_bedroom256.npz", "references/VIRTUAL_lsun_bedroom256.npz"),
    "adm_imagenet256": Download(
        f"{_ADM}imagenet/256/VIRTUAL_imagenet256_labeled.npz", "references/VIRTUAL_imagenet256_labeled.npz"
    ),
}
QNCD = "QNCD (arXiv 2403.19140)"
SURVEY = "survey (arXiv 2505.05215), one rerun of many methods on common code"


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        method: as its authors call it.
        width: such as W4A8; FP for full precision.
        figures: by the evaluator's keys (fid, sfid, inception_score_adm, clip_score).
        source: where it stands.
        differs: in what its protocol differs from ours, as far as the source says.
    """

    method: str
    width: str
    figures: Mapping[str, float]
    source: str
    differs: str = ""


@dataclass(frozen=True)
class Protocol:
    """How one model is sampled and judged.

    Attributes:
        title: model and data.
        config: yaml in configs/.
        flags: of `qncd sample` beside the model's and the quantization's.
        steps: of the sampler, network calls of one image.
        guided: each call takes the image with and without its condition.
        images: of the published protocol.
        count_flag: of `qncd sample` for the number of images.
        interval: steps between two estimates of runtime correction.
        reference: name in REFERENCES of the published statistics of real images, None where there are none.
        reference_hint: what --reference takes, in words.
        convention: of the evaluator, that of the reference.
        metrics: of the evaluator.
        prompts: captions of MS-COCO are needed.
        size: side of an image in pixels.
        published: rows of others.
    """

    title: str
    config: str
    flags: tuple[str, ...]
    steps: int
    guided: bool
    images: int
    count_flag: str
    interval: int
    reference: str | None
    reference_hint: str
    convention: str
    metrics: tuple[str, ...]
    prompts: bool
    size: int
    published: tuple[Published, ...] = field(default=(), repr=False)


def _rows(source: str, keys: tuple[str, ...], differs: str, *rows: tuple[str, str, tuple[float, ...]]) -> tuple[Published, ...]:
    return tuple(
        Published(method, width, dict(zip(keys, values, strict=True)), source, differs) for method, width, values in rows
    )


_FID_IS, _FID_SFID, _FID_CLIP = ("fid", "inception_score_adm"), ("fid", "sfid"), ("fid", "clip_score")
PROTOCOLS = {
    "cifar10": Protocol(
        "DDIM on CIFAR-10, 100 steps (quadratic), eta 0", "cifar10.yml",
        ("--timesteps", "100", "--eta", "0", "--skip_type", "quad"), 100, False, 50_000, "--max_images", 4,
        None, "a folder with the 50,000 training images, or statistics of them", "torch-fidelity", ("fid", "is"), False, 32,
        _rows("Q-Diffusion (arXiv 2302.04304)", ("fid",), "",
              ("full precision", "FP", (4.22,)), ("Q-Diffusion", "W4A8", (4.93,))),
    ),
    "bedrooms": Protocol(
        "LDM-4 on LSUN-Bedrooms, 200 steps, eta 1", "lsun_beds256.yaml", ("-c", "200", "-e", "1"), 200, False, 50_000, "-n", 10,
        "adm_lsun_bedroom256", "ADM's VIRTUAL_lsun_bedroom256.npz", "adm", ("fid", "sfid"), False, 256,
        _rows(QNCD, _FID_SFID, "", ("full precision", "FP", (3.16, 7.84)), ("QNCD", "W8A8", (3.82, 9.65)))
        + _rows(SURVEY, ("fid",), "its full precision has 3.03", ("EDA-DM", "W8A8", (7.23,)), ("EDA-DM", "W4A8", (10.61,)),
                ("EfficientDM (fine-tuned)", "W8A8", (4.39,)), ("QuEST (fine-tuned)", "W4A8", (6.54,)),
                ("QNCD", "W8A8", (9.84,)), ("QNCD", "W4A8", (13.26,))),
    ),
    "churches": Protocol(
        "LDM-8 on LSUN-Churches, 500 steps, eta 0", "lsun_churches256.yaml",
        ("-c", "500", "-e", "0"), 500, False, 50_000, "-n", 10,
        None, "a folder with the training images, or statistics of them", "adm", ("fid", "sfid"), False, 256,
        _rows(SURVEY, ("fid",), "its full precision has 4.17; number of steps as in Q-Diffusion",
              ("D2-DPM", "W8A8", (7.83,)), ("D2-DPM", "W4A8", (11.18,)), ("EfficientDM (fine-tuned)", "W8A8", (6.89,)),
              ("EfficientDM (fine-tuned)", "W4A8", (8.36,))),
    ),
    "imagenet": Protocol(
        "LDM-4 on ImageNet, class-conditional, 20 steps, eta 0, guidance 3", "cin256-v2.yaml",
        ("-c", "20", "-e", "0", "--scale", "3"), 20, True, 50_000, "-n", 4,
        "adm_imagenet256", "ADM's VIRTUAL_imagenet256_labeled.npz", "adm", ("fid", "sfid", "is"), False, 256,
        _rows(QNCD, _FID_IS, "", ("full precision", "FP", (11.42, 245.39)), ("QNCD", "W8A8", (10.57, 231.85)),
              ("QNCD", "W4A8", (9.48, 221.62)), ("QNCD", "W4A6", (20.14, 136.49)), ("Q-Diffusion", "W8A8", (10.92, 229.31)),
              ("Q-Diffusion", "W4A8", (9.56, 219.64)), ("Q-Diffusion", "W4A6", (41.25, 89.82)))
        + _rows("PTQD (arXiv 2305.10657)", _FID_IS, "", ("PTQD", "W8A8", (11.94, 153.92)), ("PTQD", "W4A8", (10.40, 214.73))),
    ),
    "coco": Protocol(
        "Stable Diffusion v1.4 on MS-COCO captions, 50 PLMS steps, guidance 7.5", "sd-v1-inference.yaml",
        ("--plms", "--ddim_steps", "50", "--scale", "7.5", "--skip_grid"), 51, True, 30_000, "--max_prompts", 10,
        None, "the folder of images that the captions belong to (val2014)", "pytorch-fid", ("fid", "clip_score"), True, 512,
        _rows(QNCD, _FID_CLIP, "number of images and captions not stated", ("full precision", "FP", (23.80, 30.54)),
              ("QNCD", "W8A8", (27.33, 30.32)), ("QNCD", "W4A8", (26.05, 30.47)), ("QNCD", "W4A6", (36.25, 30.25)),
              ("Q-Diffusion", "W8A8", (27.84, 30.23)), ("Q-Diffusion", "W4A8", (31.01, 29.98)),
              ("Q-Diffusion", "W4A6", (38.87, 29.82)))
        + _rows(SURVEY, _FID_CLIP, "its full precision has 13.27 and 30.64", ("DGQ", "W4A8", (13.92, 29.04))),
    ),
}  # fmt: skip
