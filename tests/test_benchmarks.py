"""The benchmarks run, on small shapes; what they measure is for a person to read."""

import subprocess
import sys
from pathlib import Path


def test_the_loss_benchmark_measures_every_form():
    script = Path(__file__).parent / "benchmarks" / "loss.py"
    shape = ["--layers=2", "--width=32", "--vocab=200", "--pairs=2", "--tokens=12", "--steps=1"]
    ran = subprocess.run([sys.executable, script, *shape], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()[1:]]
    assert [line[:-4] for line in lines] == [
        ["plain", "step"],
        ["reference"],
        ["published"],
        ["paper"],
    ]
    assert all(float(line[-4]) > 0 for line in lines)


def test_the_panel_benchmark_measures_every_view_beside_one_drawn_by_hand():
    script = Path(__file__).parent / "benchmarks" / "panel.py"
    command = [sys.executable, script, "--trials=30", "--times=1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _, imports, opening, *redraws = [line.split() for line in ran.stdout.splitlines()]
    assert imports[0] == "imports"
    assert opening[:-1] == ["open", "and", "first", "draw"]
    assert [line[1] for line in redraws] == ["terms", "importance", "slices"]
    for line in redraws:
        ours, hand, ratio = map(float, line[2:])
        assert abs(ratio - ours / hand) < 0.1 * ratio
