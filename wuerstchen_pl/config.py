"""The config folder, and checks of a composed config before anything expensive is built.

Hydra itself refuses command-line keys that are in no YAML file. This module refuses the rest: a
``_target_`` that cannot be imported, an argument that its constructor does not accept, a missing
required argument, a value of the wrong type, and an unused key at the root or in ``paths``.
"""

import collections.abc
import inspect
import pydoc
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

KWARGS_TARGETS = {
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    **{
        f"wuerstchen_pl.data.factories.{name}": "wuerstchen_pl.data.datamodule.ImageTextDataModule"
        for name in ("shards", "folder", "hf", "openmoji", "mix")
    },
}
"""Constructor -> the callable that it passes its ``**kwargs`` to, whose signature is checked."""


def conf_dir() -> str:
    """The config folder: inside the installed package, or next to it in a source checkout.

    Raises:
        FileNotFoundError: if neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/ in or next to {package}; reinstall the package")


def group_choices(group: str) -> list[str]:
    """The choices of a group: its YAML files, except the shared bases that start with ``_``."""
    return sorted(path.stem for path in Path(conf_dir(), group).glob("[!_]*.yaml"))


def check_config(cfg: DictConfig, known_keys: Mapping[str, Any]) -> None:
    """Refuse a config with an unused key, or with an object that cannot be built.

    Args:
        cfg: the composed config.
        known_keys: types of the root and ``paths.*`` keys that the program uses.

    Raises:
        ValueError: naming the key and the fix.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is missing; set {missing[0]}=...")
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    used = {*known_keys, *_references(plain)}
    for key in [*plain, *(f"paths.{name}" for name in plain.get("paths", {}))]:
        if key != "paths" and key not in used:
            raise ValueError(f"{key} is not used; remove it")
    plain = OmegaConf.to_container(cfg, resolve=True)
    for key, hint in known_keys.items():
        _check_value(key, OmegaConf.select(cfg, key), hint)
    for path, node in _objects(plain):
        _check_object(path, node)


def _references(node: Any) -> Iterator[str]:
    """The keys that interpolations refer to, and the root keys above them."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _references(value)
    elif isinstance(node, str):
        for key in re.findall(r"\$\{([\w.]+)\}", node):
            yield key
            yield key.split(".")[0]


def _objects(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _objects(value, f"{path}[{i}]")


def _check_object(path: str, node: dict) -> None:
    target = node["_target_"]
    function = _locate(target)
    if function is None:
        raise ValueError(f"{path}._target_={target} cannot be imported or called; fix its name")
    _, required = _parameters(function)
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    if (accepted := _accepted_keys(target, function)) is not None:
        for key in sorted(arguments.keys() - accepted):
            raise ValueError(
                f"{path}.{key} is not an argument of {target}; remove it or fix its name"
            )
    if not node.get("_partial_"):
        for key in sorted(required - arguments.keys()):
            raise ValueError(f"{path}.{key} is missing, and {target} needs it; set {path}.{key}")
    hints = _hints(_locate(KWARGS_TARGETS.get(target, ""))) | _hints(function)
    for key in sorted(arguments.keys() & hints.keys()):
        _check_value(f"{path}.{key}", arguments[key], hints[key])


def _parameters(function: Callable) -> tuple[set[str], set[str]]:
    """Names of a function's parameters, and of those without a default."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def _accepted_keys(target: str, function: Callable) -> set[str] | None:
    """Keyword arguments that ``function`` accepts; None if it accepts any."""
    named, _ = _parameters(function)
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return named
    kwargs_target = _locate(KWARGS_TARGETS.get(target, ""))
    if kwargs_target is None:  # unknown, or of an extra that is not installed: building it fails
        return None
    return named | _parameters(kwargs_target)[0]


def accepts_argument(target: str, key: str) -> bool:
    """Whether the callable that ``target`` names has a parameter ``key``."""
    function = _locate(target)
    return function is not None and key in (_accepted_keys(target, function) or ())


def _locate(target: str) -> Callable | None:
    """The callable of a dotted name, or None; Hydra's own lookup logs an error if it fails."""
    try:
        located = pydoc.locate(target) if "." in str(target) else None
    except pydoc.ErrorDuringImport:
        return None
    return located if callable(located) else None


def _hints(function: Callable | None) -> dict[str, Any]:
    """Type hints of a constructor or function; empty if they cannot be resolved."""
    if function is None:
        return {}
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):  # imported for type checking only, or implemented in C
        return {}


def _check_value(key: str, value: Any, hint: Any) -> None:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if not _matches(value, hint):
        name = hint.__name__ if inspect.isclass(hint) else str(hint)
        name = re.sub(r"(\w+\.)+", "", name).replace("NoneType", "null").replace("None", "null")
        shown = "an object" if isinstance(value, dict) else "null" if value is None else repr(value)
        raise ValueError(f"{key} is {shown}, and must be {name}; set {key}=...")


def _matches(value: Any, hint: Any) -> bool:
    """Whether a YAML value is valid for a parameter that is annotated ``hint``."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is None or hint is type(None):
        return value is None
    if hint in (bool, int, float, str, Path):
        # in Python a bool is an int; a YAML int is a valid float
        yaml_types = {float: (int, float), Path: (str,)}.get(hint, (hint,))
        return isinstance(value, yaml_types) and isinstance(value, bool) == (hint is bool)
    if origin in _LISTS:
        args = tuple(arg for arg in args if arg is not Ellipsis) or (Any,)
        return isinstance(value, list) and all(any(_matches(v, arg) for arg in args) for v in value)
    # an instance of any other class is a mapping in YAML
    return isinstance(value, dict) if inspect.isclass(origin) and origin is not Any else True


_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
