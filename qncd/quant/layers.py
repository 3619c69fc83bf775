"""Convolution and linear layers with quantized weights and inputs, made from the float layers in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.granularity import PER_ROW, PER_TENSOR, ROW, Granularity, PerGroup
from qncd.quant.affine import Codes, float16_scale, group_scale, search_weight_scale, symmetric_scale
from qncd.quant.dynamic import make_quantizer
from qncd.quant.float8 import Float8Codes
from qncd.quant.packing import pack4, unpack4
from qncd.quant.quantizers import Stage
from qncd.quant.transforms import Transforms

CACHED = 1 << 17  # weights that a CPU makes of codes together: float32 numbers of its cache
ERROR_INPUTS = 4  # inputs that rounding_error looks at together: it holds two outputs at a time


@dataclass(frozen=True)
class LayerConfig:
    """Codes and ranges of one layer; None leaves that side in floating point.

    Attributes:
        segments: sizes of consecutive groups of input channels, each with its own ranges of weights and activations.
        weight_granularity: which inputs of a segment of a row share a scale, the weight being (O, n) once flattened.
        act_granularity: which values of the input share a scale; per tensor it is calibrated, else found at run time.
        act_differences: with scales found at run time, what is rounded is the difference to the time step before.
        new_bias: corrections may give the layer a bias where it has none.
    """

    weight_codes: Codes | None
    act_codes: Codes | None
    weight_range: str
    act_range: str
    segments: tuple[int, ...] | None = None
    weight_granularity: Granularity = PER_ROW
    act_granularity: Granularity = PER_TENSOR
    act_differences: bool = False
    new_bias: bool = True

    @property
    def grouped(self) -> bool:
        """Whether the weight has scales of groups: float16 numbers, which may be negative."""
        return isinstance(self.weight_granularity, PerGroup)

    def without_kernel(self, tokens: bool = False) -> str | None:
        """What of it an engine that computes in integers has no kernel for, in words.

        Args:
            tokens: it has one for scales of tokens, which are found at run time.
        """
        if self.weight_codes is not None and isinstance(self.weight_granularity, PerGroup):
            return f"weights with one scale for each {self.weight_granularity.size} inputs"
        of_tokens = tokens and self.act_granularity == PER_ROW and not self.act_differences
        if self.act_codes is not None and self.act_granularity != PER_TENSOR and not of_tokens:
            return "activations whose scales are found at run time" + (" for groups or differences" if tokens else "")
        return "fp8" if any(isinstance(codes, Float8Codes) for codes in (self.weight_codes, self.act_codes)) else None


class QuantLayer(Transforms):
    """What quantized convolutions and linear layers share.

    The weight stays a float tensor, on the integer grid once it is rounded, so a forward pass pays nothing for it; the codes
    that it was rounded to are kept beside it. A packed layer (`pack_weight_`) keeps the codes alone. Layout of scales: (O, K),
    one for each output channel and segment of input channels, or for each group of a segment of the row, then a float16 number
    that may be negative. Our own weights are symmetric; those of Q-Diffusion's checkpoints have zero points, counted from the
    smallest code.

    Attributes:
        summed: axes of the input that a product sums over.
        weight_shape, weight_dtype: (O, I, ...) and dtype of the weight, packed or not.

    Buffers:
        codes: int8, shape of the weight, packed (`config.weight_codes.pack`); None until the weight is rounded. No part of the
            state dict: it holds the weight. Of a packed layer they are part of it, and up to 4 bits what `pack4` makes of them.
        weight_scale, weight_zero_point: (O, K) float32, whatever the dtype of the network, or None.
        smoothing, down, up: as `Transforms` has them.
    """

    bias: Any
    config: LayerConfig
    weight_zero_point: Tensor | None
    codes: Tensor | None
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    summed: ClassVar[tuple[int, ...]]

    def _prepare(self, source: nn.Conv2d | nn.Linear, config: LayerConfig) -> None:
        self.weight, self.bias = source.weight, source.bias
        self.weight_shape, self.weight_dtype = source.weight.shape, source.weight.dtype
        self.config = config
        self.act = make_quantizer(
            config.act_codes, config.act_range, config.act_granularity, self.summed, config.segments, config.act_differences
        ).to(source.weight.device)  # fmt: skip
        self.register_buffer("weight_scale", None)
        self.register_buffer("weight_zero_point", None)
        self.register_buffer("codes", None, persistent=False)
        self._prepare_transforms()
        self.train(source.training)

    def parts(self) -> Sequence[slice]:
        """The input channels of each segment."""
        edges, start = [], 0
        for size in self.config.segments or (self.weight_shape[1],):
            edges.append(slice(start, start + size))
            start += size
        return edges

    @property
    def scale_shape(self) -> tuple[int, int]:
        """(O, K)."""
        return self.weight_shape[0], sum(map(len, self._group_sizes()))

    def _group_sizes(self) -> list[list[int]]:
        """How many inputs of the flattened row share a scale, one after another, for each segment."""
        taps = self.weight_shape[2:].numel()
        return [self.config.weight_granularity.sizes((part.stop - part.start) * taps) for part in self.parts()]

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Scales as the layer can have them: float16 numbers where they are those of groups, else any."""
        return float16_scale(scale) if self.config.grouped else scale

    @property
    def takes_shift(self) -> bool:
        """Whether there is a bias, or one may be made, for the mean error to go into."""
        return self.bias is not None or self.config.new_bias

    @torch.no_grad()
    def quantize_weight_(self) -> None:
        """Search the ranges where that is still to do, and round the weight to its grid. A second call changes nothing.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        self.search_weight_range_()
        if self.config.weight_codes is not None and self.codes is None:
            self.set_weight_codes(self.nearest_codes(), self.weight_scale)

    @torch.no_grad()
    def search_weight_range_(self) -> None:
        """Find the scales, once, and leave the weight as it is. Raises ValueError as `quantize_weight_`."""
        codes = self.config.weight_codes
        if codes is None or self.weight_scale is not None:
            return
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError("a weight is NaN or infinite")
        clip = self.config.weight_range == "mse"
        scales = []
        for part, sizes in zip(self.parts(), self._group_sizes(), strict=True):
            rows = self.weight[:, part].flatten(1).float()  # (O, n)
            if self.config.grouped:
                filled = F.pad(rows, (0, len(sizes) * sizes[0] - rows.shape[1]))  # zeros move no range
                scales.append(group_scale(filled.unflatten(1, (len(sizes), sizes[0])), codes, clip))
            elif clip:
                scales.append(search_weight_scale(rows, codes))
            else:
                scales.append(symmetric_scale(rows.abs().amax(1, keepdim=True), codes))
        self.weight_scale = torch.cat(scales, 1)

    @torch.no_grad()
    def nearest_codes(self) -> Tensor:
        """The weight's nearest codes as numbers, floats of its shape. Raises ValueError before the ranges are known."""
        codes = self.config.weight_codes
        if codes is None or self.weight_scale is None:
            raise ValueError("the weights have no range yet")
        return codes.round_(torch.div(self.weight, self.expanded_scale())).clamp_(codes.qmin, codes.qmax)

    @torch.no_grad()
    def rounded_weight(self) -> Tensor:
        """The weight on its grid, a new tensor; the weight itself where it stays in floating point or is rounded already."""
        if self.config.weight_codes is None or self.codes is not None:
            return self.weight
        return self.nearest_codes().mul_(self.expanded_scale()).to(self.weight.dtype)

    @torch.no_grad()
    def rounding_error(self, x: Tensor) -> Tensor:
        """Mean error (O,) that quantizing the weight and the input x leaves in this layer's output, scales being known."""
        stage, weight = self.act.stage, self._parameters["weight"]
        rounded = weight if self.codes is not None else nn.Parameter(self.rounded_weight(), requires_grad=False)
        total = torch.zeros(self.weight_shape[0], dtype=torch.float64, device=x.device)
        for start in range(0, len(x), ERROR_INPUTS):
            part = x[start : start + ERROR_INPUTS]
            exact = self(part)
            try:
                self.act.images, self.act.whole = slice(start, start + len(part)), len(x)
                self.act.set_stage(Stage.QUANTIZE)
                self.weight = rounded
                error = self(part).sub_(exact)
            finally:
                self.act.images = self.act.whole = None
                self.act.set_stage(stage)
                self.weight = weight
            channel = self.channel_dim % error.ndim
            total += error.mean([d for d in range(error.ndim) if d != channel]).double() * len(part)
        return total / len(x)

    @torch.no_grad()
    def shift_bias_(self, shift: Tensor) -> None:
        """Add `shift` (O,) to the bias, which is made where there was none and `takes_shift` allows it.

        Raises:
            ValueError: the shift is NaN or infinite.
        """
        if not self.takes_shift:
            return
        added = shift.to(self.weight)
        if not bool(torch.isfinite(added).all()):
            raise ValueError("the mean error of its output is NaN or infinite")
        self.bias = nn.Parameter(added if self.bias is None else self.bias + added, requires_grad=False)

    def weight_codes(self) -> Tensor:
        """The weight's codes, int8, shape of the weight, packed. Raises ValueError before the weight is rounded."""
        if self.codes is None:
            raise ValueError("the weights are not quantized yet")
        return self.codes if self.codes.dtype == torch.int8 else unpack4(self.codes, self.weight_shape)

    @torch.no_grad()
    def set_weight_codes(self, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None = None) -> None:
        """Take over codes, packed (int8) or as numbers (floats), `weight_scale` and `weight_zero_point` (O, K)."""
        form = self.config.weight_codes
        if form is None or scale is None or codes.shape != self.weight_shape or scale.shape != self.scale_shape:
            shape = None if scale is None else tuple(scale.shape)
            raise ValueError(f"codes {tuple(codes.shape)} and scales {shape} for a weight {tuple(self.weight_shape)}")
        device, self.weight_dtype = self.weight.device, self.weight.dtype
        self.weight_scale = scale.to(device, torch.float32)
        self.weight_zero_point = None if zero_point is None else zero_point.to(device)
        self.codes = (form.pack(codes) if codes.is_floating_point() else codes).to(device, torch.int8)
        self.weight = nn.Parameter(self._weight_of_codes(), requires_grad=False)

    def _weight_of_codes(self) -> Tensor:
        codes, scale, form = self.weight_codes(), self.weight_scale, self.config.weight_codes
        assert form is not None and scale is not None
        weight = torch.empty(self.weight_shape, dtype=self.weight_dtype, device=codes.device)
        rows = max(1, CACHED // self.weight_shape[1:].numel()) if codes.device.type == "cpu" else len(weight)
        for part in (slice(start, start + rows) for start in range(0, len(weight), rows)):
            steps = form.unpack(codes[part])
            if self.weight_zero_point is not None:
                steps -= self._shift(part)
            weight[part] = steps.mul_(self._expanded(scale[part]))
        return weight

    @property
    def packed(self) -> bool:
        """Whether the codes alone are kept."""
        return self._parameters["weight"] is None

    @torch.no_grad()
    def pack_weight_(self) -> None:
        """Keep the codes alone, at 4 bits and fewer two in a byte; `weight` is then made of them each time that it is asked for.

        The numbers are the same. A layer whose weight is not rounded stays as it is.
        """
        form = self.config.weight_codes
        if self.packed or self.codes is None or form is None:
            return
        codes = pack4(self.codes) if form.bits <= 4 else self.codes
        self.weight = None
        del self.codes  # a buffer is part of the state dict or not from its registration on
        self.register_buffer("codes", codes)

    @torch.no_grad()
    def unpack_weight_(self) -> None:
        """The inverse of `pack_weight_`."""
        if not self.packed:
            return
        codes, weight = self.weight_codes(), self.weight
        del self.codes
        self.register_buffer("codes", codes, persistent=False)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return self._weight_of_codes() if value is None and name == "weight" else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """Of `to`, `half` and so on: scales keep their digits, and a packed layer remembers what its weight would have become."""
        exact = {name: getattr(self, name) for name in ("weight_scale", "weight_zero_point")}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            if values is not None and getattr(self, name).dtype != values.dtype:
                setattr(self, name, values.to(getattr(self, name).device))
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        if self.codes is not None and f"{prefix}weight" in state:  # they follow the weight that was loaded
            codes, shift = self.config.weight_codes, self._shift()
            assert codes is not None
            found = codes.round_(torch.div(self.weight.detach().float(), self.expanded_scale()).add_(shift))
            self.set_weight_codes(found.clamp_(codes.qmin, codes.qmax), self.weight_scale, self.weight_zero_point)

    def expanded_scale(self) -> Tensor:
        """The scales as they broadcast against the weight: (O, 1, ...), (O, I, 1, ...) with segments, its shape with groups."""
        assert self.weight_scale is not None
        return self._expanded(self.weight_scale)

    def _shift(self, rows: slice = slice(None)) -> Tensor | float:
        """What a code is above the whole number of steps that it stands for, of some rows of the weight."""
        if self.weight_zero_point is None or self.config.weight_codes is None:
            return 0.0
        return self._expanded(self.weight_zero_point[rows]) + self.config.weight_codes.qmin

    def _expanded(self, values: Tensor) -> Tensor:
        shape, taps = self.weight_shape, [1] * (len(self.weight_shape) - 2)
        if self.config.grouped:
            widths = torch.tensor([size for sizes in self._group_sizes() for size in sizes], device=values.device)
            return values.repeat_interleave(widths, 1, output_size=shape[1:].numel()).view(-1, *shape[1:])
        if self.config.segments is None:
            return values.view(-1, 1, *taps)
        sizes = torch.tensor([s.stop - s.start for s in self.parts()], device=values.device)
        return values.repeat_interleave(sizes, 1, output_size=shape[1]).view(-1, shape[1], *taps)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A Conv2d whose input and weight lie on integer grids, made by `from_float`.

    Called with what a Conv2d takes, the class gives a Conv2d: peft makes an adapter's convolutions by calling the class of the
    layer that they stand beside, and those are in floating point.
    """

    channel_dim = 1
    summed = (-3, -2, -1)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def from_float(cls, source: nn.Conv2d, config: LayerConfig) -> QuantConv2d:
        """Wrap `source`; the weight is shared, not copied."""
        new: QuantConv2d = cls.__new__(cls)
        nn.Conv2d.__init__(
            new, source.in_channels, source.out_channels, source.kernel_size, source.stride, source.padding,  # type: ignore[arg-type]
            source.dilation, source.groups, source.bias is not None, source.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        new._prepare(source, config)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W'); by torch's name, because some networks call it so."""
        return self.with_branch(self._conv_forward(self.operand(input), self.weight, self.bias), input)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(self._conv_forward(x, down, None), up[:, :, None, None])


class QuantLinear(QuantLayer, nn.Linear):
    """A Linear whose input and weight lie on integer grids."""

    channel_dim = -1
    summed = ROW

    @classmethod
    def from_float(cls, source: nn.Linear, config: LayerConfig) -> QuantLinear:
        """Wrap `source`; the weight is shared, not copied."""
        new = cls(source.in_features, source.out_features, source.bias is not None, device="meta")
        new._prepare(source, config)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., O); by torch's name, because some networks call it so."""
        return self.with_branch(F.linear(self.operand(input), self.weight, self.bias), input)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)
