"""Images of fixed prompts during a run: when they are drawn, from which weights, at no cost."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import NO_GRIDS, run_program, small
from tests.test_resume import differing
from tests.test_train import send_signals
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli.signals import DRAW_SIGNAL
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.sampling.images import to_tensor

PROMPTS = ["a red heart", "Frösche!"]


def command(root: Path, cascade: Path, *more: str, stage: str = "c", steps: int = 5) -> list[str]:
    usual = [a for a in small(stage, root, steps) if not a.startswith("validate_every_steps")]
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    data = f"paths.data={cascade.parent / 'data'}"
    return [*usual, "validate_every_steps=2", *paths, data, *more]


@pytest.mark.slow
def test_prompts_are_drawn_with_the_ema_weights_and_change_no_weight(
    cascade: Path, tmp_path: Path
) -> None:
    drawn = f"sample_prompts={PROMPTS}"
    first = command(tmp_path / "with", cascade, drawn, steps=4)
    assert run_program("train", first) == 0
    assert run_program("train", [*command(tmp_path / "with", cascade, drawn), "ckpt=auto"]) == 0
    assert run_program("train", command(tmp_path / "without", cascade)) == 0
    paths = [load.find_checkpoint(tmp_path / name / "default/c") for name in ("with", "without")]
    assert not differing(*(load.read_checkpoint(path) for path in paths))
    samples = paths[0].parent.parent / "samples"
    assert not (paths[1].parent.parent / "samples").exists()
    folders = [samples / "00-a-red-heart", samples / "01-fr-sche"]
    stage = load_stage(source=paths[0], stage="c")
    size, seeds = (64, 64), range(2)
    semantic = stage.sample(PROMPTS, size=size, seeds=seeds, num_steps=20)
    expected = stage.decode_semantic(semantic, size=size, seeds=seeds, captions=PROMPTS)
    for number, folder in enumerate(folders):
        names = [f"step000000{step}.png" for step in (0, 2, 4, 5)]
        assert sorted(path.name for path in folder.iterdir()) == names
        last = to_tensor(folder / "step0000005.png")[0]
        assert float((last - expected[number].clamp(0, 1)).abs().max()) <= 1 / 255
        with Image.open(folder.with_suffix(".png")) as strip:
            pixels = np.asarray(strip)
        width = pixels.shape[1] // 4
        columns = [pixels[16:80, i * width : i * width + 64] for i in range(4)]
        for column, name in zip(columns, names, strict=True):
            with Image.open(folder / name) as image:
                assert np.array_equal(column, np.asarray(image))


@pytest.mark.slow
def test_a_signal_draws_after_its_step_and_changes_no_weight(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = ["sample_prompts=[a frog]", "+callbacks.prompt_samples.num_steps=2", "global_batch=8"]
    keys = [*keys, "validate_every_steps=3", "callbacks.sample_grids.num_images=2"]
    checkpoints, drawn = [], []
    for name, signals in (("with", [DRAW_SIGNAL]), ("without", [])):
        usual = [a for a in command(tmp_path / name, cascade, steps=3) if a != NO_GRIDS]
        with pytest.MonkeyPatch.context() as patch:
            send_signals(patch, signals, step=1)
            assert run_program("train", [*usual, *keys]) == 0
        run = tmp_path / name / "default/c"
        checkpoints.append(load.read_checkpoint(load.find_checkpoint(run)))
        images = [*run.glob("grids/*.png"), *run.glob("samples/*/*.png")]
        drawn.append(sorted(f"{path.parent.name}/{path.stem}" for path in images))
    assert not differing(*checkpoints)
    requested = ["00-a-frog/step0000002", "grids/step0000002"]
    assert drawn[0] == sorted([*drawn[1], *requested])
    assert len(drawn[1]) == 4
    assert "SIGUSR2: drawing images after this step" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [["stage=a"], ["stage=b"]])
def test_a_stage_without_prompts_refuses_them(
    keys: list[str], cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage = keys[0][-1]
    arguments = command(tmp_path, cascade, "sample_prompts=[a]", stage=stage)
    assert run_program("train", arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: sample_prompts=['a'] needs Stage C" in error
