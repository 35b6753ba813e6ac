"""Errors of the command-line programs.

An error is reported as one line on stderr with exit code 1; HYDRA_FULL_ERROR=1 shows the traceback
instead.
"""

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from wuerstchen_pl.cli.config import conf_dir, group_choices
from wuerstchen_pl.signatures import accepts_argument


class JobFailed(Exception):
    """A job of a sweep failed; its error was printed."""


@contextmanager
def one_line_errors(in_sweep: bool = False) -> Iterator[None]:
    """Turn an exception into one line on stderr and exit code 1.

    In a job of a sweep the exception becomes ``JobFailed``: Hydra runs the other jobs, and then
    raises it.
    """
    try:
        yield
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        if in_sweep:
            raise JobFailed(f"a job of the sweep failed: {explain(error)}") from None
        sys.exit(1)


def explain(error: BaseException) -> str:
    """The message of an error on one line; for an error that Hydra wrapped, that of its cause."""
    if (message := _explain_composition(error)) is not None:
        return message
    if type(error).__module__.startswith("hydra") and error.__cause__ is not None:
        return _with_full_key(explain(error.__cause__), str(error))
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, ModuleNotFoundError, JobFailed)
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
            ",=:[]{}()<> twice: 'key=\"a,b\"'"
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
        return f"{group.rstrip('/')}={name} is unknown; choose from {choices}"
    if isinstance(error, ConfigCompositionException) and str(error).startswith("You must specify"):
        group = str(error).split("'")[1]
        choices = " or ".join(f"{group}={choice}" for choice in group_choices(group))
        return f"{group} is missing; choose {choices}"
    if "No match in the defaults list" in str(error):  # of a group
        group = str(error).split("'")[1]
        return f"{group} is not a key of this program; remove it"
    if str(error).startswith("Error resolving interpolation"):
        name = str(error).split("'")[1]
        return f"{name} selects a config file and cannot be swept; run once for each value"
    if str(error).startswith("Config group override must be"):
        for group, _, name in (argument.partition("=") for argument in sys.argv[1:]):
            if group_choices(group) and name not in group_choices(group):
                return f"{group}={name} is unknown; choose from {', '.join(group_choices(group))}"
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.parent_node is not None:
        return _explain_unknown_key(str(error.full_key), error.parent_node)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return None


def _explain_unknown_key(key: str, parent: Any) -> str:
    """A message for a key that its parent, a node of the config, does not have."""
    node, _, name = key.rpartition(".")
    siblings = list(parent) if isinstance(parent, DictConfig) else []
    typos = [s for s in map(str, siblings) if is_typo(name, s)]
    if typos:  # found without importing the constructor, which may take seconds
        suggestion = f"{node}.{typos[0]}" if node else typos[0]
        return f"{key} is not a key; did you mean {suggestion}?"
    if siblings and accepts_argument(parent.get("_target_", ""), name):
        return f"{key} is not in any YAML; add it with +{key}=..."
    closest = _closest_key(key, OmegaConf.to_container(parent._get_root()))
    return f"{key} is not a key; " + (f"did you mean {closest}?" if closest else "remove it")


def is_typo(typed: str, name: str) -> bool:
    """Whether two names differ by one letter: missing, surplus, wrong or swapped."""
    ratio = difflib.SequenceMatcher(None, typed, name).ratio()
    return typed != name and ratio >= 1 - 1 / max(len(typed), len(name))


def _closest_key(key: str, config: Any) -> str | None:
    """The config key or group that is most similar to a mistyped key."""
    groups = [path.name for path in Path(conf_dir()).iterdir() if path.is_dir()]
    by_name: dict[str, list[str]] = {}
    for full_key in (name for name in (*_keys(config), *groups) if name != key):
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
