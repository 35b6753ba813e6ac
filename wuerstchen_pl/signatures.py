"""Constructors as schemas: the arguments of a ``_target_`` are compared with its signature.

A config is composed by Hydra, or read from a checkpoint or a model's file. An unknown or missing
argument, or one of the wrong type, is refused before anything is built.
"""

import collections.abc
import importlib.util
import inspect
import pydoc
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

KWARGS_TARGETS = {
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    **{
        f"wuerstchen_pl.data.factories.{name}": "wuerstchen_pl.data.datamodule.ImageTextDataModule"
        for name in ("shards", "folder", "hf", "openmoji", "mix")
    },
    "wuerstchen_pl.stages.controlnet.ControlNetStage": "wuerstchen_pl.stages.c.StageC",
    "wuerstchen_pl.stages.distillation.DistillationStage": "wuerstchen_pl.stages.c.StageC",
}
"""Constructor -> the callable that it passes its ``**kwargs`` to, whose signature is checked."""


def check_objects(node: Any, path: str = "") -> None:
    """Refuse nested objects (dicts with a ``_target_``) that cannot be built.

    Args:
        node: nested dicts and lists.
        path: dotted key of ``node``, which errors start with.

    Raises:
        ValueError: naming the key and the fix.
    """
    for key, value in _objects(node, path):
        _check_object(key, value)


def _objects(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _objects(value, _join(path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _objects(value, f"{path}[{i}]")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _check_object(path: str, node: dict) -> None:
    target = node["_target_"]
    function = _locate(target)
    if function is None:
        if package := _missing_package(target):
            raise ValueError(
                f"{_join(path, '_target_')}={target} needs the package {package}, which is not "
                f"installed; run pip install {package}, or fix its name"
            )
        raise ValueError(
            f"{_join(path, '_target_')}={target} cannot be imported or called; fix its name"
        )
    _, required = _parameters(function)
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    if (accepted := _accepted_keys(target, function)) is not None:
        for key in sorted(arguments.keys() - accepted):
            raise ValueError(
                f"{_join(path, key)} is not an argument of {target}; remove it or fix its name"
            )
    if not node.get("_partial_"):
        for key in sorted(required - arguments.keys()):
            key = _join(path, key)
            raise ValueError(f"{key} is missing, and {target} needs it; set {key}")
    hints = _hints(_locate(KWARGS_TARGETS.get(target, ""))) | _hints(function)
    for key in sorted(arguments.keys() & hints.keys()):
        check_value(_join(path, key), arguments[key], hints[key])


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


def _missing_package(target: str) -> str | None:
    """The package of a dotted name if it is not installed."""
    package, dot, _ = str(target).partition(".")
    return package if dot and package and importlib.util.find_spec(package) is None else None


def _hints(function: Callable | None) -> dict[str, Any]:
    """Type hints of a constructor or function; empty if they cannot be resolved."""
    if function is None:
        return {}
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):  # imported for type checking only, or implemented in C
        return {}


def check_entries(content: Any, hints: Mapping[str, Any], path: str = "") -> None:
    """Refuse a dict that lacks one of the keys of ``hints``, or has a value of another type.

    Args:
        content: what a file contains.
        hints: key -> type hint of its value.
        path: dotted key of ``content``, which errors start with.

    Raises:
        ValueError: naming the key.
    """
    check_value(path or "the content", content, dict)
    for key, hint in hints.items():
        if key not in content:
            raise ValueError(f"{_join(path, key)} is missing; set it")
        check_value(_join(path, key), content[key], hint)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that does not match a type hint.

    Raises:
        ValueError: naming the key and the type.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if not _matches(value, hint):
        shown = "an object" if isinstance(value, dict) else "null" if value is None else repr(value)
        raise ValueError(f"{key} is {shown}, and must be {_describe(hint)}; set {key}=...")


def _describe(hint: Any) -> str:
    """A type hint as users of YAML know it: ``int | null``, ``'a' | 'b'``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_describe, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    name = hint.__name__ if inspect.isclass(hint) and not args else str(hint)
    return re.sub(r"(\w+\.)+", "", name).replace("NoneType", "null").replace("None", "null")


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
    if origin in (dict, collections.abc.Mapping):
        values = args[1] if args else Any
        return isinstance(value, dict) and all(_matches(v, values) for v in value.values())
    if origin is Any or not inspect.isclass(origin):
        return True
    # an instance of any other class is built from a mapping
    return isinstance(value, dict) and (typing.is_typeddict(origin) or "_target_" in value)


_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
