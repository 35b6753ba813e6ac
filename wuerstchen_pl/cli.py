"""The command-line programs: their signals and their help.

A program's module imports only this one, which imports the rest when it runs: Hydra when a config
is composed, and torch once the config has been checked. So help is immediate, and a signal is
handled from the start.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from typing import Any

from wuerstchen_pl.signals import INTERRUPTED, Exit, StopSignals


def command(
    name: str,
    description: str | None,
    known_keys: Mapping[str, Any] | None = None,
    *,
    read_keys: re.Pattern[str] | None = None,
    rewrite: Callable[[str], str] | None = None,
    resumable: bool = False,
) -> Callable[[], None]:
    """Make the command-line program that calls ``programs.<name>.run`` with ``<name>.yaml``.

    Args:
        name: of the program's module in ``programs``, and of its YAML.
        description: what the program does, for its help.
        known_keys: types of its keys, at the root and in ``paths``; None if it checks them itself.
        read_keys: the keys that the command line may set; None is all.
        rewrite: applied to each command-line argument before Hydra reads it.
        resumable: see ``StopSignals``.
    """

    def main() -> None:
        with StopSignals(resumable=resumable) as signals:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, TextIOWrapper):  # a terminal may not have every character
                    stream.reconfigure(errors="backslashreplace")
            if {"--help", "-h"} & set(sys.argv[1:]):
                from wuerstchen_pl.help import help_text

                print(help_text(name, description or "", read_keys))
                return
            from wuerstchen_pl.jobs import launch

            if rewrite is not None:
                sys.argv[1:] = map(rewrite, sys.argv[1:])
            try:
                launch(name, known_keys, read_keys, signals.begin_work)
            except KeyboardInterrupt:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                sys.exit(INTERRUPTED)
            except Exit as stop:
                print(stop.message, file=sys.stderr)
                raise

    return main
