"""All cases: flags with values that they do not take, and files that are not what a command reads."""

from __future__ import annotations

from bad_inputs.case import Case, flag_cases
from bad_inputs.edits import ARRAYS, INDEX, INDEX_EDITS, JSON_EDITS
from bad_inputs.files import BINARY, JSON, NOBODY, STRUCTURED, TEXTUAL
from bad_inputs.pipelines import BROKEN

GOOD = " --config {m}/good/tiny.yml --ckpt {m}/good/pipeline"
DDIM = f"qncd sample{GOOD} --timesteps 4 --max_images 2 -l out"
PTQ = f"{DDIM} --ptq --quant_mode qncd --cali_n 4 --cali_st 2"
LDM = "qncd sample --config fashion_mnist_ldm.yaml -l out"
EXPORT = f"qncd export{GOOD}"
TEXT = "qncd sample --prompt circle --outdir out"
PIPELINE = "qncd sample --ckpt {m}/good/text --prompt circle --ddim_steps 2 --outdir out"
EVALUATE = "qncd evaluate {m}/good/pictures {m}/good/pictures --features fashion_mnist --no_cache"
SCENES = "tools/score_scenes.py"
WRONG_COUNTS = "0 -1 2.5 many"

STEPS = {"--timesteps": f"{WRONG_COUNTS} 1001", "--max_images": WRONG_COUNTS, "--batch_size": WRONG_COUNTS,
         "--lane": WRONG_COUNTS, "--eta": "-1 nan inf much", "--seed": "-1 x 99999999999999999999",
         "--sample_type": "euler", "--skip_type": "cubic",
         "--device": "tpu cuda:99", "--sha256": "abc", "--verbose": "loud"}  # fmt: skip
QUANTIZATION = {
    "--weight_bit": "1 9 0 4.5 x", "--act_bit": "1 9 -4 x", "--sm_abit": "1 17 x", "--act_range": "median",
    "--cali_n": WRONG_COUNTS, "--cali_st": f"{WRONG_COUNTS} 5", "--cali_batch_size": WRONG_COUNTS, "--cali_seed": "-1 x",
    "--quant_mode": "best",
    "--reverse_interval": f"{WRONG_COUNTS}", "--reverse_target": "any", "--reverse_statistics": "all", "--recon_cache": "int8",
    "--cali_iters --recon": WRONG_COUNTS, "--recon_lr --recon": "0 -1 nan inf x", "--recon_inputs --recon": WRONG_COUNTS,
    "--recon_memory --recon": "-1 nan x", "--cali_iters_a --recon --recon_act": WRONG_COUNTS,
    "--cali_lr --recon --recon_act": "0 -1 nan x",
    "--devices": WRONG_COUNTS, "--num_nodes": WRONG_COUNTS, "--backend": "tflite", "--engine_precision": "fp8",
}  # fmt: skip
LATENT = {"--n_samples": WRONG_COUNTS, "--custom_steps": f"{WRONG_COUNTS} 1001", "--eta": "-1 nan x", "--seed": "-1 x",
          "--batch_size": WRONG_COUNTS, "--scale": "nan inf x", "--classes": "11 -1 x 1,,2", "--lane": WRONG_COUNTS}  # fmt: skip
TEXTS = {"--n_samples": WRONG_COUNTS, "--n_iter": WRONG_COUNTS, "--ddim_steps": f"{WRONG_COUNTS} 1001", "--ddim_eta": "-1 nan x",
         "--scale": "nan inf x", "--seed": "-1 x", "--H": f"{WRONG_COUNTS} 63", "--W": f"{WRONG_COUNTS} 63", "--C": "0 5 x",
         "--f": "0 3 x", "--precision": "half", "--n_rows": WRONG_COUNTS, "--safety_checker": "{m}/missing"}  # fmt: skip
NO_ADAPTERS = "{m}/missing {m}/good/w4a8.safetensors {m}/good/prompts.txt"
ADDED = {"--scheduler": "FlowX", "--argument": "colour=3 guidance_rescale generator=1 eta=[", "--lora": NO_ADAPTERS,
         "--lora --ptq": "{m}/good/foreign_lora.safetensors", "--embedding": NO_ADAPTERS,
         "--ip_adapter --ip_adapter_image {m}/good/pictures": NO_ADAPTERS, "--ip_adapter": "{m}/good/w4a8.safetensors",
         "--image": "{m}/missing {m}/other {m}/good/pictures", "--mask_image": "{m}/good/pictures",
         "--ip_adapter_image": "{m}/good/pictures"}  # fmt: skip
