"""The command's arguments, output and exit codes: 0 done, 1 the two things of ``diff`` differ, 2 wrong input."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from lightning_source._lightning import MisconfigurationException
from lightning_source.command_line.comparing import compare_runs, compare_scores
from lightning_source.command_line.exporting import write_csv
from lightning_source.command_line.inspecting import inspect, text_of
from lightning_source.scores import InfluenceScores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives back its exit code.

    Args:
        arguments: of the command line; by default the process's own.
    """
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.run(asked))
    except (MisconfigurationException, FileNotFoundError, OSError) as error:
        print(f"lightning-source: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-source", description="Look into recorded runs and files of scores, without the model or the data."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("inspect", help="what a run directory holds and what can be asked of it")
    one.add_argument("run_directory", type=Path, metavar="RUN")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(run=_inspect)

    one = commands.add_parser("export", help="the strongest examples of each query of a file of scores, as CSV")
    one.add_argument("scores", type=Path, metavar="SCORES")
    one.add_argument("-k", type=_positive, default=10, help="examples on each side of a query (default: 10)")
    one.add_argument("--out", type=Path, help="the file; by default the standard output")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(run=_export)

    one = commands.add_parser("diff", help="how two files of scores, or two runs, differ")
    one.add_argument("one", type=Path, metavar="A")
    one.add_argument("other", type=Path, metavar="B")
    one.add_argument("-k", type=_positive, default=10, help="examples whose overlap is counted (default: 10)")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(run=_diff)
    _add_completion(parser, commands.choices.values())
    return parser


class _NeedsShtab(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error("completion is made by shtab, which is missing. HINT: pip install 'lightning_source[cli]'")


def _add_completion(parser: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser]) -> None:
    """``--print-completion SHELL``; the script is static, since to ask this command would import torch at each tab."""
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        parser.add_argument("--print-completion", action=_NeedsShtab, metavar="SHELL", help=argparse.SUPPRESS)
        return
    shtab.add_argument_to(parser, ["--print-completion"], help="print a script that completes this command in a shell")
    for action in (action for command in commands for action in command._actions):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _version() -> str:
    try:
        return metadata.version("lightning_source")
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _inspect(asked: argparse.Namespace) -> int:
    found = inspect(asked.run_directory)
    print(json.dumps(found, indent=1) if asked.json else text_of(found))
    return 0


def _export(asked: argparse.Namespace) -> int:
    scores = InfluenceScores.load(asked.scores)
    out = sys.stdout if asked.out is None else open(asked.out, "w", newline="")  # noqa: SIM115 - closed below
    try:
        if asked.json:
            json.dump([row._asdict() for row in scores.rows(asked.k)], out, indent=1)
            out.write("\n")
        else:
            write_csv(scores, asked.k, out)
    finally:
        if asked.out is not None:
            out.close()
    return 0


def _diff(asked: argparse.Namespace) -> int:
    if asked.one.is_dir() and asked.other.is_dir():
        found = compare_runs(asked.one, asked.other)
        differ = bool(found)
    else:
        found = compare_scores(InfluenceScores.load(asked.one), InfluenceScores.load(asked.other), asked.k)
        differ = found["relative_difference"] != 0 or bool(found["metadata"])
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{key}: {value}" for key, value in found.items()) or "no difference")
    return int(differ)
