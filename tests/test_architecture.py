"""The import rule of DESIGN.md, and the sizes that keep files readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wuerstchen_pl

PACKAGE = Path(wuerstchen_pl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ENTRY_POINTS = {"train", "sample", "evaluate", "cache", "convert"}
# A layer is a folder or a file of the package; what it may import besides itself.
SHARED = {"cli", "config"}
BELOW_ENTRY_POINTS = {
    "pipeline",
    "evaluation",
    "stages",
    "metrics",
    "checkpoint",
    "layouts",
    "sampling",
    "models",
    "fingerprint",
}
MAY_IMPORT: dict[str, set[str]] = {
    **{name: SHARED | BELOW_ENTRY_POINTS for name in ENTRY_POINTS},
    "cache": SHARED | {"fingerprint", "data"},
    "data.__main__": SHARED | {"data"},
    "export": SHARED | BELOW_ENTRY_POINTS | {"card", "convert"},
    "card": {"checkpoint", "durable"},
    "cli": {"config"},
    "config": set(),
    "evaluation": {
        "callbacks.checkpoints",
        "fingerprint",
        "stages",
        "metrics",
        "pipeline",
        "checkpoint",
        "models",
        "sampling",
    },
    "pipeline": {"sampling", "layouts", "checkpoint", "diffusion", "models"},
    "layouts": {"checkpoint", "models"},
    "stages": {"sampling", "models", "diffusion", "ema", "checkpoint", "durable", "sharding"},
    "sampling": {"models", "diffusion"},
    "checkpoint": {"models", "durable", "in_parts"},
    "ema": {"sharding"},
    "metrics": {"models", "durable", "fingerprint"},
    "strategy": {"sharding", "in_parts", "put_off"},
    "one_file": {"checkpoint", "durable", "put_off"},
    "train": SHARED
    | {"callbacks.signals", "checkpoint", "models.blocks", "fingerprint", "one_file", "strategy"},
    "callbacks": {"sampling.pictures", "durable", "put_off"},
    "data.sources": set(),
    "data.order": {"data.sources"},
    "data.loading": {"data.sources", "data.order"},
    "data.caches": {"data.sources", "data.order", "data.loading", "data.datamodule"},
    **{
        name: set()
        for name in (
            "models",
            "diffusion",
            "data",
            "fingerprint",
            "durable",
            "sharding",
            "in_parts",
            "put_off",
        )
    },
    "__init__": {"pipeline", "sampling"},
}


def layer_of(path: Path) -> str:
    """wuerstchen_pl/data/order/stream.py -> data.order; wuerstchen_pl/cli.py -> cli."""
    if path.name == "__main__.py":  # a program, and no part of its folder
        return f"{path.parent.name}.__main__"
    folder = path.relative_to(PACKAGE).parts[:-1]
    return ".".join(folder) or path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """Names below the package that are imported at run time: not those for type checking only."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        for node in tree.orelse:
            yield from imports(node)
        return
    names: list[str] = []
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports are absolute"
        names = [f"{tree.module}.{alias.name}" for alias in tree.names]
    yield from (name.removeprefix("wuerstchen_pl.") for name in names if "wuerstchen_pl" in name)
    for node in ast.iter_child_nodes(tree):
        yield from imports(node)


def forbidden(path: Path, source: str) -> list[str]:
    """What a file at ``path`` imports and may not."""
    own = layer_of(path)
    allowed = MAY_IMPORT[own] | {own}
    return [
        name
        for name in imports(ast.parse(source))
        if not any(f"{name}.".startswith(f"{layer}.") for layer in allowed)
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_the_layers_below_it(path: Path) -> None:
    assert layer_of(path) in MAY_IMPORT, f"{path} belongs to no layer; DESIGN.md has them"
    assert forbidden(path, path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from wuerstchen_pl.stages.a import StageA",
        "import wuerstchen_pl.pipeline",
        "from wuerstchen_pl import stages",
        "def late():\n    from wuerstchen_pl.checkpoint import find",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from wuerstchen_pl import ema",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    assert len(forbidden(PACKAGE / "models" / "planted.py", source)) == 1


def test_an_import_for_types_alone_is_no_import() -> None:
    source = "if TYPE_CHECKING:\n    from wuerstchen_pl.stages.stage import Stage"
    assert forbidden(PACKAGE / "models" / "planted.py", source) == []


def test_files_are_short_and_none_is_a_drawer() -> None:
    assert [p for p in FILES if len(p.read_text().splitlines()) > 300] == []
    assert [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")] == []
