"""Precompute the frozen networks' outputs for Stage B or C: ``python -m wuerstchen_pl.cache``.

Takes the training keys that select data and frozen networks (``data``, ``preset``, ``experiment``,
``paths``; see ``python -m wuerstchen_pl.train --help``) and writes the outputs of those networks
for every image. Train on them with ``data=cached data.root=OUT``. Run the same command again to
resume. With ``torchrun --nproc-per-node=8 -m wuerstchen_pl.cache``, the processes share the work.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from wuerstchen_pl import train
from wuerstchen_pl.cli.command import Command

KNOWN_KEYS: Mapping[str, Any] = {
    **train.KNOWN_KEYS,
    "out": str,
    "text": bool,
    "crops": int,
    "dtype": Literal["bfloat16", "float32"],
    "shard_mb": int,
    "device": str | None,
}
READ_KEYS = re.compile(
    r"(stage|preset|data|experiment|init_from|encoders|compressor|decoder|paths|name|seed|image_size|image_size_at_\d+|bucket_multiple|require_caption)$"
    r"|(data|paths)\.|stage\.(stage_[ab]|text_encoder|train_text_encoder)\b"
    r"|(out|text|crops|dtype|shard_mb|device)$"
)
"""Keys that determine the contents of a cache."""

main = Command(name="cache", description=__doc__, known_keys=KNOWN_KEYS, read_keys=READ_KEYS)

if __name__ == "__main__":
    main()
