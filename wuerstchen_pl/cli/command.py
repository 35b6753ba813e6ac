"""The command-line programs: their signals and their help.

A program's module imports only this one, which imports the rest when it runs: Hydra when a config
is composed, and torch once the config has been checked. So help is immediate, and a signal is
handled from the start.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from wuerstchen_pl.cli.signals import INTERRUPTED, Exit, StopSignals


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program: ``programs.<name>.run`` with ``<name>.yaml``; called, the command-line program.

    Attributes:
        name: of the program's module in ``programs``, and of its YAML.
        description: what the program does, for its help.
        known_keys: types of its keys, at the root and in ``paths``; None if it checks them itself.
        read_keys: the keys that the command line may set; None is all.
        rewrite: applied to each command-line argument before Hydra reads it.
        resumable: see ``StopSignals``.
    """

    name: str
    description: str | None = None
    known_keys: Mapping[str, Any] | None = None
    read_keys: re.Pattern[str] | None = None
    rewrite: Callable[[str], str] | None = None
    resumable: bool = False

    def __call__(self) -> None:
        """Run with the arguments of the command line; errors end the process."""
        with StopSignals(resumable=self.resumable) as signals:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, TextIOWrapper):  # a terminal may not have every character
                    stream.reconfigure(errors="backslashreplace")
            if {"--help", "-h"} & set(sys.argv[1:]):
                from wuerstchen_pl.cli.help import help_text

                print(help_text(self.name, self.description or "", self.read_keys))
                return
            from wuerstchen_pl.cli.jobs import launch

            sys.argv[1:] = self._rewritten(sys.argv[1:])
            try:
                launch(self.name, self.known_keys, self.read_keys, signals.begin_work)
            except KeyboardInterrupt:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                sys.exit(INTERRUPTED)
            except Exit as stop:
                print(stop.message, file=sys.stderr)
                raise

    def run(self, overrides: Sequence[str], *, output_key: str) -> Path:
        """Run within this process.

        Args:
            overrides: ``key=value`` strings.
            output_key: the key of the folder that the program writes, which is returned.

        Raises:
            ValueError: if the config is invalid; programs raise further errors.
        """
        if isinstance(overrides, str):
            raise ValueError(f"{overrides!r} is a single string; give a list of key=value strings")
        from wuerstchen_pl.cli.jobs import call

        return call(
            self.name, self.known_keys, self.read_keys, self._rewritten(overrides), output_key
        )

    def _rewritten(self, arguments: Sequence[str]) -> list[str]:
        return list(arguments if self.rewrite is None else map(self.rewrite, arguments))


def run_command(program: str, commands: Mapping[str, Command], description: str | None) -> None:
    """Run the one of a program's commands that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in commands:
        del sys.argv[1]
        commands[name]()
    elif name in ("--help", "-h"):
        print(description)
    else:
        choices = " or ".join(commands)
        sys.exit(f"{program}: {name} is not a command; use {choices}, then key=value ...")
