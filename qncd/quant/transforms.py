"""What a quantized layer does to its input and its weight beside rounding them: smoothing, rotation and a low-rank branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qncd.quant.quantizers import HALVES, ActQuantizer
from qncd.quant.rotation import check_block, rotate

BRANCH_BITS = 16  # of each number of a low-rank branch


class Transforms(nn.Module):
    """A layer whose product W x is computed as ((W - L) S R)(R^T S^-1 x) + L x: exact in floats, the first part rounds better.

    `weight` is (W - L) S R, what is rounded; S, R and L come in any order, each in place, before the weights are quantized.

    Attributes:
        rotation: channels of a block of R (`qncd.quant.rotation`), or None.
        channel_dim: of the input and the output.

    Buffers:
        smoothing: factors S that broadcast against the input, or None.
        down, up: (r, I, ...) and (O, r), L = up down, 16-bit numbers in the dtype of the weight, or None.
    """

    weight: Any
    weight_dtype: torch.dtype
    act: ActQuantizer
    weight_scale: Tensor | None
    smoothing: Tensor | None
    rotation: int | None
    down: Tensor | None
    up: Tensor | None
    channel_dim: int

    def _prepare_transforms(self) -> None:
        self.rotation = None
        for name in ("smoothing", "down", "up"):
            self.register_buffer(name, None)

    def parts(self) -> Sequence[slice]:
        """The input channels of each group that has ranges of its own."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up down x, of the shape of the layer's output."""
        raise NotImplementedError

    @torch.no_grad()
    def smooth_(self, factors: Tensor) -> None:
        """Divide input channels by `factors` (C,) from now on, and multiply them into the weight: exact in floats.

        Raises:
            ValueError: wrong number of factors, factors that are not positive, or weights already quantized.
        """
        channels = self.weight.shape[1]
        self._check_float("smoothing")
        if factors.shape != (channels,):
            raise ValueError(f"{tuple(factors.shape)} smoothing factors for {channels} input channels")
        if not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise ValueError("a smoothing factor is not a positive finite number")
        shaped = factors.to(self.weight).view(1, -1, *[1] * (self.weight.ndim - 2))
        self.weight = nn.Parameter(self._rotated(self.unrotated_weight() * shaped), requires_grad=False)
        self.smoothing = shaped if self.smoothing is None else self.smoothing * shaped

    @torch.no_grad()
    def rotate_(self, block: int) -> None:
        """Rotate the smoothed input in blocks of channels from now on, and the weight with it: exact in floats.

        Raises:
            ValueError: a block that does not fit the channels of each segment, a second rotation, or weights already quantized.
        """
        self._check_float("rotation")
        if self.rotation is not None:
            raise ValueError("the layer is rotated already")
        self.check_rotation(block)
        self.rotation = block
        self.weight = nn.Parameter(self._rotated(self.weight), requires_grad=False)

    def check_rotation(self, block: int) -> None:
        """Raise ValueError for a block that does not fit the channels of each segment."""
        check_block(block, [part.stop - part.start for part in self.parts()])

    def unrotated_weight(self) -> Tensor:
        """The weight by channels of the input: what it is without its rotation."""
        return self._rotated(self.weight)

    def _rotated(self, weight: Tensor) -> Tensor:
        return weight if self.rotation is None else rotate(weight.float(), self.rotation, 1).to(weight.dtype)

    @torch.no_grad()
    def split_off_(self, down: Tensor, up: Tensor) -> None:
        """Compute a low-rank part of the product beside the integers from now on, and take it out of the weight: exact in floats.

        Args:
            down: (r, I, ...), what the input is multiplied by first, before smoothing and rotation.
            up: (O, r); both as `branch_dtype` holds them.

        Raises:
            ValueError: wrong shapes, numbers that are not finite, a second branch, or weights already quantized.
        """
        self._check_float("a low-rank branch")
        shape = self.weight.shape
        if self.up is not None:
            raise ValueError("the layer has a low-rank branch already")
        if down.shape[1:] != shape[1:] or up.shape != (shape[0], len(down)):
            raise ValueError(f"a branch of {tuple(down.shape)} and {tuple(up.shape)} for a weight {tuple(shape)}")
        if not all(bool(torch.isfinite(part).all()) for part in (down, up)):
            raise ValueError("a low-rank branch holds NaN or infinity in 16 bits")
        # Laid out as a file holds them: kernels for other layouts round differently.
        self.down, self.up = (part.to(self.weight).contiguous() for part in (down, up))
        product = (self.up.float() @ self.down.float().flatten(1)).view(shape)
        if self.smoothing is not None:
            product *= self.smoothing
        self.weight = nn.Parameter(self.weight - self._rotated(product).to(self.weight.dtype), requires_grad=False)

    @property
    def branch_size(self) -> int:
        """Numbers of the low-rank branch, 0 without one."""
        return sum(part.numel() for part in (self.down, self.up) if part is not None)

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of the 16-bit numbers that a branch is made of."""
        return self.weight_dtype if self.weight_dtype in HALVES else torch.float16

    def _check_float(self, what: str) -> None:
        if self.weight_scale is not None:
            raise ValueError(f"{what} comes before the weights are quantized")

    def operand(self, x: Tensor) -> Tensor:
        """The input as `weight` multiplies it: smoothed, rotated, and as the quantizer leaves it."""
        if self.rotation is None:
            return self.act(x, self.smoothing)
        smoothed = x if self.smoothing is None else x / self.smoothing
        return self.act(rotate(smoothed, self.rotation, self.channel_dim), owned=True)

    def with_branch(self, product: Tensor, x: Tensor) -> Tensor:
        """The product in integers, and the low-rank branch of the input added to it."""
        if self.down is None or self.up is None:
            return product
        return product + self.low_rank(x, self.down, self.up)
