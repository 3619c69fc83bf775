"""What has to be said before any test imports torch or Triton."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run in several processes, which share the cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # Triton decides while it is imported whether its kernels run in an interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
