"""Bits in the mean, against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
from quantized_networks import inputs, prepared

from qncd.models.network import network_of
from qncd.ptq.bits import counting_multiplications, mean_bits
from qncd.ptq.observing import run_over
from qncd.quant.inspection import quant_layers
from qncd.recipe import QuantConfig


def test_edges_and_softmax_count(make_unet: Any) -> None:
    """4-bit weights and activations, 8 bits at the first and the last layer, 16 at the softmax."""
    unet = prepared(make_unet(), QuantConfig(4, 4, softmax_bits=16))
    found = mean_bits(network_of(unet), inputs(unet, 2))
    layers = quant_layers(unet)
    edge = sum(layers[name].weight.numel() for name in ("conv_in", "conv_out"))
    whole = sum(layer.weight.numel() for layer in layers.values())
    assert found.weight_bits == pytest.approx((8 * edge + 4 * (whole - edge)) / whole)
    # Attention over 4x4 places of 32 channels: as many multiplications for q, k, v and the softmax.
    sites = [name for name, _ in unet.named_modules() if name.endswith(".processor")]
    product = 16 * 16 * 32
    counts: dict[str, int] = {}
    with counting_multiplications(unet, counts):
        run_over(network_of(unet), inputs(unet, 1), 1)
    assert all(counts[f"{site}.{operand}"] == product for site in sites for operand in ("q", "k", "v", "softmax")) and sites
    edges = ("conv_in.act", "conv_out.act")
    assert [counts[name] for name in edges] == [64 * layers[name.removesuffix(".act")].weight.numel() for name in edges]
    wide, softmax = sum(counts[name] for name in edges), product * len(sites)
    rest = sum(counts.values()) - wide - softmax
    assert found.act_bits == pytest.approx((8 * wide + 16 * softmax + 4 * rest) / (wide + softmax + rest))
    floating = mean_bits(network_of(prepared(make_unet(), QuantConfig(8, None))), inputs(unet, 2))
    assert floating.weight_bits == 8 and floating.act_bits == 32
