"""Transformers to train: a class-conditional DiT that predicts noise, and Stable Diffusion 3's MMDiT under rectified flow.

Each is a small pipeline of diffusers around a trained autoencoder, with its objective. Sizes and further settings are a section
of a yaml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from qncd.models.original.autoencoders import FirstStage
from qncd.models.original.clip_tokenizer import small_tokenizer
from qncd.training.diffusion import dropped, noised

NO_CLASS = 1000  # DiTPipeline's label for none
ABSENT_TOKENS = 256  # of a third text encoder that is not there: the default of max_sequence_length
SHARE_OF_ABSENT = 0.25
SIZES = ("num_layers", "num_attention_heads", "attention_head_dim")


@dataclass(frozen=True)
class Trainee:
    """A pipeline whose parts an objective trains.

    Attributes:
        pipe: with random weights in what is trained.
        objective: of a batch of latents (N, C, H, W) and one row of what each is conditioned on.
        rows: conditions of images -> tensors of first dimension N, which the objective takes behind the latents.
        parts: names of the pipeline's components, each with the name that it has in the objective.
    """

    pipe: Any
    objective: nn.Module
    rows: Any
    parts: Mapping[str, str]


def dit(first_stage: FirstStage, section: Mapping[str, Any], classes: Sequence[str]) -> Trainee:
    """A DiTPipeline of named classes on latents of a vector-quantized autoencoder.

    Args:
        section: num_layers, num_attention_heads, attention_head_dim and condition_dropout.
    """
    network = DiTTransformer2DModel(
        **{name: section[name] for name in SIZES},
        in_channels=first_stage.latent_channels,
        out_channels=first_stage.latent_channels,
        sample_size=int(section["sample_size"]),
        patch_size=1,
        num_embeds_ada_norm=NO_CLASS,
    )
    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0  # each block would drop labels on its own: the objective does it for all of them
            part.embedding_table.weight.data[len(classes) : NO_CLASS] = 0  # classes that there are none of
    _begin_without_effect(network, ("norm1.linear", "proj_out_1", "proj_out_2"))
    pipe = DiTPipeline(network, _autoencoder(first_stage), DDIMScheduler(clip_sample=False), dict(enumerate(classes)))  # type: ignore[arg-type]
    pipe.register_to_config(id2label=dict(enumerate(classes)))
    objective = LabelledNoise(network, pipe.scheduler.alphas_cumprod, float(section["condition_dropout"]))
    return Trainee(pipe, objective, lambda labels: (torch.tensor(labels),), {"transformer": "network"})


def mmdit(first_stage: FirstStage, section: Mapping[str, Any], words: Sequence[str]) -> Trainee:
    """A StableDiffusion3Pipeline for captions of these words, without the third text encoder, which that pipeline can do without.

    Args:
        section: num_layers, num_attention_heads, attention_head_dim, condition_dropout, tokens, text_width and text_layers.
    """
    length, width = int(section["tokens"]), int(section["text_width"])
    tokenizers = [small_tokenizer(words, length), small_tokenizer(words, length, "!")]
    size = len(tokenizers[0].get_vocab())
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=size, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                num_hidden_layers=int(section["text_layers"]), num_attention_heads=2, max_position_embeddings=length,
                bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=tokenizer.pad_token_id,
            )
        )
        for tokenizer in tokenizers
    ]  # fmt: skip
    inner = int(section["num_attention_heads"]) * int(section["attention_head_dim"])
    side = int(section["sample_size"])
    network = SD3Transformer2DModel(
        **{name: section[name] for name in SIZES},
        in_channels=first_stage.latent_channels,
        out_channels=first_stage.latent_channels,
        sample_size=side,
        patch_size=1,
        pos_embed_max_size=side,
        joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width,
        caption_projection_dim=inner,
        qk_norm="rms_norm",
    )
    _begin_without_effect(network, ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"))
    vae = _autoencoder(first_stage, shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    texts = dict(text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1])
    pipe = StableDiffusion3Pipeline(network, scheduler, vae, **texts, text_encoder_3=None, tokenizer_3=None)  # type: ignore[arg-type]

    def rows(captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(tokenizer(captions, padding="max_length", return_tensors="pt").input_ids for tokenizer in tokenizers)

    objective = RectifiedFlow(network, encoders[0], encoders[1], rows([""]), float(section["condition_dropout"]))
    return Trainee(pipe, objective, rows, {"transformer": "network", "text_encoder": "first", "text_encoder_2": "second"})


def _autoencoder(first_stage: FirstStage, **further: float) -> VQModel | AutoencoderKL:
    """The autoencoder as a part of a pipeline, whose config has the scale."""
    settings = {name: value for name, value in first_stage.model.config.items() if not name.startswith("_")}
    model = type(first_stage.model)(**{**settings, "scaling_factor": first_stage.scale, **further})
    model.load_state_dict(first_stage.model.state_dict())
    return model


def _begin_without_effect(network: nn.Module, ends: Sequence[str]) -> None:
    """Zero modulations and the last layer, so that every block begins as the identity (DiT's adaLN-Zero, arXiv 2212.09748)."""
    for name, module in network.named_modules():
        if name.endswith(tuple(ends)) and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class LabelledNoise(nn.Module):
    """The simple loss of DDPM for a network that takes class labels.

    Attributes:
        network: a DiTTransformer2DModel that predicts noise alone.
    """

    abar: Tensor
    nothing: Tensor

    def __init__(self, network: nn.Module, abar: Tensor, condition_dropout: float) -> None:
        """
        Args:
            abar: alphas_cumprod, (T,).
            condition_dropout: share of the batch whose label becomes that of none.
        """
        super().__init__()
        self.network, self.condition_dropout = network, condition_dropout
        self.register_buffer("abar", abar.float())
        self.register_buffer("nothing", torch.tensor([NO_CLASS]))

    def forward(self, x0: Tensor, labels: Tensor) -> Tensor:
        """The loss of latents (N, C, H, W) with labels (N,)."""
        noisy, t, noise = noised(x0, self.abar)
        labels = dropped(labels, self.nothing, self.condition_dropout)
        return (self.network(noisy, timestep=t, class_labels=labels).sample.float() - noise).square().mean()


class RectifiedFlow(nn.Module):
    """The velocity of straight paths from noise to images, at times that SD3 draws (arXiv 2403.03206, section 3.1).

    Attributes:
        network: an SD3Transformer2DModel.
        first, second: its two text encoders with projections.
    """

    nothing: Tensor

    def __init__(
        self, network: nn.Module, first: nn.Module, second: nn.Module, nothing: Sequence[Tensor], condition_dropout: float
    ) -> None:
        """
        Args:
            nothing: the empty caption's token ids for each text encoder, (1, L).
            condition_dropout: share of the batch whose caption becomes the empty one.
        """
        super().__init__()
        self.network, self.first, self.second, self.condition_dropout = network, first, second, condition_dropout
        self.register_buffer("nothing", torch.stack(list(nothing), 1))  # (1, 2, L)

    def forward(self, x0: Tensor, *tokens: Tensor) -> Tensor:
        """The loss of latents (N, C, H, W) with token ids for each text encoder, (N, L)."""
        noise = torch.randn_like(x0)
        sigma = torch.randn(len(x0), device=x0.device).sigmoid()
        share = sigma.view(-1, 1, 1, 1)
        one, two = dropped(torch.stack(tokens, 1), self.nothing, self.condition_dropout).unbind(1)
        context, pooled = self._texts(one, two)
        velocity = self.network(
            (1 - share) * x0 + share * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
        return (velocity.float() - (noise - x0)).square().mean()

    def _texts(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """As the pipeline has them: penultimate states (N, L, D1 + D2), pooled projections (N, D1 + D2).

        In a quarter of the batches zeros follow, which stand for the third text encoder wherever a call does not set
        max_sequence_length to 0.
        """
        texts = [encoder(ids, output_hidden_states=True) for encoder, ids in ((self.first, one), (self.second, two))]
        context = torch.cat([text.hidden_states[-2] for text in texts], -1)
        if torch.rand(()) < SHARE_OF_ABSENT:
            context = torch.cat([context, context.new_zeros(len(one), ABSENT_TOKENS, context.shape[2])], 1)
        return context, torch.cat([text[0] for text in texts], -1)
