"""Run one section in this process: ``python -m scripts.gpu_check.section NAME ROWS CHECK``.

``__main__`` starts it. Each row is printed, and appended to the file ROWS as a line of JSON; CHECK
is the section's ``Check`` in JSON.
"""

import importlib
import json
import sys
from pathlib import Path

from scripts.gpu_check.sizes import Check


def run(name: str, rows_file: Path, check: Check) -> None:
    """Compute a section's rows, and write each as soon as it is known."""
    section = importlib.import_module(f"scripts.gpu_check.{name}")
    for row in section.rows(check):
        print(row.in_table(name), flush=True)
        with rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Run the section that the command line names."""
    name, rows_file, encoded = sys.argv[1:]
    run(name, Path(rows_file), Check.from_json(encoded))


if __name__ == "__main__":
    main()
