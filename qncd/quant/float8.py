"""Eight bits of floating point instead of an integer: the numbers of torch.float8_e4m3fn (Micikevicius et al., arXiv 2209.05433).

One bit of sign, four of exponent, three of mantissa: steps grow with the numbers, from 2^-9 below 2^-6 to 32 between 256 and
448, the largest. There are no infinities, and rounding is to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LARGEST = 448


@dataclass(frozen=True)
class Float8Codes:
    """The same as `qncd.quant.affine.IntegerRange` is for integers: what x / scale is rounded to. It needs no zero point."""

    bits: ClassVar[int] = 8
    signed: ClassVar[bool] = True
    qmin: ClassVar[int] = -LARGEST
    qmax: ClassVar[int] = LARGEST
    ceiling: ClassVar[int] = 512
    file_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def of_width(self, bits: int) -> Float8Codes:
        """Raises ValueError for another width."""
        if bits != self.bits:
            raise ValueError(f"bits {bits}: fp8 has {self.bits}")
        return self

    def round_(self, steps: Tensor) -> Tensor:
        """The nearest numbers, in place."""
        limited = steps.detach().clamp(self.qmin, self.qmax)  # what lies beyond would become NaN
        return steps.copy_(limited.to(self.file_dtype))

    def pack(self, values: Tensor) -> Tensor:
        """Numbers of the grid as their bits, int8 of the same shape."""
        return values.to(self.file_dtype).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, float32."""
        return packed.view(self.file_dtype).to(torch.float32)
