"""Run experiments and collect what they found: `python -m experiments --help`."""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from jaxattn.claims import experiment, report, runner


def main(arguments: list[str] | None = None) -> None:
    """One command. Errors of the user's making are one line on stderr and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    options, console = _parser().parse_args(given), Console()
    try:
        match options.command:
            case "list":
                _list(console)
            case "run":
                _run(options, shlex.join(["python", "-m", "experiments", *_without_folder(given)]), console)
            case "keep":
                for name in options.name:
                    kept = experiment.load(name).name
                    report.keep(options.folder / kept, options.place / kept)
                    console.print(f"kept {options.place / kept}", soft_wrap=True)
            case "report":
                console.print(Markdown(report.write_index(options.folder, reports=True)))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("experiments: interrupted; run the same again to go on", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments there are")
    run = commands.add_parser("run", help="run an experiment, or go on with one")
    run.add_argument("name", nargs="*", help="experiments, as `list` names them")
    run.add_argument("--all", action="store_true", help="every experiment")
    run.add_argument("--quick", action="store_true", help="at the size that takes less than a minute")
    run.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: 1)")
    run.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE", help="another value; repeatable"
    )
    collect = commands.add_parser("report", help="write all reports anew, and one index of every claim")
    keep = commands.add_parser("keep", help="copy the reports of runs at full size to where they are kept")
    keep.add_argument("name", nargs="+", help="experiments, as `list` names them")
    keep.add_argument("--place", type=Path, default=Path("docs/results"), help="to here (default: docs/results)")
    for command in (run, collect, keep):
        command.add_argument("--folder", type=Path, default=Path("results"), help="where results go (default: results)")
    return parser


def _without_folder(given: list[str]) -> list[str]:
    """Returns the arguments without the folder, a place on this machine that changes no number."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder")
    return parser.parse_known_args(given)[1]


def _list(console: Console) -> None:
    table = Table("experiment", "", box=None)
    for name, about in experiment.names().items():
        table.add_row(name, about)
    console.print(table)


def _run(options: argparse.Namespace, command: str, console: Console) -> None:
    chosen = list(experiment.names()) if options.all else options.name
    if not chosen:
        raise ValueError("no experiment is named: need a NAME (see `list`), or --all")
    if options.changes and len(chosen) > 1:
        raise ValueError("--set is for one experiment: name one")
    planned = []
    for name in chosen:
        one = experiment.load(name)
        config = runner.changed(one.quick if options.quick else one.default, options.changes)
        planned.append((one, config, runner.place(options.folder, one, config)))
    for one, config, folder in planned:
        runner.run(one, config, seeds=options.seeds, folder=folder, command=command, console=console)
        results = [report.to_result(seed) for seed in report.read_seeds(folder).values()]
        for claim, _, verdict, criterion in report.held_to(report.written_claims(folder), one.claims, results):
            moved = f" Criterion: {criterion}." if verdict == report.CHANGED else ""
            console.print(f"{verdict}: {claim.says}{moved}", soft_wrap=True, highlight=False)
        console.print(f"wrote {folder / 'report.md'}", soft_wrap=True)
    report.write_index(options.folder)


if __name__ == "__main__":
    main()
