"""Write what an experiment found into a folder: tables, figures, and one page to look at."""

import base64
import html
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from repnoise_kit import plots, style
from repnoise_kit.quickstart import readable, summarise, verdicts
from repnoise_kit.results import Result
from repnoise_kit.stats import Interval, verdict
from repnoise_kit.store import written_whole

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;
color:#222}}table{{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}}
th,td{{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}}
img{{max-width:100%}}figcaption{{color:#555}}pre{{overflow-x:auto;font-size:.8rem}}</style>
<h1>{title}</h1>{body}</html>
"""

CAPTIONS = {
    "resistance": "What an attack brings back: how much of the forbidden answer is given away "
    "(left), and how harmful the answer sounds to a classifier (right). Neither is to be read "
    "alone.",
    "questions": "The same, question by question.",
    "price": "What the defence costs: questions refused, everyday answers kept, broken answers.",
    "terms": "The defence's three terms while it trains.",
    "unseen": "Resistance on things the defence never saw.",
}


def sentences(differences: pd.DataFrame) -> list[str]:
    """Return the result in words: what the defence changes, by budget, group and measure."""
    said = []
    shown = differences["metric"].isin(["recall", "harmfulness"])
    for row in differences[shown & (differences["attack"] != "none")].to_dict("records"):
        words = verdict(Interval(row["value"], row["low"], row["high"]))
        said.append(f"{row['attack']} attack, {row['group']}: {row['metric']} {words}")
    return said


def figures(rows: Result, cells: pd.DataFrame, curves: Result) -> dict[str, Figure]:
    """Return the quickstart's figures by name, drawn in the kit's style from rows and summary."""
    with style.clean_style():
        plain, ax = plt.subplots(figsize=(8.4, 2.6))
        plots.plot_questions(rows, ax=ax)
        drawn = {
            "resistance": plots.plot_resistance(cells)[0].figure,
            "questions": plain,
            "price": plots.plot_price(cells)[0].figure,
            "terms": plots.plot_terms(_of_defence(curves))[0].figure,
            "unseen": plots.plot_resistance(cells, group="unseen")[0].figure,
        }
    return drawn


def write(rows: Result, curves: Result, out: Path) -> pd.DataFrame:
    """Write tables, figures and `report.html` into a folder, and return the summary.

    Files: `results.csv` (a row a question and metric), `summary.csv`, `curves.csv`, a PNG a figure.
    """
    cells = summarise(rows.frame)
    differences = verdicts(rows.frame)
    rows.save(out / "results.csv")
    curves.save(out / "curves.csv")
    with written_whole(out / "summary.csv") as fresh:
        cells.to_csv(fresh, index=False)
    pictures = {}
    for name, figure in figures(rows, cells, curves).items():
        with written_whole(out / f"{name}.png") as fresh:
            # The kit's style lays panels out when they are drawn, so it holds here too.
            with style.clean_style():
                figure.savefig(fresh, format="png", dpi=110)
            pictures[name] = fresh.read_bytes()
        plt.close(figure)
    with written_whole(out / "report.html") as fresh:
        fresh.write_text(_page(rows, cells, differences, pictures), encoding="utf-8")
    return cells


def _page(
    rows: Result, cells: pd.DataFrame, differences: pd.DataFrame, pictures: dict[str, bytes]
) -> str:
    name, seeds = rows.frame["testbed"].iloc[0], rows.frame["seed"].nunique()
    over = "over seeds and questions" if seeds > 1 else "over questions only (one seed)"
    parts = [
        f"<p>RepNoise on <b>{html.escape(str(name))}</b>, {seeds} seed{'s' * (seeds > 1)}; 95 % "
        f"intervals {over}. <i>seen</i>: the defence saw the things asked about; <i>unseen</i>: "
        "it did not. <i>broken</i>: the attacked model is worse than the attacked base by more "
        "than 0.1 (nats a token where utility is a log-probability) in what the note names, so "
        "that giving little away may be damage rather than defence.</p>"
        "<h2>With RepNoise against without, in words</h2><ul>",
        *(f"<li>{html.escape(text)}</li>" for text in sentences(differences)),
        "</ul>",
    ]
    for group in ("seen", "unseen"):
        table = readable(cells, group).to_html(index=False, border=0)
        parts.append(f"<h2>{group.capitalize()} things</h2>{table}")
    for key, data in pictures.items():
        image = base64.b64encode(data).decode()
        parts.append(
            f'<figure><img alt="{html.escape(CAPTIONS[key])}" src="data:image/png;base64,{image}">'
            f"<figcaption>{html.escape(CAPTIONS[key])}</figcaption></figure>"
        )
    made = html.escape(json.dumps(rows.made_with["stacked"], indent=1))
    parts.append(f"<h2>How it was made</h2><pre>{made}</pre>")
    return _PAGE.format(title="RepNoise quickstart", body="\n".join(parts))


def _of_defence(curves: Result) -> Result:
    return Result(curves.frame[curves.frame["defence"] == "repnoise"].query("attack.isna()"))
