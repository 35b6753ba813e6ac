"""Shared by the command-line programs: locating ``conf/``, help texts, and error messages.

An error is reported as one line on stderr with exit code 1; HYDRA_FULL_ERROR=1 shows the traceback
instead.
"""

import difflib
import functools
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from wuerstchen_pl.config import accepts_argument

_PACKAGE = Path(__file__).resolve().parent
_TRACEBACKS = "HYDRA_FULL_ERROR"


def conf_dir() -> str:
    """The config folder: inside the installed package, or next to it in a source checkout.

    Raises:
        FileNotFoundError: if neither exists.
    """
    for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/ in or next to {_PACKAGE}; reinstall the package")


def command(
    config_name: str,
    run: Callable[[DictConfig], float | None],
    *,
    read_keys: re.Pattern[str] | None = None,
) -> Callable[[], None]:
    """Make a command-line program that calls ``run`` with the composed ``<config_name>.yaml``.

    A sweeper minimizes the return value of ``run``.
    """

    @functools.wraps(run)
    def guarded(cfg: DictConfig) -> float | None:
        # Hydra prints its own line for an exception of its task, but none for SystemExit.
        with _environment(None), one_line_errors(), one_line_warnings(), one_line_logs():
            return run(cfg)

    composed = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)

    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(config_name, inspect.getdoc(inspect.getmodule(run)) or "", read_keys))
        elif os.environ.get(_TRACEBACKS) == "1":
            with one_line_logs():
                composed(run)()
        else:  # with this variable, Hydra raises composition errors instead of printing them
            with _environment("1"), one_line_errors():
                composed(guarded)()

    return main


def help_text(config_name: str, description: str, read_keys: re.Pattern[str] | None = None) -> str:
    """A program's config groups with their choices, and its keys with their YAML comments.

    Args:
        config_name: name of the program's YAML.
        description: what the program does.
        read_keys: the keys and groups that it reads, if it refuses others; None is all.
    """
    texts = list(_with_included(config_name))
    entries = [line[4:] for text in texts for line in text.splitlines() if line.startswith("  - ")]
    groups = [entry.split(":")[0] for entry in entries]
    groups = [g for g in groups if read_keys is None or read_keys.match(g)]
    listed = [f"  {g}={'|'.join(group_choices(g))}" for g in groups if group_choices(g)]
    # cache includes train and refuses most of its keys; evaluate includes a plan without ``hydra``
    shown = [text for text in texts[:-1] if "\nhydra:" not in text] + texts[-1:]
    keys = [text.partition("\nhydra:")[0].partition("\n\n")[2].strip("\n") for text in shown]
    footer = "--cfg job prints the composed config; -m runs every combination of key=value,value"
    return "\n".join([description, "", *listed, "", *keys, "", footer])


def _with_included(config_name: str) -> Iterator[str]:
    """The text of a program's YAML, and before it those of the files it includes."""
    text = Path(conf_dir(), f"{config_name}.yaml").read_text()
    for name in re.findall(r"^  - (?!_self_)(\w+)(?: #.*)?$", text, re.MULTILINE):
        yield from _with_included(name)
    yield text


def typed_keys() -> list[str]:
    """The keys and groups that the command line sets: ``data``, ``stage.optimizer.lr``."""
    names = [text.lstrip("+~").partition("=")[0] for text in HydraConfig.get().overrides.task]
    return [name.rpartition("@")[2] for name in names]


def group_choices(group: str) -> list[str]:
    """The choices of a group: its YAML files, except the shared bases that start with ``_``."""
    return sorted(path.stem for path in Path(conf_dir(), group).glob("[!_]*.yaml"))


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


class SetHydraConfigEarly(Callback):
    """Lets ``hydra.sweep.dir`` use ``${hydra:...}``, which Hydra makes available only later."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Set the config that ``${hydra:...}`` interpolations resolve against."""
        HydraConfig.instance().set_config(config)


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


class Exit(Exception):
    """Ends an interrupted program with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and exit code 1, or the code of ``Exit``."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exit as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


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


def explain(error: BaseException) -> str:
    """The message of an error on one line; for an error that Hydra wrapped, that of its cause."""
    if (message := _explain_composition(error)) is not None:
        return message
    if type(error).__module__.startswith("hydra") and error.__cause__ is not None:
        return _with_full_key(explain(error.__cause__), str(error))
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, ModuleNotFoundError)
    from_hydra = type(error).__module__.split(".")[0] in ("hydra", "omegaconf")
    if isinstance(error, expected) or from_hydra:
        return text
    return f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)"


def _with_full_key(message: str, hydra_report: str) -> str:
    """Prefix the argument that a constructor refused with its config node.

    Constructors are also called from Python, so their messages start with ``argument=value``;
    Hydra's report of a failed instantiation says which node was being built.
    """
    node = re.search(r"^full_key: ([\w.]+)$", hydra_report, re.MULTILINE)
    argument = re.match(r"([a-z_][\w.]*)=", message)
    if node is None or argument is None or argument[1].startswith(node[1].split(".")[0] + "."):
        return message
    return f"{node[1]}.{message}"


def _explain_composition(error: BaseException) -> str | None:
    """A message with the fix for an error in the command line; None for other errors."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read; write key=value, and quote a value with any of "
            ",=:[]{}() twice: 'key=\"a,b\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(option for option in error.options if not option.startswith("_"))
        if group.startswith("preset/"):  # selected by stage and preset together
            presets = [c for c in group_choices("preset") if name in group_choices(f"preset/{c}")]
            return (
                f"{group.replace('/', '=')} has no networks for stage={name}; choose from "
                f"{', '.join(presets)}"
            )
        return f"{group}={name} is unknown; choose from {choices}"
    if isinstance(error, ConfigCompositionException) and str(error).startswith("You must specify"):
        group = str(error).split("'")[1]
        choices = " or ".join(f"{group}={choice}" for choice in group_choices(group))
        return f"{group} is missing; choose {choices}"
    if str(error).startswith("Error resolving interpolation"):
        name = str(error).split("'")[1]
        return f"{name} selects a config file and cannot be swept; run once for each value"
    if str(error).startswith("Config group override must be"):
        for group, _, name in (argument.partition("=") for argument in sys.argv[1:]):
            if group_choices(group) and name not in group_choices(group):
                return f"{group}={name} is unknown; choose from {', '.join(group_choices(group))}"
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.parent_node is not None:
        key, parent = str(error.full_key), error.parent_node
        if isinstance(parent, DictConfig) and accepts_argument(
            parent.get("_target_", ""), str(error.key)
        ):
            return f"{key} is not in any YAML; add it with +{key}=..."
        suggestion = _closest_key(key, OmegaConf.to_container(parent._get_root()))
        return f"{key} is not a key; " + (
            f"did you mean {suggestion}?" if suggestion else "remove it"
        )
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return None


def _closest_key(key: str, config: Any) -> str | None:
    """The config key or group that is most similar to a mistyped key."""
    groups = [path.name for path in Path(conf_dir()).iterdir() if path.is_dir()]
    by_name: dict[str, list[str]] = {}
    for full_key in [*_keys(config), *groups]:
        by_name.setdefault(full_key.rpartition(".")[2], []).append(full_key)
    for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.7):
        return difflib.get_close_matches(key, by_name[name], n=1, cutoff=0)[0]
    return None


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a config as a dotted path, except those of Hydra."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if not (prefix or name != "hydra"):
            continue
        yield f"{prefix}{name}"
        yield from _keys(value, f"{prefix}{name}.")
