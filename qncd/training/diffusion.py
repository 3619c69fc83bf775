"""What the training scripts share: objectives, a Lightning module with an exponential moving average, and the loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import nn

from qncd.io.files import reading, regular_file
from qncd.models.original.conditioning import ClassConditioner, TextConditioner


@dataclass(frozen=True)
class TrainingSettings:
    """How an objective is minimized.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: images a step.
        lr: Adam's learning rate at its height.
        beta1: Adam's first decay.
        grad_clip: largest norm of the gradient.
        ema_rate: decay of the moving average a step, once it has warmed up.
        snapshot_every: steps between two snapshots.
        warmup: steps of linear warm-up.
        decay: share of the run, at its end, over which the learning rate falls linearly to 0.

    Raises:
        ValueError: a value that allows no training.
    """

    steps: int
    batch_size: int
    lr: float
    beta1: float = 0.9
    grad_clip: float = 1.0
    ema_rate: float = 0.999
    snapshot_every: int = 250
    warmup: int = 300
    decay: float = 0.3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "grad_clip", "snapshot_every", "warmup"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be positive")
        for name in ("beta1", "ema_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 0 and below 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay {self.decay}: must be above 0 and at most 1")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], steps: int | None = None) -> TrainingSettings:
        """Settings of a yaml section `batch_size, n_iters, lr, grad_clip, ema_rate, snapshot_freq`.

        Args:
            steps: optimizer steps instead of the section's n_iters.

        Raises:
            ValueError: a key is missing, or a value is not allowed.
        """

        def number(key: str, kind: type[int] | type[float] = float, default: float | None = None) -> Any:
            value = section.get(key, default)
            if value is None:
                raise ValueError(f"the config's training section lacks {key!r}")
            if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
                raise ValueError(f"the config's training section: {key} {value!r}: expected a number")
            return kind(value)

        return cls(
            steps=number("n_iters", int) if steps is None else steps,
            batch_size=number("batch_size", int),
            lr=number("lr"),
            beta1=number("beta1", default=0.9),
            grad_clip=number("grad_clip"),
            ema_rate=number("ema_rate"),
            snapshot_every=number("snapshot_freq", int),
            decay=number("decay", default=0.3),
        )

    def lr_factor(self, step: int) -> float:
        """Share of `lr` at a step: up over the warm-up, constant, then linearly to 0 over the last part of the run."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / (self.decay * self.steps)))


def value_at(config: Mapping[str, Any], source: Path, *keys: str) -> Any:
    """What a config holds below its keys. Raises ValueError where it has no such key; `source` is the file that is named."""
    value: Any = config
    for depth, key in enumerate(keys, 1):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{source}: no {'.'.join(keys[:depth])}, which training needs")
        value = value[key]
    return value


def section_at(config: Mapping[str, Any], source: Path, *keys: str) -> Mapping[str, Any]:
    """The same, of a section. Raises ValueError too where it is something else."""
    section = value_at(config, source, *keys)
    if not isinstance(section, Mapping):
        raise ValueError(f"{source}: {'.'.join(keys)} is {section!r}, expected a section")
    return section


