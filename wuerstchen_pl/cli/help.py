"""The help of a program: its description, and its keys with their comments in YAML."""

import re
from collections.abc import Iterator
from pathlib import Path

from wuerstchen_pl.cli.config import conf_dir, group_choices


def help_text(config_name: str, description: str, read_keys: re.Pattern[str] | None = None) -> str:
    """A program's config groups with their choices, and its keys with their YAML comments.

    Of nested keys, such as ``data.batch_size``, those of each group's default choice that have a
    comment.

    Args:
        config_name: name of the program's YAML.
        description: what the program does.
        read_keys: the keys and groups that it reads, if it refuses others; None is all.
    """
    texts = list(_with_included(config_name))
    entries = [line[4:] for text in texts for line in text.splitlines() if line.startswith("  - ")]
    groups = [entry.split(":")[0] for entry in entries]
    groups = [g for g in groups if read_keys is None or read_keys.match(g)]
    listed = [f"  {g}={'|'.join(group_choices(g))}" for g in groups if group_choices(g)]
    # cache includes train and refuses most of its keys; evaluate includes a plan without ``hydra``
    shown = [text for text in texts[:-1] if "\nhydra:" not in text] + texts[-1:]
    keys = [text.partition("\nhydra:")[0].partition("\n\n")[2].strip("\n") for text in shown]
    defaults = [entry.partition(" #")[0].split(": ") for entry in entries]
    chosen = [(d[0], d[1]) for d in defaults if len(d) == 2 and d[0] in groups]
    nested = [line for group, choice in chosen for line in _nested_keys(group, choice)]
    footer = (
        "--cfg job prints the composed config with all nested keys, which are typed with dots;\n"
        "-m runs every combination of key=value,value"
    )
    return "\n".join([description, "", *listed, "", *keys, "", *nested, "", footer])


def _nested_keys(group: str, choice: str) -> Iterator[str]:
    """``group.key: value # comment`` for each key with a comment in a choice of a group."""
    path = Path(conf_dir(), group, f"{choice}.yaml")
    text = path.read_text() if path.is_file() else ""
    if "@package _global_" in text:  # its keys are not below the group's name
        return
    values: dict[str, str] = {}
    comments: dict[str, str] = {}
    for key, value, comment in (entry for text in _with_bases(text) for entry in _entries(text)):
        values[key] = value
        comments[key] = comment or comments.get(key, "")
    yield from (f"{group}.{key}: {values[key]} {text}" for key, text in comments.items() if text)


def _with_bases(text: str) -> Iterator[str]:
    """The text of a choice of a group, and before it those of the choices it extends."""
    for group, choice in re.findall(r"^  - /(\w+)@_here_: (\w+)", text, re.MULTILINE):
        yield from _with_bases(Path(conf_dir(), group, f"{choice}.yaml").read_text())
    yield text


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, value, comment) of the keys of a YAML text that have a value."""
    parents: list[str] = []
    for indent, key, rest in re.findall(r"^( *)(\w+):(.*)$", text, re.MULTILINE):
        parents[len(indent) // 2 :] = [key]
        value, mark, comment = f"{rest} ".partition(" # ")
        if value.strip():
            yield ".".join(parents), value.strip(), f"# {comment.strip()}" if mark else ""


def _with_included(config_name: str) -> Iterator[str]:
    """The text of a program's YAML, and before it those of the files it includes."""
    text = Path(conf_dir(), f"{config_name}.yaml").read_text()
    for name in re.findall(r"^  - (?!_self_)(\w+)(?: #.*)?$", text, re.MULTILINE):
        yield from _with_included(name)
    yield text
