"""Small pipelines of diffusers with random weights: UNets and transformers. Each is made in a second."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qncd.models.class_conditional import ClassConditionalLDMPipeline
from qncd.models.original.clip_tokenizer import clip_bpe
from qncd.models.original.conditioning import ClassConditioner

PROMPTS = ["a large red circle above a small blue square", "a small green square left of a large blue circle"]
WIDTHS = (16, 32)
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
SCALED = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False,
}  # fmt: skip
# Rectified flow as the published folders of Sana and Wan have it, in schedulers of the other kind.
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def unet(**settings: Any) -> Any:
    """A UNet2DConditionModel with samples of 8x8."""
    common = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": WIDTHS, "layers_per_block": 1, **CROSS,
        "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**common, **settings})


def image_unet(channels: int = 3, **settings: Any) -> Any:
    """A UNet2DModel with samples of 16x16."""
    common = {
        "sample_size": 16, "in_channels": channels, "out_channels": channels, "block_out_channels": WIDTHS,
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8, **PLAIN,
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**common, **settings})


def text_model(width: int = 16, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projection or width, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tokenizer(pad: str | None = None) -> Any:
    """CLIP's, as transformers has it; padded with the end of the text unless `pad` says otherwise."""
    vocab, merges = clip_bpe()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, **({"pad_token": pad} if pad else {}))


def vae(**settings: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=16, **settings,
    )  # fmt: skip


def vq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=3, num_vq_embeddings=16, sample_size=16,
    )  # fmt: skip


def stable(network: Any | None = None, scheduler: Any | None = None, kind: Any | None = None, **parts: Any) -> Any:
    """A pipeline of Stable Diffusion v1 or v2."""
    common = {
        "vae": vae(), "text_encoder": text_model(), "tokenizer": tokenizer(), "unet": network or unet(),
        "scheduler": scheduler or diffusers.DDIMScheduler(**SCALED), "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip
    return (kind or diffusers.StableDiffusionPipeline)(**{**common, **parts})


def xl_unet(numbers: int = 6, channels: int = 4, **settings: Any) -> Any:
    """SDXL's kind of UNet: pooled text (16) and `numbers` of sizes (8 each) are added to the time embedding."""
    return unet(
        in_channels=channels, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 8 * numbers, transformer_layers_per_block=(1, 2),
        use_linear_projection=True, **settings,
    )  # fmt: skip


def xl(network: Any | None = None, scheduler: Any | None = None, kind: Any | None = None, **parts: Any) -> Any:
    """A pipeline of SDXL: two text encoders, pooled text and sizes beside the time step."""
    common = {
        "vae": vae(), "text_encoder": text_model(), "text_encoder_2": text_model(16, 16), "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer("!"), "unet": network or xl_unet(),
        "scheduler": scheduler or diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "force_zeros_for_empty_prompt": True, "add_watermarker": False,
    }  # fmt: skip
    return (kind or diffusers.StableDiffusionXLPipeline)(**{**common, **parts})


def refiner() -> Any:
    parts = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    network = xl_unet(5).__class__.from_config({**xl_unet(5).config, "cross_attention_dim": 16})
    return xl(network, kind=diffusers.StableDiffusionXLImg2ImgPipeline, **parts)


def turbo() -> Any:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="trailing"
    )
    return xl(scheduler=scheduler)


def lcm() -> Any:
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return stable(unet(time_cond_proj_dim=8), scheduler, diffusers.LatentConsistencyModelPipeline)


def controlnet() -> Any:
    network = unet()
    control = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():  # from_unet has them at zero
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(block.weight, std=0.2)
    return stable(network, kind=diffusers.StableDiffusionControlNetPipeline, controlnet=control)


def kandinsky() -> Any:
    network = unet(
        cross_attention_dim=16, out_channels=8, resnet_time_scale_shift="scale_shift", addition_embed_type="image",
        addition_embed_type_num_heads=2, encoder_hid_dim=12, encoder_hid_dim_type="image_proj", attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), class_embed_type=None,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, num_vq_embeddings=16, vq_embed_dim=4, sample_size=16,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range",
    )  # fmt: skip
    return diffusers.KandinskyV22Pipeline(unet=network, scheduler=scheduler, movq=movq)


