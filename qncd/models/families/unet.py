"""diffusers' UNet2DModel and UNet2DConditionModel: residual blocks with a time embedding, skip concatenations, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qncd.models.calls import Inputs
from qncd.models.families.attentions import PLAIN_PROCESSORS, known_attentions
from qncd.models.network import Network, TimePath
from qncd.models.seen import seen_inputs
from qncd.models.stretch import additive_factors, scale_shift_factors

EMBEDDING_LAYERS = ("time_embedding", "add_embedding", "time_emb_proj")  # by a part of their names
EXAMPLE_TOKENS = 7  # of a context; any number goes


class UNet(Network):
    """A UNet2DModel or UNet2DConditionModel."""

    block_types = (ResnetBlock2D, Attention, BasicTransformerBlock)

    @property
    def condition(self) -> str | None:
        if self.config.get("encoder_hid_dim_type") == "image_proj":
            return "added_cond_kwargs.image_embeds"  # which the context is made of
        if "cross_attention_dim" in self.config:
            return "encoder_hidden_states"
        return "class_labels" if getattr(self.module, "class_embedding", None) is not None else None

    def example(self, batch: int, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
        config, device = self.config, self.device
        further = ("addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "class_embed_type")
        if seen_inputs(self.module) is not None or any(config.get(name) for name in further):
            return super().example(batch, shape)
        if shape is None:
            size = config.sample_size
            shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        inputs = {
            "sample": torch.zeros(batch, *shape, device=device),
            "timestep": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        if self.condition == "encoder_hidden_states":
            inputs["encoder_hidden_states"] = torch.zeros(batch, EXAMPLE_TOKENS, config.cross_attention_dim, device=device)
        elif self.condition is not None:
            inputs[self.condition] = torch.zeros(batch, dtype=torch.int64, device=device)
        return inputs

    def edges(self) -> tuple[str, ...]:
        return ("conv_in", "conv_out")

    def embedding(self) -> set[str]:
        return {name for name in self.layers() if not set(name.split(".")).isdisjoint(EMBEDDING_LAYERS)}

    def splits(self) -> dict[str, int]:
        """The 1x1 shortcut of every residual block of the up path, as Q-Diffusion (arXiv 2302.04304) splits them.

        A grouped shortcut mixes no channels of the two halves in one sum, so it is left whole.
        """
        module: Any = self.module
        boundaries: dict[str, int] = {}
        middle = module.mid_block.resnets if module.mid_block is not None else []
        channels = middle[-1].out_channels if len(middle) else module.config.block_out_channels[-1]
        for i, block in enumerate(module.up_blocks):
            for j, resnet in enumerate(block.resnets):
                shortcut = getattr(resnet, "conv_shortcut", None)
                plain = isinstance(resnet, ResnetBlock2D) and isinstance(shortcut, nn.Conv2d) and shortcut.groups == 1
                if plain and channels < resnet.in_channels:
                    boundaries[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = channels
                channels = resnet.out_channels
        return boundaries

    def attentions(self) -> dict[str, Any]:
        return known_attentions(self.module, PLAIN_PROCESSORS)

    # The time embedding.

    @torch.no_grad()
    def embeddings(self, times: Sequence[float], inputs: Inputs | None = None) -> Tensor:
        """The embedding that every residual block receives: (T, E), times the number of classes or of calibration inputs.

        Raises:
            ValueError: conditions are added to the time embedding, and no calibration inputs are given.
        """
        module: Any = self.module
        visited = torch.tensor(sorted(set(times)), device=self.device)
        emb = module.time_embedding(module.time_proj(visited).to(self.dtype))  # (T, E)
        kind = self.config.get("addition_embed_type")
        if kind is not None:
            emb = self._with_added(emb, kind, inputs)
        if getattr(module, "class_embedding", None) is None:
            return emb
        return (emb[:, None] + self._classes(inputs)[None]).flatten(0, 1)

    def _with_added(self, emb: Tensor, kind: str, inputs: Inputs | None) -> Tensor:
        module: Any = self.module
        added = {name.partition(".")[2]: value for name, value in (inputs or {}).items() if name.startswith("added_cond_kwargs.")}
        if not added or not hasattr(module, "get_aug_embed"):
            raise ValueError(f"addition_embed_type {kind!r}: smoothing needs an embedding of time and class alone")
        count = max(map(len, added.values()))  # one row stands for all where they are alike
        places = torch.arange(min(count, 8)) * count // min(count, 8)  # evenly spread
        values = {name: value[places % len(value)].to(self.device, self.dtype) for name, value in added.items()}
        context = (inputs or {}).get("encoder_hidden_states")
        context = None if context is None else context[places % len(context)].to(self.device, self.dtype)
        extra = module.get_aug_embed(emb=emb[:1], encoder_hidden_states=context, added_cond_kwargs=values)
        if isinstance(extra, tuple):
            extra = extra[0]
        return emb if extra is None else (emb[:, None] + extra[None]).flatten(0, 1)

    def _classes(self, inputs: Inputs | None) -> Tensor:
        """(K, E) embeddings of all classes of a table, else of the calibration inputs' labels."""
        module: Any = self.module
        labels = (inputs or {}).get("class_labels")
        if isinstance(module.class_embedding, nn.Embedding):
            labels = torch.arange(module.class_embedding.num_embeddings, device=self.device)
        elif labels is None:
            raise ValueError("this model's class embedding is no table: calibration inputs have to hold class_labels")
        labels = labels.unique(dim=0).to(self.device)
        if self.config.get("class_embed_type") == "timestep":
            labels = module.time_proj(labels).to(self.dtype)
        elif labels.is_floating_point():
            labels = labels.to(self.dtype)
        return module.class_embedding(labels)

    @torch.no_grad()
    def stretch(self, times: Sequence[float], inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Of the second convolution of every residual block, by the block's own structure (QNCD, arXiv 2403.19140, 3.2)."""
        emb = self.embeddings(times, inputs)
        factors = {}
        for name, block in self.module.named_modules():
            if not isinstance(block, ResnetBlock2D) or block.time_emb_proj is None:
                continue
            projected = block.time_emb_proj(block.nonlinearity(emb))
            if block.time_embedding_norm == "scale_shift":
                per_step = scale_shift_factors(projected)
            elif block.time_embedding_norm == "default":
                per_step = additive_factors(projected, block.norm2)
            else:
                continue  # the embedding enters through the normalization itself: nothing to read off
            factors[f"{name}.conv2"] = per_step.mean(0)
        return factors

    def time_path(self) -> TimePath | None:
        module: Any = self.module
        if getattr(module, "class_embedding", None) is not None or self.config.get("addition_embed_type") is not None:
            return None
        blocks = {
            f"{name}.time_emb_proj": m
            for name, m in self.module.named_modules()
            if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None
        }
        if not blocks:
            return None
        first = next(iter(blocks.values()))
        projections = {name: block.time_emb_proj for name, block in blocks.items()}
        return TimePath(module, module.time_embedding, first.nonlinearity, projections)
