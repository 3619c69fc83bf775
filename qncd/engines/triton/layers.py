"""Integer layers that take the place of the fake-quantized ones, and the norms beside them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.engines.triton import kernels
from qncd.engines.triton.deferred import CALL, Multiplied, codes_of, deferred, plain, put_off_norm, rows_of, share
from qncd.engines.triton.grids import Grids
from qncd.engines.triton.operands import Grid, Norm, Packed, PackedDepthwise, Rounded, TokenGrid
from qncd.quant.layers import QuantConv2d, QuantLayer
from qncd.quant.rotation import rotate

Affine = tuple[Tensor, Tensor]


class IntegerLayer(nn.Module):
    """A convolution or linear layer that multiplies int8 codes.

    Args:
        name: for errors.
        layer: calibrated.
        grids: of the network.
        dtype: of the outputs.

    Raises:
        ValueError: naming the layer and what has no integer kernel.
    """

    packed: Any = Packed  # what lays out the codes of its weight
    of_images = False  # whether scales that are found at run time are those of images, not of tokens

    def __init__(self, name: str, layer: QuantLayer, grids: Grids, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.bias = dtype, None if layer.bias is None else layer.bias.detach().float()
        if layer.weight_scale is None or layer.config.weight_codes is None:
            raise ValueError(f"{name}: its weights are in floating point; backend triton runs integers only")
        if layer.weight_zero_point is not None or layer.config.weight_codes.bits > 8:
            raise ValueError(f"{name}: weights with zero points or more than 8 bits have no kernel in backend triton")
        # Some networks ask a layer for its weight's dtype.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=layer.weight_scale.device), requires_grad=False)
        self.rotation = layer.rotation
        self.branch = None if layer.down is None or layer.up is None else (layer.down.to(dtype), layer.up.to(dtype))
        self.stride, self.pads = 1, (0, 0, 0, 0)
        if isinstance(layer, QuantConv2d):
            strides, padding = set(layer.stride), layer.padding
            known = layer.groups == 1 or isinstance(self, IntegerDepthwise)
            if not known or set(layer.dilation) != {1} or len(strides) != 1 or isinstance(padding, str):
                which = "groups of channels, dilation, two strides and named padding"
                raise ValueError(f"{name}: {which} have no kernel in backend triton")
            if layer.padding_mode != "zeros":
                raise ValueError(f"{name}: padding {layer.padding_mode!r} has no kernel in backend triton; allowed is zeros")
            self.stride, self.pads = strides.pop(), (padding[0], padding[1], padding[0], padding[1])
        self.parts = layer.parts()
        factors = None if layer.smoothing is None else layer.smoothing.flatten().float()
        self.divided_by = grids.factors(factors) if self.rotation is not None else None  # before the rotation: no part of it
        rounded_with = factors if self.rotation is None else None
        self.grids = grids.make(
            name, layer.act, 8, [None if rounded_with is None else rounded_with[part].contiguous() for part in self.parts]
        )
        codes = layer.weight_codes()
        codes = codes if codes.ndim == 4 else codes[:, :, None, None]
        self.weights = [self.packed(codes[:, part], layer.weight_scale[:, i]) for i, part in enumerate(self.parts)]

    def codes(self, x: Tensor, **before: Any) -> list[Rounded]:
        """The codes of x for each segment: (N, H, W, C), tokens (N, L, C) or rows (..., C), which may be deferred.

        Args:
            before: what `kernels.pointwise` does first.
        """
        pads = tuple(a + b for a, b in zip(before.pop("pads", (0, 0, 0, 0)), self.pads, strict=True))
        if self.rotation is not None:
            x, before = self._rotated(x, before), {}
        if before and isinstance(self.grids[0], TokenGrid):
            x, before = kernels.pointwise(rows_of(plain(x)), dtype=self.dtype, **before), {}
        alone = len(self.parts) == 1 and not any(pads) and not before
        if alone and not (self.of_images and isinstance(self.grids[0], TokenGrid)):
            return [codes_of(x, self.grids[0])]
        x, pieces = rows_of(plain(x)), self.parts if len(self.parts) > 1 else [None]
        return [self._part_codes(x, grid, part, pads, before) for grid, part in zip(self.grids, pieces, strict=True)]

    def _part_codes(
        self, x: Tensor, grid: Grid | TokenGrid, part: slice | None, pads: tuple[int, ...], before: dict[str, Any]
    ) -> Rounded:
        if isinstance(grid, Grid):
            return Rounded(kernels.pointwise(x, grid, pads=pads, part=part, **before), grid)
        x = x if part is None else x[..., part].contiguous()
        return kernels.image_codes(x, grid, pads) if self.of_images else kernels.token_codes(x, grid)

    def _rotated(self, x: Tensor, before: dict[str, Any]) -> Tensor:
        """What comes before the rounding, in floats: all of `before`, smoothing and rotation."""

        def make() -> Tensor:
            floats = plain(x)
            if before:
                floats = kernels.pointwise(rows_of(floats), dtype=floats.dtype, **before)
            if self.divided_by is not None:
                floats = floats / self.divided_by.to(floats.dtype)
            return rotate(floats, self.rotation or 1, -1)

        return make() if before else share(x, (self.rotation, self.divided_by), make)

    def product(
        self,
        codes: list[Rounded],
        embedding: Tensor | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **behind: Any,
    ) -> Tensor:
        """Codes of each segment -> (N, H', W', O), with (N, O) and (N, H', W', O) added; `behind` is what comes after that."""
        out = None if residual is None else plain(residual).contiguous()
        for i, (part, weight) in enumerate(zip(codes, self.weights, strict=True)):
            first, last = i == 0, i == len(codes) - 1
            out = kernels.convolve(
                part, weight, dtype or self.dtype if last else self.dtype, self.stride, self.bias if first else None,
                plain(embedding) if first else None, residual=out, **(behind if last else {}),
            )  # fmt: skip
        assert out is not None
        return out


class IntegerConv2d(IntegerLayer):
    """(N, C, H, W) in channels-last memory -> (N, O, H', W') in the same."""

    of_images = True

    def forward(self, x: Tensor, **before: Any) -> Tensor:
        """`before` is what `kernels.pointwise` does first; a layer with a branch has nothing before it."""
        out = self.product(self.codes(x.permute(0, 2, 3, 1), **before)).permute(0, 3, 1, 2)
        if self.branch is None:
            return out
        down, up = self.branch
        inner = F.conv2d(x.to(down.dtype), down, None, self.stride, self.pads[:2])
        return out + F.conv2d(inner, up[:, :, None, None])


class IntegerDepthwise(IntegerConv2d):
    """A convolution of each channel by itself."""

    packed = PackedDepthwise

    @staticmethod
    def fits(layer: QuantConv2d) -> bool:
        """Whether each channel has a group and an output of its own."""
        return 1 < layer.groups == layer.in_channels == layer.out_channels

    def product(self, codes: list[Rounded], *_: Any, **__: Any) -> Tensor:
        """Codes (N, H, W, pitch) -> (N, H', W', C), alone: it is not `fusable`."""
        return kernels.depthwise(codes[0], self.weights[0], self.dtype, self.stride, self.bias)


class IntegerLinear(IntegerLayer):
    """(..., C) -> (..., O), put off within a call."""

    def forward(self, x: Tensor, **before: Any) -> Tensor:
        """`before` is what `kernels.pointwise` does first; a layer with a branch has nothing before it."""
        branch = None if self.branch is None else F.linear(F.linear(plain(x).to(self.dtype), self.branch[0]), self.branch[1])
        return self.put_off(self.codes(x, **before), x, branch)

    def put_off(self, codes: list[Rounded], x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The product of codes of what has the leading axes of x (..., C): (..., O), with (..., O) added."""
        shape = torch.Size((*x.shape[:-1], len(self.weights[0].codes)))
        return deferred(Multiplied(self, codes, shape, residual=residual), shape, self.dtype, x.device)


