"""Draws prompts into a folder: what is there is not drawn again, and several processes share."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from wuerstchen_pl.evaluation.folder import FACTS
from wuerstchen_pl.pipeline.cascade import Cascade
from wuerstchen_pl.pipeline.draw import Settings, draw
from wuerstchen_pl.sampling.pictures import write_png

PATIENCE = 600.0
"""Seconds in which another process has to have drawn something, or is thought to be dead."""


class Wanted(NamedTuple):
    """A picture to be drawn."""

    prompt: str
    seed: int
    height: int
    width: int


class Process(NamedTuple):
    """One of those that share the work."""

    rank: int
    number: int

    @staticmethod
    def of_launch() -> "Process":
        """As torchrun and the like say it."""
        return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def draw_into(
    folder: Path,
    wanted: Sequence[Wanted],
    pipeline: Cascade,
    settings: Settings,
    facts: dict[str, Any],
    process: Process,
) -> None:
    """Draw this process's share of the pictures that are not there yet; the first waits for all.

    A picture is ``<number of its prompt>-<seed>.png``, and appears whole or not at all.

    Args:
        folder: for the pictures.
        wanted: all of them, in order.
        pipeline: draws them.
        settings: steps, guidance, sampler.
        facts: what pictures depend on besides, such as the weights' hash.
        process: which one this is.

    Raises:
        ValueError: if a size or prompt cannot be drawn, or the folder holds pictures that were
            drawn otherwise.
        OSError: if a picture cannot be written.
    """
    for height, width in {(each.height, each.width) for each in wanted}:
        pipeline.drawn_size(height, width)
    for each in wanted:
        pipeline.prior.text_encoder.check(each.prompt)
    # the number drawn at once changes no picture
    how = {key: value for key, value in vars(settings).items() if key != "batch_size"}
    claim(folder, wanted, {**facts, **how}, process)
    paths = [folder / name_of(number, each) for number, each in enumerate(wanted)]
    # by number, and not by what is missing: another process may have begun
    share = range(process.rank, len(paths), process.number)
    own = [number for number in share if not paths[number].is_file()]
    _draw({paths[n]: wanted[n] for n in own}, pipeline, settings, facts)
    if process.rank == 0:
        _wait_for(paths)


def _draw(
    own: dict[Path, Wanted], pipeline: Cascade, settings: Settings, facts: dict[str, Any]
) -> None:
    """Draw pictures, those of one size together, and write each to its path."""
    by_size: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, each in own.items():
        by_size[each.height, each.width].append(path)
    with tqdm(total=len(own), desc="drawing", unit="picture", disable=not own) as bar:
        for (height, width), paths in by_size.items():
            pictures = draw(
                pipeline,
                [own[path].prompt for path in paths],
                seeds=[own[path].seed for path in paths],
                height=height,
                width=width,
                settings=settings,
            )
            for path, picture in zip(paths, pictures, strict=True):
                told = {"prompt": own[path].prompt, "seed": own[path].seed}
                write_png(path, picture, {**told, **facts})
                bar.update()


def name_of(number: int, wanted: Wanted) -> str:
    """The name of a picture's file."""
    return f"{number:06d}-{wanted.seed}.png"


def claim(folder: Path, wanted: Sequence[Wanted], facts: dict[str, Any], process: Process) -> None:
    """Note what a folder's pictures are drawn from, or see that it is the same.

    Raises:
        ValueError: if they were drawn from something else.
    """
    path = folder / FACTS
    content = {
        "prompts": [each.prompt for each in wanted],
        "seeds": [each.seed for each in wanted],
        "sizes": [[each.height, each.width] for each in wanted],
        **facts,
    }
    content = json.loads(json.dumps(content))
    if not path.is_file() or not any(folder.glob("*.png")):  # or of a command that drew nothing
        if process.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
            os.replace(aside, path)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged; choose another output_dir") from error
    differing = [k for k in {**content, **there} if there.get(k) != content.get(k)]
    if differing:
        raise ValueError(
            f"{folder} holds pictures of other {', '.join(differing)}; choose another output_dir, "
            "or remove them"
        )


def _wait_for(paths: Sequence[Path]) -> None:
    """Until the other processes have drawn theirs.

    Raises:
        TimeoutError: if none came for ten minutes.
    """
    missing, since = len(paths), time.monotonic()
    while left := sum(not path.is_file() for path in paths):
        if left < missing:
            missing, since = left, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise TimeoutError(
                f"{paths[0].parent} lacks {left} pictures that other processes were to draw; run "
                "the command again, which draws only these"
            )
        time.sleep(0.2)
