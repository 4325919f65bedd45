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
