#!/usr/bin/env python3
"""Train the DDIM model in the box on Fashion-MNIST (Lightning, EMA, resumable).

    python scripts/train_ddim.py --config configs/fashion_mnist.yml --out runs/fashion_mnist

Run the same line again after an interruption: it goes on from the last snapshot. Ends by writing the EMA weights
as a diffusers folder, `OUT/unet`, in half precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="yaml with model, diffusion, training, optim sections")
    parser.add_argument("--out", type=Path, required=True, help="folder for snapshots and the final weights")
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST idx files (default: where Debian puts them)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="diffusers folder with weights to start from instead of fresh ones (fine-tuning)"
    )
    parser.add_argument("--max_steps", type=int, help="training steps instead of the config's n_iters")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: 1.5x on a CPU, minutes to start")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import pytorch_lightning as pl
    import torch
    import yaml

    from qncd.io.fashion_mnist import load_fashion_mnist
    from qncd.models.ddim import build_ddim_unet
    from qncd.models.loading import load_unet_folder
    from qncd.sampling.schedule import alphas_cumprod, betas_of

    config = yaml.safe_load(args.config.read_text())
    steps = args.max_steps or config["training"]["n_iters"]
    pl.seed_everything(args.seed)

    class DDPM(pl.LightningModule):
        """Noise prediction with the simple loss of DDPM (Ho et al. 2020, eq. 14); EMA of the weights."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = build_ddim_unet(config)
            if args.init:
                self.unet.load_state_dict(load_unet_folder(args.init).state_dict())
            self.ema = build_ddim_unet(config).requires_grad_(False)
            self.ema.load_state_dict(self.unet.state_dict())
            self.register_buffer("abar", torch.from_numpy(alphas_cumprod(betas_of(config))).float())

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            x0 = batch[0].float().permute(0, 3, 1, 2) / 127.5 - 1  # (N, 1, 32, 32) in [-1, 1]
            half = torch.randint(0, len(self.abar), ((len(x0) + 1) // 2,), device=x0.device)
            t = torch.cat([half, len(self.abar) - 1 - half])[: len(x0)]  # antithetic, as in the DDIM code
            noise = torch.randn_like(x0)
            abar = self.abar[t].view(-1, 1, 1, 1)
            predicted = self.unet(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t).sample
            loss = (predicted.float() - noise).square().mean()
            self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_batch_end(self, *_: object) -> None:
            decay = min(config["model"]["ema_rate"], (1 + self.global_step) / (10 + self.global_step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1 - decay)

        def configure_optimizers(self) -> dict:
            optim = config["optim"]
            optimizer = torch.optim.Adam(self.unet.parameters(), lr=optim["lr"], betas=(optim["beta1"], 0.999))
            # Warm-up over 300 steps, constant, then linear to 0 over the last 30 % of the run.
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / 300, max(0.0, (steps - step) / (0.3 * steps)))
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    images, _ = load_fashion_mnist("train", args.data)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(images)), config["training"]["batch_size"], shuffle=True, drop_last=True
    )
    snapshot = pl.callbacks.ModelCheckpoint(
        args.out,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=config["training"]["snapshot_freq"],
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        max_steps=steps,
        precision=args.precision,
        gradient_clip_val=config["optim"]["grad_clip"],
        callbacks=[snapshot],
        default_root_dir=args.out,
        logger=pl.loggers.CSVLogger(args.out, name="log"),
        log_every_n_steps=25,
    )
    model = DDPM()
    if args.compile:
        model.unet.compile()
    last = args.out / "last.ckpt"
    trainer.fit(model, loader, ckpt_path=str(last) if last.is_file() else None)
    model.ema.half().save_pretrained(args.out / "unet")
    print(f"EMA weights after {trainer.global_step} steps: {args.out / 'unet'}")


if __name__ == "__main__":
    main()