def noised(x0: torch.Tensor, abar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t of a batch (N, C, H, W) at random time steps, the steps (N,) and the noise.

    The steps come in antithetic pairs t and T - 1 - t, as in the DDIM code.
    """
    half = torch.randint(0, len(abar), ((len(x0) + 1) // 2,), device=x0.device)
    t = torch.cat([half, len(abar) - 1 - half])[: len(x0)]
    noise = torch.randn_like(x0)
    level = abar[t].view(-1, 1, 1, 1)
    return level.sqrt() * x0 + (1 - level).sqrt() * noise, t, noise


def dropped(conditions: torch.Tensor, nothing: torch.Tensor, share: float) -> torch.Tensor:
    """Conditions (N, ...) with a random share of the rows replaced by `nothing` (1, ...)."""
    chosen = torch.rand(len(conditions), device=conditions.device) < share
    return torch.where(chosen.view(-1, *(conditions.ndim - 1) * [1]), nothing, conditions)


class NoisePrediction(nn.Module):
    """The simple loss of DDPM, ||eps - eps_theta(x_t, t, c)||^2 (Ho et al. 2020, eq. 14).

    Attributes:
        unet: a UNet2DModel, or a UNet2DConditionModel where there is a conditioner.
        conditioner: a ClassConditioner or TextConditioner, trained jointly; None for an unconditional model.
    """

    abar: torch.Tensor
    nothing: torch.Tensor

    def __init__(
        self,
        unet: nn.Module,
        abar: np.ndarray,
        conditioner: ClassConditioner | TextConditioner | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        """
        Args:
            abar: alphas_cumprod, (T,).
            condition_dropout: share of the batch whose condition is replaced by the empty one, which classifier-free
                guidance needs (Ho and Salimans 2022).
        """
        super().__init__()
        self.unet, self.conditioner, self.condition_dropout = unet, conditioner, condition_dropout
        self.register_buffer("abar", torch.from_numpy(np.asarray(abar)).float())
        self.register_buffer("nothing", torch.empty(0) if conditioner is None else condition_tensor(conditioner, None))

    def forward(self, x0: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of a batch at random time steps.

        Args:
            x0: clean images in [-1, 1] or latents, (N, C, H, W).
            condition: rows of `condition_tensor`, (N, ...), where there is a conditioner.
        """
        noisy, t, noise = noised(x0, self.abar)
        context = () if condition is None else (self._context(condition),)
        return (self.unet(noisy, t, *context).sample.float() - noise).square().mean()

    def _context(self, condition: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (N, L, D), with gradients."""
        condition = dropped(condition, self.nothing, self.condition_dropout)
        if isinstance(self.conditioner, TextConditioner):  # whose own forward is for inference
            return self.conditioner.text_model(input_ids=condition).last_hidden_state
        assert self.conditioner is not None
        return self.conditioner(condition)


def condition_tensor(
    conditioner: ClassConditioner | TextConditioner, conditions: Sequence[int] | Sequence[str] | None
) -> torch.Tensor:
    """What `NoisePrediction` takes: labels int64 (N,) or caption ids int64 (N, 77); for None, one row that means no condition."""
    if isinstance(conditioner, TextConditioner):
        return conditioner.tokenize([""] if conditions is None else cast(Sequence[str], conditions))
    return torch.tensor([conditioner.n_classes - 1] if conditions is None else conditions)


class Reconstruction(nn.Module):
    """What a first stage is trained for: L1 and squared error of the image, and its latents' own loss.

    AutoencoderKL: KL divergence of the latents' distribution from N(0, 1), a mean over dimensions.
    VQModel: codebook and commitment loss (van den Oord et al. 2017, eq. 3). There is no adversarial and no perceptual
    loss, which LDM uses for photographs: flat shapes and 32x32 images come out sharp without.
    """

    seen: torch.Tensor

    def __init__(self, autoencoder: AutoencoderKL | VQModel, kl_weight: float = 2e-4, codebook_from: int = 300) -> None:
        """
        Args:
            kl_weight: weight of the KL divergence beside the image's error.
            codebook_from: step at which vector quantization begins, with latents of the batch as codes. Codes placed
                before that lie where no latents are, and most are never used.
        """
        super().__init__()
        self.autoencoder, self.kl_weight, self.codebook_from = autoencoder, kl_weight, codebook_from
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of images in [-1, 1], (N, C, H, W)."""
        if isinstance(self.autoencoder, AutoencoderKL):
            posterior = self.autoencoder.encode(images).latent_dist
            error = self.autoencoder.decode(posterior.sample()).sample.float() - images
            own = self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        else:
            latents = self.autoencoder.encode(images).latents.float()
            if self.training:
                if self.seen == self.codebook_from:
                    self._place_codes(latents)
                self.seen += 1
            quantizes = bool(self.seen > self.codebook_from)
            decoded = self.autoencoder.decode(latents, force_not_quantize=not quantizes)
            error, own = decoded.sample.float() - images, cast(torch.Tensor, decoded.commit_loss).float().mean()
        return error.abs().mean() + error.square().mean() + own

    @torch.no_grad()
    def _place_codes(self, latents: torch.Tensor) -> None:
        assert isinstance(self.autoencoder, VQModel)
        vectors, codes = latents.movedim(1, -1).flatten(0, -2), self.autoencoder.quantize.embedding.weight
        codes.copy_(vectors[torch.randint(len(vectors), (len(codes),), device=vectors.device)])


class EmaTraining(pl.LightningModule):
    """Minimizes an objective, a module that returns the loss of a batch, and keeps a moving average of its weights.

    Attributes:
        objective: the module that is trained.
        ema: its copy with averaged weights, which is what gets used.
    """

    def __init__(self, objective: nn.Module, settings: TrainingSettings) -> None:
        super().__init__()
        self.objective, self.settings = objective, settings
        self.ema = copy.deepcopy(objective).requires_grad_(False)

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> list[torch.Tensor]:
        first = batch[0]
        return [images_to_float(first) if first.dtype == torch.uint8 else first.float(), *batch[1:]]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.objective(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        decay = min(self.settings.ema_rate, (1 + self.global_step) / (10 + self.global_step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.objective.parameters()), 1 - decay)

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.settings.lr, betas=(self.settings.beta1, 0.999))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.settings.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BatchedTensors(torch.utils.data.IterableDataset):
    """Shuffled batches of tensors that share their first dimension, without end-of-epoch remainders.

    Slices whole batches: stacking single items costs more than a small network's step.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], batch_size: int) -> None:
        """
        Raises:
            ValueError: lengths differ, or there is less than one batch.
        """
        if len({len(tensor) for tensor in tensors}) != 1 or len(tensors[0]) < batch_size:
            raise ValueError(f"{[len(tensor) for tensor in tensors]} items for batches of {batch_size}")
        self.tensors, self.batch_size = tensors, batch_size

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch_size

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.tensors[0]))
        for index in order[: len(self) * self.batch_size].split(self.batch_size):
            yield [tensor[index] for tensor in self.tensors]


def _check_snapshot(path: Path, module: nn.Module) -> None:
    """Raise ValueError where a file is no snapshot of this training."""
    with reading(path, "a snapshot of this training"):
        snapshot = torch.load(regular_file(path), "cpu", weights_only=True, mmap=True)
        there = {name: tuple(value.shape) for name, value in snapshot["state_dict"].items()}
    if there != {name: tuple(value.shape) for name, value in module.state_dict().items()}:
        raise ValueError(f"{path}: a snapshot of another network: name another folder or delete it")


def images_to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 NHWC -> [-1, 1] float NCHW."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    objective: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    settings: TrainingSettings,
    out: Path,
    precision: str = "bf16-mixed",
    compiled: Sequence[str] = (),
) -> nn.Module:
    """Train, or resume from the last snapshot in `out`, and return the objective with averaged weights.

    Args:
        objective: takes a batch of the tensors, gives its loss.
        tensors: the training data, first dimension N; uint8 NHWC images come to the objective in [-1, 1] float NCHW.
        out: folder for `last.ckpt` and `log/metrics.csv`.
        precision: Lightning's name, "32-true" or "bf16-mixed".
        compiled: names of the objective's networks that torch.compile makes faster.

    Raises:
        ValueError: less than one batch of data; the snapshot is damaged, or one of another network.
    """
    loader = torch.utils.data.DataLoader(BatchedTensors(tensors, settings.batch_size), batch_size=None)
    module = EmaTraining(objective, settings)
    last = out / "last.ckpt"
    if last.exists():
        _check_snapshot(last, module)
    for name in compiled:
        objective.get_submodule(name).compile()
    snapshot = pl.callbacks.ModelCheckpoint(
        out, save_last=True, save_top_k=0, every_n_train_steps=settings.snapshot_every, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_steps=settings.steps,
        precision=cast(Any, precision),
        gradient_clip_val=settings.grad_clip,
        callbacks=[snapshot],
        default_root_dir=out,
        logger=pl.loggers.CSVLogger(out, name="log"),
        log_every_n_steps=min(25, settings.steps),
    )
    trainer.fit(module, loader, ckpt_path=str(last) if last.is_file() else None)
    return module.ema.eval()
