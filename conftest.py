"""Triton decides while it is imported whether its kernels run in an interpreter, on the CPU: before any test imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
