"""Blocks of diffusers in integers: those of UNets with everything in the passes of their products, and attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from qncd.engines.triton import kernels
from qncd.engines.triton.deferred import Scaled, deferred, plain, put_off_norm, rows_of
from qncd.engines.triton.grids import Grids
from qncd.engines.triton.layers import IntegerConv2d, IntegerLayer, IntegerLinear, fusable
from qncd.engines.triton.operands import Norm
from qncd.quant.attention import AttentionProducts, QuantAttnProcessor, mask_of_heads


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
                embedding = self.time_emb_proj(temb, act="" if self.skip_time_act else "silu")
            else:
                embedding = self.time_emb_proj(temb if self.skip_time_act else nn.functional.silu(temb))
        inner = self.conv1.product(self.conv1.codes(rows, affine=self.norm1.affine_of(rows), act="silu"), embedding)
        residual = rows if self.conv_shortcut is None else self.conv_shortcut.product(self.conv_shortcut.codes(rows))
        codes = self.conv2.codes(inner, affine=self.norm2.affine_of(inner), act="silu")
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), put off within a call."""
        return self.second.put_off(self.second.codes(self.first.product(self.first.codes(x)), gated=True), x)


def attend_on_codes(name: str, products: AttentionProducts, grids: Grids, dtype: torch.dtype) -> None:
    """Let a processor compute its products on codes, in place; what it does before and after them stays its own.

    Args:
        dtype: of the result.

    Raises:
        ValueError: naming what has no kernel.
    """
    operands, softmax = grids.of_attention(name, products)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, upcast: bool) -> Tensor:
        side_by_side = [part.transpose(1, 2).flatten(2)[:, None].contiguous() for part in (query, key, value)]
        q, k, v = (
            kernels.pointwise(part, grid, dtype=torch.float16)[:, 0] for part, grid in zip(side_by_side, operands, strict=True)
        )
        out = kernels.attend(q, k, v, operands, softmax, query.shape[1], scale, dtype, mask)
        return out.unflatten(2, (query.shape[1], -1)).transpose(1, 2)

    object.__setattr__(products, "attend", attend)
    for operand in ("q", "k", "v"):
        setattr(products, operand, nn.Identity())


class IntegerAttnProcessor(nn.Module):
    """QuantAttnProcessor on codes: one kernel from q, k and v to the result."""

    def __init__(self, name: str, processor: QuantAttnProcessor, grids: Grids) -> None:
        super().__init__()
        self.operands, self.softmax = grids.of_attention(name, processor)

    def attend(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """From x (N, H, W, C) or (N, L, C), which may be deferred, and contexts (N, L2, C2): what to_out gets, (N, H, W, D)."""
        sources = (x, x if context is None else context, x if context is None else context)
        rounded = [
            layer.product(layer.codes(source), dtype=torch.float16, out_grid=grid)
            for layer, source, grid in zip((attn.to_q, attn.to_k, attn.to_v), sources, self.operands, strict=True)
        ]
        q, k, v = (part.flatten(1, 2) for part in rounded)
        out = kernels.attend(q, k, v, self.operands, self.softmax, attn.heads, attn.scale, attn.to_q.dtype, mask)
        return out.view(rounded[0].shape)

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
        spatial, mask = hidden_states.ndim == 4, None
        rows = x = hidden_states.permute(0, 2, 3, 1).contiguous() if spatial else hidden_states
        if attn.group_norm is not None:
            source = rows_of(plain(rows))
            x = deferred(Scaled(source, attn.group_norm.affine_of(source)), source.shape, source.dtype, source.device)
        if attention_mask is not None:
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            mask = mask_of_heads(attn, attention_mask, len(hidden_states), keys.shape[1])
        out = self.attend(attn, x, encoder_hidden_states, mask)
        out = attn.to_out[0](out if spatial else out[:, 0])
        if attn.residual_connection:
            out = out + rows
        out = plain(out).permute(0, 3, 1, 2) if spatial else out
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
        x = self.proj_in.product(self.proj_in.codes(residual, affine=self.norm.affine_of(residual)))
        block: Any
        for block in self.blocks:
            first = encoder_hidden_states if block.only_cross_attention else None
            x = x + _attended(block.attn1, _normed(block.norm1, x), first)
            x = x + _attended(block.attn2, _normed(block.norm2, x), encoder_hidden_states)
            x = x + block.ff(_normed(block.norm3, x))
        return (self.proj_out.product(self.proj_out.codes(x), residual=residual).permute(0, 3, 1, 2),)


def _attended(attn: Any, x: Tensor, context: Tensor | None) -> Tensor:
    result: Tensor = attn.to_out[0](attn.processor.attend(attn, x, context))
    return result


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return put_off_norm(x, Norm(norm.eps, norm.weight, norm.bias), x.dtype)


def _block_fits(block: Any) -> bool:
    attentions = (getattr(block, "attn1", None), getattr(block, "attn2", None))
    return (
        getattr(block, "norm_type", "") == "layer_norm"
        and block.pos_embed is None
        and isinstance(block.ff, IntegerGatedFeedForward)
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2, block.norm3))
        and all(attn is not None and isinstance(attn.processor, IntegerAttnProcessor) for attn in attentions)
        and all(attn.rescale_output_factor == 1 and not attn.residual_connection for attn in attentions if attn is not None)
    )
