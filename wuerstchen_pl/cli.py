"""What the entry points share: where ``conf/`` is, and how they fail.

A failure that a user can mend is one line on stderr and exit code 1; HYDRA_FULL_ERROR=1 shows the
traceback instead.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig

_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> str:
    """The folder of configs: inside an installed package, beside a checked-out one.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/ in or beside {_PACKAGE}; install the package again")


def command(config_name: str, run: Callable[[DictConfig], float | None]) -> Callable[[], None]:
    """Make a command-line program of ``run``, composed from ``conf/<config_name>.yaml``.

    What ``run`` returns is what a sweeper minimises.
    """
    tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @functools.wraps(run)
    def guarded(cfg: DictConfig) -> float | None:
        # Hydra would announce an exception of its task in a line of its own, but lets an exit pass.
        with nullcontext() if tracebacks else one_line_errors():
            return run(cfg)

    composed = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)

    def main() -> None:
        if tracebacks:
            composed(guarded)()
            return
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors of composition on, not printed
        with one_line_errors():
            composed(guarded)()

    return main


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException) -> str:
    """One line that says what went wrong: the cause that Hydra wraps, without its layout."""
    while type(error).__module__.startswith("hydra") and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, ModuleNotFoundError)
    foreign = type(error).__module__.split(".")[0] in ("hydra", "omegaconf")
    if isinstance(error, expected) or foreign:
        return text
    return f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)"
