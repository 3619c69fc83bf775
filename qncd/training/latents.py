"""Latents of a data set's images, computed once and kept in a file."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qncd.io.files import reading, regular_file
from qncd.models.files.safetensors_files import write_safetensors
from qncd.models.original.autoencoders import FirstStage
from qncd.training.diffusion import images_to_float

logger = logging.getLogger(__name__)
BATCH = 100  # images that are encoded at a time


def cached_latents(first_stage: FirstStage, images: Tensor, path: Path) -> Tensor:
    """Latents of uint8 NHWC images for the network, float16 (N, C, H, W): from the file if it holds them, else computed.

    The file is bound to the autoencoder's weights, its scale and the images by a SHA-256. Raises ValueError where it is damaged.
    """
    digest = hashlib.sha256(f"{first_stage.scale} {tuple(images.shape)}".encode())
    for tensor in (images, *first_stage.model.state_dict().values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    if path.exists():
        with reading(path, "a file of latents"), safe_open(regular_file(path), framework="pt") as stream:
            if (stream.metadata() or {}).get("sha256") == digest.hexdigest():
                return stream.get_tensor("latents")
        logger.warning("%s belongs to other images or another autoencoder: computing it again", path)
    latents = torch.cat([first_stage.encode(images_to_float(batch)).half() for batch in images.split(BATCH)]).contiguous()
    write_safetensors({"latents": latents}, path, {"sha256": digest.hexdigest()})
    return latents
