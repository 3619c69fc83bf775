"""A calibrated network in integers on a GPU: every layer on int8 codes, and each shape of a call recorded as a CUDA graph."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from qncd.engines.network import check_kernels
from qncd.engines.triton.blocks import (
    IntegerAttnProcessor,
    IntegerDownsample,
    IntegerGatedFeedForward,
    IntegerResnetBlock,
    IntegerTransformer,
    IntegerUpsample,
    attend_on_codes,
)
from qncd.engines.triton.deferred import plain
from qncd.engines.triton.fusion import Fusing
from qncd.engines.triton.grids import Grids
from qncd.engines.triton.layers import (
    ChannelsLastGroupNorm,
    IntegerConv2d,
    IntegerDepthwise,
    IntegerLinear,
    OncePerCall,
    RowsNorm,
    fusable,
)
from qncd.io.files import first_line
from qncd.models.network import Network
from qncd.models.seen import seen_constants, settings_of
from qncd.models.traceable import Traceable
from qncd.quant.attention import AttentionProducts, QuantAttnProcessor
from qncd.quant.inspection import quant_layers
from qncd.quant.layers import QuantConv2d
from qncd.quant.quantizers import HALVES

log = logging.getLogger("qncd")

WARM_UP_CALLS = 2  # before a call is recorded


class IntegerNetwork:
    """A calibrated network whose layers multiply int8 codes.

    Args:
        network: calibrated; it stays as it is, and its weights are not needed any more.
        dtype: float32 or float16, of what is not quantized.

    Raises:
        ValueError: naming a layer that has no integer kernel.
    """

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        check_kernels(network, "backend triton", tokens=True)
        self.grids, self.dtype = Grids(network.device), dtype
        self.settings = settings_of(network.module, seen_constants(network.module))
        self.network = copy.copy(network)
        self.network.module = self._converted(network)
        self.form = ExitStack()  # as long as this object: a form in which a graph can be recorded
        self.call = self.form.enter_context(self.network.traced(self.settings))
        self.one_step_a_call = any(len(known) > 1 for known in self.grids.tables)
        self.graphs: dict[tuple[Any, ...], tuple[Any, dict[str, Tensor], Tensor] | None] = {}  # None: cannot be recorded

    def _converted(self, calibrated: Network) -> nn.Module:
        original, read = calibrated.module, calibrated.read_layers()
        shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}  # deepcopy keeps what it knows
        network: Any = copy.deepcopy(original, shared)
        times: dict[Any, OncePerCall] = {}
        network._forward_pre_hooks.clear()  # the time steps of a call are told on the device
        for name, layer in quant_layers(network).items():
            if name in read:
                layer.weight_dtype = self.dtype
                continue
            kind: Any = IntegerConv2d if isinstance(layer, QuantConv2d) else IntegerLinear
            if isinstance(layer, QuantConv2d) and IntegerDepthwise.fits(layer):
                kind = IntegerDepthwise
            _replace(network, name, kind(name, layer, self.grids, self.dtype))
        for name, module in list(network.named_modules()):
            new: nn.Module | None = None
            if isinstance(module, nn.GroupNorm):
                new = ChannelsLastGroupNorm.from_norm(module)
            elif isinstance(module, Upsample2D) and (conv := _only_layer(module)):
                new = IntegerUpsample(conv)
            elif isinstance(module, Downsample2D) and (conv := _only_layer(module)):
                new = IntegerDownsample(conv, int(module.padding))
            elif isinstance(module, FeedForward):
                new = _gated(module)
            elif RowsNorm.fits(module):
                new = RowsNorm(module)
            elif isinstance(module, Timesteps):
                key = (module.num_channels, module.flip_sin_to_cos, module.downscale_freq_shift, module.scale)
                new = times.setdefault(key, OncePerCall(module))
            elif isinstance(getattr(module, "processor", None), AttentionProducts):
                self._convert_attention(name, module)
            if new is not None:
                _replace(network, name, new)
        for name, module in list(network.named_modules()):
            if isinstance(module, ResnetBlock2D) and IntegerResnetBlock.fits(module):
                _replace(network, name, IntegerResnetBlock(module))
            elif isinstance(module, Transformer2DModel) and IntegerTransformer.fits(module):
                _replace(network, name, IntegerTransformer(module))
        for module in network.modules():  # norms and what else stays in floats; the original keeps its own
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.dtype in HALVES:
                    setattr(module, name, buffer.to(self.dtype))
        return network

    def _convert_attention(self, name: str, module: Any) -> None:
        processor, layers = module.processor, [getattr(module, part, None) for part in ("to_q", "to_k", "to_v")]
        if isinstance(processor, QuantAttnProcessor):
            norms = (module.spatial_norm, module.norm_q, module.norm_k, module.norm_cross)
            if all(norm is None for norm in norms) and fusable(*layers, module.to_out[0]):
                module.set_processor(IntegerAttnProcessor(name, processor, self.grids))
                return
        attend_on_codes(name, processor, self.grids, self.dtype)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The network's inputs by name, the sample (N, C, H, W) float32 first, on the device -> its output, float32."""
        device = inputs[self.network.sample_name].device
        if device.type != "cuda":
            return self._run(inputs)
        key = tuple((name, value.shape) for name, value in inputs.items())
        with torch.cuda.device(device):
            if key not in self.graphs:
                self.graphs[key] = self._recorded(inputs)
            if (kept := self.graphs[key]) is None:
                return self._run(inputs)
            graph, places, out = kept
            for name, value in inputs.items():
                places[name].copy_(value)
            graph.replay()
            return out.clone()

    def _recorded(self, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor] | None:
        """A call as a CUDA graph; None where a part of the network takes something from the CPU as it runs."""
        places = {name: value.clone() for name, value in inputs.items()}
        try:
            graph, out = recorded(lambda: self._run(places))
        except RuntimeError as error:
            kind = type(self.network.module).__name__
            log.warning("%s cannot be recorded as a CUDA graph, its kernels start one by one: %s", kind, first_line(error))
            return None
        return graph, places, out

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        times = inputs[self.network.time_name]
        self.grids.select(times)
        times = times.to(self.dtype) if self.network.fractions else times  # as pipelines give them
        floats = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        x = floats.pop(self.network.sample_name)
        floats.pop(self.network.time_name)
        with Traceable(), Fusing():
            return plain(self.call(x, times, floats)).float().contiguous()


def recorded(call: Callable[[], Any]) -> tuple[Any, Any]:
    """(CUDA graph, what it leaves its results in) of a call on the current device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def _gated(module: FeedForward) -> IntegerGatedFeedForward | None:
    """Its replacement, where it is GEGLU between two integer layers and nothing else."""
    if not isinstance(module.net[0], GEGLU) or len(module.net) != 3:
        return None
    first, last = module.net[0].proj, module.net[2]
    if isinstance(first, IntegerLinear) and isinstance(last, IntegerLinear) and fusable(first, last):
        return IntegerGatedFeedForward(first, last)
    return None


def _only_layer(module: Upsample2D | Downsample2D) -> IntegerConv2d | None:
    """Its convolution, where it has that and more or fewer pixels, and nothing else."""
    conv: Any = module.conv
    return conv if module.norm is None and isinstance(conv, IntegerConv2d) and fusable(conv) else None


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
