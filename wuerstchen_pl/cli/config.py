"""The config folder, and checks of a composed config before anything expensive is built.

Hydra itself refuses command-line keys that are in no YAML file. This module refuses the rest: a
``_target_`` that cannot be imported, an argument that its constructor does not accept, a missing
required argument, a value of the wrong type, and an unused key at the root or in ``paths``.
"""

import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.signatures import check_objects, check_value


def conf_dir() -> str:
    """The config folder: inside the installed package, or next to it in a source checkout.

    Raises:
        FileNotFoundError: if neither exists.
    """
    package = Path(__file__).resolve().parents[1]
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
    used = {*known_keys, *(key.split(".")[0] for key in known_keys), *_references(plain)}
    for key in [*plain, *(f"paths.{name}" for name in plain.get("paths", {}))]:
        if key != "paths" and key not in used:
            raise ValueError(f"{key} is not used; remove it")
    for key, hint in known_keys.items():
        check_value(key, OmegaConf.select(cfg, key), hint)
    with _without_auto(cfg, known_keys):
        check_objects(OmegaConf.to_container(cfg, resolve=True))


@contextmanager
def _without_auto(cfg: DictConfig, known_keys: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, a number for each ``auto`` that the program will replace by one."""
    replaced = [
        key
        for key, hint in known_keys.items()
        if int in typing.get_args(hint) and OmegaConf.select(cfg, key) == "auto"
    ]
    for key in replaced:
        OmegaConf.update(cfg, key, 1)
    try:
        yield
    finally:
        for key in replaced:
            OmegaConf.update(cfg, key, "auto")


def _references(node: Any) -> Iterator[str]:
    """The keys that interpolations refer to, and the root keys above them."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _references(value)
    elif isinstance(node, str):
        for key in re.findall(r"\$\{([\w.]+)\}", node):
            yield key
            yield key.split(".")[0]
