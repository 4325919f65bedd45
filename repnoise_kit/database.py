"""The database in which studies lie: a file, or a server that several machines share."""

import re
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import optuna
from sqlalchemy.exc import SQLAlchemyError

from repnoise_kit.errors import KitError
from repnoise_kit.store import cache_dir, check_writable, disk_trouble

optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT, GRACE = 5, 30
"""Seconds between two signs of life of a trial, and without one until it is tried again."""

RETRIES = 3


@contextmanager
def trusted() -> Generator[None]:
    """Let pass in silence what Optuna has called experimental for years."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # That it takes low values for good ones, of which `importance` takes care.
        warnings.filterwarnings("ignore", message=".*PedAnova")
        yield


@contextmanager
def kept_in(where: str | Path) -> Generator[None]:
    """Say in one line that the disk of a study's database is full or read-only.

    Raises:
        KitError: nothing more can be written to it.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        if (reason := disk_trouble(error)) is None:
            raise
        raise KitError(
            f"cannot write to the study in {without_password(where)} ({reason}); make room there "
            "or choose another file, and run the same again"
        ) from error


def default_file(testbed: str) -> Path:
    """Return where the studies of a testbed lie unless somebody says otherwise."""
    return cache_dir() / "studies" / (re.sub(r"[^\w.-]+", "-", testbed) + ".db")


def without_password(where: str | Path) -> str:
    """Write where a study is, as it may be shown."""
    hidden = re.sub(r"(://[^/:@]*):.*@", r"\1:…@", str(where))
    return re.sub(r"([?&][^=&]*(?:password|passwd|pwd)=)[^&]*", r"\1…", hidden)


def storage(where: str | Path) -> optuna.storages.RDBStorage:
    """Open a database whose dead trials are tried again."""
    url = str(where)
    if url.startswith("sqlite") and (":memory:" in url or url.rstrip("/").endswith(":")):
        raise KitError(f"{url} is in the memory of one process; give a file, which all can open")
    if "://" not in url:
        check_writable(Path(url).absolute().parent)
        url = f"sqlite:///{Path(url).absolute()}"
    if url.partition("://")[2].partition("?")[0].count("@") > 1:
        raise KitError(
            f"no database opens at {without_password(where)} (more than one @); write the one of a "
            "password as %40"
        )
    for _ in range(3):
        try:
            return _database(url)
        except SQLAlchemyError as error:
            if disk_trouble(error):
                raise
            # Of two that make the tables at once one fails, and finds them at its next try.
            problem: Exception = error
            time.sleep(0.5)
        except (ImportError, RuntimeError, ValueError) as error:
            problem = error
            break
    raise KitError(
        f"no database opens at {without_password(where)} ({str(problem).splitlines()[0]}); give a "
        "file, or a URL such as postgresql+psycopg://user@host/name, and install its driver"
    ) from problem


def _database(url: str) -> optuna.storages.RDBStorage:
    # SQLite lets one process write at a time; the others wait.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    with trusted():
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs=options | {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                max_retry=RETRIES
            ),
        )
