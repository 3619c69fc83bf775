"""The command `qncd`: one word names what to do, the rest are its flags."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qncd.app import stopping


@dataclass(frozen=True)
class Command:
    """One line of `qncd --help`.

    Attributes:
        summary: what it does.
        module: below `qncd.app.commands`: has `make_parser` and `main`, or `choose` where the flags depend on the model.
        below: the commands behind this one's word, of a command that is a group of others.
    """

    summary: str
    module: str = ""
    below: Mapping[str, Command] | None = None


COMMANDS = {
    "sample": Command("sample a model, in full precision or quantized (--ptq), and write the images", "sample"),
    "quantize": Command("quantize a model and write the quantized checkpoint", "quantize"),
    "export": Command("export a quantized network as an ONNX model that computes in integers, or as GGUF", "export"),
    "convert": Command("convert an original checkpoint to a folder that diffusers loads, or back", "convert"),
    "evaluate": Command("compute FID, precision, CLIP score and other figures of images", "evaluate"),
    "benchmark": Command(
        "measure quality or speed of quantized models",
        below={
            "quality": Command("measure what quantization costs a model in image quality", "benchmark_quality"),
            "speed": Command("measure what quantization costs and gains in time and memory", "benchmark_speed"),
        },
    ),
    "report": Command("write one HTML file about runs: settings, layers, figures, images to flip between", "report"),
    "inspect": Command("show what each layer of a quantized model got, and where its error comes from", "inspect"),
    "reproduce": Command("repeat a published evaluation, and put its figures beside the published ones", "reproduce"),
    "prompts": Command("draw prompts from the captions of MS-COCO", "prompts"),
}
CHOOSING = ("sample", "quantize")
SUMMARY = "Quantize diffusion models after training, correct their quantization noise, and measure what is left."


def overview(program: str, commands: Mapping[str, Command], summary: str) -> str:
    """The text of --help above the commands themselves."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
    usage = f"usage: {program} COMMAND [FLAGS]"
    return "\n".join([usage, "", summary, "", *lines, "", f"`{program} COMMAND --help` lists the flags of a command."])


def parse(words: Sequence[str]) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """The function that a command line calls, and its arguments.

    Raises:
        ValueError: there is no such command, or what `choose` raises.
        SystemExit: --help and --version are answered; or the flags are wrong, which is said already.
    """
    program, commands, summary, rest = "qncd", COMMANDS, SUMMARY, list(words)
    while True:
        if rest and rest[0] in ("-h", "--help"):
            print(overview(program, commands, summary))
            sys.exit(0)
        if rest and rest[0] == "--version" and program == "qncd":
            from qncd import __version__

            print(f"qncd {__version__}")
            sys.exit(0)
        if not rest or rest[0] not in commands:
            found = f"{rest[0]}: no such command" if rest else "a command is missing"
            raise ValueError(f"{found}; allowed behind `{program}` are {', '.join(commands)}")
        name = rest.pop(0)
        command, program = commands[name], f"{program} {name}"
        if command.below is None:
            break
        commands, summary = dict(command.below), f"{command.summary[0].upper()}{command.summary[1:]}."
    module = importlib.import_module(f"qncd.app.commands.{command.module}")
    if command.module in CHOOSING:
        parser, main, rest = module.choose(rest)
    else:
        parser, main = module.make_parser(), module.main
    parser.prog = program
    return main, parser.parse_args(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line, by default this process's own: bad input is one line on stderr and exit status 2."""
    if argv is None:  # before the imports that take seconds
        stopping.install()
    from qncd.app.parser import run_main

    words = list(sys.argv[1:] if argv is None else argv)

    def run(_: argparse.Namespace) -> None:
        command, args = parse(words)
        command(args)

    run_main(run, argparse.Namespace(debug="--debug" in words))
