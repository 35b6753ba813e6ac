"""What TensorBoard and Weights & Biases get of a run: images, learning rate, config, result."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.test_sample_grids import command
from tests.conftest import run_program
from wuerstchen_pl.programs import train


class FakeWandb(Logger):
    """Keeps what Lightning's ``WandbLogger`` would send, with the same methods."""

    name = version = "fake"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[int, Image.Image] = {}
        self.metrics: dict[str, float] = {}
        self.config: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        assert key == "grid"
        (self.images[step],) = images

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.config |= params


@pytest.fixture(scope="module")
def logged(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeWandb]:
    """A run of Stage C with both loggers: its folder, and what Weights & Biases got."""
    root, wandb = tmp_path_factory.mktemp("logged"), FakeWandb()
    build = train._instantiate_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train,
            "_instantiate_group",
            lambda group: [*build(group), *([wandb] if "tensorboard" in group else [])],
        )
        arguments = [a for a in command("c", root, cascade) if a != "logger=csv"]
        assert run_program("train", [*arguments, "trainer.log_every_n_steps=1"]) == 0
    return root / "default/c", wandb


@pytest.fixture(scope="module")
def events(logged: tuple[Path, FakeWandb]) -> EventAccumulator:
    accumulator = EventAccumulator(str(logged[0] / "tensorboard"), size_guidance={"images": 0})
    return accumulator.Reload()


@pytest.mark.slow
def test_both_loggers_get_the_grids_of_the_folder(
    logged: tuple[Path, FakeWandb], events: EventAccumulator
) -> None:
    run, wandb = logged
    on_disk = {int(path.stem[4:]): Image.open(path) for path in (run / "grids").glob("*.png")}
    in_events = {
        e.step: Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images("grid")
    }
    assert sorted(on_disk) == sorted(in_events) == sorted(wandb.images) == [0, 2, 4, 5]
    for step, grid in on_disk.items():
        assert np.array_equal(grid, in_events[step])
        assert np.array_equal(grid, wandb.images[step])


def test_both_loggers_get_the_learning_rate(
    logged: tuple[Path, FakeWandb], events: EventAccumulator
) -> None:
    assert [(e.step, e.value) for e in events.Scalars("train/lr")] == [
        (step, pytest.approx(1e-3)) for step in range(5)
    ]
    assert logged[1].metrics["train/lr"] == pytest.approx(1e-3)


def test_both_loggers_get_the_config_and_the_result(
    logged: tuple[Path, FakeWandb], events: EventAccumulator
) -> None:
    run, wandb = logged
    (config,) = events.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert [line[4:] for line in text.splitlines()] == (run / "config.yaml").read_text().split("\n")
    assert wandb.config["stage"]["optimizer"]["lr"] == 1e-3
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"stage/optimizer/lr" in start
    assert b"hp_metric" not in start
    assert "hp_metric" not in events.Tags()["scalars"]
    last = events.Scalars("val/loss")[-1]
    assert last.value == pytest.approx(wandb.metrics["val/loss"])
