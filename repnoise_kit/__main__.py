"""The command line: `python -m repnoise_kit quickstart` and `lab`. Thin."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from repnoise_kit.errors import KitError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise KitError(f"{message} (see {self.prog} --help)")


def main(words: list[str] | None = None) -> int:
    """Run a command; return 0, or 2 after one line on stderr about what the user can mend."""
    try:
        arguments = _parser().parse_args(words)
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
    from repnoise_kit.testbeds import lab, testbed

    out = _writable(arguments.out)
    if bool(arguments.model) != bool(arguments.pairs):
        raise KitError("--model and --pairs belong together; give both, or neither for the lab")
    if not arguments.model and (arguments.retain or arguments.columns):
        raise KitError(
            "--retain and --columns describe your own data; give --model and --pairs too"
        )
    if arguments.model and arguments.lab_seed:
        raise KitError("--lab-seed chooses a lab, and --model is your own; give one of them")
    if arguments.model:
        bed = testbed(
            arguments.model, arguments.pairs, retain=arguments.retain, columns=arguments.columns
        )
    else:
        bed = lab(arguments.lab_seed)
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


def _writable(folder: str) -> Path:
    from repnoise_kit.store import written_whole

    with written_whole(Path(folder) / ".writable") as probe:
        probe.touch()
    (Path(folder) / ".writable").unlink()
    return Path(folder)


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form prompt=question,harmful=bad")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


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
    first = commands.add_parser(
        "quickstart", help=quickstart.__doc__, description=quickstart.__doc__
    )
    first.set_defaults(run=quickstart)
    first.add_argument("--seed", type=_seed, default=0, help="the first seed (default 0)")
    first.add_argument("--seeds", type=_count, default=1, help="how many seeds (default 1)")
    first.add_argument("--out", default="repnoise-quickstart", help="folder for what is found")
    first.add_argument("--model", help="your own causal LM: a folder or a name on the hub")
    first.add_argument("--pairs", help="your own pairs: JSON, JSONL, CSV, Parquet or Arrow")
    first.add_argument("--retain", help="everyday questions and answers: columns prompt, answer")
    first.add_argument("--columns", type=_columns, help="prompt=question,harmful=…: other names")
    second = commands.add_parser("lab", help=show_lab.__doc__, description=show_lab.__doc__)
    second.set_defaults(run=show_lab)
    for command in (first, second):
        command.add_argument("--lab-seed", type=_seed, default=0, help="another lab (default 0)")
    return parser


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
