"""The programs as functions: the same results as the commands, and errors as exceptions."""

import inspect
import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.conftest import PROGRAMS, run_program, small
from tests.data.factories import image
from wuerstchen_pl import api
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import registry


def test_there_is_a_function_for_each_program() -> None:
    programs = {*PROGRAMS, "check_data", "build_data", "extract_lora", "resize_lora"}
    assert set(api.__all__) == programs - {"data", "lora"}
    assert all(inspect.getdoc(getattr(api, name)) for name in api.__all__)


def test_training_returns_the_folder_of_a_run_like_that_of_the_command(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # of an earlier test
    folder = api.train(small("a", tmp_path))
    assert folder == tmp_path / "default/a"
    state, expected = (
        load.read_checkpoint(load.find_checkpoint(run))["state_dict"]
        for run in (folder, cascade / "a")
    )
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert HydraConfig.instance().cfg is None
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_several_stages_return_the_folder_of_the_last(tmp_path: Path) -> None:
    common = [key for key in small("a", tmp_path, 1) if not key.startswith("stage")]
    assert api.train(["stage=ab", *common]) == tmp_path / "default/b"
    assert load.find_checkpoint(tmp_path / "default/a").is_file()


def test_models_and_images_are_made_from_a_notebook(cascade: Path, tmp_path: Path) -> None:
    model = api.export([f"ckpt={cascade / 'c'}", f"to={tmp_path / 'model'}"])
    copied = api.convert([f"from={model}", f"to={tmp_path / 'copied'}"])
    mean = api.interpolate([f"a={model}", f"b={copied}", f"to={tmp_path / 'mean'}"])
    assert (
        registry.read_model(str(mean)).parts.keys() == registry.read_model(str(model)).parts.keys()
    )
    fast = ["sample.prior_steps=2", "sample.decoder_steps=1", "height=64", "width=64", "device=cpu"]
    keys = [f"model={mean}", "prompt=a cat, a dog", f"output_dir={tmp_path / 'images'}"]
    images = api.sample([*keys, *fast])
    assert [path.name for path in images.glob("*.png")] == ["0000-a-cat-a-dog-0.png"]


def test_evaluation_returns_the_scores(cascade: Path, tmp_path: Path) -> None:
    keys = [f"model={cascade / 'c'}", f"output_dir={tmp_path}", "device=cpu"]
    scores = api.evaluate([*keys, "metric=[validation_loss]"])
    assert {"stage_b/loss", "stage_c/loss"} <= scores.keys()
    assert scores["stage_c/loss"]["low"] <= scores["stage_c/loss"]["value"]


@pytest.mark.slow
def test_data_are_checked_built_and_cached(cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / f"images/{i}.jpg").write_bytes(image(str(i), 64, 64))
        (tmp_path / f"images/{i}.txt").write_text(f"number {i}")
    settings = ["data=folder", f"data.root={tmp_path / 'images'}", "data.num_workers=0"]
    checked = api.check_data([*settings, f"output_dir={tmp_path / 'report'}"])
    assert (checked / "sizes.png").is_file()
    built = api.build_data([f"from={tmp_path / 'images'}", f"to={tmp_path / 'shards'}"])
    assert len(list(built.glob("*.tar"))) == 1
    stage_b = f"paths.stage_b={cascade / 'b'}"
    cached = api.cache(["stage=c", *settings, stage_b, f"out={tmp_path / 'cache'}", "device=cpu"])
    assert list(cached.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["stage=a", "sead=1"], ValueError, "sead is not a key; did you mean seed?"),
        (["stage=a", "preset=huge"], ValueError, "preset=huge is unknown; choose from"),
        (["stage=a", "experiment=none"], ValueError, "experiment=none is unknown; choose from"),
        ([], ValueError, "stage is missing; choose stage=a or stage=b"),
        (["stage=a", "data.batch_size=many"], ValueError, "data.batch_size is 'many', and must be"),
        (
            ["stage=a", "init_from=/no/run", "data.limit=4"],
            FileNotFoundError,
            "/no/run does not exist",
        ),
        (["stage=a", "data.val_fraction=2.0"], ValueError, "data.val_fraction=2.0 "),
        (["stage=a", "name=[a"], ValueError, "cannot be read; write key=value"),
        ("stage=a", ValueError, "'stage=a' is a single string; give a list of key=value strings"),
    ],
)
def test_an_error_is_an_exception_with_the_sentence_of_the_command(
    arguments: list[str], error: type[Exception], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    settings = arguments if isinstance(arguments, str) else [*arguments, f"paths.root={tmp_path}"]
    with pytest.raises(error) as caught:
        api.train(settings)
    assert message in " ".join(str(caught.value).split())
    if not isinstance(arguments, str):
        assert run_program("train", settings) == 1
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed == f"error: {' '.join(str(caught.value).split())}"
    assert not GlobalHydra.instance().is_initialized()
    assert not (tmp_path / "default").exists()


def test_an_interrupted_training_is_a_keyboard_interrupt_that_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wuerstchen_pl.stages.a import StageA

    step: Callable = StageA.training_step

    def interrupted(self: StageA, *arguments: object) -> torch.Tensor:
        if self.trainer.global_step == 1:  # not while the memory is estimated
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(StageA, "training_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT after step 2.*ckpt=auto"):
            api.train(small("a", tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert load.parse_step(load.find_checkpoint(tmp_path / "default/a")) == 2


def test_logs_and_warnings_are_as_before_after_a_call(tmp_path: Path) -> None:
    package = logging.getLogger("wuerstchen_pl")
    before = (package.level, list(package.handlers), warnings.formatwarning)
    with pytest.raises(ValueError, match="sead is not a key"):
        api.train(["stage=a", "sead=1"])
    assert (package.level, list(package.handlers), warnings.formatwarning) == before


def test_importing_the_functions_imports_neither_hydra_nor_torch() -> None:
    script = "import sys; from wuerstchen_pl import api; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert not {"torch", "hydra", "omegaconf", "numpy"} & set(modules.split())
