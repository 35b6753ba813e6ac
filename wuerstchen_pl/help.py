"""The help of a program: its description, and its keys with their comments in YAML."""

import re
from collections.abc import Iterator
from pathlib import Path

from wuerstchen_pl.config import conf_dir, group_choices


def help_text(config_name: str, description: str, read_keys: re.Pattern[str] | None = None) -> str:
    """A program's config groups with their choices, and its keys with their YAML comments.

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
    footer = "--cfg job prints the composed config; -m runs every combination of key=value,value"
    return "\n".join([description, "", *listed, "", *keys, "", footer])


def _with_included(config_name: str) -> Iterator[str]:
    """The text of a program's YAML, and before it those of the files it includes."""
    text = Path(conf_dir(), f"{config_name}.yaml").read_text()
    for name in re.findall(r"^  - (?!_self_)(\w+)(?: #.*)?$", text, re.MULTILINE):
        yield from _with_included(name)
    yield text
