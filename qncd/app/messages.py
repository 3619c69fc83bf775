"""What a command says while it works: lines on stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Libraries with handlers for their messages, which look here while they are imported: errors alone.
LIBRARIES = {"TORCH_LOGS": "-all", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


class _Stderr(logging.Handler):
    """Lines on what is stderr at the time, which may be another stream than when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show(level: str) -> None:
    """This package's messages from `level` on; those of libraries where they are errors, or with `debug` all of them.

    Some libraries warn while they are imported, which would stand in front of the one line of an error.

    Args:
        level: debug, info, warning, error or critical.
    """
    root, debug = logging.getLogger(), level == "debug"
    for handler in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(handler)
    root.addHandler(_Stderr())
    root.setLevel("DEBUG" if debug else "ERROR")
    logging.getLogger("qncd").setLevel(level.upper())
    if debug:
        return
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!qncd)")


def hide_loading_bars() -> None:
    """No bars of diffusers and transformers while they load the parts of a folder; downloads keep theirs."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    enable_progress_bars()
