"""The activation quantizer: observing is a phase of its own, quantizing reads buffers only."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qncd.quant.affine import Codes
from qncd.quant.observers import Observer, make_observer

HALVES = (torch.float16, torch.bfloat16)


class Stage(enum.Enum):
    """What an activation quantizer does with its input."""

    FLOAT = "float"  # nothing but the smoothing division
    OBSERVE = "observe"  # the same, and shows it to the observers
    QUANTIZE = "quantize"  # rounds it to the integer grid


class ActQuantizer(nn.Module):
    """Per-tensor fake quantization of one activation, or of each half of a skip concatenation.

    Args:
        codes: what values are rounded to, or None to leave activations in floating point.
        act_range: "mse", "max" or "running".
        segments: sizes of consecutive channel groups (dimension 1), each with its own range.

    Buffers:
        scale (K,) float32 and zero_point (K,) float32 holding whole numbers, K the number of segments.
    """

    calibrated = True  # its ranges are found on a calibration set, and are part of a checkpoint
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Codes | None, act_range: str, segments: Sequence[int] | None = None) -> None:
        super().__init__()
        self.codes = codes
        self.act_range = act_range
        self.segments = tuple(segments) if segments else None
        self.stage = Stage.FLOAT
        self.observers: list[Observer] = []
        self.more_follows = False  # while observing: the inputs are a part of a batch
        self.images: slice | None = None  # which of the network's inputs come next, where they are a part of a batch
        self.whole: int | None = None  # length of the input that `images` are a part of, where it is no row for each sample
        count = len(self.segments) if self.segments else 1
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("zero_point", torch.zeros(count))
        self._bounds = [(0.0, 0.0)] * count  # qmin - z and qmax - z of each segment, as numbers: twice as quick

    def set_bits(self, bits: int) -> None:
        """Codes of another width; the scales that fit them are not known yet. Raises ValueError where there are no codes."""
        if self.codes is None:
            raise ValueError(f"bits {bits}: the activation stays in floating point")
        self.codes = self.codes.of_width(bits)
        self._refresh_bounds()

    def set_stage(self, stage: Stage) -> None:
        """Enter a stage; entering OBSERVE starts with fresh observers."""
        if self.codes is None:
            return
        if stage is Stage.OBSERVE:
            self.observers = [make_observer(self.act_range) for _ in range(self.scale.numel())]
        self.stage = stage

    def finish_observing(self) -> None:
        """Turn what the observers saw into scales and zero points, and forget it. Raises ValueError if they saw nothing."""
        if self.codes is None:
            return
        pairs = [observer.qparams(self.codes) for observer in self.observers]
        scale, zero_point = (torch.stack(values).view_as(self.scale) for values in zip(*pairs, strict=True))
        self.set_qparams(scale, zero_point)
        self.observers = []

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, (K,) each. Raises ValueError for another shape, or scales that are not positive."""
        if scale.shape != self.scale.shape or zero_point.shape != self.zero_point.shape:
            raise ValueError(f"scale of shape {tuple(scale.shape)}: expected {tuple(self.scale.shape)}")
        if not bool((torch.isfinite(scale) & (scale > 0) & torch.isfinite(zero_point)).all()):
            raise ValueError("an activation scale is not a positive finite number")
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._refresh_bounds()

    def _refresh_bounds(self) -> None:
        if self.codes is not None and not self.zero_point.is_meta:
            self._bounds = [(self.codes.qmin - z, self.codes.qmax - z) for z in self.zero_point.tolist()]

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._refresh_bounds()

    def forward(
        self,
        x: Tensor,
        smoothing: Tensor | None = None,
        owned: bool = False,
        more: bool = False,
        images: slice | None = None,
    ) -> Tensor:
        """`x` divided by `smoothing` and rounded to the grid, same shape.

        Args:
            x: any shape; (N, C, ...) where there are segments.
            smoothing: factors S that broadcast against x. In the QUANTIZE stage the division by S is merged with the
                quantizer's own: round(x / (S*s)).
            owned: nobody else needs `x`: it may be overwritten, where no gradient flows.
            more: `x` is a part of a batch and others follow: "running" ranges move once a batch.
            images: which of the network's inputs `x` belongs to, where it is a part of a batch.
        """
        images = images or self.images
        if self.stage is Stage.QUANTIZE:
            return self._fake_quantize(x, smoothing, owned, images)
        if smoothing is not None:
            x = x / smoothing
        if self.stage is Stage.OBSERVE:
            self._observe(x, more or self.more_follows, images)
        return x

    def _observe(self, x: Tensor, more: bool, images: slice | None) -> None:
        for observer, part in zip(self.observers, self._split(x), strict=True):
            observer.observe(part, more)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(self.segments, 1) if self.segments else (x,)

    def _fake_quantize(self, x: Tensor, smoothing: Tensor | None, owned: bool, images: slice | None) -> Tensor:
        if self.scale.requires_grad:
            return self._straight_through(x, smoothing)
        return self._to_grid(x, smoothing, owned, self.scale, self._bounds)

    def _to_grid(
        self, x: Tensor, smoothing: Tensor | None, owned: bool, scales: Tensor, bounds: Sequence[tuple[float, float]]
    ) -> Tensor:
        """With scales (K,) and bounds of each segment."""
        # clamp(round(x/s) + z, qmin, qmax) - z = clamp(round(x/s), qmin - z, qmax - z): one pass over memory fewer.
        if x.dtype in HALVES:  # codes of more than 8 bits, and the quotients, need more digits
            return narrowed(self._to_grid(x.float(), None if smoothing is None else smoothing.float(), True, scales, bounds), x)
        assert self.codes is not None
        if self.segments is None:
            scale = scales[0]
            divisor = scale if smoothing is None else smoothing * scale
            divided = x.div_(divisor) if owned and not x.requires_grad else torch.div(x, divisor)
            return self.codes.round_(divided).clamp_(*bounds[0]).mul_(scale)
        scale = self._expanded(scales, x)
        out = self.codes.round_(torch.div(x, scale if smoothing is None else smoothing * scale))
        if out.requires_grad:  # gradients do not flow through parts that are changed in place
            return torch.cat([part.clamp(*limits) for part, limits in zip(self._split(out), bounds, strict=True)], 1) * scale
        for part, limits in zip(self._split(out), bounds, strict=True):
            part.clamp_(*limits)
        return out.mul_(scale)

    def _straight_through(self, x: Tensor, smoothing: Tensor | None) -> Tensor:
        """The same values with gradients, as if rounding did nothing: to x where it is not clipped, and to the scales.

        The scale's is that of LSQ (arXiv 1902.08153, eq. 3): round(x/s) - x/s within the range, the bound outside; what
        rounds into the range counts as within.
        """
        scale = self._expanded(self.scale, x)
        divided = x / (scale if smoothing is None else smoothing * scale)
        rounded = divided.detach().round()
        codes = [part.clamp(*bounds) for part, bounds in zip(self._split(rounded), self._bounds, strict=True)]
        clipped = codes[0] if len(codes) == 1 else torch.cat(codes, 1)
        return (clipped + (divided - divided.detach()) * (clipped == rounded)) * scale  # the difference is 0 but for gradients

    def _expanded(self, scales: Tensor, x: Tensor) -> Tensor:
        """Scales (K,) as they broadcast against x."""
        if self.segments is None:
            return scales[0]
        return scales.repeat_interleave(torch.tensor(self.segments, device=x.device)).view(1, -1, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"bits={self.codes.bits if self.codes else None}, segments={self.segments}, stage={self.stage.value}"


def narrowed(wide: Tensor, like: Tensor) -> Tensor:
    """Values on a grid in the dtype of `like`, beyond which the grid's last step may lie. Overwrites them."""
    largest = torch.finfo(like.dtype).max
    return wide.clamp_(-largest, largest).to(like.dtype)
