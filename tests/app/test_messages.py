"""What libraries have to say does not stand in front of what a command says."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from qncd.app import messages

ROOT = Path(__file__).resolve().parents[2]
CHATTER = """
import logging, warnings
from qncd.app import messages
messages.show("warning")
import torch
from diffusers.utils import logging as diffusers_logging
logging.getLogger("torch.utils._pytree").warning("torch has something to say, as it does when torchao is installed")
diffusers_logging.get_logger("diffusers.quantizers").warning("Unable to import `torchao` Tensor objects")
logging.getLogger("some.library").warning("so have others")
warnings.warn("this is deprecated", FutureWarning)
logging.getLogger("qncd").info("not now")
logging.getLogger("qncd").warning("what this package says")
logging.getLogger("some.library").error("an error")
"""


def test_libraries_are_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", CHATTER], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "what this package says\nan error\n")


def test_lines_go_to_what_is_stderr_at_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    root, level = logging.getLogger(), logging.getLogger("qncd").level
    before, root_level = list(root.handlers), root.level
    try:
        messages.show("info")
        messages.show("info")  # once more is not twice
        logging.getLogger("qncd").info("one")
        assert capsys.readouterr().err == "one\n"
        logging.getLogger("qncd").info("two")
        assert capsys.readouterr().err == "two\n"
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
        root.setLevel(root_level)
        logging.getLogger("qncd").setLevel(level)
