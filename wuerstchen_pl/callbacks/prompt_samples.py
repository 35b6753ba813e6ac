"""Images of fixed prompts before, during and after training, in one strip per prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wuerstchen_pl.callbacks.drawing import DrawingCallback
from wuerstchen_pl.callbacks.grid_image import render_grid
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.io.image_files import slug
from wuerstchen_pl.io.images import to_float, write_png
from wuerstchen_pl.loggers.images import log_image
from wuerstchen_pl.stages.stage import Stage
from wuerstchen_pl.stages.text_conditional import TextConditionalStage


class PromptSamples(DrawingCallback):
    """Write ``samples/00-a-red-heart/step0001000.png``, and the strip of all beside the folder.

    Each prompt has the same seed at all steps, and is drawn with the EMA weights. TensorBoard and
    Weights & Biases get the strips. Training is not affected.

    Args:
        folder: the folder to write to.
        prompts: none by default.
        every_steps: steps between two images; the first is before training, the last at its end.
        size: height and width in pixels.
        num_steps: denoising steps; None for those of the grids.
        guidance_scale: guidance away from the empty caption; None likewise.
        seed: of the first prompt; the next has the next one.
    """

    def __init__(
        self,
        *,
        folder: str,
        prompts: Sequence[str],
        every_steps: int,
        size: int,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        if every_steps < 1 or (num_steps is not None and num_steps < 1):
            raise ValueError(
                f"every_steps={every_steps} and num_steps={num_steps} are out of range; use 1 or "
                "more"
            )
        super().__init__(every_steps=every_steps)
        self.prompts, self.size = list(prompts), size
        chosen = {"num_steps": num_steps, "guidance_scale": guidance_scale}
        self.chosen = {name: value for name, value in chosen.items() if value is not None}
        self.seed = seed
        names = [f"{number:02d}-{slug(prompt)}" for number, prompt in enumerate(self.prompts)]
        self.folders = [Path(folder, name) for name in names]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See ``DrawingCallback``; check that the stage can draw prompts.

        Raises:
            ValueError: if it cannot.
        """
        super().on_train_start(trainer, pl_module)
        stage = cast(Stage, pl_module)
        if self.prompts and not (isinstance(stage, TextConditionalStage) and stage.can_draw):
            raise ValueError(
                f"sample_prompts={self.prompts} needs Stage C with Stages B and A (or ldm), but "
                f"this is stage={stage.name} without them; remove it"
            )
        if self.prompts and hasattr(stage, "controlnet"):
            raise ValueError(
                f"sample_prompts={self.prompts} has no control images for the ControlNet; remove "
                "it, as grids show its images"
            )

    def can_draw(self, stage: Stage) -> bool:
        """Whether there are prompts."""
        return bool(self.prompts)

    @torch.no_grad()
    def images(self, trainer: L.Trainer, stage: Stage) -> Tensor:
        """(B, 3, H, W) in [0, 1], one per prompt."""
        assert isinstance(stage, TextConditionalStage)
        size = (self.size, self.size)
        seeds = range(self.seed, self.seed + len(self.prompts))
        with stage.ema.applied(stage):
            options: Any = {**stage.grid_sampling, **self.chosen}
            semantic = stage.sample(self.prompts, size=size, seeds=seeds, **options)
            return stage.decode_semantic(semantic, size=size, seeds=seeds, captions=self.prompts)

    def write(self, trainer: L.Trainer, images: Tensor) -> None:
        """Write the images, and write and log the strips."""
        step = trainer.global_step
        for prompt, folder, image in zip(self.prompts, self.folders, images, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            write_png(folder / f"step{step:07d}.png", image, {"prompt": prompt, "step": step})
            strip = render_strip(folder, prompt)
            with atomic_write(folder.with_suffix(".png")) as temporary:
                strip.save(temporary, format="PNG")
            log_image(trainer.loggers, f"samples/{folder.name}", strip, step)


def render_strip(folder: Path, prompt: str) -> Image.Image:
    """The images of a folder side by side, with their steps above and the prompt below."""
    columns: dict[str, Tensor] = {}
    for path in sorted(folder.glob("step*.png")):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        columns[f"step {int(path.stem.removeprefix('step'))}"] = to_float(pixels)[None]
    return render_grid(columns, [prompt])