def fusable(*layers: nn.Module | None) -> bool:
    """Whether layers (or None for none) run in integers, give nothing but the product of their codes, and add what follows."""
    return all(
        layer is None or (isinstance(layer, IntegerLayer) and not isinstance(layer, IntegerDepthwise) and layer.branch is None)
        for layer in layers
    )


class ChannelsLastGroupNorm(nn.GroupNorm):
    """The same norm, whose outputs stay in channels-last memory."""

    @classmethod
    def from_norm(cls, norm: nn.GroupNorm) -> ChannelsLastGroupNorm:
        """With the same parameters."""
        new = cls(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        new.weight, new.bias = norm.weight, norm.bias
        return new

    def affine_of(self, x: Tensor) -> Affine:
        """What it multiplies x (N, H, W, C), contiguous, by and adds: (N, C) each."""
        return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...), the same shape out."""
        if x.ndim != 4:
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).contiguous()
        return kernels.pointwise(rows, affine=self.affine_of(rows), dtype=x.dtype).permute(0, 3, 1, 2)


class RowsNorm(nn.Module):
    """A root-mean-square norm in one kernel, put off within a call."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, getattr(norm, "bias", None), norm.eps

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it is a norm of the last axis that this class computes."""
        axes = module.dim if isinstance(module, RMSNorm) else module.normalized_shape if isinstance(module, nn.RMSNorm) else ()
        return len(axes) == 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), the same shape out."""
        dtype = x.dtype if self.weight is None else torch.promote_types(x.dtype, self.weight.dtype)
        epsilon = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return put_off_norm(x, Norm(epsilon, self.weight, self.bias, False), dtype)


class OncePerCall(nn.Module):
    """An embedding of time steps that several blocks compute, each for itself: DiT's."""

    def __init__(self, module: Timesteps) -> None:
        super().__init__()
        self.module = module

    def forward(self, timesteps: Tensor) -> Tensor:
        """(N,) -> (N, C)."""
        call = CALL.get()
        return self.module(timesteps) if call is None else call.once(self, timesteps, lambda: self.module(timesteps))
