"""A UNet as an ONNX graph in which every quantized layer and attention product is one marker node.

The markers are operators of the domain "qncd" with the module's name; `qncd.engines.onnx.lowering` replaces them
by standard operators. Quantizers and weights never pass through the tracer: it sees shapes alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd.engines.packages import require
from qncd.quant.attention import QuantAttnProcessor
from qncd.quant.convert import UNet, quant_layers
from qncd.quant.layers import QuantConv2d, QuantLayer
from qncd.quant.stepwise import steps_not_selected

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "qncd"
LAYER, ATTENTION = "Layer", "Attention"  # the markers' operators
OPSET = 21  # the first with INT4 weights and 16-bit activations
EXAMPLE_TOKENS = 7  # of a context; any number goes
SMALLEST_TORCH = (2, 8)  # the first with torch.onnx.ops.symbolic


class _Network(nn.Module):
    """The UNet with plain tensors as inputs and output."""

    def __init__(self, unet: UNet, condition: str | None) -> None:
        super().__init__()
        self.unet, self.condition = unet, condition

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (N,), (N, ...) -> (N, C, H, W)."""
        given = {} if self.condition is None else {self.condition: condition}
        output: Tensor = self.unet(sample, timestep, **given).sample
        return output


def condition_input(unet: UNet) -> str | None:
    """The name of the UNet's argument for conditions: a context, class labels, or None for an unconditional network."""
    if "cross_attention_dim" in unet.config:
        return "encoder_hidden_states"
    return "class_labels" if getattr(unet, "class_embedding", None) is not None else None


def example_inputs(unet: UNet, batch: int, shape: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    """Zeros in the shape of one call, by the name of the input: sample, timestep and the condition if there is one.

    Args:
        shape: (C, H, W) of one sample; by default the network's own.

    Raises:
        ValueError: the network takes an embedding that no script of this package gives it.
    """
    config: Any = unet.config
    if getattr(config, "addition_embed_type", None) or getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError("networks with added embeddings (SDXL, image prompts) are not exported")
    if shape is None:
        size = config.sample_size
        shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    inputs = {
        "sample": torch.zeros(batch, *shape, device=unet.device),
        "timestep": torch.zeros(batch, dtype=torch.int64, device=unet.device),
    }
    name = condition_input(unet)
    if name == "encoder_hidden_states":
        inputs[name] = torch.zeros(batch, EXAMPLE_TOKENS, config.cross_attention_dim, device=unet.device)
    elif name is not None:
        inputs[name] = torch.zeros(batch, dtype=torch.int64, device=unet.device)
    return inputs


def _marker(kind: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=1)


@contextlib.contextmanager
def _marked(unet: UNet) -> Iterator[None]:
    """Within it, quantized layers and attention products are markers."""
    patched: list[tuple[nn.Module, str]] = []

    def patch(module: nn.Module, attribute: str, function: Any) -> None:
        object.__setattr__(module, attribute, function)
        patched.append((module, attribute))

    def layer_forward(name: str, layer: QuantLayer) -> Any:
        def forward(x: Tensor) -> Tensor:
            if isinstance(layer, QuantConv2d):
                # The shape alone: a convolution of meta tensors.
                weight = torch.empty(layer.weight.shape, device="meta")
                meta = torch.empty(x.shape, device="meta")
                shape: Any = F.conv2d(meta, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).shape
            else:
                shape = (*x.shape[:-1], layer.weight.shape[0])
            return _marker(LAYER, (x,), {"module": name}, shape)

        return forward

    def attend(name: str) -> Any:
        def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, upcast: bool) -> Tensor:
            if mask is not None:
                raise ValueError(f"{name}: attention with a mask is not exported")
            return _marker(ATTENTION, (query, key, value), {"module": name, "scale": float(scale)}, query.shape)

        return forward

    try:
        for name, layer in quant_layers(unet).items():
            patch(layer, "forward", layer_forward(name, layer))
        for name, module in unet.named_modules():
            if isinstance(module, QuantAttnProcessor):
                patch(module, "attend", attend(name))
                patch(module.q, "forward", lambda x: x)
                patch(module.k, "forward", lambda x: x)
                patch(module.v, "forward", lambda x: x)
        yield
    finally:
        for module, attribute in patched:
            object.__delattr__(module, attribute)


def _first_line(error: BaseException) -> str:
    """What went wrong at first: the exporter wraps it in general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def trace(unet: UNet, shape: tuple[int, int, int] | None = None) -> ir.Model:
    """The network as an ONNX graph with markers; batch and tokens are dynamic, channels, height and width are not.

    Args:
        unet: in floating point or quantized.
        shape: (C, H, W) of one sample; by default the network's own.

    Raises:
        ValueError: a package is missing, or the network cannot be traced.
    """
    require("onnxscript")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SMALLEST_TORCH:
        raise ValueError(f"exporting needs torch {'.'.join(map(str, SMALLEST_TORCH))} or newer, this is {torch.__version__}")
    network = _Network(unet, condition_input(unet)).eval()
    inputs = example_inputs(unet, 2, shape)
    # By name alone: with a range beside it a network is traced twice, since diffusers looks for batches of 64 and more.
    shapes: list[dict[int, str]] = [{0: "batch"} for _ in inputs]
    if "encoder_hidden_states" in inputs:
        shapes[-1][1] = "tokens"
    talkers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [talker.level for talker in talkers]
    with _marked(unet), steps_not_selected(unet), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network, tuple(inputs.values()), dynamo=True, opset_version=OPSET, dynamic_shapes=tuple(shapes),
                input_names=list(inputs), output_names=["noise"], verbose=False,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ValueError(f"the network cannot be traced: {_first_line(error)}") from error
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)
    assert program is not None
    return program.model
