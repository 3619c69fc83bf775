"""One bad command line, and what its one line on stderr has to say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A command line that ends with exit status 2.

    Attributes:
        name: unique; the command, the flag and what is wrong with it.
        words: `qncd` or a script below the repository, and what follows; `{m}` is the folder of materials, and the working
            directory is an empty one.
        says: texts that the line has to hold.
        given: what lies in the working directory before, by its name there: a file or folder of the materials. All of it has to
            be there unchanged afterwards, and nothing else.
        as_nobody: file permissions hold; root, whom they do not stop, becomes another user.
    """

    name: str
    words: tuple[str, ...]
    says: tuple[str, ...]
    given: Mapping[str, str] = field(default_factory=dict)
    as_nobody: bool = False

    def command(self, materials: Path) -> list[str]:
        """The words with the folder of materials."""
        return [word.replace("{m}", str(materials)) for word in self.words]


def flag_cases(command: str, values: Mapping[str, str]) -> list[Case]:
    """A case for each of the space-separated values of each flag of a command.

    The line has to name the flag and the value; of a path that is the value, the path.
    """
    cases = []
    for flags, listed in values.items():
        flag, _, also = flags.partition(" ")
        for value in listed.split():
            words = (*command.split(), f"{flag}={value}" if flag.startswith("--") else flag, *also.split())
            if not flag.startswith("--"):
                words = (*command.split(), flag, value, *also.split())
            name = f"{_title(command)} {flag} {value}" + (f" {also}" if also else "")
            cases.append(Case(name, words, (value,) if value.startswith("{m}/") else (flag.lstrip("-"), value)))
    return cases


def _title(command: str) -> str:
    """The command without the good files that stand behind it."""
    return re.sub(r" (--\w+ )?(\{m\}/good/\S+|out)\b", "", command)
