#!/usr/bin/env python3
"""Sample a DDIM model, in full precision or quantized after training (--ptq), and write the images.

    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/fp
    python scripts/sample_diffusion_ddim.py --config configs/fashion_mnist.yml --timesteps 50 -l out/w4a8 \\
        --ptq --weight_bit 4 --compare_fp

The output folder holds images/ (named by index and seed), contact_sheet.png and run.json; the same command line goes
on with a run that was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd import cli

if TYPE_CHECKING:
    import numpy as np

    from qncd.io.runs import Run
    from qncd.ptq.pipeline import Diffusion
    from qncd.sampling.runtime_noise import NoiseTable

log = logging.getLogger("qncd")
SHEET_IMAGES = 64  # the most that a contact sheet shows of one model
SEQUENCE_IMAGES, SEQUENCE_STEPS = 8, 16


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    cli.add_model_arguments(parser)
    cli.add_sampling_arguments(parser)
    cli.add_quantization_arguments(parser)
    cli.add_correction_arguments(parser)
    cli.add_calibration_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", type=Path, required=True, help="output folder")
    group.add_argument("--compare_fp", action="store_true", help="also sample the full-precision model with the same seeds")
    group.add_argument("--savez", action="store_true", help="also write samples.npz, as ADM's evaluator takes it")
    group.add_argument("--sequence", action="store_true", help=f"also write sequence.png: {SEQUENCE_IMAGES} images on their way")
    group.add_argument("--verbose", choices=("debug", "info", "warning", "critical"), default="info")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=args.verbose.upper(), format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cli.check_counts(args, ("max_images", "batch_size", "lane", "cali_n", "cali_st", "cali_batch_size"))
    sampler, quant = cli.sampler_config(args), cli.quant_config(args)
    smoothing, correction = cli.smoothing_config(args), cli.correction_config(args)
    _check_combinations(args)

    from qncd.io.runs import open_run
    from qncd.models.loading import load_config, load_ddim, state_dict_hash
    from qncd.ptq.pipeline import Diffusion
    from qncd.sampling.schedule import betas_of

    model_config = load_config(args.config)
    betas = betas_of(model_config)
    device = cli.choose_device(args.device)
    unet = load_ddim(model_config, args.ckpt, args.use_pretrained).to(device)
    size, channels = int(model_config["data"]["image_size"]), int(model_config["model"]["in_channels"])
    diffusion = Diffusion(unet, betas, sampler, (channels, size, size), args.lane or (16 if size <= 64 else 4))
    log.debug("%d steps: %s", len(diffusion.steps), [s.t for s in diffusion.steps])
    base_hash = state_dict_hash(unet)
    batch_size = args.batch_size or int(model_config.get("sampling", {}).get("batch_size", 64))
    settings = {
        "model": base_hash,
        "seed": args.seed,
        "lane": diffusion.lane,
        "sampler": dataclasses.asdict(sampler),
        "quantization": quant and {"mode": args.quant_mode, **dataclasses.asdict(quant)},
        "smoothing": smoothing and dataclasses.asdict(smoothing),
        "correction": correction and dataclasses.asdict(correction),
        "calibration": quant and _calibration_settings(args),
        "batch": batch_size if correction and correction.statistics == "batch" else None,
    }
    environment = {
        "arguments": {k: v if v is None or isinstance(v, (int, float)) else str(v) for k, v in vars(args).items()},
        "device": device,
        "batch_size": batch_size,
    }
    # Twice the size of raw images: PNG files are smaller, an npz and a comparison may come on top.
    run = open_run(args.logdir, settings, environment, min_free_bytes=4 * args.max_images * channels * size * size)
    job = Job(args, run, batch_size)
    if args.compare_fp:
        job.sample_images(diffusion, "fp", None, "FP32")
    corrector = None
    if quant:
        table, calibration_seconds = prepare_quantized(args, diffusion, base_hash, correction, smoothing)
        job.figures["calibration_seconds"] = calibration_seconds
        if correction:
            from qncd.sampling.runtime_noise import RuntimeNoiseCorrector

            corrector = RuntimeNoiseCorrector(correction, table if correction.control or correction.shrink else None)
    label = f"{quant.label} {args.quant_mode}" if quant else "FP32"
    job.sample_images(diffusion, "images", corrector, label)
    job.finish(label)


def _check_combinations(args: argparse.Namespace) -> None:
    for name in ("cali_ckpt", "cali_data_path", "resume", "compare_fp", "quant_act", "weight_only", "running_stat", "a_sym"):
        if getattr(args, name) and not args.ptq:
            raise ValueError(f"--{name} needs --ptq")
    if args.resume and (args.cali_ckpt is None or not args.cali_ckpt.is_file()):
        raise FileNotFoundError(f"--resume needs a quantized checkpoint: --cali_ckpt {args.cali_ckpt} is none")


def _calibration_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "samples": args.cali_n, "steps": args.cali_st, "seed": args.cali_seed,
        "batch_size": args.cali_batch_size if args.running_stat else None,
        "data": str(args.cali_data_path) if args.cali_data_path else None,
        "checkpoint": str(args.cali_ckpt) if args.cali_ckpt else None,
    }  # fmt: skip


def prepare_quantized(
    args: argparse.Namespace, diffusion: Diffusion, base_hash: str, correction: Any, smoothing: Any
) -> tuple[NoiseTable | None, float]:
    """Turn the network of `diffusion` into the quantized one: from --cali_ckpt where it exists, else by calibrating.

    Returns the full-precision noise table, where the correction needs one, and the seconds that calibrating took.
    """
    from qncd.config import CalibrationConfig
    from qncd.ptq.calibration import load_calibration, save_calibration
    from qncd.ptq.checkpoint import load_quantized_, peek_quantized, save_quantized
    from qncd.ptq.pipeline import quantize_with_, record_noise_table, sample_calibration

    quant = cli.quant_config(args)
    assert quant is not None
    calibration = CalibrationConfig(args.cali_n, args.cali_st, args.cali_batch_size, args.cali_seed)
    controlled = correction if correction and (correction.control or correction.shrink) else None
    settings = {
        "sampler": dataclasses.asdict(diffusion.config),
        "correction": {"interval": controlled.interval, "target": controlled.target} if controlled else None,
    }
    quiet = logging.getLogger("qncd").getEffectiveLevel() > logging.INFO
    if args.cali_ckpt and args.cali_ckpt.is_file():
        info, table = peek_quantized(args.cali_ckpt)
        _check_same(args.cali_ckpt, info.config, quant, info.smoothed, smoothing is not None)
        if info.settings["sampler"] != settings["sampler"] and info.smoothed:
            log.warning("%s was smoothed for the time steps of %s", args.cali_ckpt, info.settings["sampler"])
        if controlled and (table is None or info.settings != settings):
            with cli.progress_bar("full-precision noise table", "image", quiet) as bar:
                table = record_noise_table(diffusion, calibration, controlled, bar)
        load_quantized_(diffusion.unet, args.cali_ckpt, base_hash)
        log.info("loaded %s: %s", args.cali_ckpt, info.config.label)
        return table, 0.0
    start, table = time.perf_counter(), None
    if args.cali_data_path and args.cali_data_path.exists():
        data = load_calibration(args.cali_data_path, args.cali_n, args.cali_st)
        data.check_model(diffusion.unet, base_hash)
        if controlled:
            with cli.progress_bar("full-precision noise table", "image", quiet) as bar:
                table = record_noise_table(diffusion, calibration, controlled, bar)
    else:
        with cli.progress_bar("calibration set", "image", quiet) as bar:
            data, table = sample_calibration(diffusion, calibration, controlled, base_hash, bar)
        if args.cali_data_path:
            save_calibration(data, args.cali_data_path)
    with cli.progress_bar(f"calibrating {quant.label}", "input", quiet) as bar:
        quantize_with_(diffusion, quant, data, smoothing, args.cali_batch_size, bar)
    if args.cali_ckpt:
        save_quantized(diffusion.unet, args.cali_ckpt, quant, base_hash, table, settings)
        log.info("quantized checkpoint: %s, %.1f MB", args.cali_ckpt, args.cali_ckpt.stat().st_size / 1e6)
    return table, time.perf_counter() - start


def _check_same(path: Path, there: Any, wanted: Any, smoothed: bool, smooth: bool) -> None:
    old, new = dataclasses.asdict(there) | {"smoothed": smoothed}, dataclasses.asdict(wanted) | {"smoothed": smooth}
    differing = [f"{key} {old[key]} there, {new[key]} asked for" for key in old if old[key] != new[key]]
    if differing:
        raise ValueError(
            f"{path}: was quantized otherwise ({'; '.join(differing)}): name another --cali_ckpt or the same settings"
        )


class Job:
    """The images of one run on their way to its folder."""

    def __init__(self, args: argparse.Namespace, run: Run, batch_size: int) -> None:
        self.args, self.run, self.batch_size = args, run, batch_size
        self.figures: dict[str, Any] = {}

    def sample_images(self, diffusion: Diffusion, subfolder: str, corrector: Any, label: str) -> None:
        """Sample what is missing of images 0 to max_images - 1 into a subfolder, batch by batch."""
        from qncd.io.images import image_name, save_png, to_uint8

        folder = self.run.folder / subfolder
        folder.mkdir(exist_ok=True)
        done = self.run.existing_indices(subfolder)
        missing = [i for i in range(self.args.max_images) if i not in done]
        if len(missing) < self.args.max_images:
            log.info("%s: %d of %d images are there already", folder, self.args.max_images - len(missing), self.args.max_images)
        quiet, start = log.getEffectiveLevel() > logging.INFO, time.perf_counter()
        with cli.progress_bar(f"sampling {label}", "image", quiet) as bar:
            for first in range(0, len(missing), self.batch_size):
                indices = missing[first : first + self.batch_size]
                images = to_uint8(diffusion.sample([self.args.seed + i for i in indices], corrector))
                for index, image in zip(indices, images, strict=True):
                    save_png(image, folder / image_name(index, self.args.seed + index))
                bar(first + len(indices), len(missing))
        seconds = time.perf_counter() - start
        if missing:
            self.figures[f"{subfolder}_seconds"] = seconds
            self.figures[f"{subfolder}_per_second"] = len(missing) / seconds
        if self.args.sequence and subfolder == "images":
            self._write_sequence(diffusion, corrector)

    def finish(self, label: str) -> None:
        """Write the contact sheet, samples.npz and the figures."""
        from qncd.io.images import contact_sheet, save_npz
        from qncd.metrics.statistics import mse_to_psnr, paired_mse

        blocks, labels = [self._read("images", SHEET_IMAGES)], [label]
        if self.args.compare_fp:
            blocks.insert(0, self._read("fp", SHEET_IMAGES))
            labels.insert(0, "FP32")
            mse = paired_mse(self._read("fp"), self._read("images"))
            psnr = float(mse_to_psnr(mse).mean())
            self.figures |= {"psnr_to_fp_db": psnr, "mse_to_fp": float(mse.mean())}
            log.info("PSNR to full precision %.2f dB (mean over %d images, peak 255)", psnr, len(mse))
        contact_sheet(blocks, labels, columns=8).save(self.run.folder / "contact_sheet.png")
        if self.args.savez:
            save_npz(self._read("images"), self.run.folder / "samples.npz")
        self.run.finish(**self.figures)
        log.info("%d images in %s", self.args.max_images, self.run.folder / "images")

    def _read(self, subfolder: str, limit: int | None = None) -> np.ndarray:
        import numpy as np
        from PIL import Image

        from qncd.io.images import image_name

        count = min(self.args.max_images, limit or self.args.max_images)
        paths = [self.run.folder / subfolder / image_name(i, self.args.seed + i) for i in range(count)]
        arrays = [np.asarray(Image.open(path)) for path in paths]
        return np.stack([a if a.ndim == 3 else a[..., None] for a in arrays])

    def _write_sequence(self, diffusion: Diffusion, corrector: Any) -> None:
        import numpy as np

        from qncd.io.images import contact_sheet, to_uint8

        total = len(diffusion.steps)
        kept = {round(i * (total - 1) / max(1, SEQUENCE_STEPS - 1)) for i in range(SEQUENCE_STEPS)}
        rows: list[np.ndarray] = []
        count = min(SEQUENCE_IMAGES, self.args.max_images)
        diffusion.sample(
            [self.args.seed + i for i in range(count)], corrector,
            lambda state: rows.append(to_uint8(state.x_prev)) if state.step.index in kept else None,
        )  # fmt: skip
        images = np.stack(rows, 1)  # (images, steps, H, W, C)
        contact_sheet([images.reshape(-1, *images.shape[2:])], ["x_t on its way"], len(rows)).save(
            self.run.folder / "sequence.png"
        )


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
