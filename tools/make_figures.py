#!/usr/bin/env python3
"""Make the figures of the documents, each by its name.

    python tools/make_figures.py overview quality
    python tools/make_figures.py smoothing noise flip --out fig

overview   what happens to a model, from loading to integers; a drawing
quality    PSNR to full precision by mode and width, of three models, from fig/fair_*.json
smoothing  range of each channel in front of a layer, before and after smoothing by the time embedding (bundled DDIM model)
noise      how far x_t is from the full-precision run's at each step, by mode at W4A8 (the same model)
flip       the same seeds in full precision and at W4A8, in turn; an animated WebP (the same model)

The last three quantize the bundled DDIM model (configs/fashion_mnist.yml, 10 steps) and take a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qncd.app import parser as cli
from qncd.io.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
CONFIG, STEPS, WIDTH = "configs/fashion_mnist.yml", 10, "W4A8"
IMAGES, CALIBRATION, LANE = 32, 32, 16  # images measured, images calibrated with, images of a call
FIRST_SEED = 1234
INK, MUTED, PALE = "#1f2430", "#8a919e", "#e8ebf0"
STYLE: Any = {"font.size": 9, "mathtext.fontset": "cm", "axes.edgecolor": MUTED}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
ACCENT, WARM, COOL = "#c2255c", "#e8890c", "#1c7ed6"
MODES = {  # name of a line -> mode, options, colour; "nearest": weights rounded to nearest instead of reconstructed
    "linear": ("linear", {}, MUTED),
    "qdiff, nearest": ("qdiff", {"reconstruction": False}, WARM),
    "qncd, nearest": ("qncd", {"reconstruction": False}, COOL),
    "qncd+": ("qncd+", {}, ACCENT),
}
FLIPPED = ("qncd+", "linear")
MODELS = {
    "DDIM": "fair_ddim.json",
    "class-conditional latent diffusion": "fair_ldm.json",
    "text to image": "fair_scenes.json",
}
LINES = {  # row of the tables -> what the picture calls it, colour
    "linear": ("linear", MUTED), "qdiff": ("qdiff", MUTED), "qdiff,stepwise_activations=true": ("qdiff, steps", MUTED),
    "ptqd": ("ptqd", MUTED), "d2dpm": ("d2dpm", MUTED), "qncd,correction=true": ("the paper's parts", WARM),
    "qncd,stepwise_activations=true": ("qncd", COOL), "qncd+": ("qncd+", ACCENT),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("names", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "fig", help="folder (default: fig/ of the checkout)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from matplotlib import rc_context

    args.out.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name in dict.fromkeys(args.names):
            print(FIGURES[name](args.out))


# Drawing.


def make_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """As PNG of at most 256 colours, which is a third of the bytes and looks the same."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png", facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with whole_file(path) as part:
        picture.save(part, format="png", optimize=True)
    return path


def bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def overview(out: Path) -> Path:
    """Boxes and arrows: what happens to a model."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = make_figure(11.5, 4.1)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 115), ylim=(0, 41))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
        style = "round,pad=0,rounding_size=1.2"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.2))

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3))

    def column(x: float, width: float, title: str, color: str, parts: Sequence[tuple[str, str]]) -> None:
        """A column of parts under its title, each a line and what it is in symbols or a few words."""
        axes.text(x + width / 2, 38, title, ha="center", va="center", fontsize=12, fontweight="bold", color=color)
        height = (33.5 - 1.6 * (len(parts) - 1)) / len(parts)
        for i, (name, detail) in enumerate(parts):
            y = 1.5 + (len(parts) - 1 - i) * (height + 1.6)
            box(x, y, width, height, "white", color)
            lines = name.count("\n") + 1
            shift = 0.9 + 0.5 * lines if detail else 0
            axes.text(x + width / 2, y + height / 2 + shift, name, ha="center", va="center", fontsize=9.5)
            if detail:
                below = y + height / 2 + shift - 0.9 * lines - 1.9
                axes.text(x + width / 2, below, detail, ha="center", va="center", fontsize=9, color=MUTED)

    column(0.5, 20, "load", INK, [
        ("diffusers pipelines", "SD, SDXL, FLUX, PixArt, ..."), ("original checkpoints", "DDIM, LDM, SD v1"),
        ("bundled models", "offline, on a CPU"),
    ])  # fmt: skip
    column(24.5, 20, "calibrate", COOL, [
        ("inputs of the network", "in full precision, at every step"),
        ("predictions to compare with", r"$\epsilon$ and $x_t$ of the same seeds"),
    ])  # fmt: skip
    column(48.5, 26, "quantize", ACCENT, [
        ("smoothing by the time embedding", r"$W x = (W S)(x / S)$"),
        ("ranges, for each time step", r"$q = \mathrm{round}(x / s_t) + z$"),
        ("bits where the image needs them", "W4A6: 4 to 8 bits, 6 in the mean"),
        ("weights on the grid", "GPTQ, or BRECQ; bias corrected"),
    ])  # fmt: skip
    column(78.5, 16, "correct", WARM, [
        ("filters fitted\nto trajectories", r"$\epsilon' = \tilde\epsilon + K_t * [\tilde\epsilon, x_t]$"),
        ("or estimates\nwhile sampling", "as in the paper"),
    ])  # fmt: skip
    column(98.5, 16, "run", INK, [
        ("diffusers folder", ""), ("OpenVINO", "int8 on a CPU"), ("ONNX Runtime", "int8 on a CPU"), ("Triton", "int8 on a GPU"),
        ("GGUF", ""),
    ])  # fmt: skip
    for start in (20.7, 44.7, 74.7, 94.7):
        arrow((start, 18.2), (start + 3.6, 18.2))
    return save(figure, out / "overview.png")


def quality(out: Path) -> Path:
    """PSNR against the width, a panel for each model, a line for each mode, bands from the least to the largest seed."""
    figure = make_figure(11, 3.7)
    panels = figure.subplots(1, len(MODELS))
    for panel, (title, name) in zip(panels, MODELS.items(), strict=True):
        rows = json.loads((ROOT / "fig" / name).read_text(encoding="utf-8"))["rows"]
        lines = {mode: values for mode, values in psnr_lines(rows).items() if mode in LINES}
        ends = spread_apart({mode: values[-1][0] for mode, values in lines.items()}, 2.1)
        for mode, values in lines.items():
            label, color = LINES[mode]
            places, bold = range(len(values)), mode == "qncd+"
            means, lows, highs = zip(*values, strict=True)
            panel.plot(places, means, color=color, linewidth=2.4 if bold else 1.3, marker="o", markersize=3.5)
            panel.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
            weight = "bold" if bold else "normal"
            panel.text(len(values) - 0.92, ends[mode], label, color=color, va="center", fontsize=8.5, fontweight=weight)
        widths = list(dict.fromkeys(row["width"] for row in rows if row["psnr"]))
        panel.set_xticks(range(len(widths)), widths)
        panel.set(title=title, xlim=(-0.2, len(widths) + 0.3), ylim=(0, 48))
        panel.title.set_fontsize(10)
        bare(panel)
    panels[0].set_ylabel("PSNR to full precision, dB")
    return save(figure, out / "quality.png")


def psnr_lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Mean, least and largest PSNR of the calibration seeds by mode, in the order of the widths."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["psnr"]:
            lines.setdefault(row["mode"], []).append(tuple(row["psnr"][key] for key in ("mean", "min", "max")))
    return lines


def spread_apart(places: Mapping[str, float], distance: float) -> dict[str, float]:
    """Places of labels, moved up until each is `distance` above the one below it."""
    moved: dict[str, float] = {}
    for name in sorted(places, key=lambda name: places[name]):
        moved[name] = max(places[name], max(moved.values(), default=float("-inf")) + distance)
    return moved


# Measuring.


def load_pipe() -> Any:
    import qncd

    pipe = qncd.load(CONFIG)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def quantized(name: str) -> Any:
    """The bundled model at W4A8 by one of MODES."""
    import qncd

    pipe = load_pipe()
    mode, options, _ = MODES[name]
    qncd.quantize(pipe, WIDTH, mode, calls=[{"batch_size": LANE}] * (CALIBRATION // LANE), steps=STEPS, **options)
    return pipe


def sample(pipe: Any, images: int) -> Any:
    """x_t in front of every step, and the images in the end: (STEPS + 1, images, 32, 32) in [-1, 1], seeds from FIRST_SEED on."""
    import numpy as np
    import torch

    runs = []
    for start in range(0, images, LANE):
        seeds = range(FIRST_SEED + start, FIRST_SEED + min(start + LANE, images))
        seen: list[Any] = []
        hook = pipe.unet.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][:, 0].clone()))
        try:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            found = pipe(batch_size=len(seeds), num_inference_steps=STEPS, generator=generators, output_type="np").images
        finally:
            hook.remove()
        seen.append(torch.from_numpy(found[..., 0] * 2 - 1))
        runs.append(torch.stack(seen))
    return np.asarray(torch.cat(runs, 1))


def smoothing(out: Path, images: int = LANE) -> Path:
    """Largest |value| of each channel in front of the second convolution of the block that the embedding stretches most."""
    from qncd.inspection.drawing import smoothing_figure
    from qncd.inspection.measuring import ChannelRanges
    from qncd.inspection.record import Smoothed
    from qncd.models.network import network_of
    from qncd.ptq.observing import hooked
    from qncd.ptq.stages.smoothing import smoothing_factors

    pipe = load_pipe()
    pipe.scheduler.set_timesteps(STEPS)
    factors, ranges = smoothing_factors(network_of(pipe.unet), pipe.scheduler.timesteps.tolist()), ChannelRanges()
    with hooked(ranges.watch(pipe.unet, list(factors))):
        sample(pipe, images)
    return save(smoothing_figure(Smoothed(ranges.largest, factors)), out / "smoothing.png")


def noise(out: Path, modes: Sequence[str] = tuple(MODES), images: int = IMAGES) -> Path:
    """x_t of one seed at some steps, and its distance from the full-precision run's at every step, in the mean over the seeds."""
    import numpy as np

    exact = sample(load_pipe(), images)
    runs = {name: sample(quantized(name), images) for name in modes}
    errors = np.square(runs[modes[0]][-1] - exact[-1]).mean((1, 2))
    typical = int(np.argsort(errors)[images // 2])  # the median seed of the first mode
    figure = make_figure(11, 3.9)
    thumbs, curves = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    shown = (0, 3, 6, 8, STEPS)
    cells = thumbs.subplots(1 + len(runs), len(shown), gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for row, (name, run) in zip(cells, {"full precision": exact, **runs}.items(), strict=True):
        for cell, step in zip(row, shown, strict=True):
            cell.imshow(run[step, typical], cmap="gray", vmin=-1.2, vmax=1.2)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        color = MODES[name][2] if name in MODES else INK
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", color=color, fontsize=9)
    for cell, step in zip(cells[0], shown, strict=True):
        cell.set_title("image" if step == STEPS else f"$x_t$, step {step + 1}", fontsize=8.5)
    panel = curves.subplots()
    steps = range(1, STEPS + 1)
    distances = {
        name: np.sqrt(np.square(run - exact).mean((2, 3)) / np.square(exact).mean((2, 3))).mean(1)[1:]
        for name, run in runs.items()
    }
    ends = spread_apart({name: np.log10(values[-1]) for name, values in distances.items()}, 0.08)
    for name, values in distances.items():
        panel.plot(steps, values, color=MODES[name][2], marker="o", markersize=3.5, linewidth=2)
        panel.text(STEPS + 0.25, 10 ** ends[name], name, color=MODES[name][2], va="center", fontsize=9)
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    panel.set(
        yscale="log", xlabel="steps taken", ylabel="distance from the full-precision run, relative", ylim=(ticks[0], ticks[-1])
    )
    panel.set_xticks(steps)
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlim(0.7, STEPS + 2.4)
    bare(panel)
    return save(figure, out / "noise.png")


def flip(out: Path, modes: Sequence[str] = FLIPPED, images: int = IMAGES) -> Path:
    """Sheets of the same seeds in turn, full precision between the others; each stands for a second and a half."""
    frames = {"full precision": sample(load_pipe(), images)[-1]}
    frames |= {f"{WIDTH} {name}": sample(quantized(name), images)[-1] for name in modes}
    sheets = [sheet(title, found) for title, found in frames.items()]
    turns = [part for other in sheets[1:] for part in (sheets[0], other)]
    path = out / "flip.webp"
    with whole_file(path) as part:
        turns[0].save(part, format="webp", save_all=True, append_images=turns[1:], duration=1500, loop=0, quality=70, method=6)
    return path


def sheet(title: str, images: Any, columns: int = 8, side: int = 80) -> Any:
    """Images (N, H, W) in [-1, 1] below a title."""
    import numpy as np
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(images) // columns)
    picture = Image.new("L", (columns * side, rows * side + 30), 255)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 16)
    ImageDraw.Draw(picture).text((4, 5), title, fill=30, font=font)
    for i, image in enumerate(images):
        tile = Image.fromarray(np.uint8(np.clip((image + 1) * 127.5, 0, 255).round())).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        picture.paste(tile, (i % columns * side, 30 + i // columns * side))
    return picture


FIGURES: dict[str, Callable[[Path], Path]] = {
    "overview": overview, "quality": quality, "smoothing": smoothing, "noise": noise, "flip": flip,
}  # fmt: skip


if __name__ == "__main__":
    cli.run_main(main, parse_args())
