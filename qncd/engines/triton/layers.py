"""Integer layers that take the place of the fake-quantized ones, and the blocks of diffusers that they are fused in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.engines.triton import kernels
from qncd.engines.triton.kernels import Grid, Packed
from qncd.quant.attention import AttentionProducts, QuantAttnProcessor
from qncd.quant.layers import QuantConv2d, QuantLayer
from qncd.quant.quantizers import ActQuantizer
from qncd.quant.rotation import rotate
from qncd.quant.stepwise import StepwiseActQuantizer

Affine = tuple[Tensor, Tensor]
Rows = Callable[[tuple[int, ...]], Tensor]  # known time steps -> () int32: which of them a call is at


def make_grids(
    name: str, quantizer: ActQuantizer, rows: Rows, widest: int, smoothing: Sequence[Tensor | None] = (None,)
) -> list[Grid]:
    """The grid of each segment, whose channels are divided by `smoothing` (C,) first.

    Raises:
        ValueError: activations in floating point or wider than `widest` bits, or ranges without a common whole zero point.
    """
    codes = quantizer.codes
    if codes is None:
        raise ValueError(f"{name}: its activations are in floating point; backend triton runs integers only: pass --act_bit 8")
    if codes.bits > widest:
        raise ValueError(f"{name}: activations of {codes.bits} bits; backend triton has kernels for up to {widest}")
    known = quantizer.known if isinstance(quantizer, StepwiseActQuantizer) else (0,)
    scales, zeros = (v.view(len(known), -1) for v in (quantizer.scale.float(), quantizer.zero_point))
    grids = []
    for segment, factors in enumerate(smoothing):
        zero = int(zeros[0, segment])
        if not bool((zeros[:, segment] == zero).all()) or not codes.qmin <= zero <= codes.qmax:
            raise ValueError(f"{name}: a range without 0 or with a zero point for each time step: calibrate anew")
        stored = zero - codes.qmin - 128 if codes.bits == 8 else 0
        grids.append(Grid(scales[:, segment].contiguous(), rows(known), codes.qmin - zero, codes.qmax - zero, stored, factors))
    return grids


class IntegerLayer(nn.Module):
    """A convolution or linear layer that multiplies int8 codes.

    Args:
        name: for errors.
        layer: calibrated.
        rows: which time step a call is at.
        dtype: of the outputs.

    Raises:
        ValueError: naming the layer and what has no integer kernel.
    """

    def __init__(self, name: str, layer: QuantLayer, rows: Rows, dtype: torch.dtype) -> None:
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
            if layer.groups != 1 or set(layer.dilation) != {1} or len(strides) != 1 or isinstance(padding, str):
                raise ValueError(f"{name}: groups, dilation, two strides and named padding have no kernel in backend triton")
            if layer.padding_mode != "zeros":
                raise ValueError(f"{name}: padding {layer.padding_mode!r} has no kernel in backend triton; allowed is zeros")
            self.stride, self.pads = strides.pop(), (padding[0], padding[1], padding[0], padding[1])
        self.parts = layer.parts()
        factors = None if layer.smoothing is None else layer.smoothing.flatten().float()
        self.divided_by = factors if self.rotation is not None else None  # before the rotation: no part of the rounding
        rounded_with = factors if self.rotation is None else None
        self.grids = make_grids(
            name, layer.act, rows, 8, [None if rounded_with is None else rounded_with[part].contiguous() for part in self.parts]
        )
        codes = layer.weight_codes()
        codes = codes if codes.ndim == 4 else codes[:, :, None, None]
        self.weights = [Packed(codes[:, part], layer.weight_scale[:, i]) for i, part in enumerate(self.parts)]

    def codes(self, x: Tensor, layer_norm: nn.LayerNorm | None = None, **before: Any) -> list[Tensor]:
        """The codes of x (N, H, W, C) for each segment; `before` is what `kernels.pointwise` does first."""
        x, pads = x.contiguous(), before.pop("pads", (0, 0, 0, 0))
        if self.rotation is not None:
            x = self._rotated(x, layer_norm, before)
            layer_norm, before = None, {}
        if layer_norm is not None:
            return [kernels.layer_norm_codes(x, grid, layer_norm.weight, layer_norm.bias, layer_norm.eps) for grid in self.grids]
        pads = tuple(a + b for a, b in zip(pads, self.pads, strict=True))
        pieces = self.parts if len(self.parts) > 1 else [None]
        return [kernels.pointwise(x, grid, pads=pads, part=part, **before) for grid, part in zip(self.grids, pieces, strict=True)]

    def _rotated(self, x: Tensor, layer_norm: nn.LayerNorm | None, before: dict[str, Any]) -> Tensor:
        """What comes before the rounding, in floats: all of `before`, smoothing and rotation."""
        if layer_norm is not None:
            x = layer_norm(x)
        elif before:
            x = kernels.pointwise(x, dtype=x.dtype, **before)
        return rotate(x if self.divided_by is None else x / self.divided_by.to(x.dtype), self.rotation or 1, -1).contiguous()

    def product(
        self,
        codes: list[Tensor],
        embedding: Tensor | None = None,
        residual: Tensor | None = None,
        out_grid: Grid | None = None,
    ) -> Tensor:
        """Floats (N, H', W', O), with (N, O) and (N, H', W', O) added; or rounded, as `kernels.convolve` does."""
        out = None if residual is None else residual.contiguous()
        for i, (part, weight, grid) in enumerate(zip(codes, self.weights, self.grids, strict=True)):
            first, last = i == 0, i == len(codes) - 1
            out = kernels.convolve(
                part, weight, grid, self.dtype, self.stride, self.bias if first else None, embedding if first else None, out,
                out_grid if last else None,
            )  # fmt: skip
        assert out is not None
        return out


class IntegerConv2d(IntegerLayer):
    """(N, C, H, W) in channels-last memory -> (N, O, H', W') in the same."""

    def forward(self, x: Tensor, **before: Any) -> Tensor:
        """`before` is what `kernels.pointwise` does first; a layer with a branch has nothing before it."""
        out = self.product(self.codes(x.permute(0, 2, 3, 1), **before)).permute(0, 3, 1, 2)
        if self.branch is None:
            return out
        down, up = self.branch
        inner = F.conv2d(x.to(down.dtype), down, None, self.stride, self.pads[:2])
        return out + F.conv2d(inner, up[:, :, None, None])


class IntegerLinear(IntegerLayer):
    """(..., C) -> (..., O)."""

    def forward(self, x: Tensor, **before: Any) -> Tensor:
        """`before` is what `kernels.pointwise` does first; a layer with a branch has nothing before it."""
        out = self.product(self.codes(x.reshape(1, 1, -1, x.shape[-1]), **before))
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self.branch is None else out + F.linear(F.linear(x.to(self.dtype), self.branch[0]), self.branch[1])


def fusable(*layers: nn.Module | None) -> bool:
    """Whether layers (or None for none) run in integers and give nothing but the product of their codes."""
    return all(layer is None or (isinstance(layer, IntegerLayer) and layer.branch is None) for layer in layers)


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


class IntegerResnetBlock(nn.Module):
    """ResnetBlock2D with its norms, SiLU, time embedding and sum computed in the passes of its convolutions."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    conv_shortcut: Any
    time_emb_proj: Any

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.time_emb_proj, self.conv_shortcut, self.skip_time_act = block.time_emb_proj, block.conv_shortcut, block.skip_time_act

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        """Whether it computes what this class does."""
        embedding = block.time_emb_proj
        return (
            isinstance(block.nonlinearity, nn.SiLU)
            and block.upsample is block.downsample is None
            and block.time_embedding_norm == "default"
            and block.output_scale_factor == 1.0
            and fusable(block.conv1, block.conv2, block.conv_shortcut)
            and (not isinstance(embedding, IntegerLayer) or fusable(embedding))
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (N, E) -> (N, O, H, W)."""
        rows = x.permute(0, 2, 3, 1).contiguous()
        embedding = None
        if self.time_emb_proj is not None and temb is not None:
            if isinstance(self.time_emb_proj, IntegerLinear):
                embedding = self.time_emb_proj(temb, silu=not self.skip_time_act)
            else:
                embedding = self.time_emb_proj(temb if self.skip_time_act else nn.functional.silu(temb))
        inner = self.conv1.product(self.conv1.codes(rows, affine=self.norm1.affine_of(rows), silu=True), embedding)
        residual = rows if self.conv_shortcut is None else self.conv_shortcut.product(self.conv_shortcut.codes(rows))
        codes = self.conv2.codes(inner, affine=self.norm2.affine_of(inner), silu=True)
        return self.conv2.product(codes, residual=residual).permute(0, 3, 1, 2)


class IntegerUpsample(nn.Module):
    """Upsample2D with the pixels doubled while they are quantized."""

    def __init__(self, conv: IntegerConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """(N, C, H, W) -> (N, O, 2H, 2W), or (N, O, *output_size)."""
        if output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(x, up=True)
        return self.conv(nn.functional.interpolate(x, size=output_size, mode="nearest"))


class IntegerDownsample(nn.Module):
    """Downsample2D with the pixels padded while they are quantized."""

    def __init__(self, conv: IntegerConv2d, padding: int) -> None:
        super().__init__()
        self.conv, self.pads = conv, (0, 0, 1, 1) if padding == 0 else (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        return self.conv(x, pads=self.pads)


class IntegerGatedFeedForward(nn.Module):
    """FeedForward with GEGLU, computed while the second layer's input is quantized."""

    def __init__(self, first: IntegerLinear, second: IntegerLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def run(self, codes: list[Tensor], residual: Tensor | None = None) -> Tensor:
        """From the first layer's codes (N, H, W, pitch): (N, H, W, C)."""
        return self.second.product(self.second.codes(self.first.product(codes), gated=True), residual=residual)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.run(self.first.codes(x.reshape(1, 1, -1, x.shape[-1]))).view(*x.shape[:-1], -1)


def attention_grids(name: str, products: AttentionProducts, rows: Rows) -> tuple[list[Grid], Grid]:
    """The grids of q, k and v, and that of the softmax. Raises ValueError naming what has no kernel."""
    quantizers = (("q", products.q), ("k", products.k), ("v", products.v))
    grids = [make_grids(f"{name}.{part}", quantizer, rows, 8)[0] for part, quantizer in quantizers]
    softmax = make_grids(f"{name}.softmax", products.softmax, rows, 16)[0]
    if softmax.low != 0:
        raise ValueError(f"{name}.softmax: a zero point that is not 0 has no kernel in backend triton")
    return grids, softmax


def attend_on_codes(name: str, products: AttentionProducts, rows: Rows, dtype: torch.dtype) -> None:
    """Let a processor compute its products on codes, in place; what it does before and after them stays its own.

    Args:
        dtype: of the result.

    Raises:
        ValueError: naming what has no kernel.
    """
    grids, softmax = attention_grids(name, products, rows)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, upcast: bool) -> Tensor:
        side_by_side = [part.transpose(1, 2).flatten(2)[:, None].contiguous() for part in (query, key, value)]
        q, k, v = (
            kernels.pointwise(part, grid, dtype=torch.float16)[:, 0] for part, grid in zip(side_by_side, grids, strict=True)
        )
        out = kernels.attend(q, k, v, grids, softmax, query.shape[1], scale, dtype, mask)
        return out.unflatten(2, (query.shape[1], -1)).transpose(1, 2)

    object.__setattr__(products, "attend", attend)
    for operand in ("q", "k", "v"):
        setattr(products, operand, nn.Identity())


class IntegerAttnProcessor(nn.Module):
    """QuantAttnProcessor on codes: one kernel from q, k and v to the result."""

    def __init__(self, name: str, processor: QuantAttnProcessor, attn: Any, rows: Rows) -> None:
        super().__init__()
        self.grids, self.softmax = attention_grids(name, processor, rows)
        queries = attn.to_q.grids[0]
        self.shared = tuple(queries.same_as(layer.grids[0]) for layer in (attn.to_k, attn.to_v))

    def run(self, attn: Any, rows: Tensor, context: Tensor | None, residual: Tensor | None, **before: Any) -> Tensor:
        """From rows (N, H, W, C), and a context (N, 1, L2, C2): (N, H, W, O). `before`: see `IntegerLayer.codes`."""
        codes = attn.to_q.codes(rows, **before)
        query = attn.to_q.product(codes, out_grid=self.grids[0])
        key, value = (
            layer.product(
                layer.codes(context) if context is not None else codes if shared else layer.codes(rows, **before), out_grid=grid
            )
            for layer, shared, grid in zip((attn.to_k, attn.to_v), self.shared, self.grids[1:], strict=True)
        )
        q, k, v = (part.flatten(1, 2) for part in (query, key, value))
        out = kernels.attend(q, k, v, self.grids, self.softmax, attn.heads, attn.scale, attn.to_q.dtype)
        last: IntegerLayer = attn.to_out[0]
        return last.product(last.codes(out.view(query.shape)), residual=residual)

    # diffusers looks at the signature of __call__ itself to see which arguments a processor takes.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(N, L, C) or (N, C, H, W) in, the same shape out; `encoder_hidden_states` (N, L2, C2) for cross-attention."""
        if attention_mask is not None:
            raise ValueError("attention masks have no kernel in backend triton")
        spatial = hidden_states.ndim == 4
        rows = (hidden_states.permute(0, 2, 3, 1) if spatial else hidden_states[:, None]).contiguous()  # (N, H, W, C)
        affine = None if attn.group_norm is None else attn.group_norm.affine_of(rows)
        context = None if encoder_hidden_states is None else encoder_hidden_states[:, None]
        inside = attn.residual_connection and attn.rescale_output_factor == 1  # of the last kernel
        out = self.run(attn, rows, context, rows if inside else None, affine=affine)
        out = out.permute(0, 3, 1, 2) if spatial else out[:, 0]
        if attn.residual_connection and not inside:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class IntegerTransformer(nn.Module):
    """Transformer2DModel of BasicTransformerBlocks with its norms, GEGLU and sums computed in the passes of its products."""

    norm: Any
    proj_in: Any
    proj_out: Any

    def __init__(self, module: Transformer2DModel) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = module.norm, module.proj_in, module.proj_out
        self.blocks = module.transformer_blocks

    @staticmethod
    def fits(module: Transformer2DModel) -> bool:
        """Whether it computes what this class does."""
        return (
            module.is_input_continuous
            and fusable(module.proj_in, module.proj_out)
            and all(_block_fits(block) for block in module.transformer_blocks)
        )

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any) -> tuple[Tensor]:
        """(N, C, H, W), (N, L, D) -> (N, C, H, W), in a tuple of one."""
        if any(others.get(mask) is not None for mask in ("attention_mask", "encoder_attention_mask")):
            raise ValueError("attention masks have no kernel in backend triton")
        residual = hidden_states.permute(0, 2, 3, 1).contiguous()
        context = None if encoder_hidden_states is None else encoder_hidden_states[:, None]
        x = self.proj_in.product(self.proj_in.codes(residual, affine=self.norm.affine_of(residual)))
        block: Any
        for block in self.blocks:
            first = context if block.only_cross_attention else None
            x = block.attn1.processor.run(block.attn1, x, first, x, layer_norm=block.norm1)
            x = block.attn2.processor.run(block.attn2, x, context, x, layer_norm=block.norm2)
            x = block.ff.run(block.ff.first.codes(x, layer_norm=block.norm3), x)
        return (self.proj_out.product(self.proj_out.codes(x), residual=residual).permute(0, 3, 1, 2),)


def _block_fits(block: Any) -> bool:
    attentions = (getattr(block, "attn1", None), getattr(block, "attn2", None))
    return (
        getattr(block, "norm_type", "") == "layer_norm"
        and block.pos_embed is None
        and isinstance(block.ff, IntegerGatedFeedForward)
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in (block.norm1, block.norm2, block.norm3))
        and all(attn is not None and isinstance(attn.processor, IntegerAttnProcessor) for attn in attentions)
        and all(attn.rescale_output_factor == 1 and not attn.residual_connection for attn in attentions if attn is not None)
    )
