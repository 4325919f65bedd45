"""Cells for the tests of grids, in a module that workers can import: each notes that it ran."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from repnoise_kit import bench as room
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result

PATIENCE = 60
"""Seconds until what is waited for counts as never coming."""


def note(log, words):
    """Add a line to a file that other processes add to as well."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{words}\n".encode())
    os.close(handle)


def notes(log):
    return Path(log).read_text().splitlines() if Path(log).exists() else []


def wait_until(come, what):
    ends = time.monotonic() + PATIENCE
    while not come():
        if time.monotonic() > ends:
            raise TimeoutError(f"waited {PATIENCE} s in vain until {what}")
        time.sleep(0.02)


def rows(name, count=20):
    values = np.random.default_rng(list(name.encode())).normal(size=count)
    return Result(pd.DataFrame({"name": name, "value": values}), {"name": name})


def noted(bench, *, log, name, count=20):
    note(log, name)
    return rows(name, count)


def troubled(bench, *, log, name, trouble):
    """Fail for as long as the file `trouble` is there."""
    note(log, name)
    if Path(trouble).exists():
        raise KitError(f"{name} is in trouble")
    return rows(name)


def lethal(bench, *, log, name, deaths):
    """Be killed at the first calls, that many."""
    note(log, name)
    if notes(log).count(name) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(name)


def asking(bench, *, log, name, method, together):
    """Ask for a defended model, which is only made once that many ask for it at the same time."""
    defend = room.defend_

    def slow(model, bed, chosen, **settings):
        note(log, f"defend {chosen}")
        wait_until(lambda: len([n for n in notes(log) if n.startswith("ask")]) >= together, "asked")
        return defend(model, bed, chosen, **settings)

    note(log, f"ask {name}")
    with mock.patch.object(room, "defend_", slow):
        model, _ = bench.defended(method, 0)
    return Result(pd.DataFrame({"sum": [w.double().sum().item() for w in model.parameters()]}))
