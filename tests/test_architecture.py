"""The import rule of docs/architecture.md, the folders of tests, and the limit on file length."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import wuerstchen_pl

PACKAGE = Path(wuerstchen_pl.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer is a folder or a file of the package.
PROGRAM = {"cli", "io"}
ANYWHERE = ("plural",)
"""Layers that all others may import."""
# layer -> the layers that it may import besides itself
MAY_IMPORT: dict[str, set[str]] = {
    # the commands import their programs by name, once they run
    **{name: {"cli"} for name in ("train", "sample", "evaluate", "lora", "data.__main__")},
    **{name: {"cli", "formats.FormatName"} for name in ("convert", "export", "interpolate")},
    "cache": {"cli", "train"},
    "api": {
        "train",
        "sample",
        "evaluate",
        "cache",
        "convert",
        "export",
        "interpolate",
        "lora",
        "data.__main__",
    },
    "cli": {"signatures"},
    **{name: set() for name in ("signatures", "programs")},
    "programs.next_steps": set(),
    "programs.base_model": PROGRAM | {"formats", "checkpointing"},
    "programs.training_cache": PROGRAM
    | {"programs.cache", "data", "distributed", "formats", "models"},
    "programs.run_length": {"data", "distributed"},
    "programs.optimizer_checks": PROGRAM,
    "programs.memory_table": {"callbacks"},
    "programs.dry_run": PROGRAM
    | {
        "programs.base_model",
        "programs.memory_table",
        "programs.training_cache",
        "batch",
        "callbacks",
        "models",
        "stages",
    },
    "programs.train": PROGRAM
    | {
        "programs.base_model",
        "programs.dry_run",
        "programs.next_steps",
        "programs.optimizer_checks",
        "programs.training_cache",
        "programs.run_length",
        "data",
        "batch",
        "callbacks",
        "checkpointing",
        "distributed",
        "models",
        "stages",
        "formats",
    },
    "programs.sample": PROGRAM | {"pipelines", "sampling", "evaluation", "distributed", "formats"},
    "programs.evaluate": PROGRAM
    | {
        "pipelines",
        "sampling",
        "evaluation",
        "checkpointing",
        "models",
        "distributed",
        "stages",
        "formats",
    },
    "programs.cache": PROGRAM
    | {"programs.base_model", "data", "models", "distributed", "checkpointing"},
    "programs.convert": PROGRAM | {"formats"},
    "programs.extract": PROGRAM | {"adapters", "formats"},
    "programs.resize": PROGRAM | {"adapters", "formats"},
    "programs.interpolate": PROGRAM | {"formats", "programs.convert"},
    "programs.export": PROGRAM
    | {"adapters", "formats", "models", "checkpointing", "programs.convert"},
    "programs.build": PROGRAM | {"data"},
    "programs.check": PROGRAM | {"programs.base_model", "data", "train"},
    "callbacks": {
        "batch",
        "data",
        "loggers",
        "cli.signals",
        "distributed",
        "sampling",
        "evaluation",
        "pipelines",
        "stages",
        "models.activations",
        "checkpointing",
        "io",
    },
    "evaluation": {
        "pipelines",
        "sampling",
        "stages",
        "checkpointing",
        "models",
        "io",
        "distributed",
    },
    "evaluation.metrics": {"models", "io"},
    "pipelines": {"adapters", "sampling", "formats", "diffusion", "models", "io", "checkpointing"},
    "formats": {"adapters", "checkpointing", "models", "io", "signatures"},
    "adapters": {"models"},
    "stages": {
        "adapters",
        "batch",
        "sampling",
        "models",
        "diffusion",
        "transfer",
        "checkpointing",
        "distributed",
        "io",
    },
    "sampling": {"models", "diffusion", "io"},
    "distributed.strategy": {"distributed", "checkpointing"},
    "checkpointing": {"io", "signatures"},
    "models": {"distributed.sync_batchnorm", "transfer", "io.contents", "io.atomic"},
    "diffusion": {"transfer"},
    "data": {"batch", "io", "distributed.launch", "distributed.counters"},
    "data.sources": {"io"},
    "data.ordering": {"data.sources", "io"},
    "data.loading": {"batch", "data.sources", "data.ordering", "io", "distributed.counters"},
    "data.caches": {
        "batch",
        "signatures",
        "data.sources",
        "data.ordering",
        "data.loading",
        "data.datamodule",
        "io",
    },
    "loggers": {"io"},
    **{name: set() for name in ("batch", "transfer", "distributed", "io", "plural")},
    "__init__": {"pipelines", "sampling"},
}


def layer_of(path: Path) -> str:
    """wuerstchen_pl/data/ordering/stream.py -> data.ordering; wuerstchen_pl/train.py -> train."""
    if path.name == "__main__.py":  # a program, not part of its folder's layer
        return f"{path.parent.name}.__main__"
    relative = path.relative_to(PACKAGE).with_suffix("")
    if (module := ".".join(relative.parts)) in MAY_IMPORT:
        return module
    return ".".join(relative.parts[:-1]) or path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported at run time, without type-checking imports."""
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
        if not isinstance(node, ast.expr):
            yield from imports(node)


def forbidden(path: Path, source: str) -> list[str]:
    """Forbidden imports of a file at ``path``."""
    own_layer = layer_of(path)
    allowed = MAY_IMPORT[own_layer] | {own_layer, *ANYWHERE}
    return [
        name
        for name in imports(ast.parse(source))
        if not any(f"{name}.".startswith(f"{layer}.") for layer in allowed)
    ]


def test_files_import_only_from_the_layers_below_them() -> None:
    """docs/architecture.md lists the layers."""
    assert [path for path in FILES if layer_of(path) not in MAY_IMPORT] == []
    imported = {path.relative_to(PACKAGE): forbidden(path, path.read_text()) for path in FILES}
    assert {path: upward for path, upward in imported.items() if upward} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from wuerstchen_pl.stages.a import StageA",
        "import wuerstchen_pl.pipelines",
        "from wuerstchen_pl import stages",
        "def late():\n    from wuerstchen_pl.checkpointing.load import find_checkpoint",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from wuerstchen_pl import ema",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    assert len(forbidden(PACKAGE / "models" / "planted.py", source)) == 1


def test_a_type_checking_import_is_ignored() -> None:
    source = "if TYPE_CHECKING:\n    from wuerstchen_pl.stages.stage import Stage"
    assert forbidden(PACKAGE / "models" / "planted.py", source) == []


def test_folders_of_tests_are_those_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert [str(folder) for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_tests_name_no_folder_that_others_write_to() -> None:
    """A file that someone left there would change a result."""
    shared = re.compile(r"[\"'=]/(tmp|var|home|root)\b")
    assert [path.name for path in TESTS.rglob("*.py") if shared.search(path.read_text())] == []


def test_files_are_short_and_none_is_a_catch_all() -> None:
    assert [p for p in FILES if len(p.read_text().splitlines()) > 300] == []
    assert [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")] == []
