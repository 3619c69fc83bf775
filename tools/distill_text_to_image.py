#!/usr/bin/env python3
"""Distill a bundled text-to-image model into one of few steps in the layout of SDXL, and write it as a folder of diffusers.

    python tools/distill_text_to_image.py --config configs/scenes_turbo.yaml --out runs/scenes_turbo

The student begins with the teacher's weights. It has two text encoders, SDXL's pooled text and time ids, predicts v under a
schedule of zero-terminal SNR, and needs no guidance. First the teacher draws its paths from noises to images, once, in parts
that are kept in `OUT/paths`; then the student is trained on them. Run the same line again after an interruption: it goes on
from the last part or snapshot. Ends by writing `OUT/model`, averaged weights in half precision: for the bundled model, copy it
to `qncd/assets` under the name in the config's `model.weights`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qncd.app import parser as cli
from qncd.app import training

if TYPE_CHECKING:
    import torch

    from qncd.training.few_steps import Strides

logger = logging.getLogger(__name__)
PART = 2000  # paths in a file
BATCH = 250  # of the teacher
BRANCH_ENDS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "add_embedding.linear_2")  # what they give is added


def parse_args() -> argparse.Namespace:
    parser = training.make_parser(__doc__ or "", "yaml with the sections model, data and training")
    parser.add_argument("--images", type=int, help="paths of the teacher instead of the config's number")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet; takes minutes to start on a CPU")
    return parser.parse_args()


def student_of(teacher: Any, words: Sequence[str], section: Mapping[str, Any]) -> Any:
    """A StableDiffusionXLPipeline with the teacher's weights wherever it has such, for one to train."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from qncd.models.original.clip_tokenizer import small_tokenizer

    length = int(section["tokens"])
    tokenizers = [small_tokenizer(words, length), small_tokenizer(words, length, "!")]
    known, own = teacher.tokenizer.get_vocab(), tokenizers[0].get_vocab()
    rows = torch.tensor([known[token] for token in sorted(own, key=own.__getitem__)])
    encoders = []
    for kind, tokenizer in zip((CLIPTextModel, CLIPTextModelWithProjection), tokenizers, strict=True):
        layers = teacher.text_encoder.config.num_hidden_layers + 1  # the context is what comes in front of the last
        ids = {"bos_token_id": len(own) - 2, "eos_token_id": len(own) - 1, "pad_token_id": tokenizer.pad_token_id}
        changed = {"vocab_size": len(own), "max_position_embeddings": length, "num_hidden_layers": layers, **ids}
        encoder = kind(CLIPTextConfig(**{**teacher.text_encoder.config.to_diff_dict(), **changed}))
        state = {key: value.clone() for key, value in teacher.text_encoder.state_dict().items()}
        for key in state:
            if "token_embedding" in key:
                state[key] = state[key][rows]
            elif "position_embedding.weight" in key:
                state[key] = state[key][:length]
            elif "position_ids" in key:
                state[key] = state[key][:, :length]
        target = getattr(encoder, "text_model", encoder)
        prefix = "text_model." if next(iter(state)).startswith("text_model.") and target is not encoder else ""
        missing, unexpected = target.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items()}, strict=False
        )
        assert not unexpected and all(f"layers.{layers - 1}." in key for key in missing), (missing, unexpected)
        encoders.append(encoder)
    unet = teacher.unet.config
    pooled, ids = encoders[1].config.projection_dim, int(section["time_embedding"])
    config = {name: value for name, value in unet.items() if not name.startswith("_")}
    config |= {
        "cross_attention_dim": 2 * unet.cross_attention_dim,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ids,
        "projection_class_embeddings_input_dim": pooled + 6 * ids,
        "use_linear_projection": True,
        "transformer_layers_per_block": section["transformer_layers_per_block"],
    }
    student = UNet2DConditionModel(**config)
    _inherit_(student, teacher.unet.state_dict())
    schedule = {
        name: teacher.scheduler.config[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    scheduler = DDIMScheduler(
        **schedule,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    vae = AutoencoderKL(**{**teacher.vae.config, "force_upcast": False})
    vae.load_state_dict(teacher.vae.state_dict())
    return StableDiffusionXLPipeline(
        vae, *encoders, *tokenizers, student, scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False
    )


def _inherit_(student: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Give a UNet the weights of a smaller one: what is new begins without effect."""
    import torch

    own = student.state_dict()
    for name, value in own.items():
        if name not in state:
            if any(f"{end}." in name for end in BRANCH_ENDS):
                value.zero_()
            continue
        given = state[name]
        if given.ndim == 4 and value.ndim == 2:
            given = given[:, :, 0, 0]  # a 1x1 convolution as a linear layer
        corner = tuple(slice(0, size) for size in given.shape)
        value.zero_()[corner].copy_(given)
    student.load_state_dict(own)
    with torch.no_grad():
        for block in student.modules():
            if hasattr(block, "attn2"):  # the second text encoder begins as a weak voice
                for layer in (block.attn2.to_k, block.attn2.to_v):
                    half = layer.weight.shape[1] // 2
                    layer.weight[:, half:].normal_(std=0.02)


def path_of(teacher: Any, captions: Sequence[str], noise: torch.Tensor, guidance: float, strides: Strides, substeps: int) -> Any:
    """The teacher's paths from noises to the images of captions, float16 (N, K + 1, C, H, W)."""
    import torch

    from qncd.training.few_steps import teacher_path

    texts, _ = teacher.encode_prompt(["", *captions], "cpu", 1, False)
    abar = teacher.scheduler.alphas_cumprod.double().numpy()
    context = torch.cat([texts[:1].expand(len(captions), -1, -1), texts[1:]])

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            free, told = teacher.unet(torch.cat([x, x]), t, context).sample.float().chunk(2)
        return free + guidance * (told - free)

    return teacher_path(noise, predict, abar, strides, substeps).half()


def paths(
    teacher: Any, captions: Sequence[str], section: Mapping[str, Any], strides: Strides, folder: Path, seed: int
) -> torch.Tensor:
    """The teacher's paths of all captions, computed in parts that the folder keeps.

    Raises:
        ValueError: a part is damaged, or of other settings.
    """
    import torch
    from safetensors import safe_open

    from qncd.io.files import reading, regular_file
    from qncd.models.files.safetensors_files import write_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    guidance, substeps = float(section["guidance"]), int(section["substeps"])
    size = (teacher.unet.config.in_channels, *2 * (teacher.unet.config.sample_size,))
    parts = []
    with cli.progress_bar("teacher", "path") as bar:
        for first in range(0, len(captions), PART):
            told = captions[first : first + PART]
            made = json.dumps([guidance, substeps, strides.times, seed, first, told])
            path = folder / f"{first:06d}.safetensors"
            if path.exists():
                with reading(path, "paths of a teacher"), safe_open(regular_file(path), framework="pt") as stream:
                    if (stream.metadata() or {}).get("made") != made:
                        raise ValueError(f"{path}: of other settings: name another --out, or delete it")
                    parts.append(stream.get_tensor("path"))
            else:
                noise = torch.randn(len(told), *size, generator=torch.Generator().manual_seed(seed + first))
                batches = zip((told[at : at + BATCH] for at in range(0, len(told), BATCH)), noise.split(BATCH), strict=True)
                parts.append(torch.cat([path_of(teacher, some, x, guidance, strides, substeps) for some, x in batches]))
                write_safetensors({"path": parts[-1]}, path, {"made": made})
            bar(first + len(told), len(captions))
    return torch.cat(parts)


def main(args: argparse.Namespace) -> None:
    training.check(args)
    import pytorch_lightning as pl
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    from qncd.api import load
    from qncd.io.scenes import all_scenes, caption_of, is_held_out
    from qncd.models.configs import find_config, read_config
    from qncd.training.diffusion import TrainingSettings, fit, section_at, value_at
    from qncd.training.few_steps import StrideDistillation, Strides, TwoTextEncoders

    config = read_config(args.config)
    section = section_at(config, args.config, "training", "distillation")
    settings = TrainingSettings.from_section(section, args.max_steps)
    teacher = load(find_config(str(value_at(config, args.config, "training", "teacher"))))
    plain = AttnProcessor()  # the same attention, on a CPU twice as fast with small heads as the fused one
    teacher.unet.set_attn_processor(plain)
    pl.seed_everything(args.seed, verbose=False)

    known = [caption_of(scene) for scene in all_scenes() if not is_held_out(scene)]
    count = args.images or int(section["images"])
    order = torch.cat([torch.randperm(len(known)) for _ in range(-(-count // len(known)))])[:count]
    captions = [known[i] for i in order]
    student = student_of(teacher, sorted({word for caption in known for word in caption.split()}), section)
    strides = Strides.of(student.scheduler, int(value_at(config, args.config, "sampling", "timesteps")))
    path = paths(teacher, captions, section, strides, args.out / "paths", args.seed)
    print(f"{len(path)} paths of {len(strides)} steps, standard deviation at the end {path[:, -1].float().std():.3f}")

    tokens = [
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        for tokenizer in (student.tokenizer, student.tokenizer_2)
    ]
    side = float(student.unet.config.sample_size * student.vae_scale_factor)
    student.unet.set_attn_processor(plain)
    text = TwoTextEncoders(student.text_encoder, student.text_encoder_2)
    for encoder in (text.first, text.second):
        encoder.set_attn_implementation("eager")
    objective = StrideDistillation(student.unet, text, (side, side, 0, 0, side, side), strides, float(section["own_share"]))
    compiled = ("unet",) if args.compile else ()
    trained = fit(objective, (path, *tokens), settings, args.out / "run", args.precision, compiled)

    student.register_modules(unet=trained.unet, text_encoder=trained.text.first, text_encoder_2=trained.text.second)
    student.to(torch.float16).save_pretrained(args.out / "model")
    size = sum(file.stat().st_size for file in (args.out / "model").rglob("*") if file.is_file())
    print(f"EMA weights after {settings.steps} steps: {args.out / 'model'}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    arguments = parse_args()
    cli.run_main(main, arguments)
