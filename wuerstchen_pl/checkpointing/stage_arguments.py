"""The arguments of a stage's constructor, read from its source.

To import a stage takes seconds, as it imports Lightning, and a checkpoint can be read without one.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wuerstchen_pl.checkpointing.allowed import check_stage
from wuerstchen_pl.signatures import KWARGS_TARGETS

PACKAGE = Path(__file__).parents[1]


def check_stage_arguments(config: Mapping[str, Any]) -> None:
    """Refuse a stage's config with unknown or missing arguments; their values are not checked.

    Raises:
        ValueError: naming the first one, or if it is not a stage of this package.
    """
    check_stage(config)
    target = config["_target_"]
    accepted, required = stage_arguments(target)
    arguments = config.keys() - {"_target_"}
    for key in sorted(arguments - accepted, key=str):
        raise ValueError(f"stage.{key} is not an argument of {target}; use another checkpoint")
    for key in sorted(required - arguments):
        raise ValueError(f"stage.{key} is missing, and {target} needs it; use another checkpoint")


def stage_arguments(target: str) -> tuple[set[str], set[str]]:
    """Names of the arguments of a class of this package, and of those without a default."""
    module, _, name = target.rpartition(".")
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    signature = _constructor(ast.parse(path.read_text(encoding="utf-8")), name).args
    accepted = {argument.arg for argument in signature.kwonlyargs}
    required = {
        argument.arg
        for argument, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True)
        if default is None
    }
    if signature.kwarg is None:
        return accepted, required
    passed_on, needed = stage_arguments(KWARGS_TARGETS[target])
    return accepted | passed_on, required | needed


def _constructor(module: ast.Module, name: str) -> ast.FunctionDef:
    return next(
        function
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == name
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    )