FIGURES = {"--metrics": "fidelity", "--features": "vgg", "--convention": "ours", "--is_splits": WRONG_COUNTS, "--iqa": "beauty",
           "--bootstrap": "-1 2.5 x", "--batch_size": WRONG_COUNTS, "--devices": WRONG_COUNTS, "--num_nodes": WRONG_COUNTS,
           "--device": "tpu", "--weights": "{m}/missing", "--json": "{m}/missing/x.json {m}/other",
           "--save_statistics": "{m}/other"}  # fmt: skip
QUALITY = {"--widths": "W4 8 W9A8 W4A1", "--modes": "best qncd,smooth=false qncd,smoothing", "--seeds": WRONG_COUNTS,
           "--images": WRONG_COUNTS, "--seed": "x",
           "--batch_size": WRONG_COUNTS, "--cali_n": WRONG_COUNTS, "--cali_st": WRONG_COUNTS, "--cali_iters": WRONG_COUNTS,
           "--interval": WRONG_COUNTS, "--jobs": WRONG_COUNTS, "--device": "tpu", "--config": "{m}/missing.yml",
           "--out": "{m}/taken"}  # fmt: skip
REPRODUCE = {"--widths": "W4 W9A8 x", "--modes": "best nncf", "--images": f"{WRONG_COUNTS} 1", "--devices": WRONG_COUNTS,
             "--device": "tpu", "--seed": "-1 x", "--reference": "{m}/missing", "--ckpt": "{m}/missing",
             "--cali_ckpt": "W4A8 W4A4={m}/other W4A8={m}/missing", "--out": "{m}/taken"}  # fmt: skip
SPEED = {"--rounds": WRONG_COUNTS, "--calibration_samples": WRONG_COUNTS, "--job_rounds": WRONG_COUNTS,
         "--job_images": WRONG_COUNTS, "--large_rounds": WRONG_COUNTS, "--parts": "all", "--threads": WRONG_COUNTS,
         "--json": "{m}/other"}  # fmt: skip
TRAINING = {"--max_steps": WRONG_COUNTS, "--seed": "-1 x", "--precision": "64", "--out": "{m}/taken"}
CLASSIFIERS = {"--epochs": WRONG_COUNTS, "--batch_size": WRONG_COUNTS, "--lr": "0 -1 nan x", "--threads": WRONG_COUNTS,
               "--out": "{m}/taken", "--seed": "-1 x"}  # fmt: skip
TOOLS = {
    "tools/train_ddim.py --config fashion_mnist.yml --out out": TRAINING | {
        "--config": "{m}/missing.yml",
        "--init": "{m}/missing", "--data": "{m}/missing", "--images": WRONG_COUNTS,
    },
    "tools/train_first_stage.py --config scenes.yaml --out out": TRAINING | {"--images": WRONG_COUNTS},
    "tools/train_latent_diffusion.py --config scenes.yaml --out out": TRAINING | {"--first_stage": "{m}/missing {m}/other"},
    "tools/train_transformer.py --config fashion_mnist_dit.yaml --out out": TRAINING,
    "tools/train_scene_classifier.py --out out": CLASSIFIERS | {"--images": WRONG_COUNTS, "--test_images": WRONG_COUNTS},
    "tools/train_fashion_mnist_classifier.py --out out": CLASSIFIERS | {"--data": "{m}/missing {m}/other"},
    "tools/score_scenes.py --write_captions out.txt": {"-n": "0 -1 5000 x", "--seed": "-1 x"},
    "tools/check_full_size.py": {
        "--model": "sd9", "--sample_size": WRONG_COUNTS,
        "--size": f"{WRONG_COUNTS}", "--steps": f"{WRONG_COUNTS} 1001", "--scale": "nan x", "--weight_bit": "1 9",
        "--act_bit": "1 9", "--cali_n": WRONG_COUNTS, "--cali_st": WRONG_COUNTS, "--config": "{m}/missing.yaml",
        "--json": "{m}/other",
    },
    "tools/benchmark_reconstruction.py": {
        "--rounds": WRONG_COUNTS, "--iterations": "0 x", "--settings": "fast 1:x published@0", "--inputs": WRONG_COUNTS,
        "--threads": WRONG_COUNTS, "--widths": "W9A1 x", "--model": "sdxl", "--json": "{m}/other",
    },
    "tools/benchmark_evaluator.py": {
        "--small": "-1 x", "--large": "-1 x", "--runs": WRONG_COUNTS, "--dimension": "1 x", "--threads": WRONG_COUNTS,
        "--json": "{m}/other",
    },
}  # fmt: skip

