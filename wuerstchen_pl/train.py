"""Train one stage: ``python -m wuerstchen_pl.train stage=a|b|c|ldm experiment=...``."""

from collections.abc import Mapping
from typing import Any, Literal

from wuerstchen_pl.cli import command

KNOWN_KEYS: Mapping[str, Any] = {
    # read by the program itself
    "stage": dict,
    "data": dict,
    "trainer": dict,
    "callbacks": dict,
    "logger": dict,
    "seed": int,
    "ckpt": str | None,
    "init_from": str | None,
    "allow_mismatch": bool,
    "activation_checkpointing": bool | Literal["auto"],
    "compile": bool,
    "check_memory": bool,
    "paths.output_dir": str,
    # used in interpolations; a stage or an override need not use all of them
    "name": str,
    "image_size": int,
    "image_size_at_12": int,
    "require_caption": bool,
    "image_size_at_24": int,
    "global_batch": int | None,
    "bucket_multiple": int,
    "checkpoint_every_steps": int | Literal["auto"],
    "validate_every_steps": int | Literal["auto"],
    "trainer.max_steps": int | Literal["auto"],
    "paths.root": str,
    "paths.data": str,
    "paths.stage_a": str,
    "paths.stage_b": str,
}

main = command("train", __doc__, KNOWN_KEYS, resumable=True)

if __name__ == "__main__":
    main()
