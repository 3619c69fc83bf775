"""A network as an ONNX graph in which every quantized layer and attention product is one marker node.

The markers are operators of the domain "qncd" with the module's name; `qncd.engines.onnx.lowering` replaces them
by standard operators. Quantizers and weights never pass through the tracer: it sees shapes alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.engines.packages import require
from qncd.io.files import first_line
from qncd.models.calls import PlainCall
from qncd.models.network import Network
from qncd.models.seen import seen_constants, settings_of
from qncd.models.traceable import Traceable
from qncd.quant.attention import AttentionProducts
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantConv2d, QuantLayer
from qncd.quant.stepwise import steps_not_selected

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "qncd"
LAYER, ATTENTION = "Layer", "Attention"  # the markers' operators
OPSET = 21  # the first with INT4 weights and 16-bit activations
SMALLEST_TORCH = (2, 8)  # the first with torch.onnx.ops.symbolic


class _Traced(nn.Module):
    """A network with plain tensors as inputs and output.

    Args:
        call: what it computes (`qncd.models.network.Network.traced`).
        names: of its inputs.
    """

    def __init__(self, module: nn.Module, call: PlainCall, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.call, self.names = module, call, tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        """The tensors of `names`: (N, ...) samples, (N,) time steps and what else the network takes -> (N, ...)."""
        x, t, *others = values
        with Traceable():
            return self.call(x, t, dict(zip(self.names[2:], others, strict=True)))


def dynamic_axes(network: Network, shape: Sequence[int] | None = None) -> dict[str, dict[int, str]]:
    """Axes of any size of each input, by name: what grows with the batch in the network's example, and a prompt's tokens."""
    one, other = (network.example(batch, shape) for batch in (2, 3))
    axes: dict[str, dict[int, str]] = {}
    for name, value in one.items():
        sizes = zip(value.shape, other[name].shape, strict=True)
        axes[name] = {axis: "batch" for axis, (small, large) in enumerate(sizes) if small != large}
        if value.ndim > network.tokens.get(name, value.ndim):
            axes[name][network.tokens[name]] = "tokens"
    return axes


def _marker(kind: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=1)


@contextlib.contextmanager
def _marked(network: Network) -> Iterator[None]:
    """Within it, quantized layers and attention products are markers, and nobody watches the network's calls, as a runtime
    correction does: who counts samples ties the graph to their number.
    """
    patched: list[tuple[nn.Module, str]] = []
    module, read = network.module, network.read_layers()
    hooks = dict(module._forward_hooks)
    module._forward_hooks.clear()

    def patch(module: nn.Module, attribute: str, function: Any) -> None:
        object.__setattr__(module, attribute, function)
        patched.append((module, attribute))

    def layer_forward(name: str, layer: QuantLayer) -> Any:
        def forward(x: Tensor) -> Tensor:
            if isinstance(layer, QuantConv2d):
                # The shape alone: a convolution of meta tensors.
                weight = torch.empty(layer.weight_shape, device="meta")
                meta = torch.empty(x.shape, device="meta")
                shape: Any = F.conv2d(meta, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).shape
            else:
                shape = (*x.shape[:-1], layer.weight_shape[0])
            return _marker(LAYER, (x,), {"module": name}, shape)

        return forward

    def attend(name: str) -> Any:
        def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, upcast: bool) -> Tensor:
            operands = (query, key, value) if mask is None else (query, key, value, mask)
            return _marker(ATTENTION, operands, {"module": name, "scale": float(scale)}, query.shape)

        return forward

    try:
        for name, layer in quant_layers(module).items():
            patch(layer, "forward", layer_forward(name, layer))
            if layer.packed:  # who else asks for its weight wants to know the dtype
                shape = torch.zeros((), dtype=layer.weight_dtype).expand(layer.weight_shape)
                patch(layer, "weight", layer.weight if name in read else shape)
        for name, part in module.named_modules():
            if isinstance(part, AttentionProducts):
                patch(part, "attend", attend(name))
                patch(part.q, "forward", lambda x: x)
                patch(part.k, "forward", lambda x: x)
                patch(part.v, "forward", lambda x: x)
        yield
    finally:
        module._forward_hooks.update(hooks)
        for part, attribute in patched:
            object.__delattr__(part, attribute)


def _first_cause(error: BaseException) -> str:
    """What went wrong at first: the exporter wraps it in general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def trace(network: Network, shape: Sequence[int] | None = None) -> ir.Model:
    """The network as an ONNX graph with markers; batch and tokens are dynamic, channels, height and width are not.

    Args:
        network: in floating point or quantized.
        shape: of one sample, (C, H, W); by default the network's own.

    Raises:
        ValueError: a package is missing, or the network cannot be traced.
    """
    require("onnxscript")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SMALLEST_TORCH:
        raise ValueError(f"exporting needs torch {'.'.join(map(str, SMALLEST_TORCH))} or newer, this is {torch.__version__}")
    kind = type(network.module).__name__
    settings = settings_of(network.module, seen_constants(network.module))
    inputs = network.example(2, shape)
    # By name alone: with a range beside it a network is traced twice, since diffusers looks for batches of 64 and more.
    shapes = tuple(dynamic_axes(network, shape).values())
    talkers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [talker.level for talker in talkers]
    with (
        network.traced(settings) as call,
        _marked(network),
        steps_not_selected(network.module),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _Traced(network.module, call, list(inputs)).eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET,
                dynamic_shapes=(shapes,), input_names=list(inputs), output_names=["noise"], verbose=False,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ValueError(f"{kind} cannot be traced: {_first_cause(error)}") from error
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)
    assert program is not None
    _drop_idle_squeezes_(program.model)
    return program.model


def _drop_idle_squeezes_(model: ir.Model) -> None:
    """Take out what squeezes an axis of another size than 1: torch leaves those as they are, the operator is refused."""
    from onnx_ir import convenience

    for node in list(model.graph):
        if node.op_type != "Squeeze" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs
        assert x is not None and axes is not None
        chosen = convenience.get_const_tensor(axes)
        if x.shape is None or chosen is None:
            continue
        sizes = [x.shape[int(axis)] for axis in chosen.numpy().reshape(-1)]
        if all(isinstance(size, int) and size != 1 for size in sizes):
            convenience.replace_all_uses_with(node.outputs[0], x)
            model.graph.remove(node, safe=True)
