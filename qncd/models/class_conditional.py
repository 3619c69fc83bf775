"""Latent diffusion conditioned on classes as a pipeline of diffusers, which has none of this kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qncd.models.original.conditioning import ClassConditioner

Generators = torch.Generator | list[torch.Generator]
StepEnd = Callable[["ClassConditionalLDMPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """Images of classes by latent diffusion with cross-attention on a class embedding, as CompVis' cin256-v2.

    Args:
        vqvae: between latents and images; an autoencoder without a codebook is as good.
        unet: predicts the noise in latents.
        class_embedder: class labels -> contexts; its last class stands for none.
        scheduler: any of diffusers that takes noise predictions.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"  # type: ignore[assignment]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        unet: UNet2DConditionModel,
        class_embedder: ClassConditioner,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
    ) -> ImagePipelineOutput:
        """One image for each class label.

        Args:
            class_labels: one label or several (N).
            guidance_scale: of classifier-free guidance; at 1 the UNet is called for the class alone, at half the cost.
            num_inference_steps: of the scheduler.
            eta: of DDIM, for schedulers that take it.
            generator: of all noise; one, or one for each image.
            latents: (N, C, h, w) standard normal noise to begin with, drawn from the generator where there is none.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], or "latent".
            callback_on_step_end: called as callback(pipeline, step, time step, {"latents": latents}) after each step; may
                return a dict with other latents to go on with.

        Raises:
            ValueError: a label is no class, there are no labels, latents have another shape, or the output type is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: allowed are {', '.join(OUTPUT_TYPES)}")
        labels = torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1)
        if not len(labels):
            raise ValueError("class_labels: expected one class label or more")
        device, guided = self._execution_device, guidance_scale != 1
        context = self.class_embedder(labels.to(device))
        if guided:
            context = torch.cat([self.class_embedder.unconditional(len(labels)), context])
        context = context.to(self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = self._noise(len(labels), generator, latents).to(device) * self.scheduler.init_noise_sigma
        extra = self._step_arguments(eta, generator)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            eps = self.unet(inputs, t, encoder_hidden_states=context).sample
            if guided:
                uncond, cond = eps.chunk(2)
                eps = uncond + guidance_scale * (cond - uncond)
            x = self.scheduler.step(eps, t, x, **extra).prev_sample
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, i, t, {"latents": x}) or {}).get("latents", x)
        images: Any = x
        if output_type != "latent":
            decoded = self.vqvae.decode(x / self.vqvae.config.scaling_factor).sample
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _noise(self, count: int, generator: Generators | None, latents: Tensor | None) -> Tensor:
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (count, self.unet.config.in_channels, height, width)
        if latents is None:
            if isinstance(generator, list) and len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} class labels: allowed are one, or one for each")
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        # Any height and width: the UNet is convolutional.
        if latents.ndim != 4 or latents.shape[:2] != shape[:2]:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected ({count}, {shape[1]}, height, width)")
        return latents.to(self.unet.dtype)

    def _step_arguments(self, eta: float, generator: Generators | None) -> dict[str, Any]:
        """What this scheduler's step takes of eta and the generator."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}
