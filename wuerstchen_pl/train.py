"""Train one stage: ``python -m wuerstchen_pl.train stage=a|b|c|ldm experiment=...``.

``stage=abc`` trains several stages, one after the other.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from wuerstchen_pl.cli.command import Command

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
    "encoders": str | None,
    "compressor": str | None,
    "decoder": str | None,
    "cache": bool,
    "activation_checkpointing": bool | Literal["auto"],
    "compile": bool,
    "check_memory": bool,
    "dry_run": bool,
    "paths.output_dir": str,
    # used in interpolations; a stage or an override need not use all of them
    "name": str,
    "image_size": int | Literal["auto"],
    "image_size_at_12": int,
    "require_caption": bool,
    "sample_prompts": list[str],
    "image_size_at_24": int,
    "global_batch": int | None,
    "adamw.lr": float,
    "adamw.betas": list[float],
    "bucket_multiple": int | Literal["auto"],
    "checkpoint_every_steps": int | Literal["auto"],
    "validate_every_steps": int | Literal["auto"],
    "trainer.max_steps": int | Literal["auto"],
    "paths.root": str,
    "paths.data": str,
    "paths.stage_a": str,
    "paths.stage_b": str,
}

command = Command(name="train", description=__doc__, known_keys=KNOWN_KEYS, resumable=True)


def main() -> None:
    """The command-line program."""
    for arguments in for_each_stage(sys.argv[1:]):
        sys.argv[1:] = arguments
        command()


def for_each_stage(arguments: Sequence[str]) -> list[Sequence[str]]:
    """The arguments for each stage of ``stage=abc``; otherwise the arguments themselves."""
    for position, argument in enumerate(arguments):
        key, _, stages = argument.partition("=")
        if key == "stage" and len(stages) > 1 and set(stages) <= set("abc"):
            before, after = arguments[:position], arguments[position + 1 :]
            return [[*before, f"stage={stage}", *after] for stage in stages]
    return [arguments]


if __name__ == "__main__":
    main()
