"""What a finished run prints: where to look, and the command that follows it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

PLOT = "loss_by_timestep.png"
NEXT_STAGE = {"a": "b", "b": "c"}
OF_ONE_STAGE = re.compile(
    r"[+~]*(stage\b|optimizer@|ckpt|init_from|callbacks|checkpoint_every_steps|data\.batch_size"
    r"|global_batch|validate_every_steps|paths\.output_dir|paths\.stage_|trainer\.max_)"
)
"""Typed arguments that the next stage does not share."""


def describe_end(
    run: Path,
    stage: str,
    typed: Sequence[str],
    *,
    caption: str,
    default_folder: Path,
    is_cached: bool = False,
    has_controlnet: bool = False,
    student_steps: int | None = None,
) -> str:
    """Lines that name the images of a run and the next command.

    Args:
        run: the run's folder.
        stage: the trained stage.
        typed: the command's arguments, as Hydra reads them.
        caption: a caption of the training images, which the model knows.
        default_folder: the folder in which the next stage expects this run.
        is_cached: whether the run read a cache, which has the data of one stage only.
        has_controlnet: whether the run trained a ControlNet, which needs a control image.
        student_steps: of a distilled Stage C.
    """
    lines = []
    if any(run.glob("grids/*.png")):
        plot = f", {run / PLOT}" if (run / PLOT).is_file() else ""
        lines.append(f"images: {run / 'grids'}{plot}")
    if stage in ("c", "ldm"):
        command = ["python", "-m", "wuerstchen_pl.sample", f"model={run}", f"prompt={caption}"]
        command += ["control_image=IMAGE"] * has_controlnet
        if student_steps is not None:
            command += ["sample=distilled", f"sample.prior_steps={student_steps}"]
        lines.append(f"next: {shlex.join(command)}")
    elif starts_a_cascade(typed) and not is_cached:
        following = NEXT_STAGE[stage]
        shared = [text for text in typed if not OF_ONE_STAGE.match(text)]
        elsewhere = [f"paths.stage_{stage}={run}"] if run != default_folder else []
        command = ["python", "-m", "wuerstchen_pl.train", f"stage={following}"]
        lines.append(f"next: {shlex.join([*command, *shared, *elsewhere])}")
    return "\n".join(lines)


def starts_a_cascade(typed: Sequence[str]) -> bool:
    """Whether the typed arguments choose a stage, and no weights to start from."""
    keys = {text.partition("=")[0] for text in typed}
    return "stage" in keys and "init_from" not in keys
