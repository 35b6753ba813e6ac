"""Checks of a composed config, before anything heavy is built: a config cannot lie.

Hydra refuses keys on the command line that no YAML file has. Here the rest: a ``_target_`` that is
nothing, a key that its constructor does not take, one that it needs and lacks, and a key at the
root or in ``paths`` that nothing reads.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

READ_BY_TRAIN = frozenset({"stage", "data", "trainer", "callbacks", "logger", "seed", "ckpt"}) | {
    "init_from", "paths.output_dir",
}  # fmt: skip


def check_config(cfg: DictConfig, read: frozenset[str] = READ_BY_TRAIN) -> None:
    """Refuse a config with a key that nothing reads, or an object that cannot be built.

    Args:
        cfg: the composed config.
        read: keys at the root, and ``paths.*``, that the program itself reads.

    Raises:
        ValueError: naming the key and the fix.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is missing; set {missing[0]}=...")
    used = read | set(_references(plain))
    paths = plain.get("paths", {})
    for key in [*plain, *(f"paths.{name}" for name in paths)]:
        if key != "paths" and key not in used and key.split(".")[-1] not in _SPARE:
            raise ValueError(f"{key} is read by nothing; remove it")
    for path, node in _objects(plain):
        _check_object(path, node)


# Paths that one stage reads and another does not.
_SPARE = frozenset({"stage_a", "stage_b", "name"})


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
    try:
        function = hydra.utils.get_object(target)
    except Exception as error:
        raise ValueError(f"{path}._target_={target} is nothing that can be imported") from error
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    given = {key for key in node if not key.startswith("_")}
    for key in sorted(given - parameters.keys()):
        raise ValueError(f"{path}.{key} is no argument of {target}; remove it or mend its name")
    needed = {name for name, p in parameters.items() if p.default is p.empty}
    if not node.get("_partial_"):
        for key in sorted(needed - given):
            raise ValueError(f"{path}.{key} is missing, and {target} needs it; set {path}.{key}")
