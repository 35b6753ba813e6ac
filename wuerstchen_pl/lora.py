"""Make LoRA files from other files: ``python -m wuerstchen_pl.lora extract|resize``.

``extract`` writes the change from one model to another as a LoRA, ``resize`` gives one another
rank. ``python -m wuerstchen_pl.convert lora=[...]`` merges adapters into a model.

python -m wuerstchen_pl.lora extract base=A tuned=B to=C rank=16
python -m wuerstchen_pl.lora resize lora=A base=B to=C rank=8
"""

from collections.abc import Mapping
from typing import Any

from wuerstchen_pl.cli.command import Command, run_command

LIMIT: Mapping[str, Any] = {"to": str, "rank": int | None, "share": float | None}
COMMANDS = {
    "extract": Command(
        name="extract",
        description=__doc__,
        known_keys={"base": str, "tuned": str, **LIMIT},
    ),
    "resize": Command(
        name="resize",
        description=__doc__,
        known_keys={"lora": str, "base": str, **LIMIT},
    ),
}


def main() -> None:
    """Run the command that the first argument names."""
    run_command("lora", COMMANDS, __doc__)


if __name__ == "__main__":
    main()
