"""docs/troubleshooting.md quotes messages that the programs print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def messages(tree: ast.AST) -> Iterator[str]:
    """The string literals of a file, with ``{}`` for what an f-string fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_quoted_message_exists() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^- `(.+?)`", text, re.MULTILINE)
    printed = [
        m
        for p in (ROOT / "wuerstchen_pl").rglob("*.py")
        for m in messages(ast.parse(p.read_text()))
    ]
    assert len(quoted) > 10
    assert [q for q in quoted if not any(q in message for message in printed)] == []
