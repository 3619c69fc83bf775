"""Packaging of QNCD. The ranges here are what the code needs; constraints.txt holds one tested set of exact versions."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The `__version__` of qncd/__init__.py, read as text: importing the package needs what is being installed."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "qncd" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError('qncd/__init__.py has no line `__version__ = "X.Y.Z"`')
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


INSTALL_REQUIRES = [
    "torch>=2.6,<3",  # before 2.6, loading a hostile checkpoint could run its code even with weights_only=True
    "torchvision>=0.21,<1",
    "numpy>=1.26,<3",
    "pytorch-lightning>=2.5,<3",
    "transformers>=5,<6",
    "open_clip_torch>=2.26,<4",
    "tqdm>=4.66,<5",
    "scipy>=1.11,<2",
    "pillow>=10.3,<14",
    "diffusers>=0.42,<1",
    "accelerate>=1,<2",  # diffusers loads quantized folders with it
    "peft>=0.17,<1",  # LoRA
    "safetensors>=0.4.5,<1",
    "torch-fidelity>=0.3,<1",
    "matplotlib>=3.8,<4",
    "Jinja2>=3.1,<4",  # reports
    "pyyaml>=6.0.1,<7",
]
EXPORT_REQUIRES = [  # `qncd export` and --backend; exporting also needs torch 2.8 or newer
    "onnx>=1.18,<2",
    "onnxscript>=0.5,<1",
    "onnxruntime>=1.22,<2",
    "openvino>=2025.2",
]
GGUF_REQUIRES = ["gguf>=0.17,<1"]  # `qncd export --out FILE.gguf`
DOCS_REQUIRES = [  # the site of docs/, and the notebooks of docs/tutorials/
    "sphinx>=8,<10",
    "furo>=2024.8",
    "myst-nb>=1.2,<2",
    "nbclient>=0.10,<1",
    "ipykernel>=6.29,<8",
]
TEST_REQUIRES = [
    *EXPORT_REQUIRES,
    *GGUF_REQUIRES,
    *DOCS_REQUIRES,
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "omegaconf>=2.3,<3",  # what the published yamls are read with elsewhere
    "ruff>=0.9,<1",
    "mypy>=1.13,<3",
    "types-PyYAML>=6.0.12,<7",
    "packaging>=23.2",
    "pytorch-fid>=0.3,<1",
    "clean-fid>=0.1.35,<1",
    "torchmetrics>=1.4,<2",
    "lpips>=0.1.4,<1",
]
PEERS_REQUIRES = [  # other toolkits, for `qncd benchmark quality`; nncf and optimum-quanto compile C++ on first use
    "nvidia-modelopt>=0.47,<1",
    "nncf>=3.4,<4",
    "optimum-quanto>=0.2.7,<1",
    "torchao>=0.18,<1",
]

setup(
    name="qncd",
    version=read_version(),
    description="Post-training quantization of diffusion models with intra and inter quantization noise correction",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="QNCD contributors",
    license="Apache-2.0",
    keywords="diffusion models, quantization, post-training quantization, int8, stable diffusion, diffusers",
    project_urls={"Paper": "https://arxiv.org/abs/2403.19140"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(where=str(ROOT), include=["qncd", "qncd.*"]), "qncd.configs"],
    package_dir={"qncd.configs": "configs"},  # the yaml files stay at the root of the repository, and go into the wheel
    package_data={
        "qncd": ["py.typed", "assets/**/*", "models/files/registry.json", "report/templates/*"],
        "qncd.configs": ["*.yml", "*.yaml"],
    },
    entry_points={"console_scripts": ["qncd = qncd.app.console:main"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "test": TEST_REQUIRES,
        "docs": DOCS_REQUIRES,
        "export": EXPORT_REQUIRES,
        "gguf": GGUF_REQUIRES,
        "peers": PEERS_REQUIRES,
    },
)