def deepfloyd() -> Any:
    network = unet(
        sample_size=16, in_channels=3, out_channels=6, resnet_time_scale_shift="scale_shift", encoder_hid_dim=12,
        encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=2, attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), class_embed_type=None,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
        variance_type="learned_range",
    )  # fmt: skip
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    return diffusers.IFPipeline(unet=network, scheduler=scheduler, requires_safety_checker=False, **parts)


def classes() -> Any:
    network = unet(in_channels=3, out_channels=3)
    return ClassConditionalLDMPipeline(vq(), network, ClassConditioner(6, 16), diffusers.DDIMScheduler(**SCALED))


# Transformers.

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def t5() -> Any:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def t5_tokenizer() -> Any:
    """T5's, of single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in string.ascii_lowercase)], extra_ids=0, model_max_length=64)


def spread_out(network: Any) -> Any:
    """A transformer whose modulation does something: diffusers leaves it next to nothing in random networks."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("linear.weight") or name.endswith("mod.1.weight") or "adaLN_modulation" in name:
                parameter.mul_(4)
    return network


def flow(shift: float = 3.0, **settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **settings)


def dit() -> Any:
    network = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000
    )
    return diffusers.DiTPipeline(spread_out(network), vae(), diffusers.DDIMScheduler(**SCALED))


def pixart(kind: Any) -> Any:
    network = diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, caption_channels=16,
        cross_attention_dim=16,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return kind(t5_tokenizer(), t5(), vae(), spread_out(network), scheduler)


def sd3() -> Any:
    network = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        spread_out(network), flow(), vae(shift_factor=0.1), text_model(16, 16), tokenizer(), text_model(16, 16), tokenizer("!"),
        T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), t5_tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    network = diffusers.FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16,
        pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        flow(use_dynamic_shifting=True),
        vae(shift_factor=0.1),
        text_model(),
        tokenizer(),
        t5(),
        t5_tokenizer(),
        spread_out(network),
    )


def flux_control() -> Any:
    """FLUX whose network gets the latents of an image beside those of the sample."""
    parts = {**flux().components, "transformer": None}
    network = diffusers.FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=32, out_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16,
        pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return diffusers.FluxControlPipeline(**{**parts, "transformer": spread_out(network)})


def chroma() -> Any:
    network = diffusers.ChromaTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(flow(), vae(shift_factor=0.1), t5(), t5_tokenizer(), network)


def umt5() -> Any:
    return UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def aura_flow() -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(t5_tokenizer(), umt5(), vae(), spread_out(network), flow(1.7))


def gemma() -> tuple[Any, Any]:
    """Tokenizer, of single letters, and text encoder."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\N{LOWER ONE EIGHTH BLOCK}")
    vocabulary = {piece: i for i, piece in enumerate((*special, *string.ascii_letters, *string.punctuation))}
    config = Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return GemmaTokenizer(vocab=vocabulary, merges=[]), Gemma2Model(config)


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    words, text = gemma()
    decoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    return diffusers.SanaPipeline(words, text, decoder, spread_out(network), diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS))


def lumina() -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, axes_dim_rope=(4, 4, 8), axes_lens=(64, 32, 32), cap_feat_dim=16, multiple_of=8,
    )  # fmt: skip
    words, text = gemma()
    return diffusers.Lumina2Pipeline(spread_out(network), flow(), vae(shift_factor=0.1), text, words)


def hunyuan() -> Any:
    network = diffusers.HunyuanDiT2DModel(
        **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2, mlp_ratio=2.0, learn_sigma=True,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=77, text_len_t5=256,
    )  # fmt: skip
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle"))}
    text = BertModel(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    return diffusers.HunyuanDiTPipeline(
        vae(), text, BertTokenizer(vocab=vocabulary), spread_out(network), diffusers.DDPMScheduler(), None, None, False, t5(),
        t5_tokenizer(),
    )  # fmt: skip


def wan() -> Any:
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS)
    return diffusers.WanPipeline(t5_tokenizer(), umt5(), decoder, scheduler, spread_out(network))


def qwen_tokenizer() -> tuple[Any, int]:
    """Qwen's, of single letters, and the size of its vocabulary."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {piece: i for i, piece in enumerate((*sorted(bytes_to_unicode().values()), *special))}
    words = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    words.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return words, len(vocabulary)


