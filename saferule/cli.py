"""The command line: `saferule reproduce | reference | notebook | check | verify | verdict | download | import | export`.

Bad input ends with one line `saferule: ...` on stderr and exit code 2; Ctrl-C with one line and 130; a notebook that failed
for another reason with one line and 1. `verdict` ends with 0 for a pass and 1 for anything less.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See `{self.prog} --help`.")


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="saferule", description="Reproducibility kit for Safe-RULE: unlearn poison from offline safe RL policies.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    reproduce = commands.add_parser("reproduce", help="run every notebook that is out of date and print table T1")
    reproduce.add_argument("--profile", default="quick", help="smoke, quick (default), standard, learners or paper")
    reproduce.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    reproduce.add_argument("--seeds", default="", help="such as 0,1,2; default: the profile's")
    reproduce.add_argument("--tasks", default="", help="such as BallCircle,CarCircle; default: the profile's")
    reproduce.add_argument("--cores", default="", help="processes at a time; default: all cores")
    reproduce.add_argument("engine", nargs="*", metavar="-- OPTION", help="further options for snakemake, such as --dry-run")

    notebook = commands.add_parser("notebook", help="execute one notebook with papermill")
    notebook.add_argument("source", type=Path, metavar="NOTEBOOK")
    notebook.add_argument("out", type=Path, metavar="OUT", help="where the executed notebook goes")
    notebook.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
                          help="a parameter, as in papermill")
    notebook.add_argument("--log", type=Path, help="where it lies while it runs and if it fails (default: OUT.failed.ipynb)")
    notebook.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)       # started by snakemake

    check = commands.add_parser("check", help="validate a data file (DSRL or D4RL HDF5) and describe it")
    check.add_argument("data", type=Path, metavar="DATA.hdf5")
    check.add_argument("--task", required=True)

    verify = commands.add_parser("verify", help="compare an artefact's files with the hashes in its manifest")
    verify.add_argument("path", type=Path, metavar="ARTEFACT", help="its folder or its manifest.json")

    verdict = commands.add_parser("verdict", help="judge a repair against stated thresholds: exit code 0 if it passes, 1 if not")
    verdict.add_argument("file", type=Path, nargs="?", metavar="VERDICT.json", help="one that was handed in: check and show it")
    verdict.add_argument("--profile", default="quick", help="whose models are judged; default: quick")
    verdict.add_argument("--method", default="saferule", help="default: saferule")
    verdict.add_argument("--tasks", default="", help="such as BallCircle,CarCircle; default: the profile's")
    verdict.add_argument("--learners", default="", help="such as bcq_lag,cpq; default: the profile's")
    verdict.add_argument("--json", action="store_true", help="print the JSON instead of the page")

    reference = commands.add_parser("reference", help="copy tables, figures, notebooks and manifests to results/reference")
    reference.add_argument("--profile", default="quick")

    bring = commands.add_parser("import", help="take over checkpoints of OSRL as trained models")
    bring.add_argument("sources", type=Path, nargs="+", metavar="CHECKPOINT",
                       help="folders that OSRL wrote, or a model.pt in one; several must differ in seed or cost limit only")
    bring.add_argument("--profile", default="quick", help="where 01_data and 02_poison (attack 'given') were run; default: quick")
    bring.add_argument("--task", help="default: as in config.yaml")
    bring.add_argument("--learner", help="what it is, to be sure; default: found from the weights")
    bring.add_argument("--attack", default="given", help="given (default): the model is poisoned | none: it is clean")
    bring.add_argument("--seeds", default="", help="the models' seeds in later stages, such as 0,1,2; default: as in config.yaml")
    bring.add_argument("--best", action="store_true", help="model_best.pt instead of model.pt")
    bring.set_defaults(command="bring")                    # 'import' cannot be a function's name

    give = commands.add_parser("export", help="write a model trained in parity mode as a checkpoint for OSRL")
    give.add_argument("source", type=Path, metavar="ARTEFACT", help="the folder of a 'train' or 'unlearn' artefact")
    give.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    give.add_argument("--replica", type=int, help="which model, if there are several")
    give.set_defaults(command="give")

    download = commands.add_parser("download", help="fetch a task's DSRL or D4RL file")
    download.add_argument("task")
    download.add_argument("--to", type=Path, help="folder (default: results/downloads, where 01_data looks)")
    return main


def reproduce(args: argparse.Namespace) -> int:
    from .engine import run
    return run(args.profile, args.device, args.seeds, args.tasks, args.cores, args.engine)


def notebook(args: argparse.Namespace) -> int:
    import time

    from .notebook import die_with_parent, run_notebook
    log = args.log
    if args.engine:
        die_with_parent()
        log = log or args.out.parent.parent / "logs" / args.out.name
        say(f"run   {args.out.stem}")
    start = time.monotonic()
    run_notebook(args.source, args.out, dict(args.parameters), log)
    if args.engine:
        say(f"done  {args.out.stem:<48} {time.monotonic() - start:6.1f} s")
    return 0


def say(line: str) -> None:
    """A line in one piece, although other notebooks write to the same place."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def check(args: argparse.Namespace) -> int:
    import numpy as np

    from .hdf5 import read_hdf5
    from .tasks import get_task
    task = get_task(args.task)
    columns = read_hdf5(args.data, task)
    ends = np.flatnonzero(columns["terminal"] | columns["timeout"])
    bounds = np.concatenate([[0], ends[ends < len(columns["cost"]) - 1] + 1])
    returns, costs = (np.add.reduceat(columns[name].astype(np.float64), bounds) for name in ("reward", "cost"))
    print(f"{args.data}: fits {task.name}\n"
          f"  {len(columns['cost']):,} transitions, {len(bounds):,} episodes; "
          f"observations [{columns['obs'].shape[1]}], actions [{columns['action'].shape[1]}]\n"
          f"  return per episode: {returns.min():.1f} / {np.median(returns):.1f} / {returns.max():.1f} (least, median, greatest)\n"
          f"  cost per episode:   {costs.min():.1f} / {np.median(costs):.1f} / {costs.max():.1f}; "
          f"{(costs <= task.cost_limit).mean():.0%} of episodes within the limit {task.cost_limit:g}")
    return 0


