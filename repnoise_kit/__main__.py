"""The command line: `python -m repnoise_kit quickstart`, `lab`, `grid`, `sweep`, `notebooks`."""

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from repnoise_kit.errors import KitError
from repnoise_kit.steps import interruptible

if TYPE_CHECKING:
    from repnoise_kit.testbeds import Testbed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise KitError(f"{message} (see {self.prog} --help)")


def main(words: list[str] | None = None) -> int:
    """Run a command; return 0, or 2 after one line on stderr about what the user can mend."""
    try:
        words = sys.argv[1:] if words is None else words
        arguments = _parser().parse_args(words, argparse.Namespace(words=words))
        with interruptible():
            arguments.run(arguments)
    except KitError as error:
        print("repnoise_kit:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("repnoise_kit: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def quickstart(arguments: argparse.Namespace) -> None:
    """Attack a model, defend it, attack it again; write tables, figures and a report."""
    from repnoise_kit import quickstart as experiment
    from repnoise_kit import report

    out = _writable(arguments.out)
    bed = _bed(arguments)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    rows, curves = experiment.run(bed, seeds, out)
    cells = report.write(rows, curves, out)
    over = "seeds and questions" if len(seeds) > 1 else "questions only: one seed"
    for group in ("seen", "unseen"):
        print(f"\n{group} things, 95 % intervals over {over}")
        print(experiment.readable(cells, group).to_string(index=False))
    print("\nwith RepNoise against without, paired by seed and question")
    for text in report.sentences(experiment.verdicts(rows.frame)):
        print(f"  {text}")
    print(f"\nwritten to {out}; look at {out / 'report.html'}")


def show_lab(arguments: argparse.Namespace) -> None:
    """Build the lab's model, if it is not there yet, and print what it knows and refuses."""
    from repnoise_kit.evaluation import evaluate
    from repnoise_kit.quickstart import summarise
    from repnoise_kit.testbeds import lab

    bed = lab(arguments.lab_seed)
    rows = evaluate(bed.base, bed).tagged(defence="none", attack="none").frame
    print(f"{bed.name}: {sum(p.numel() for p in bed.base.parameters()):,} parameters, {bed.source}")
    for metric in ("utility", "refusal"):
        examples = rows[rows["metric"] == metric].groupby("category").head(1).head(4)
        print(f"\nit {'knows' if metric == 'utility' else 'refuses'}")
        for row in examples.itertuples():
            print(f"  {row.prompt}\n    {row.response}")
    print(
        "\n"
        + summarise(rows)[["group", "metric", "value", "low", "high", "n"]].to_string(index=False)
    )


def grid(arguments: argparse.Namespace) -> None:
    """Run a grid of experiments, or go on with one, and write its tables."""
    from repnoise_kit import cost, freezing, generalization, immunization, resistance, tuning
    from repnoise_kit.results import Result

    out = _writable(arguments.out)
    grids = {
        "resistance": (resistance.resistance_grid, resistance.write),
        "cost": (cost.cost_grid, cost.write),
        "criteria": (immunization.criteria, immunization.write),
        "samples": (generalization.samples_grid, generalization.write),
        "freezing": (freezing.ablate_layers, freezing.write),
        "baselines": (tuning.tune, tuning.write),
    }
    if arguments.name == "baselines" and arguments.model:
        raise KitError("the trials of the baselines' settings are the lab's; leave out --model")
    make, write = grids[arguments.name]
    rows = make(
        _bed(arguments),
        seeds=range(arguments.first_seed, arguments.first_seed + arguments.seeds),
        store=arguments.store,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        progress=f"grid {arguments.name}",
    )
    command = shlex.join(["python", "-m", "repnoise_kit", *arguments.words])
    print(write(Result(rows.frame, rows.made_with | {"command": command}), out))
    print(f"\nwritten to {out}")


def notebooks(arguments: argparse.Namespace) -> None:
    """Copy the notebooks into a folder of yours and open them in JupyterLab."""
    from repnoise_kit import walkthrough

    copied = walkthrough.copy_notebooks(arguments.folder)
    print(f"{len(copied)} notebooks of the kit in {arguments.folder}", flush=True)
    if not arguments.copy_only:
        walkthrough.open_notebooks(arguments.folder, browser=not arguments.no_browser)


def sweep(arguments: argparse.Namespace) -> None:
    """Search for settings of RepNoise that resist and stay of use, or go on with a search."""
    from repnoise_kit import choosing
    from repnoise_kit.search import search_settings

    out = _writable(arguments.out)
    bed = _bed(arguments)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    reported = range(arguments.report_seeds)
    choosing.check_other_seeds(seeds, reported)
    how = {"workers": arguments.workers, "store": arguments.store}
    study = search_settings(
        bed,
        arguments.trials,
        arguments.storage,
        attacks=arguments.attack,
        seeds=seeds,
        seconds=arguments.timeout,
        progress="sweep",
        **how,
    )
    best, start = choosing.winner(study), choosing.started_from(study)
    numbers = [number for number in dict.fromkeys((start, best)) if number is not None]
    rows = choosing.report_trials(bed, study, numbers, reported, progress="report", **how)
    command = shlex.join(["python", "-m", "repnoise_kit", *arguments.words])
    print(choosing.write(study, rows, out, command))
    print(f"\nwritten to {out}; the study is in {_shown(arguments.storage, bed)}")


_OWN = (
    "retain",
    "columns",
    "budget",
    "prompt_format",
    "lora",
    "gradient_checkpointing",
    "accumulation",
    "revision",
)


def _bed(arguments: argparse.Namespace) -> "Testbed":
    from repnoise_kit.testbeds import lab, testbed

    if bool(arguments.model) != bool(arguments.pairs):
        raise KitError("--model and --pairs belong together; give both, or neither for the lab")
    told = {name: getattr(arguments, name) for name in _OWN if getattr(arguments, name)}
    if not arguments.model and told:
        raise KitError(
            f"--{next(iter(told)).replace('_', '-')} is about your own model or data; give --model "
            "and --pairs too"
        )
    if arguments.model and arguments.lab_seed:
        raise KitError("--lab-seed chooses a lab, and --model is your own; give one of them")
    if not arguments.model:
        return lab(arguments.lab_seed)
    return testbed(arguments.model, arguments.pairs, **told)


def _writable(folder: str) -> Path:
    from repnoise_kit.store import check_writable

    check_writable(Path(folder))
    return Path(folder)


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form prompt=question,harmful=bad")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _shown(storage: str | None, bed: "Testbed") -> str:
    from repnoise_kit.database import default_file, without_password

    return without_password(storage) if storage else str(default_file(bed.name))


def _attack(text: str) -> tuple[float, int]:
    lr, _, examples = text.partition(":")
    try:
        return float(lr), int(examples)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3e-4:64") from error


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m repnoise_kit", description="Representation Noising, to try out."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    labs, beds = _Parser(add_help=False), _Parser(add_help=False)
    labs.add_argument("--lab-seed", type=_seed, default=0, help="another lab (default 0)")
    beds.add_argument("--model", help="your own causal LM: a folder or a name on the hub")
    beds.add_argument("--pairs", help="your own pairs: JSON, JSONL, CSV, Parquet or Arrow")
    beds.add_argument("--retain", help="everyday questions and answers: columns prompt, answer")
    beds.add_argument("--columns", type=_columns, help="prompt=question,harmful=…: other names")
    beds.add_argument("--budget", help="paper (the default), toxicity, or lab for tiny models")
    beds.add_argument("--prompt-format", help="plain (the paper's, the default), or chat")
    beds.add_argument("--lora", type=_count, metavar="RANK", help="train a low-rank change only")
    beds.add_argument("--gradient-checkpointing", action="store_true", help="for less memory")
    beds.add_argument(
        "--accumulation", type=_count, metavar="PARTS", help="of a batch, for less memory"
    )
    beds.add_argument("--revision", help="of a model on the hub")

    def command(name: str, run: Callable, *parents: _Parser) -> Any:
        added = commands.add_parser(
            name, help=run.__doc__, description=run.__doc__, parents=parents
        )
        added.set_defaults(run=run)
        return added

    first = command("quickstart", quickstart, beds, labs)
    first.add_argument("--seed", type=_seed, default=0, help="the first seed (default 0)")
    first.add_argument("--seeds", type=_count, default=1, help="how many seeds (default 1)")
    first.add_argument("--out", default="repnoise-quickstart", help="folder for what is found")
    command("lab", show_lab, labs)
    third = command("grid", grid, beds, labs)
    third.add_argument(
        "name",
        choices=("resistance", "cost", "criteria", "samples", "freezing", "baselines"),
        help="Table 1; the cost to break; the four criteria (Tables 1, 3, 4, 5); fewer pairs "
        "(Table 20); parts held still during the defence (Table 6); the trials that chose the "
        "baselines' settings",
    )
    third.add_argument("--seeds", type=_count, default=5, help="how many seeds (default 5)")
    third.add_argument("--first-seed", type=_seed, default=0, help="the first seed (default 0)")
    third.add_argument("--workers", type=_count, default=1, help="processes (default 1)")
    third.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler's, for its workers")
    third.add_argument("--store", metavar="DIR", help="folder for finished cells (default: cache)")
    third.add_argument("--out", metavar="DIR", default="repnoise-grid", help="folder for tables")
    last = command("notebooks", notebooks)
    last.add_argument("folder", nargs="?", metavar="DIR", default="repnoise-notebooks")
    last.add_argument("--copy-only", action="store_true", help="do not start JupyterLab")
    last.add_argument("--no-browser", action="store_true", help="start it without a browser")
    fourth = command("sweep", sweep, beds, labs)
    fourth.add_argument("--trials", type=_count, default=100, help="in all (default 100)")
    fourth.add_argument("--workers", type=_count, default=1, help="processes (default 1)")
    fourth.add_argument("--storage", metavar="URL", help="a file, or a database's URL")
    fourth.add_argument(
        "--timeout", type=float, metavar="S", help="no trial begins after S seconds"
    )
    fourth.add_argument(
        "--attack", type=_attack, action="append", metavar="LR:EXAMPLES",
        help="what trials must hold against; may be given again (default: the small and the large)",
    )  # fmt: skip
    fourth.add_argument("--seeds", type=_count, default=2, help="to choose by (default 2)")
    fourth.add_argument("--first-seed", type=_seed, default=100, help="of these (default 100)")
    fourth.add_argument("--report-seeds", type=_count, default=5, help="to report on (default 5)")
    fourth.add_argument("--store", metavar="DIR", help="folder for finished cells (default: cache)")
    fourth.add_argument("--out", metavar="DIR", default="repnoise-sweep", help="folder for tables")
    return parser


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
