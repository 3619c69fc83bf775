"""Attention with quantized q, k, v and softmax output, as diffusers attention processors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qncd.granularity import PER_TENSOR, Granularity
from qncd.quant.affine import Codes
from qncd.quant.dynamic import make_quantizer

SCORE_ELEMENTS = 1 << 18  # attention scores computed at a time: 1 MiB, a core's second-level cache; one head's where it has more


class AttentionProducts(nn.Module):
    """The two matrix products of attention with a quantizer at each operand.

    q and k are quantized before the product and before the scale head_dim^-1/2, as in Q-Diffusion. The softmax
    output is never negative, so its integers are unsigned, with zero point 0. The products sum over the last axis of each operand
    but v, whose tokens they sum over.
    """

    def __init__(
        self,
        codes: Codes | None,
        softmax_codes: Codes | None,
        act_range: str,
        softmax_range: str | None = None,
        granularity: Granularity = PER_TENSOR,
    ) -> None:
        super().__init__()
        self.q = make_quantizer(codes, act_range, granularity)
        self.k = make_quantizer(codes, act_range, granularity)
        self.v = make_quantizer(codes, act_range, granularity, summed=(-2,))
        self.softmax = make_quantizer(softmax_codes, softmax_range or act_range, granularity)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, upcast: bool) -> Tensor:
        """softmax(scale q k^T + mask) v, (N, heads, L, D), in parts: at 64x64 one image's scores with 8 heads take 512 MiB."""
        query = query * scale
        parts = _score_parts(query, key)
        outs = []
        for part in parts:
            scores = query[part] @ key[part].transpose(-1, -2)  # (n, h, L, L2)
            if mask is not None:
                scores = scores + mask[part]
            if upcast:
                scores = scores.float()
            scores = scores.softmax(-1)
            weights = self.softmax(scores, owned=True, more=part is not parts[-1], images=part[0]).to(value.dtype)
            outs.append(weights @ value[part])
        if len(outs) == 1:
            return outs[0]
        return torch.cat([out.flatten(0, 1) for out in outs]).unflatten(0, query.shape[:2])


class QuantAttnProcessor(AttentionProducts):
    """The computation of diffusers' AttnProcessor."""

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
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (N, H*W, C)
        batch = hidden_states.shape[0]
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)  # (N, heads, L, D)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = None
        if attention_mask is not None:
            mask = mask_of_heads(attn, attention_mask, batch, context.shape[1])
        out = self.attend(self.q(query), self.k(key), self.v(value), mask, attn.scale, attn.upcast_softmax)
        out = out.transpose(1, 2).flatten(2)  # (N, L, C)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return torch.div(out, attn.rescale_output_factor) if attn.rescale_output_factor != 1 else out


def mask_of_heads(attn: Any, mask: Tensor, batch: int, keys: int) -> Tensor:
    """(N, heads, 1 or L, L2) of what diffusers' attention gets as a mask, for so many keys."""
    each: Tensor = attn.prepare_attention_mask(mask, keys, batch)
    return each.view(batch, attn.heads, -1, each.shape[-1])


class QuantizedProducts(AttentionProducts):
    """Another processor of diffusers, whose one call of torch's attention is computed here.

    What a model does in front of the product and after it stays the processor's own: normalized and rotated queries and keys,
    the tokens of several streams side by side, diffusers' attention dispatcher.

    Args:
        inner: the processor.
    """

    def __init__(
        self,
        inner: Any,
        codes: Codes | None,
        softmax_codes: Codes | None,
        act_range: str,
        softmax_range: str | None = None,
        granularity: Granularity = PER_TENSOR,
    ) -> None:
        super().__init__(codes, softmax_codes, act_range, softmax_range, granularity)
        self.inner = inner
        # diffusers looks at the signature of an instance's __call__ to see which arguments a processor takes.
        self.__dict__["__call__"] = inner.__call__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the processor. Raises ValueError where it does not call torch's attention once."""
        with _Intercepted(self) as seen:
            out = self.inner(*args, **kwargs)
        if seen.count != 1:
            raise ValueError(
                f"{type(self.inner).__name__} called torch's attention {seen.count} times, expected 1: set attention up before "
                "quantizing"
            )
        return out

    def product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's scaled_dot_product_attention, of (N, heads, L, D), without dropout."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
            attn_mask = attn_mask.expand(*query.shape[:2], *attn_mask.shape[-2:])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if attn_mask is None:
            return self.attend(self.q(query), self.k(key), self.v(value), None, scale, False)
        blind = torch.isneginf(attn_mask).all(-1, keepdim=True)  # queries that see no key get nothing, as in torch's attention
        seen = attn_mask.masked_fill(blind, 0)
        return self.attend(self.q(query), self.k(key), self.v(value), seen, scale, False).masked_fill(blind, 0)


class _Intercepted(TorchFunctionMode):
    """Within it, torch's attention is that of `products`."""

    def __init__(self, products: QuantizedProducts) -> None:
        super().__init__()
        self.products, self.count = products, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self.products.product(*args, **(kwargs or {}))


def _score_parts(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """(images, heads) of the parts in which attention is computed: whole images, or single heads of one that is too large."""
    images, heads, length = query.shape[:3]
    if query.requires_grad:  # back-propagation keeps all scores anyway
        return [(slice(0, images), slice(0, heads))]
    fitting = max(1, SCORE_ELEMENTS // (length * key.shape[2]))  # heads
    if fitting >= heads:
        step = fitting // heads
        return [(slice(i, i + step), slice(0, heads)) for i in range(0, images, step)]
    return [(slice(i, i + 1), slice(h, h + fitting)) for i in range(images) for h in range(0, heads, fitting)]
