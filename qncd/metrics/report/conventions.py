"""What a name such as "clean-fid" stands for: resize, scaling, inception score and the metrics that the package defines.

Every published figure belongs to one of these; two figures of different conventions cannot be compared. Nothing heavy is
imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Groups of figures, as `--metrics` names them.
DISTRIBUTION_METRICS = ("fid", "sfid", "is", "precision_recall", "kid")
CLIP_METRICS = ("clip_score", "clip_iqa")
PAIRED_METRICS = ("psnr", "ssim", "lpips")
METRICS = (*DISTRIBUTION_METRICS, *CLIP_METRICS, *PAIRED_METRICS)

RESIZES = {
    "tensorflow1": "bilinear resize of TensorFlow 1 to 299x299 from uint8",
    "torch_bilinear": "torch's bilinear resize to 299x299 without antialiasing",
    "pil_bicubic": "PIL's antialiased bicubic resize to 299x299, not rounded",
}
SCALINGS = {"128": "(x - 128) / 128", "255": "2 x / 255 - 1"}


@dataclass(frozen=True)
class Convention:
    """One way of measuring with the Inception v3 of 2015-12-05.

    Attributes:
        name: as `--convention` takes it.
        resize: a key of RESIZES.
        scaling: a key of SCALINGS, x the pixel of 0 to 255.
        metrics: what the package itself reports, and what is computed unless others are asked for.
        score_split_size: images in a part of the inception score, None where the package does not go by size.
        score_shuffle_seed: seed with which the images are permuted before they are split into parts, None for no shuffle.
        package: the reference implementation.
    """

    name: str
    resize: str
    scaling: str
    metrics: tuple[str, ...]
    score_split_size: int | None
    score_shuffle_seed: int | None
    package: str

    def __post_init__(self) -> None:
        unknown = {self.resize} - RESIZES.keys() | {self.scaling} - SCALINGS.keys() | set(self.metrics) - set(METRICS)
        if unknown:
            raise ValueError(f"convention {self.name}: unknown {', '.join(sorted(unknown))}")

    @property
    def preprocessing(self) -> str:
        """What decides the features; conventions that agree in it can read one another's statistics."""
        return f"{self.resize}, {SCALINGS[self.scaling]}"

    @property
    def description(self) -> str:
        """The convention in words, for a printed number."""
        return f"convention {self.name}: Inception v3 2015-12-05, {RESIZES[self.resize]}, {SCALINGS[self.scaling]}"


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("adm", "tensorflow1", "128", ("fid", "sfid", "is"), 5000, None, "guided-diffusion's evaluator.py"),
        Convention("torch-fidelity", "tensorflow1", "128", ("fid", "is", "kid"), None, 2020, "torch-fidelity"),
        Convention("pytorch-fid", "torch_bilinear", "255", ("fid",), None, None, "pytorch-fid"),
        Convention("clean-fid", "pil_bicubic", "128", ("fid", "kid"), None, None, "clean-fid"),
    )
}
DEFAULT_CONVENTION = "adm"