def qwen_image() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    words, size = qwen_tokenizer()
    text_config = {
        "vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text_config, vision_config=sight))
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(flow(use_dynamic_shifting=True), decoder, text, words, spread_out(network))


def z_image() -> Any:
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8],
        axes_lens=[640, 32, 32],
    )  # fmt: skip
    words, size = qwen_tokenizer()
    words.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    torch.nn.init.normal_(network.x_pad_token)
    torch.nn.init.normal_(network.cap_pad_token)
    return diffusers.ZImagePipeline(flow(), vae(shift_factor=0.1), text, words, spread_out(network))


def zero_snr(prediction: str = "v_prediction") -> Any:
    return diffusers.DDIMScheduler(
        **{**SCALED, "steps_offset": 0, "set_alpha_to_one": True}, prediction_type=prediction, rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


def picture(seed: int = 0) -> Image.Image:
    """16x16 of noise, for pipelines that begin with an image."""
    values = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


TEXT: dict[str, Any] = {"prompt": PROMPTS}
SQUARE: dict[str, Any] = {**TEXT, "height": 16, "width": 16}
SHORT: dict[str, Any] = {**SQUARE, "max_sequence_length": 12}
UNCHANGED: dict[str, Any] = {**SHORT, "use_resolution_binning": False, "clean_caption": False}
COUNT: dict[str, Any] = {"batch_size": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: how one is made, and what a call for two images takes."""

    make: Callable[[], Any]
    given: dict[str, Any] = field(default_factory=lambda: TEXT)

    @property
    def call(self) -> dict[str, Any]:
        """With lists of its own: Z-Image's pipeline writes into that of the prompts."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self.given.items()}


def _embeds(name: str, *shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {key: torch.randn(*shape, generator=generator) for key in (name, f"negative_{name}")}


KINDS: dict[str, Kind] = {
    "DDPM": Kind(lambda: diffusers.DDPMPipeline(image_unet(), diffusers.DDPMScheduler()), COUNT),
    "DDIM": Kind(lambda: diffusers.DDIMPipeline(image_unet(), diffusers.DDIMScheduler(clip_sample=False)), COUNT),
    "LDM": Kind(lambda: diffusers.LDMPipeline(vq(), image_unet(sample_size=8), diffusers.DDIMScheduler(**SCALED)), COUNT),
    "LDM, classes": Kind(classes, {"class_labels": [1, 3]}),
    "SD1": Kind(stable),
    "SD2": Kind(lambda: stable(unet(use_linear_projection=True), tokenizer=tokenizer("!"))),
    "SD2, v-prediction": Kind(
        lambda: stable(
            unet(use_linear_projection=True),
            diffusers.DDIMScheduler(**SCALED, prediction_type="v_prediction"),
            tokenizer=tokenizer("!"),
        )
    ),
    "SD2, zero terminal SNR": Kind(
        lambda: stable(unet(use_linear_projection=True), zero_snr(), tokenizer=tokenizer("!")), {**TEXT, "guidance_rescale": 0.7}
    ),
    "SD1 img2img": Kind(
        lambda: stable(kind=diffusers.StableDiffusionImg2ImgPipeline), {**TEXT, "image": [picture(), picture(1)], "strength": 0.6}
    ),
    "SD1 inpainting": Kind(
        lambda: stable(unet(in_channels=9), kind=diffusers.StableDiffusionInpaintPipeline),
        {**TEXT, "image": [picture(), picture(1)], "mask_image": [picture(2), picture(3)], "height": 16, "width": 16},
    ),
    "SD1 ControlNet": Kind(controlnet, {**TEXT, "image": [picture(), picture(1)]}),
    "SDXL": Kind(xl),
    "SDXL refiner": Kind(refiner, {**TEXT, "image": [picture(), picture(1)], "strength": 0.6}),
    "SDXL turbo": Kind(turbo, {**TEXT, "guidance_scale": 0.0}),
    "SDXL inpainting": Kind(
        lambda: xl(xl_unet(channels=9), kind=diffusers.StableDiffusionXLInpaintPipeline),
        {**TEXT, "image": [picture(), picture(1)], "mask_image": [picture(2), picture(3)], "height": 16, "width": 16},
    ),
    "LCM": Kind(lcm),
    "Kandinsky 2.2": Kind(kandinsky, {**_embeds("image_embeds", 2, 12), "height": 64, "width": 64}),
    "DeepFloyd IF": Kind(deepfloyd, _embeds("prompt_embeds", 2, 5, 12)),
    "DiT": Kind(dit, {"class_labels": [1, 3]}),
    "PixArt alpha": Kind(lambda: pixart(diffusers.PixArtAlphaPipeline), UNCHANGED),
    "PixArt sigma": Kind(lambda: pixart(diffusers.PixArtSigmaPipeline), UNCHANGED),
    "SD3": Kind(sd3, SHORT),
    "FLUX": Kind(flux, SHORT),
    "FLUX Control": Kind(flux_control, {**SHORT, "control_image": [picture(), picture(1)], "height": 16, "width": 16}),
    "Chroma": Kind(chroma, {**SHORT, "guidance_scale": 3.0}),
    "AuraFlow": Kind(aura_flow, SHORT),
    "Sana": Kind(sana, {**UNCHANGED, "height": 32, "width": 32, "complex_human_instruction": None}),
    "Lumina2": Kind(lumina, {**SHORT, "height": 64, "width": 64, "cfg_normalization": False}),
    "HunyuanDiT": Kind(hunyuan, {**SQUARE, "use_resolution_binning": False}),
    "Qwen-Image": Kind(qwen_image, {**TEXT, "height": 64, "width": 64}),
    "Z-Image": Kind(z_image, {**SHORT, "guidance_scale": 3.0}),
    "Wan": Kind(wan, {**TEXT, "height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 12}),
}


def made(name: str, seed: int = 0) -> Any:
    """The pipeline of a kind, its networks in eval mode and without gradients."""
    torch.manual_seed(seed)
    pipe = KINDS[name].make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, kind: str, steps: int = 4, **further: Any) -> torch.Tensor:
    """Latents (or images) of a call for two images with the seeds 3 and 4."""
    pipe.set_progress_bar_config(disable=True)
    latent = {} if kind in ("DDPM", "DDIM", "LDM") else {"output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed << 8) for seed in (3, 4)]
    out = pipe(**KINDS[kind].call, **latent, **further, num_inference_steps=steps, generator=generators)
    images = out[0]
    return (images if isinstance(images, torch.Tensor) else torch.as_tensor(np.asarray(images))).float()


def write_lora(path: Path, network: torch.nn.Module, *ends: str, scale: float = 0.3, prefix: str = "unet", seed: int = 0) -> Path:
    """A LoRA of rank 2 for all layers of a network whose names end so, in the layout of diffusers."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, layer in network.named_modules():
        if name.endswith(ends) and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            shapes = {"A": (2, *layer.weight.shape[1:]), "B": (len(layer.weight), 2, *[1] * (layer.weight.ndim - 2))}
            for side, shape in shapes.items():
                state[f"{prefix}.{name}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * scale
    save_file(state, path)
    return path


def write_ip_adapter(folder: Path, network: Any, embedding: int = 12) -> Path:
    """An IP-Adapter with random weights for a UNet2DConditionModel, its image encoder beside it; returns its file."""
    generator, width = torch.Generator().manual_seed(7), network.config.cross_attention_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {"image_proj.proj.weight": random(4 * width, embedding), "image_proj.proj.bias": random(4 * width)}
    state |= {"image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width)}
    crossing = [name.removesuffix(".processor") for name in network.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):  # their numbers are odd
        for side in "kv":
            state[f"ip_adapter.{2 * index + 1}.to_{side}_ip.weight"] = random(network.get_submodule(name).inner_dim, width)
    folder.mkdir()
    save_file(state, folder / "ip-adapter.safetensors")
    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=embedding,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return folder / "ip-adapter.safetensors"