# Command, with FILE for the bad file; format; the ways in which it is bad.
READ: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("qncd sample --config FILE --ckpt {m}/good/pipeline --timesteps 4 -l out", "tiny.yml", STRUCTURED),
    ("scripts/sample_diffusion_ddim.py --config FILE --timesteps 4 -l out", "tiny.yml", STRUCTURED),
    ("qncd sample --config {m}/good/tiny.yml --ckpt FILE --timesteps 4 -l out", "zip.ckpt", BINARY),
    ("qncd sample --config {m}/good/tiny.yml --ckpt FILE --timesteps 4 -l out", "legacy.ckpt", BINARY),
    (f"{PTQ} --cali_ckpt FILE --resume", "w4a8.safetensors", BINARY),
    (f"{PTQ} --cali_ckpt FILE --resume", "qdiffusion.pth", BINARY),
    (f"{PTQ} --cali_data_path FILE", "set.pt", tuple(kind for kind in BINARY if kind != "missing")),
    (f"{PTQ} --recipe FILE", "recipe.yaml", tuple(kind for kind in STRUCTURED if kind not in ("empty", "torn"))),
    (
        "scripts/export.py --config {m}/good/tiny.yml --ckpt {m}/good/pipeline --out out --cali_ckpt FILE",
        "w4a8.safetensors",
        BINARY,
    ),
    ("qncd export --config FILE --ckpt {m}/good/pipeline --out out", "tiny.yml", STRUCTURED),
    ("qncd convert --config FILE --out out", "tiny.yml", STRUCTURED),
    ("scripts/convert_checkpoint.py --config {m}/good/tiny.yml --ckpt FILE --out out", "zip.ckpt", BINARY),
    ("qncd convert --config cin256-v2.yaml --ckpt FILE --out out", "legacy.ckpt", BINARY),
    ("qncd sample --from_file FILE --outdir out", "prompts.txt", TEXTUAL),
    ("scripts/txt2img.py --from_file FILE --outdir out", "prompts.txt", TEXTUAL),
    ("qncd evaluate FILE {m}/good/pictures --features fashion_mnist --no_cache", "images.npz", (*BINARY, *ARRAYS["images.npz"])),
    (
        "evaluator.py {m}/good/pictures FILE --features fashion_mnist --no_cache",
        "statistics.npz",
        (*BINARY, *ARRAYS["statistics.npz"]),
    ),
    ("qncd prompts --annotations FILE --out out.txt", "captions.json", (*JSON, *JSON_EDITS["captions.json"])),
    ("tools/train_ddim.py --config FILE --out out", "tiny.yml", STRUCTURED),
    ("tools/train_first_stage.py --config FILE --out out", "tiny.yml", ("missing", "list", "folder", "torn")),
    ("tools/check_full_size.py --config FILE", "tiny.yml", ("missing", "folder", "pipe")),
)

