#!/usr/bin/env python3
"""Run the notebooks of docs/tutorials/ from the first cell to the last, and put what they show into them.

    python tools/run_tutorials.py
    python tools/run_tutorials.py docs/tutorials/first_pipeline.ipynb

A notebook keeps what its cells print, and its pictures as PNG; warnings, progress and times are left out. Each takes less than a
minute on two cores, and writes its files to a folder that is removed afterwards. Needs the extra docs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from qncd.app import parser as cli
from qncd.io.files import regular_file, write_text

TUTORIALS = sorted((Path(__file__).resolve().parents[1] / "docs" / "tutorials").glob("*.ipynb"))
SECONDS = 300  # that a cell may take


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in a new kernel whose working directory is `folder`; what they show is in the notebook afterwards.

    Raises:
        ValueError: a cell raises; the message ends with its error.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as sockets:  # files in the place of ports; their paths must be short
        config = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")})
        try:
            NotebookClient(notebook, config=config, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
        except CellExecutionError as error:
            raise ValueError(f"a cell failed: {error.ename}: {error.evalue}") from error
    notebook.metadata.language_info = {"name": "python"}  # without the version of this one
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _kept(output)) is not None]
    return notebook


def _kept(output: Any) -> Any:
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    output.data = {kind: data for kind, data in output.data.items() if kind in ("text/plain", "image/png")}
    if "image/png" in output.data:
        output.data["text/plain"] = "a picture"  # its own text may hold an address in memory
    return output


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__ or "")
    parser.add_argument("notebooks", nargs="*", type=Path, default=TUTORIALS, help="by default all of docs/tutorials/")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import nbformat

    for file in [regular_file(file) for file in args.notebooks]:
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            try:
                execute(notebook, Path(folder))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        write_text(file, nbformat.writes(notebook) + "\n")
        print(file)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
