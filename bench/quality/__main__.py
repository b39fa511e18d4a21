"""The command line.

    python -m bench.quality smoke --results DIR [--model PATH]
    python -m bench.quality run --model LABEL=PATH --task NAME:KIND:TRAINER=FOLDER [...] --results DIR
    python -m bench.quality run --model LABEL=PATH --data ROOT --results DIR

Kinds: gsm8k (question, answer), titles (abstract, title), preference (prompt, chosen, rejected), text. Trainers: sft,
dpo, orpo. ``--data`` takes every folder of `KNOWN` that is below it. Stop it whenever you like: the same command goes
on where it stopped. Results: ``results.json``, ``page.md`` and plots in DIR; records of cells in ``DIR/cells``,
starts that learning rates share in ``DIR/starts``.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench.quality.grid import Places, Plan, Protocol, Task
from bench.quality.initializers import INITIALIZERS
from bench.quality.page import write_page
from bench.quality.running import CellsFailed, run_plans
from bench.quality.smoke import smoke_plans, write_smoke_places
from bench.quality.store import Store
from bench.quality.summary import BASELINE, shown_command, summarize

KNOWN = (
    "gsm8k:gsm8k:sft",
    "paper_titles:titles:sft",
    "alpaca_eval_pref:preference:dpo",
    "alpaca_eval_pref:preference:orpo",
    "tiny_shakespeare:text:sft",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    smoke = commands.add_parser("smoke", help="a small grid on rows made in code; minutes")
    smoke.add_argument("--model", help="a model by path; a tiny random one is made otherwise")
    run = commands.add_parser("run", help="the grid")
    run.add_argument("--model", action="append", required=True, metavar="LABEL=PATH")
    run.add_argument("--task", action="append", default=[], metavar="NAME:KIND:TRAINER=FOLDER")
    run.add_argument("--data", type=Path, help="a folder of the known data sets' folders")
    run.add_argument("--general", type=Path, help="a file of text rows, for forgetting")
    run.add_argument("--untrained", type=Path, help="a file of multiple-choice rows (instruction, answer), likewise")
    run.add_argument("--rows", nargs="+", type=int, default=[64])
    run.add_argument("--initializers", nargs="+", default=list(INITIALIZERS))
    run.add_argument("--learning-rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the test split")
    run.add_argument("--tune-seeds", nargs="+", type=int, help="among which learning rates are chosen; else --seeds")
    for name, field in Protocol.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            run.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            run.add_argument(option, type=field.annotation, default=field.default)
    for sub in (smoke, run):
        sub.add_argument("--results", type=Path, required=True)
        sub.add_argument("--processes", type=int, default=1)
        sub.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="quality-") as directory:
        if arguments.command == "smoke":
            places = write_smoke_places(Path(directory), arguments.model)
            plans = smoke_plans()
        else:
            plan, places = _plan(arguments, parser)
            plans = [plan]
        places = places.model_copy(update={"starts": arguments.results / "starts"})
        store = Store(arguments.results / "cells")
        try:
            records, choices, failed = run_plans(
                plans, places, store, processes=arguments.processes, threads=arguments.threads
            )
        except CellsFailed as error:
            print(f"cells failed; the same command tries them again:\n{error}", file=sys.stderr)
            return 1
    write_page(summarize(records, choices, failed, command=shown_command(sys.argv[1:])), records, arguments.results)
    print(arguments.results / "page.md")
    return 0


def _plan(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[Plan, Places]:
    """Return the grid and where its parts are; bad arguments end the program with what is wrong."""
    named = [text.partition("=") for text in arguments.task]
    if arguments.data is not None:
        known = [(text, "=", str(arguments.data / text.split(":")[0])) for text in KNOWN]
        named += [entry for entry in known if Path(entry[2]).is_dir()]
    tasks, folders = [], {}
    for text, _, folder in named:
        parts = text.split(":")
        if len(parts) != 3 or not folder:
            parser.error(f"--task {text}: NAME:KIND:TRAINER=FOLDER is needed")
        name, kind, trainer = parts
        # One folder may serve several trainers.
        name = name if trainer == "sft" else f"{name}-{trainer}"
        tasks.append(Task.model_validate({"name": name, "kind": kind, "trainer": trainer}))
        folders[name] = Path(folder)
    if not tasks:
        parser.error("no task: give --task or --data")
    unknown = set(arguments.initializers) - set(INITIALIZERS)
    if unknown or BASELINE not in arguments.initializers:
        parser.error(f"--initializers: {BASELINE} must be among them, and all of {', '.join(INITIALIZERS)}")
    models = dict(text.partition("=")[::2] for text in arguments.model)
    plan = Plan(
        tasks=tuple(tasks),
        rows=tuple(arguments.rows),
        initializers=tuple(arguments.initializers),
        learning_rates=tuple(arguments.learning_rates),
        seeds=tuple(arguments.seeds),
        tune_seeds=tuple(arguments.tune_seeds) if arguments.tune_seeds else None,
        protocol=Protocol(**{name: getattr(arguments, name) for name in Protocol.model_fields}),
    )
    return plan, Places(models=models, folders=folders, general=arguments.general, questions=arguments.untrained)


if __name__ == "__main__":
    sys.exit(main())
