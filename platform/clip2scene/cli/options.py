"""What the commands share: their groups in ``clip2scene --help``, common options and the types of option values."""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", int, float)


class Commands:
    """The subcommands of a parser, and the overview of them for its own help."""

    def __init__(self, parser: argparse.ArgumentParser):
        # argparse knows no groups of subcommands, so its own list is suppressed.
        self._parsers = parser.add_subparsers(
            required=True, metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS
        )
        self._width = min(shutil.get_terminal_size().columns - 2, 100)
        self.overview = ""

    def group(self, title: str) -> None:
        """Begin a group of the overview."""
        self.overview += f"\n{title}:\n"

    def add_parser(
        self, name: str, *, help: str, description: str | None = None, example: str | None = None
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: what the user types.
            help: its line in the overview.
            description: one or two sentences at the top of its own help; made from ``help`` when not given.
            example: a command line, shown below the description; the bare command when not given.
        """
        self.overview += self._wrapped(f"{name:10}{help}", "  ", " " * 12) + "\n"
        text = self._wrapped(description or f"{help[0].upper()}{help[1:]}.")
        text += f"\n\nexample:\n  {example or f'clip2scene {name}'}"
        parser = self._parsers.add_parser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.set_defaults(error=parser.error)
        return parser

    def _wrapped(self, text: str, indent: str = "", next_indent: str = "") -> str:
        return textwrap.fill(
            text, self._width, initial_indent=indent, subsequent_indent=next_indent, break_on_hyphens=False
        )


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``key=value ...``; with it, the command also takes such words after its options."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)


def add_submission(parser: argparse.ArgumentParser) -> None:
    """Add what ``plan`` and ``submit`` take: any file that ``run`` or ``sweep`` takes, and settings to change."""
    parser.add_argument("file", metavar="FILE", help="job, table or search space, such as jobs/nuscenes.yaml")
    add_overrides(parser, "settings to change, as with run and sweep")
    parser.add_argument("--job", metavar="FILE", help="with a search space: job file whose settings are varied")


def add_dashboard(parser: argparse._ActionsContainer, help: str) -> None:
    """Add ``--dashboard URL``, the cluster's side that answers from outside of it."""
    parser.add_argument("--dashboard", metavar="URL", help=help)


def file_to_write(text: str) -> str:
    """A path to write to, refused before any work is done if it is a folder or lies below a file."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; a file is needed")
    folder_to_write(str(Path(text).parent))
    return text


def folder_to_write(text: str) -> str:
    """A folder to write to, which need not exist yet; refused if it is a file or lies below one."""
    there = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; a folder is needed")
    return text


def _number(convert: Callable[[str], T], is_allowed: Callable[[T], bool], allowed: str) -> Callable[[str], T]:
    def checked(text: str) -> T:
        with contextlib.suppress(ValueError):
            if is_allowed(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {allowed}")

    return checked


positive_integer = _number(int, lambda value: value > 0, "an integer above 0")
non_negative_integer = _number(int, lambda value: value >= 0, "an integer of at least 0")
positive_number = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
non_negative_number = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
