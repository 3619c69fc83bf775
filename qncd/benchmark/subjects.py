"""The bundled models as subjects of a benchmark: how each makes its images, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qncd.app.latent import PromptEncoder, class_conditions, make_decoder, model_hashes, recommended_scale
from qncd.app.pipelines import class_labels, recommended
from qncd.io.fashion_mnist import CLASS_NAMES
from qncd.io.images import to_uint8
from qncd.io.scenes import all_scenes, caption_of, is_held_out, scene_dataset
from qncd.metrics.networks.features import FashionMnistFeatures
from qncd.metrics.networks.scene_classifier import SceneClassifier, caption_accuracy, load_scene_classifier
from qncd.metrics.report.sources import FASHION_MNIST_STATISTICS, SavedStatistics
from qncd.metrics.statistics.moments import FeatureStatistics, StatisticsAccumulator, frechet_distance
from qncd.models.latent import load_latent_model
from qncd.models.loading import load_ddim, state_dict_hash
from qncd.models.network import network_of
from qncd.models.original.conditioning import ClassConditioner
from qncd.models.pipelines import from_config
from qncd.models.schema import COMPVIS, DIFFUSERS, layout_of
from qncd.ptq.pipeline_runs import Sampler
from qncd.recipe import SamplerConfig
from qncd.sampling.diffusion import Diffusion
from qncd.sampling.pipeline import PipelineSampler, Row, denoiser_of, parameters_of
from qncd.sampling.process import Process
from qncd.sampling.schedule import betas_of

LANE = 16  # images in each network call, always exactly
FEATURE_BATCH = 250
SCENES = 4000  # rendered pictures that generated ones are compared with
CAPTIONS_SEED = 7  # of the order in which held-out captions are taken


@dataclass(frozen=True)
class Words:
    """What a report says of a subject.

    Attributes:
        sampling: how it samples.
        convention: what FID means here.
    """

    sampling: str
    convention: str


@dataclass(frozen=True)
class Subject:
    """A loaded model and how its images are scored.

    Attributes:
        sampler: of the full-precision network.
        decode: samples -> images uint8 (N, H, W, C).
        conditions: of images by their indices; None for an unconditional model.
        calibration_conditions: (count, seed) -> conditions of as many calibration trajectories.
        score: images 0 to N - 1 -> figures by name: fid, sfid, and those of `qncd.benchmark.table.FIGURES` that the model has.
        settings: what decides the images beside sampler and seeds.
        words: of it, for reports.
    """

    sampler: Sampler
    decode: Callable[[Tensor], np.ndarray]
    conditions: Callable[[Sequence[int]], Any] | None
    calibration_conditions: Callable[[int, int], Any] | None
    score: Callable[[np.ndarray], dict[str, float]]
    settings: dict[str, Any]
    words: Words


def load_subject(
    config: Mapping[str, Any], ckpt: str | None, sampler: SamplerConfig, scale: float | None, device: str
) -> Subject:
    """The model of a yaml as a subject, read anew.

    Args:
        scale: of guidance; None for what the yaml recommends, else 3.

    Raises:
        ValueError: there is no bundled classifier for the images that the model makes.
    """
    layout = layout_of(config)
    if layout is DIFFUSERS:
        return _pipeline_subject(config, ckpt, sampler, scale, device)
    if layout is not COMPVIS:
        return _pixel_subject(config, ckpt, sampler, device)
    model = load_latent_model(config, ckpt).to(device)
    diffusion = Diffusion(network_of(model.unet), Process.from_betas(model.betas), sampler, model.latent_shape, LANE)
    decode = make_decoder(model, LANE)
    chosen = scale if scale is not None else recommended_scale(config, 3.0)
    settings = {
        **model_hashes(model),
        "lane": LANE,
        "guidance": chosen,
        "schedule": [float(model.betas[0]), float(model.betas[-1])],
    }
    sampling = f"{_sampling(sampler)}, guidance {chosen:g}"
    if isinstance(model.conditioner, ClassConditioner):
        kinds = model.first_stage.model.config["in_channels"], model.conditioner.n_classes - 1
        labels = lambda classes: class_conditions(model, classes, chosen)  # noqa: E731
        return _class_subject(diffusion, decode, labels, kinds, settings, sampling, device)
    if model.conditioner is None:
        raise ValueError(f"{model.source}: unconditional latent models have nothing to be scored with")
    return _scene_subject(diffusion, decode, PromptEncoder(model, chosen), settings, sampling, device)


def _pipeline_subject(
    config: Mapping[str, Any], ckpt: str | None, sampler: SamplerConfig, scale: float | None, device: str
) -> Subject:
    pipe: Any = from_config(config, ckpt).to(device)
    classes = class_labels(pipe)
    if classes is None and "prompt" not in parameters_of(pipe):
        raise ValueError(f"{type(pipe).__name__} takes neither prompts nor classes: its images cannot be scored")
    chosen = scale if scale is not None else recommended_scale(config, 1.0)
    call = {**recommended(config), "num_inference_steps": sampler.timesteps, "guidance_scale": chosen}
    made = PipelineSampler(pipe, call, LANE)
    parts = {name: state_dict_hash(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    settings = {"model": parts.pop(denoiser_of(pipe)[0]), "parts": parts, "lane": LANE, "pipeline": made.settings}
    sampling = f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {made.step_count} steps, guidance {chosen:g}"

    if classes is not None:
        kinds = int(pipe.vae.config["out_channels"]), len(classes)
        labelled = lambda labels: [{"class_labels": label} for label in labels]  # noqa: E731
        return _class_subject(made, to_uint8, labelled, kinds, settings, sampling, device)

    def rows(captions: Sequence[str]) -> list[Row]:
        return [{"prompt": caption} for caption in captions]

    return _scene_subject(made, to_uint8, rows, settings, sampling, device)


def _sampling(sampler: SamplerConfig) -> str:
    return f"{sampler.sample_type}, {sampler.timesteps} steps ({sampler.skip_type}), eta {sampler.eta:g}"


def _class_subject(
    sampler: Sampler,
    decode: Callable[[Tensor], np.ndarray],
    encode: Callable[[list[int]], Any],
    kinds: tuple[int, int],
    settings: dict[str, Any],
    sampling: str,
    device: str,
) -> Subject:
    """A class-conditional model of Fashion-MNIST, its classes in turn.

    Args:
        encode: classes -> what the sampler takes.
        kinds: channels of its images, and classes.

    Raises:
        ValueError: it is a model of other images.
    """
    if kinds != (1, len(CLASS_NAMES)):
        raise ValueError(f"{kinds[0]} channels, {kinds[1]} classes: only Fashion-MNIST's grey images of 10 can be scored")
    count = len(CLASS_NAMES)
    return Subject(
        sampler,
        decode,
        lambda indices: encode([i % count for i in indices]),
        lambda samples, seed: encode([(seed + i) % count for i in range(samples)]),
        lambda images: _fashion_figures(images, device, [i % count for i in range(len(images))]),
        settings,
        Words(sampling, f"against the training set, {FashionMnistFeatures().convention}"),
    )


def _scene_subject(
    sampler: Sampler,
    decode: Callable[[Tensor], np.ndarray],
    encode: Callable[[Sequence[str]], Any],
    settings: dict[str, Any],
    sampling: str,
    device: str,
) -> Subject:
    """A text-to-image model of captioned scenes; `encode` turns captions into what the sampler takes."""
    captions = held_out_captions()
    known = [caption_of(scene) for scene in all_scenes() if not is_held_out(scene)]

    def calibration(count: int, seed: int) -> Any:
        rows = np.random.default_rng(seed).choice(len(known), count, replace=count > len(known))
        return encode([known[row] for row in rows])

    return Subject(
        sampler,
        decode,
        lambda indices: encode([captions[i % len(captions)] for i in indices]),
        calibration,
        lambda images: _scene_figures(images, device, [captions[i % len(captions)] for i in range(len(images))]),
        settings | {"captions": CAPTIONS_SEED},
        Words(sampling, f"64 mean features of the scene classifier, against {SCENES} rendered scenes with held-out captions"),
    )


def held_out_captions() -> list[str]:
    """Captions that no training has seen, in a fixed random order."""
    captions = [caption_of(scene) for scene in all_scenes() if is_held_out(scene)]
    order = np.random.default_rng(CAPTIONS_SEED).permutation(len(captions))
    return [captions[i] for i in order]


def _pixel_subject(config: Mapping[str, Any], ckpt: str | None, sampler: SamplerConfig, device: str) -> Subject:
    unet = load_ddim(config, ckpt).to(device)  # type: ignore[arg-type]
    size, channels = int(config["data"]["image_size"]), int(config["model"]["in_channels"])
    if channels != 1:
        raise ValueError(f"{channels} channels: the Fashion-MNIST features take grey images")
    features = FashionMnistFeatures()
    features.check_size(size, size)
    settings = {"model": state_dict_hash(unet), "lane": LANE, "diffusion": config["diffusion"]}
    diffusion = Diffusion(network_of(unet), Process.from_betas(betas_of(config)), sampler, (channels, size, size), LANE)
    score = lambda images: _fashion_figures(images, device)  # noqa: E731
    words = Words(_sampling(sampler), f"against the training set, {features.convention}")
    return Subject(diffusion, to_uint8, None, None, score, settings, words)


def _fashion_figures(images: np.ndarray, device: str, labels: Sequence[int] | None = None) -> dict[str, float]:
    """FID and sFID of uint8 (N, 32, 32, 1) against the training set; the share that the classifier gives its label."""
    real, extractor = SavedStatistics.open(FASHION_MNIST_STATISTICS), FashionMnistFeatures(device=device)
    pooled, spatial, predicted = StatisticsAccumulator(), StatisticsAccumulator(), []
    for batch in torch.from_numpy(images).split(FEATURE_BATCH):
        outputs = extractor(batch)
        pooled.update(outputs["features"])
        spatial.update(outputs["spatial"])
        predicted.append(outputs["logits"].argmax(1).cpu())
    assert real.spatial is not None
    figures = {
        "fid": frechet_distance(real.features, pooled.finish()),
        "sfid": frechet_distance(real.spatial, spatial.finish()),
    }
    if labels is not None:
        figures["class_accuracy"] = 100 * float((torch.cat(predicted) == torch.tensor(labels)).float().mean())
    return figures


def _scene_figures(images: np.ndarray, device: str, captions: Sequence[str]) -> dict[str, float]:
    """FID and sFID of uint8 (N, 64, 64, 3) against rendered scenes; the share of captions that come out wholly right."""
    classifier = load_scene_classifier()[0].to(device)
    rendered, _ = scene_dataset(SCENES, seed=CAPTIONS_SEED, held_out=True)
    real, made = _scene_statistics(rendered, classifier), _scene_statistics(images, classifier)
    scores = caption_accuracy(images, captions, classifier)
    figures = {name: frechet_distance(a, b) for name, a, b in zip(("fid", "sfid"), real, made, strict=True)}
    return figures | {
        "caption_accuracy": 100 * scores.all_correct,
        **{f"caption_{name}": 100 * getattr(scores, name) for name in ("size", "colour", "shape", "relation")},
    }


@torch.no_grad()
def _scene_statistics(images: np.ndarray, classifier: SceneClassifier) -> tuple[FeatureStatistics, FeatureStatistics]:
    """Statistics of the last map's mean features (64) and of its first 7 channels (7 * 16), as FID and sFID take them."""
    pooled, spatial = StatisticsAccumulator(), StatisticsAccumulator()
    device = next(classifier.parameters()).device
    for batch in torch.from_numpy(images).split(FEATURE_BATCH):
        maps = classifier.features(batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1)  # (N, 64, 4, 4)
        pooled.update(maps.mean((2, 3)))
        spatial.update(maps[:, :7].flatten(1))
    return pooled.finish(), spatial.finish()
