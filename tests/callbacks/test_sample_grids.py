"""Grids and validations of a run: when they are made, what they show, and that nothing changes."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import NO_GRIDS, NO_PLOT, run_program, small
from tests.data.factories import image
from tests.test_resume import differing
from wuerstchen_pl.callbacks import grid_image, sample_grids
from wuerstchen_pl.callbacks.grid_image import drawable, render_grid, wrap
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.stage import Batch


def command(stage: str, root: Path, cascade: Path, *overrides: str) -> list[str]:
    """A run of five steps, with grids, and validations of which none is at its end."""
    usual = [a for a in small(stage, root, 5) if a not in (NO_GRIDS, "validate_every_steps=5")]
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    paths.append(f"paths.data={cascade.parent / 'data'}")
    return [*usual, "validate_every_steps=2", *paths, *overrides]


def steps_of(log: Path, metric: str) -> list[int]:
    rows = [line.split(",") for line in log.read_text().splitlines()]
    return [int(step) for step, name, _ in rows[1:] if name == metric]


@pytest.mark.slow
@pytest.mark.parametrize("stage", "abc")
def test_grids_change_no_weight(stage: str, cascade: Path, tmp_path: Path) -> None:
    checkpoints = {}
    for name, more in (("with", []), ("without", [NO_GRIDS])):
        assert run_program("train", command(stage, tmp_path / name, cascade, *more)) == 0
        run = tmp_path / name / "default" / stage
        checkpoints[name] = load.read_checkpoint(load.find_checkpoint(run))
        assert len(list(run.glob("grids/*.png"))) == (4 if name == "with" else 0)
    assert not differing(checkpoints["with"], checkpoints["without"])


@pytest.mark.slow
def test_grids_and_validations_are_also_at_the_ends_of_a_run(cascade: Path, tmp_path: Path) -> None:
    more = ["trainer.log_every_n_steps=1", "trainer.max_steps=4", "global_batch=8"]
    usual = [a for a in command("c", tmp_path, cascade) if a != NO_PLOT]
    assert run_program("train", [*usual, *more]) == 0
    assert run_program("train", [*usual, *more[::2], "ckpt=auto"]) == 0
    run = tmp_path / "default/c"
    grids = [f"step000000{step}.png" for step in (0, 2, 4, 5)]
    assert sorted(path.name for path in (run / "grids").iterdir()) == grids
    assert steps_of(run / "metrics.csv", "val/loss") == [1, 3, 4]  # counted from 0
    assert steps_of(run / "metrics.csv", "train/lr") == [0, 1, 2, 3, 4]
    assert (run / "loss_by_timestep.png").is_file()


def own_images(folder: Path, number: int) -> list[str]:
    folder.mkdir()
    for i in range(number):
        (folder / f"{i}.jpg").write_bytes(image(str(i), 64, 64))
        (folder / f"{i}.txt").write_text(f"number {i}")
    data = ["data=folder", f"data.root={folder}", "data.batch_size=2", "data.num_workers=0"]
    return [*data, "data.max_upscale=null"]


@pytest.mark.parametrize(
    ("val_fraction", "split"), [(0.3, "val"), pytest.param(0.0, "train", marks=pytest.mark.slow)]
)
def test_a_run_always_draws_the_same_samples_of_validation_or_else_of_training(
    val_fraction: float, split: str, cascade: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn: list[list[str]] = []
    example_grid, training_step = StageC.example_grid, StageC.training_step
    trained: Counter[str] = Counter()

    def recording_grid(stage: StageC, batch: Batch) -> dict[str, Tensor]:
        drawn.append(list(batch["key"]))
        return example_grid(stage, batch)

    def recording_step(stage: StageC, batch: Batch, batch_idx: int) -> Tensor:
        trained.update(batch["key"])
        return training_step(stage, batch, batch_idx)

    monkeypatch.setattr(StageC, "example_grid", recording_grid)
    monkeypatch.setattr(StageC, "training_step", recording_step)
    usual = [a for a in command("c", tmp_path, cascade) if not a.startswith("data.")]
    data = [*own_images(tmp_path / "images", 6), f"data.val_fraction={val_fraction}"]
    assert run_program("train", [*usual, *data]) == 0
    assert len(drawn) == 4
    assert all(keys == drawn[0] != [] for keys in drawn)
    assert set(drawn[0]).isdisjoint(trained) == (split == "val")


@pytest.mark.slow
def test_the_time_for_grids_is_not_training_time(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    end = sample_grids.SampleGrids.on_train_end

    def recording_end(callback: sample_grids.SampleGrids, *args: object) -> None:
        seconds.append(callback.seconds)
        end(callback, *args)  # type: ignore[arg-type]
        seconds.append(callback.seconds)

    monkeypatch.setattr(sample_grids.SampleGrids, "on_train_end", recording_end)
    assert run_program("train", command("c", tmp_path, cascade)) == 0
    assert 0 < seconds[0] < seconds[1]


def test_a_grid_shows_its_images_under_labels_and_above_captions() -> None:
    red, blue = torch.zeros(2, 3, 40, 60), torch.zeros(2, 3, 40, 60)
    red[:, 0], blue[:, 2] = 1, 1
    grid = render_grid({"one": red, "two": blue}, ["a cat", "a much longer caption " * 20])
    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(grid.height, grid.width, 3)
    is_red = (pixels == torch.tensor([255, 0, 0], dtype=torch.uint8)).all(dim=2)
    is_blue = (pixels == torch.tensor([0, 0, 255], dtype=torch.uint8)).all(dim=2)
    assert int(is_red.sum()) == int(is_blue.sum()) == 2 * 40 * 60
    tops = [int(rows.nonzero()[0]) for rows in is_red.any(dim=1).split(grid.height // 2)]
    dark = pixels.sum(dim=2) < 200  # of text: 255 for both colors
    first_caption = dark[tops[0] + 40 : grid.height // 2]
    assert first_caption.any()
    assert dark[grid.height // 2 + tops[1] + 40 :].sum() > 4 * first_caption.sum()


def test_captions_of_any_script_are_drawn() -> None:
    assert drawable("a cat\n of Zoë") == "a cat of Zoë"
    assert drawable("e\u0301t\u00e9") == "\u00e9t\u00e9"  # composed, for fonts without accents
    assert drawable("a 猫 \U000e0041, кот") == "a ? ?, кот"
    render_grid({"x": torch.zeros(2, 3, 8, 8)}, ["", "猫" * 400])


@pytest.mark.parametrize("text", ["one two three " * 30, "w" * 300, "short", "", "w" * 300 + " a"])
def test_wrapped_lines_are_no_wider_than_the_grid(text: str) -> None:
    lines = wrap(text, 120, 2)
    assert 1 <= len(lines) <= 2
    assert all(grid_image._font().getlength(line) <= 120 for line in lines)
    assert " ".join(lines) == text.strip() or any(line.endswith("...") for line in lines)
