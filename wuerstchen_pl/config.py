"""Checks of a composed config, before anything heavy is built.

Hydra refuses keys on the command line that no YAML file has. Here the rest: a ``_target_`` that is
nothing, a key that its constructor does not take, one that it needs and lacks, a value of another
type than it takes, and a key at the root or in ``paths`` that nothing reads.
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

TRAIN_KEYS: Mapping[str, Any] = {
    # read by the program
    "stage": dict,
    "data": dict,
    "trainer": dict,
    "callbacks": dict,
    "logger": dict,
    "seed": int,
    "ckpt": str | None,
    "init_from": str | None,
    "activation_checkpointing": bool,
    "compile": bool,
    "check_memory": bool,
    "paths.output_dir": str,
    # what other keys are made of; a stage, or an override, may do without some of them
    "name": str,
    "image_size": int,
    "image_size_at_12": int,
    "image_size_at_24": int,
    "global_batch": int | None,
    "bucket_multiple": int,
    "checkpoint_every_steps": int,
    "validate_every_steps": int,
    "paths.root": str,
    "paths.data": str,
    "paths.stage_a": str,
    "paths.stage_b": str,
}
"""The keys at the root, and in ``paths``, that ``train`` has, and their types."""

KWARGS_TARGETS = {
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    **{
        f"wuerstchen_pl.data.factories.{name}": "wuerstchen_pl.data.datamodule.ImageTextDataModule"
        for name in ("shards", "folder", "hf", "openmoji", "mix")
    },
}
"""What takes the ``**kwargs`` of a constructor, so that they can be checked as well."""


def check_config(cfg: DictConfig, read: Mapping[str, Any] = TRAIN_KEYS) -> None:
    """Refuse a config with a key that nothing reads, or an object that cannot be built.

    Args:
        cfg: the composed config.
        read: keys at the root, and ``paths.*``, that the program reads, and their types.

    Raises:
        ValueError: naming the key and the fix.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is missing; set {missing[0]}=...")
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    used = {*read, *_references(plain)}
    for key in [*plain, *(f"paths.{name}" for name in plain.get("paths", {}))]:
        if key != "paths" and key not in used:
            raise ValueError(f"{key} is not used; remove it")
    plain = OmegaConf.to_container(cfg, resolve=True)
    for key, hint in read.items():
        _check_value(key, OmegaConf.select(cfg, key), hint)
    for path, node in _objects(plain):
        _check_object(path, node)


def _references(node: Any) -> Iterator[str]:
    """The keys that interpolations name, and their first parts."""
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
    _, needed = _parameters(function)
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    if (taken := _taken(target, function)) is not None:
        for key in sorted(given.keys() - taken):
            raise ValueError(
                f"{path}.{key} is not an argument of {target}; remove it or fix its name"
            )
    if not node.get("_partial_"):
        for key in sorted(needed - given.keys()):
            raise ValueError(f"{path}.{key} is missing, and {target} needs it; set {path}.{key}")
    hints = _hints(_locate(KWARGS_TARGETS.get(target, ""))) | _hints(function)
    for key in sorted(given.keys() & hints.keys()):
        _check_value(f"{path}.{key}", given[key], hints[key])


def _parameters(function: Callable) -> tuple[set[str], set[str]]:
    """Names of a function's parameters, and of those without a default."""
    found = inspect.signature(function).parameters.values()
    named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def _taken(target: str, function: Callable) -> set[str] | None:
    """Keys that ``function`` takes; None if it takes any."""
    named, _ = _parameters(function)
    found = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in found):
        return named
    further = _locate(KWARGS_TARGETS.get(target, ""))
    if further is None:  # or it is of an extra that is not installed, as the constructor will say
        return None
    return named | _parameters(further)[0]


def accepts_argument(target: str, key: str) -> bool:
    """Whether what ``target`` names has a parameter ``key``."""
    function = _locate(target)
    return function is not None and key in (_taken(target, function) or ())


def _locate(target: str) -> Callable | None:
    """What a dotted name calls, or None; Hydra's own also logs what it does not find."""
    try:
        found = pydoc.locate(target) if "." in str(target) else None
    except pydoc.ErrorDuringImport:
        return None
    return found if callable(found) else None


def _hints(function: Callable | None) -> dict[str, Any]:
    """Annotations of a constructor's or a function's parameters, as far as they can be read."""
    if function is None:
        return {}
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError):  # imported for type checking only, or compiled
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
    """Whether a value as YAML knows it can stand for a parameter that is annotated ``hint``."""
    origin, of = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, each) for each in of)
    if origin is Literal:
        return value in of
    if hint is None or hint is type(None):
        return value is None
    if hint in (bool, int, float, str, Path):
        # a bool is an int to Python, and an int serves as a float
        as_written = {float: (int, float), Path: (str,)}.get(hint, (hint,))
        return isinstance(value, as_written) and isinstance(value, bool) == (hint is bool)
    if origin in _LISTS:
        of = tuple(each for each in of if each is not Ellipsis) or (Any,)
        return isinstance(value, list) and all(any(_matches(v, each) for each in of) for v in value)
    # of any other class: an object, which YAML writes as a mapping
    return isinstance(value, dict) if inspect.isclass(origin) and origin is not Any else True


_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
