"""What Stable Diffusion's script does to finished images, here only where it is asked for: safety checker and watermark."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np
import torch

from qncd.io.files import first_line

log = logging.getLogger("qncd")
Finisher = Callable[[np.ndarray], np.ndarray]  # uint8 (N, H, W, 3) -> the same


def safety_checker(source: str, device: str = "cpu") -> Finisher:
    """Black out what diffusers' StableDiffusionSafetyChecker flags, and log how many images those were.

    Args:
        source: a folder with the checker and its preprocessor_config.json, or a hub id such as
            CompVis/stable-diffusion-safety-checker.

    Raises:
        FileNotFoundError: it is neither here nor to be had from the hub.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    try:
        checker = StableDiffusionSafetyChecker.from_pretrained(source).eval().to(device)
        processor = CLIPImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise FileNotFoundError(f"--safety_checker {source}: no checker there, nor on the hub ({reason})") from None

    @torch.no_grad()
    def finish(images: np.ndarray) -> np.ndarray:
        inputs = processor(list(images), return_tensors="pt").pixel_values.to(device)
        checked, flagged = checker(clip_input=inputs, images=images.copy())
        if any(flagged):
            log.warning("the safety checker blacked out %d of %d images", sum(flagged), len(images))
        return checked

    return finish


def watermark(text: str) -> Finisher:
    """Write `text` invisibly into each image (method dwtDct, as in Stable Diffusion's script).

    Raises:
        ValueError: the package invisible-watermark is not installed.
    """
    try:
        from imwatermark import WatermarkEncoder
    except ImportError:
        raise ValueError(f"--watermark {text}: needs the package invisible-watermark (pip install invisible-watermark)") from None
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode("utf-8"))

    def finish(images: np.ndarray) -> np.ndarray:
        # The package works on images in OpenCV's channel order.
        return np.stack([encoder.encode(image[:, :, ::-1].copy(), "dwtDct")[:, :, ::-1] for image in images])

    return finish


def image_finisher(checker: str | None, mark: str | None, device: str = "cpu") -> Finisher:
    """What is asked for, in the order of Stable Diffusion's script: the checker first. Raises as they do."""
    finishers: list[Finisher] = []
    if checker is not None:
        finishers.append(safety_checker(checker, device))
    if mark is not None:
        finishers.append(watermark(mark))
    return lambda images: functools.reduce(lambda made, finish: finish(made), finishers, images)
