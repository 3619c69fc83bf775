"""The first and the last layer of a quantized network, which are treated apart."""

from __future__ import annotations

from qncd.models.network import Network
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantLayer
from qncd.recipe import QuantConfig


def edge_layers(network: Network) -> tuple[str, ...]:
    """Names of the first and last layer of a network prepared by `quantize_`."""
    layers = list(quant_layers(network.module))
    return network.edges() or (layers[0], layers[-1])


def inner_layers(network: Network, config: QuantConfig) -> dict[str, QuantLayer]:
    """Layers by name whose channels are all in one product, without the edges where these have separate widths."""
    edges = edge_layers(network) if config.edge_bits is not None else ()
    layers = quant_layers(network.module)
    return {name: layer for name, layer in layers.items() if name not in edges and getattr(layer, "groups", 1) == 1}
