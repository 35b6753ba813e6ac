"""Inspect data, or write them to shards: ``python -m wuerstchen_pl.data check|build``.

``check`` takes the keys of the training that is to follow (``data``, ``stage``, ``preset``,
``experiment``, ``image_size``; see ``python -m wuerstchen_pl.train --help``).

python -m wuerstchen_pl.data check data=folder data.root=my/images full=true
python -m wuerstchen_pl.data build from=my/images to=my/shards
"""

import re

from wuerstchen_pl.cli.command import Command, run_command

READ_KEYS = re.compile(
    r"(stage|preset|data|experiment|init_from|encoders|compressor|decoder|paths|seed|image_size|image_size_at_\d+"
    r"|bucket_multiple)$"
    r"|(data|paths)\.|(require_caption|full|output_dir)$"
)
"""Keys that ``check`` reads."""
COMMANDS = {
    "check": Command(name="check", description=__doc__, read_keys=READ_KEYS),
    "build": Command(name="build", description=__doc__),
}


def main() -> None:
    """Run the command that the first argument names."""
    run_command("data", COMMANDS, __doc__)


if __name__ == "__main__":
    main()