def verify(args: argparse.Namespace) -> int:
    from .artifacts import verify as compare
    artefact = compare(args.path.parent if args.path.name == "manifest.json" else args.path)
    print(f"{args.path}: {artefact.kind} {artefact.name}, {artefact.short}: every file matches its hash")
    return 0


def verdict(args: argparse.Namespace) -> int:
    import json

    from .notebook import checked
    from .verdict_file import read
    from .verdict_page import markdown
    if args.file:
        document = read(args.file)
    else:
        from .stages.verdict import verdict_of
        given = checked({"profile": args.profile, "tasks": args.tasks, "learners": args.learners, "method": args.method})
        document = verdict_of(given.tasks, given.learners, given.method, given.profile, given.root)
    print(json.dumps(document, indent=1, ensure_ascii=False) if args.json else markdown(document).rstrip())
    return 0 if document["result"] == "pass" else 1


def reference(args: argparse.Namespace) -> int:
    from .config import PROFILES, one_of
    from .reference import keep
    from .sources import relative
    print(f"kept in {relative(keep(one_of('profile', args.profile, PROFILES)))}")
    return 0


def download(args: argparse.Namespace) -> int:
    from .files import results_dir
    from .hdf5 import download as fetch
    from .tasks import get_task
    print(fetch(get_task(args.task), args.to or results_dir() / "downloads"))
    return 0


def bring(args: argparse.Namespace) -> int:
    from .config import PROFILES, one_of
    from .files import run_dir
    from .notebook import parse_seeds
    from .osrl import import_checkpoints
    root, seeds = run_dir(one_of("profile", args.profile, PROFILES)), parse_seeds(args.seeds)
    made = import_checkpoints(args.sources, args.profile, root, args.task, args.learner, args.attack, seeds, args.best)
    for note in made.config["imported"]["notes"]:
        print(f"  {note}")
    for line in made.replicas:
        print(f"train/{made.name} {made.short}: {line['method']}, seed {line['seed']}, cost limit {line['cost_limit']:g}")
    print(f"next: notebooks 04 and 05 with -p profile {args.profile} -p learner {made.config['learner']}")
    return 0


def give(args: argparse.Namespace) -> int:
    from .osrl import export_checkpoint
    from .sources import relative
    source = args.source.parent if args.source.name == "manifest.json" else args.source
    print(f"{relative(export_checkpoint(source, args.out, args.replica))}: config.yaml, checkpoint/model.pt")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        return globals()[args.command](args)
    except UserError as error:
        code, line = 2, f"saferule: {error}"
    except KeyboardInterrupt:
        code, line = 130, "saferule: interrupted; the same command continues where this stopped."
    except BrokenPipeError:                                # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from .notebook import NotebookFailed
        if not isinstance(error, NotebookFailed):
            raise
        code, line = 1, f"saferule: {error}"
    print(line, file=sys.stderr)
    return code
