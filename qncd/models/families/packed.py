"""Transformers of diffusers whose samples are tokens of 2x2 patches: FLUX, Chroma, Qwen-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.models.calls import Call, Inputs, PlainCall
from qncd.models.families.transformer import OfFractions, filled_rows, forwarding
from qncd.models.traceable import Pairs, pairs_of


class Packed(OfFractions):
    """A transformer whose samples are tokens of 2x2 patches (N, L, 4 C)."""

    packed = True

    @property
    def image_channels(self) -> set[int]:
        return {channels // 4 for channels in super().image_channels}

    def grid(self, call: Call) -> tuple[int, int]:
        """Rows and columns of the patches of a call's samples."""
        raise NotImplementedError

    def shape_of(self, latents: Sequence[int]) -> tuple[int, ...]:
        return (latents[1] // 2) * (latents[2] // 2), self.config["in_channels"]

    def to_images(self, samples: Tensor, call: Call | None = None) -> Tensor:
        assert call is not None
        patches = samples.unflatten(1, self.grid(call)).unflatten(-1, (-1, 2, 2))  # (N, rows, columns, C, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def to_samples(self, images: Tensor, like: Tensor) -> Tensor:
        rows, columns = images.shape[2] // 2, images.shape[3] // 2
        patches = images.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (N, C, rows, 2, columns, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(like.shape)


class Flux(Packed):
    """FLUX: beside the tokens come ids of their places."""

    shared = frozenset({"img_ids", "txt_ids"})
    tokens: ClassVar[Mapping[str, int]] = {"encoder_hidden_states": 1, "txt_ids": 0}

    def grid(self, call: Call) -> tuple[int, int]:
        places = call.constants["img_ids"].amax(0).tolist()
        return int(places[1]) + 1, int(places[2]) + 1


class Chroma(Flux):
    """Chroma: a mask for the tokens of texts and image, and modulations that an approximator computes."""

    # The mask is as long as texts and image together: an exported network keeps the number of tokens that it was traced with.
    tokens: ClassVar[Mapping[str, int]] = {}

    @contextmanager
    def traced(self, constants: Mapping[str, Any]) -> Iterator[PlainCall]:
        embed: Any = self.module.time_text_embed

        def forward(timestep: Tensor) -> Tensor:
            """diffusers' own makes a tensor of as many zeros as there are samples, whose number is then fixed."""
            projected = [embed.time_proj(timestep), embed.guidance_proj(torch.zeros_like(timestep))]
            count = len(embed.mod_proj)
            of_time = torch.cat(projected, 1).to(timestep.dtype).unsqueeze(1).expand(-1, count, -1)
            places = embed.mod_proj.to(of_time).unsqueeze(0).expand(timestep.shape[0], -1, -1)
            return torch.cat([of_time, places], -1)

        with forwarding(embed, forward), super().traced(constants) as call:
            yield call


class QwenImage(Packed):
    """Qwen-Image: beside the tokens come the shapes of the images that they are of, and each text has any number of tokens."""

    texts: ClassVar[str] = "encoder_hidden_states"
    mask: ClassVar[str] = "encoder_hidden_states_mask"  # (N, tokens), which of them are a text's; None for all
    shapes: ClassVar[str] = "img_shapes"  # a list of them for each sample
    tokens: ClassVar[Mapping[str, int]] = {texts: 1, mask: 1}

    @property
    def image_channels(self) -> set[int]:
        return {self.config["in_channels"] // 4, self.config["out_channels"]}  # the second one counts those of an image

    def grid(self, call: Call) -> tuple[int, int]:
        _, rows, columns = call.constants[self.shapes][0][0]
        return rows, columns

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        texts, mask, shapes = (arguments.get(name) for name in (self.texts, self.mask, self.shapes))
        if not isinstance(texts, Tensor) or not shapes or any(other != shapes[0] for other in shapes):
            return arguments
        mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device) if mask is None else mask.bool()
        missing = filled_rows(texts.shape[1]) - texts.shape[1]
        filled = {self.texts: F.pad(texts, (0, 0, 0, missing)), self.mask: F.pad(mask, (0, missing))}
        return {**arguments, **filled, self.shapes: shapes[:1]}

    def trimmed(self, inputs: Inputs) -> dict[str, Tensor]:
        mask = inputs[self.mask].bool()
        count = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
        return {**inputs, self.texts: inputs[self.texts][:, :count], self.mask: mask[:, :count]}

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        shapes = rows.get(self.shapes)
        if rows.get(self.mask) is None or not shapes or len(shapes) != 1:
            return rows
        rows = {**rows, **self.trimmed({name: rows[name] for name in (self.texts, self.mask)})}
        mask = None if rows[self.mask].all() else rows[self.mask]
        return {**rows, self.mask: mask, self.shapes: shapes * len(rows[self.sample_name])}

    @contextmanager
    def traced(self, constants: Mapping[str, Any]) -> Iterator[PlainCall]:
        module: Any = self.module
        # All places of texts: what stands behind those of the image.
        places, all_texts = module.pos_embed(constants[self.shapes], max_txt_seq_len=1 << 20, device=self.device)
        of_image, of_texts = pairs_of(places), pairs_of(all_texts)

        def rotations(shapes: Any, max_txt_seq_len: int, **_: Any) -> tuple[Pairs, Pairs]:
            return of_image, Pairs(of_texts.values[torch.arange(max_txt_seq_len, device=self.device)])

        def call(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
            given = {self.sample_name: x, self.time_name: t, **inputs, **constants}
            return self.output_of(module(**given))

        with forwarding(module.pos_embed, rotations):
            yield call
