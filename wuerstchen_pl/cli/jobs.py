"""What a program does within Hydra: one job, or the jobs of a sweep."""

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from tqdm.contrib.logging import logging_redirect_tqdm

from wuerstchen_pl.cli.config import check_config, conf_dir
from wuerstchen_pl.cli.errors import explain, one_line_errors
from wuerstchen_pl.cli.signals import Exit
from wuerstchen_pl.cli.sweep import results_table

_PACKAGE = Path(__file__).resolve().parents[1]
_TRACEBACKS = "HYDRA_FULL_ERROR"
_FOR_HYDRA = re.compile(r"-|[+~]*hydra[./=]")
"""Arguments such as ``-m`` and ``hydra.verbose=true``. Without any, a config is composed once;
``hydra.main`` composes it twice, first to learn whether it is for a sweep."""


def launch(
    name: str,
    known_keys: Mapping[str, Any] | None,
    read_keys: re.Pattern[str] | None,
    begin_work: Callable[[], None],
) -> None:
    """Compose the config of a program, check it, and only then import and run the program.

    A sweeper minimizes what ``run`` of the program returns. See ``cli.command.Command`` for the
    arguments; ``begin_work`` is called before each job.
    """

    def run(cfg: DictConfig) -> float | None:
        return _check_and_run(name, known_keys, read_keys, begin_work, cfg)

    def guarded(cfg: DictConfig) -> float | None:
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        with _environment(None), one_line_errors(in_sweep), one_line_warnings(), one_line_logs():
            return run(cfg)

    run.__module__ = guarded.__module__ = f"{_PACKAGE.name}.{name}"  # also the job's name
    by_hydra = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)
    if os.environ.get(_TRACEBACKS) == "1":
        with one_line_logs(), results_table():
            by_hydra(run)()
        return
    if not any(map(_FOR_HYDRA.match, sys.argv[1:])):
        with one_line_errors(), composed(name, sys.argv[1:]) as cfg:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                with one_line_warnings(), one_line_logs():
                    run(cfg)
                return
    # with this variable, Hydra raises composition errors instead of printing them
    with _environment("1"), one_line_errors(), results_table():
        by_hydra(guarded)()


def call(
    name: str,
    known_keys: Mapping[str, Any] | None,
    read_keys: re.Pattern[str] | None,
    overrides: Sequence[str],
    output_key: str,
) -> Path:
    """Run a program within this process, and return the path at ``output_key``; see ``launch``.

    Raises:
        ValueError: with the sentence that the command line prints, for what Hydra raises.
        KeyboardInterrupt: if training was interrupted, after a checkpoint was saved.
    """
    try:
        with composed(name, overrides) as cfg, one_line_warnings(), one_line_logs():
            _check_and_run(name, known_keys, read_keys, lambda: None, cfg)
            return Path(OmegaConf.select(cfg, output_key))
    except Exit as stop:
        raise KeyboardInterrupt(stop.message) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("hydra", "omegaconf"):
            raise ValueError(explain(error)) from error
        raise


@contextmanager
def composed(name: str, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """The config of a program; within the block, ``HydraConfig`` is that of this one job."""
    before = HydraConfig.instance().cfg
    try:
        with initialize_config_dir(conf_dir(), version_base="1.3", job_name=name):
            cfg = compose(name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)  # which keeps a copy of its part
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        yield cfg
    finally:
        HydraConfig.instance().cfg = before


def _check_and_run(
    name: str,
    known_keys: Mapping[str, Any] | None,
    read_keys: re.Pattern[str] | None,
    begin_work: Callable[[], None],
    cfg: DictConfig,
) -> float | None:
    for key in typed_keys():
        if read_keys is not None and not read_keys.match(key):
            raise ValueError(f"{name} does not read {key}; remove it")
    if known_keys is not None:
        check_config(cfg, known_keys)
    program = importlib.import_module(f"{_PACKAGE.name}.programs.{name}")
    begin_work()
    return program.run(cfg)


def typed_keys() -> list[str]:
    """The keys and groups that the command line sets: ``data``, ``stage.optimizer.lr``."""
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    names = [text.lstrip("+~").partition("=")[0] for text in overrides]
    return [name.rpartition("@")[2] for name in names]


def check_output_dir(configured: str, key: str = "output_dir") -> Path:
    """The output folder of a run: that of ``key``, or the numbered folder of a sweep's run.

    The folder is not created yet, but it is checked that it can be, before any work is done.

    Raises:
        OSError: if it cannot be created or written to.
    """
    folder, hydra_config = Path(configured), HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        folder = Path(hydra_config.runtime.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{key}={folder} is not a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{key}={folder} is not writable: no permission for {existing}")
    return folder


@contextmanager
def _environment(value: str | None) -> Iterator[None]:
    """Set or unset HYDRA_FULL_ERROR within the block, also for processes started in it."""
    before = os.environ.pop(_TRACEBACKS, None)
    os.environ |= {} if value is None else {_TRACEBACKS: value}
    try:
        yield
    finally:
        os.environ.pop(_TRACEBACKS, None)
        os.environ |= {} if before is None else {_TRACEBACKS: before}


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings without their source location."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def one_line_logs() -> Iterator[None]:
    """Write the package's log records of level INFO and above to stderr, above progress bars."""
    logger, handler = logging.getLogger(_PACKAGE.name), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
