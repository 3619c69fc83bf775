"""Transformers of diffusers in which the tokens of captions and image follow one another: Lumina2, Z-Image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qncd.models.calls import Inputs, PlainCall
from qncd.models.families.transformer import TRAINED_STEPS, Transformer, filled_rows
from qncd.models.traceable import Pairs, pairs_of

CAPTION_ROWS = 32  # Z-Image's captions and images have a multiple of so many tokens


class Reversed(Transformer):
    """A transformer whose time steps go from 0, which is noise, to 1, and that predicts the velocity in that direction."""

    fractions = True

    def time_at(self, t: float) -> float:
        return 1 - t / TRAINED_STEPS

    def as_prediction(self, output: Tensor) -> Tensor:
        return -output


class Lumina2(Reversed):
    """Lumina2: captions with a mask, then the image."""

    @contextmanager
    def traced(self, constants: Mapping[str, Any]) -> Iterator[PlainCall]:
        """diffusers' own forward cuts each caption to its length. Here all keep the same number of tokens, and those that are
        none of a caption are masked: their order and number make no difference to the others.
        """
        module: Any = self.module
        tables, patch = _tables(module.rope_embedder.freqs_cis, self.device), module.config.patch_size

        def call(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
            mask = inputs["encoder_attention_mask"].bool()
            temb, captions = module.time_caption_embed(x, t, inputs["encoder_hidden_states"])
            lengths, (rows, columns) = mask.sum(1), (x.shape[2] // patch, x.shape[3] // patch)
            of_captions = _places(torch.arange(mask.shape[1], device=x.device).expand_as(mask))
            of_image = _grid(lengths, rows, columns)
            rotations = [_rotations(tables, places) for places in (of_captions, of_image)]
            tokens = module.x_embedder(_patches(x, patch))
            for layer in module.context_refiner:
                captions = layer(captions, mask, rotations[0])
            for layer in module.noise_refiner:
                tokens = layer(tokens, None, rotations[1], temb)
            joint = Pairs(torch.cat([part.values for part in rotations], 1))
            seen = torch.cat([mask, torch.ones_like(tokens[..., 0], dtype=torch.bool)], 1)
            tokens = torch.cat([captions, tokens], 1)
            for layer in module.layers:
                tokens = layer(tokens, seen, joint, temb)
            return _image(module.norm_out(tokens, temb)[:, mask.shape[1] :], rows, columns, patch)

        yield call


class ZImage(Reversed):
    """Z-Image: samples and captions come in lists, each caption with tokens of its own number.

    Its pipeline has the condition first, where others have it last: that guidance is the same with the two exchanged.
    """

    captions: ClassVar[str] = "cap_feats"
    counts: ClassVar[str] = "cap_tokens"  # (N,), how many each caption has; no argument of the module
    tokens: ClassVar[Mapping[str, int]] = {captions: 1}

    @property
    def condition(self) -> str | None:
        return self.captions

    def as_rows(self, arguments: dict[str, Any]) -> dict[str, Any]:
        samples, captions = (_tensors(arguments.get(name)) for name in (self.sample_name, self.captions))
        if not samples or not captions:
            return arguments
        if any(sample.shape != samples[0].shape or sample.shape[1] != 1 for sample in samples):
            raise ValueError("ZImageTransformer2DModel was called with samples of several sizes: allowed are images of one size")
        counts = torch.tensor([len(caption) for caption in captions], device=captions[0].device)
        rows = filled_rows(int(counts.max()))
        filled = torch.stack([F.pad(caption, (0, 0, 0, rows - len(caption))) for caption in captions])
        x = torch.stack(samples).squeeze(2)
        return {**arguments, self.sample_name: x, self.captions: filled, self.counts: counts}

    def as_arguments(self, rows: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(rows)
        counts = arguments.pop(self.counts).tolist()
        arguments[self.captions] = [caption[:count] for caption, count in zip(rows[self.captions], counts, strict=True)]
        arguments[self.sample_name] = self.as_result(rows[self.sample_name])
        return arguments

    def output_of(self, result: Any) -> Tensor:
        return torch.stack(list(super().output_of(result))).squeeze(2)

    def as_result(self, output: Tensor) -> list[Tensor]:
        return list(output.unsqueeze(2))

    def trimmed(self, inputs: Inputs) -> dict[str, Tensor]:
        count = _filled(int(inputs[self.counts].max()))
        return {**inputs, self.captions: inputs[self.captions][:, :count]}

    @contextmanager
    def traced(self, constants: Mapping[str, Any]) -> Iterator[PlainCall]:
        """diffusers' own forward takes lists apart. Here all captions keep the same number of tokens, and those beyond a
        caption's own multiple of CAPTION_ROWS are masked: their number makes no difference to the others.
        """
        module: Any = self.module
        embedder = module.rope_embedder
        raw = embedder.freqs_cis or embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, embedder.theta)
        tables, patch = _tables(raw, self.device), constants.get("patch_size", 2)
        size = f"{patch}-{constants.get('f_patch_size', 1)}"

        def call(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
            captions, counts = inputs[self.captions], inputs[self.counts]
            temb = module.t_embedder(t * module.t_scale).type_as(x)
            rows, columns = x.shape[2] // patch, x.shape[3] // patch
            count, missing = rows * columns, -(rows * columns) % CAPTION_ROWS
            tokens = module.all_x_embedder[size](_patches(x, patch))
            tokens = torch.cat([tokens, module.x_pad_token.expand(x.shape[0], missing, -1)], 1)
            index, lengths = torch.arange(captions.shape[1], device=x.device), _filled(counts)[:, None]
            captions = torch.where((index < counts[:, None])[..., None], module.cap_embedder(captions), module.cap_pad_token)
            mask = index < lengths
            of_captions = _rotations(tables, _places((1 + index).expand_as(mask)))
            of_image = _rotations(tables, F.pad(_grid(lengths[:, 0] + 1, rows, columns), (0, 0, 0, missing)))
            for layer in module.noise_refiner:
                tokens = layer(tokens, None, of_image, temb)
            for layer in module.context_refiner:
                captions = layer(captions, mask, of_captions)
            joint = Pairs(torch.cat([of_image.values, of_captions.values], 1))
            seen = torch.cat([torch.ones_like(tokens[..., 0], dtype=torch.bool), mask], 1)
            tokens = torch.cat([tokens, captions], 1)
            for layer in module.layers:
                tokens = layer(tokens, seen, joint, temb)
            tokens = module.all_final_layer[size](tokens, c=temb)[:, :count]
            return _image(tokens, rows, columns, patch)

        yield call


def _filled(count: Any) -> Any:
    """The next multiple of CAPTION_ROWS."""
    return -(-count // CAPTION_ROWS) * CAPTION_ROWS


def _patches(x: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, L, patch * patch * C), row by row."""
    parts = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (N, C, rows, patch, columns, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _image(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `_patches`."""
    parts = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # (N, rows, columns, patch, patch, C)
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _places(first: Tensor) -> Tensor:
    """Places (N, L, 3) of captions, which differ on the first axis."""
    return torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], -1)


def _grid(first: Tensor, rows: int, columns: int) -> Tensor:
    """Places (N, L, 3) of images: `first` (N,) on the first axis, then row and column."""
    row = torch.arange(rows, device=first.device).repeat_interleave(columns)
    column = torch.arange(columns, device=first.device).repeat(rows)
    return torch.stack([part.expand(first.shape[0], rows * columns) for part in (first[:, None], row, column)], -1)


def _tables(raw: Sequence[Tensor], device: torch.device) -> list[Pairs]:
    """Rotations by place, one table for each axis, on the device: diffusers keeps them on the CPU."""
    return [pairs_of(table.to(device)) for table in raw]


def _rotations(tables: Sequence[Pairs], places: Tensor) -> Pairs:
    """Of tokens at `places` (N, L, 3), by a table for each axis."""
    return Pairs(torch.cat([table.values[places[..., axis]] for axis, table in enumerate(tables)], -2))


def _tensors(values: Any) -> list[Tensor]:
    """A list of tensors; an empty one for anything else."""
    listed = isinstance(values, (list, tuple)) and all(isinstance(value, Tensor) for value in values)
    return list(values) if listed else []