# Command, with FOLDER for the folder that holds one bad file; the folder's name among the materials; the file's name; ways.
HELD: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("qncd sample --ckpt FOLDER -l out", "model_index.json", "model_index.json", (*JSON[1:], *JSON_EDITS["model_index.json"])),
    (
        "qncd sample --config {m}/good/tiny.yml --ckpt FOLDER --timesteps 4 -l out", "unet_config.json", "config.json",
        (*JSON, *JSON_EDITS["unet_config.json"]),
    ),
    (
        "qncd sample --config {m}/good/tiny.yml --ckpt FOLDER --timesteps 4 -l out", "scheduler_scheduler_config.json",
        "scheduler_config.json", (*JSON[1:], *JSON_EDITS["scheduler_scheduler_config.json"]),
    ),
    ("qncd sample --config {m}/good/tiny.yml --ckpt FOLDER --timesteps 4 -l out", "index", INDEX, tuple(INDEX_EDITS)),
    (f"{PTQ} --backend onnxruntime --onnx FOLDER", "onnx", "model.onnx", (*BINARY, "foreign")),
    ("qncd sample --config {m}/good/tiny.yml --ckpt FOLDER --timesteps 4 -l out", "weights", "diffusion_pytorch_model", BINARY),
    (EVALUATE.replace(" {m}/good/pictures", " FOLDER", 1), "pictures", "0.png", ("empty", "torn", "text", "zeros")),
    (SCENES + " FOLDER", "scenes", "prompts.jsonl", TEXTUAL[1:]),
)  # fmt: skip


def _written() -> list[Case]:
    """Places where a command writes, that are taken, somebody else's, or may not be written."""
    cases = []
    for command, flag in ((DDIM, "-l"), (LDM, "-l"), (TEXT, "--outdir"), (EXPORT + " --out out", "--out"),
                          ("qncd quantize --cali_ckpt q.safetensors --max_images 2 -l out", "-l"),
                          ("qncd convert --config {m}/good/tiny.yml --ckpt {m}/good/zip.ckpt --out out", "--out")):  # fmt: skip
        base = command.rpartition(f" {flag} ")[0]
        for kind in ("taken", "locked/inside", "other")[: 2 if command.startswith(EXPORT) else 3]:  # models may lie together
            words = (*base.split(), flag, f"{{m}}/{kind}" if kind != "other" else "other")
            given = {"other": "other"} if kind == "other" else {}
            name = f"{base.split(' {m}')[0]} {flag} {kind}"
            cases.append(Case(name, words, (kind,), given, as_nobody=kind.startswith("locked")))
    for kind in (*JSON[2:], *JSON_EDITS["run.json"]):
        name = kind.replace(" ", "_")
        cases.append(
            Case(f"run.json {kind}", tuple(DDIM.replace("-l out", f"-l {name}").split()), (name,),
                 {name: f"run.json/{name}"}, as_nobody=kind in NOBODY)
        )  # fmt: skip
    return cases


CONTRADICTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qncd", ("command",)),
    ("qncd sampel", ("sampel",)),
    ("qncd benchmark", ("command",)),
    ("qncd quantize --config fashion_mnist.yml", ("--cali_ckpt",)),
    ("qncd sample --config fashion_mnist.yml", ("logdir",)),
    (f"{DDIM} --weight_bit 4", ("--weight_bit", "--ptq")),
    (f"{DDIM} --compare_fp", ("--compare_fp", "--ptq")),
    (f"{DDIM} --cali_ckpt x.safetensors", ("--cali_ckpt", "--ptq")),
    (f"{DDIM} --no_such_flag", ("--no_such_flag",)),
    (f"{DDIM} --cond", ("--cond",)),
    (f"{PTQ} --resume", ("--resume", "--cali_ckpt")),
    (f"{PTQ} --resume --resume_w --cali_ckpt {{m}}/good/w4a8.safetensors", ("--resume_w", "--resume")),
    (f"{PTQ} --recon --gptq", ("recon", "gptq")),
    (f"{PTQ} --onnx {{m}}/missing --backend onnxruntime", ("--onnx", "missing")),
    (f"{PTQ} --onnx {{m}}/other --backend onnxruntime", ("other",)),
    (f"{PTQ} --onnx {{m}}/other", ("--onnx",)),
    (f"{PTQ} --cali_ckpt {{m}}/other", ("--cali_ckpt", "other")),
    (f"{PTQ} --cali_ckpt {{m}}/good/w4a8.safetensors --weight_bit 8", ("w4a8.safetensors",)),
    (f"{PTQ} --quant_mode linear --gptq --cali_iters 5", ("cali_iters",)),
    ("qncd sample --prompt circle --from_file {m}/good/prompts.txt --outdir out", ("--prompt", "--from_file")),
    ("qncd sample --prompt circle --plms --dpm --outdir out", ("--plms", "--dpm")),
    ("qncd sample --from_file {m}/good/prompts.txt --begin_data 5 --outdir out", ("--begin_data", "5")),
    ("qncd sample --from_file {m}/good/prompts.txt --max_prompts 0 --outdir out", ("--max_prompts", "0")),
    ("qncd sample --config {m}/good/tiny.yml --ckpt {m}/variant --timesteps 4 -l out", ("non_ema",)),
    ("qncd evaluate {m}/missing {m}/good/pictures", ("missing",)),
    ("qncd evaluate {m}/other {m}/good/pictures --features fashion_mnist --no_cache", ("other",)),
    ("qncd evaluate {m}/good/pictures {m}/good/images.npz --json {m}/good/images.npz", ("--json", "images.npz")),
    ("qncd evaluate - {m}/good/pictures --metrics fid", ("REAL", "--metrics")),
    (f"{EVALUATE} --metrics clip_score --prompts {{m}}/missing", ("missing",)),
    ("qncd reproduce bedroom --out out", ("bedroom",)),
    ("qncd reproduce cifar10 --out out", ("--reference",)),
    ("qncd reproduce coco --reference {m}/good/pictures --out out", ("--annotations",)),
    ("qncd reproduce cifar10 --rehearse --annotations {m}/other --out out", ("--annotations",)),
    ("qncd prompts --annotations {m}/good/captions.json --n 2 --out out.txt", ("--n", "2")),
    ("qncd prompts --annotations {m}/good/captions.json --n 1 --out {m}/other", ("--out", "other")),
    ("qncd prompts --annotations {m}/good/captions.json --n 1 --out o.txt --images {m}/other", ("1.jpg",)),
    (SCENES, ("folder",)),
    (SCENES + " {m}/good/pictures", ("prompts.jsonl",)),
    ("tools/benchmark_reconstruction.py --steps --quality", ("--steps", "--quality")),
    ("tools/benchmark_reconstruction.py --block x", ("--block",)),
)


def all_cases() -> list[Case]:
    """The whole table, in an order that does not change."""
    cases = []
    for command, values in ((DDIM, STEPS), (PTQ, QUANTIZATION), (LDM, LATENT), (TEXT, TEXTS), (PIPELINE, ADDED),
                            (EVALUATE, FIGURES), ("qncd benchmark quality --out out", QUALITY), ("qncd benchmark speed", SPEED),
                            ("qncd reproduce cifar10 --rehearse --out out", REPRODUCE),
                            ("scripts/benchmark_speed.py", {"--rounds": "0 x"}),
                            ("scripts/benchmark_quality.py", {"--seeds": "0 x"}),
                            ("scripts/sample_diffusion_ldm.py -l out", {"--custom_steps": "0 x"}),
                            ("scripts/coco_prompts.py --annotations {m}/good/captions.json --out out.txt", {"--n": "0 -1 x"}),
                            *TOOLS.items()):  # fmt: skip
        cases += flag_cases(command, values)
    for command, name, kinds in READ:
        for kind in kinds:
            place = f"{{m}}/{name}/{kind.replace(' ', '_')}/{name}"
            title = command.replace("FILE", f"{name} {kind}").replace("{m}/good/", "")
            cases.append(Case(title, tuple(command.replace("FILE", place).split()), (name,), as_nobody=kind in NOBODY))
    for command, folder, name, kinds in HELD:
        for kind in kinds:
            place = f"{{m}}/{folder}/{kind.replace(' ', '_')}"
            title = command.replace("FOLDER", f"{name} {kind}").replace("{m}/good/", "")
            cases.append(Case(title, tuple(command.replace("FOLDER", place).split()), (name,), as_nobody=kind in NOBODY))
    for kind in BROKEN:
        place = f"{{m}}/broken/{kind.replace(' ', '_')}"
        cases.append(Case(f"qncd sample broken pipeline {kind}", ("qncd", "sample", "--ckpt", place, "-l", "out"), (place,)))
    cases += _written()
    cases += [Case(words.replace("{m}/good/", ""), tuple(words.split()), says) for words, says in CONTRADICTIONS]
    return cases
