"""The command that a finished run prints is the one that uses it."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_config import composed
from tests.conftest import run_program, small
from wuerstchen_pl.programs.next_steps import describe_end

RUN = Path("outputs/default/a")
USUAL: Any = {"caption": 'a "red" heart, large', "default_folder": RUN}


@pytest.mark.parametrize(
    ("typed", "following"),
    [
        (["stage=a"], "stage=b"),
        (["stage=a", "data=folder", "data.root=my photos"],
         "stage=b data=folder 'data.root=my photos'"),
        (["stage=a", "stage.optimizer.lr=1e-3", "trainer=gpu", "ckpt=auto"], "stage=b trainer=gpu"),
        (["preset=paper", "stage=a", "+stage.x=1", "image_size=512", "trainer.max_steps=9"],
         "stage=b preset=paper image_size=512"),
        (["experiment=demo", "stage=a"], "stage=b experiment=demo"),
    ],
)  # fmt: skip
def test_the_next_stage_has_the_same_data(typed: list[str], following: str) -> None:
    (line,) = describe_end(RUN, "a", typed, **USUAL).splitlines()
    assert line == f"next: python -m wuerstchen_pl.train {following}"
    assert composed(*shlex.split(line)[4:])


def test_a_run_in_another_folder_is_named(tmp_path: Path) -> None:
    text = describe_end(tmp_path, "b", ["stage=b"], **USUAL)
    assert text == f"next: python -m wuerstchen_pl.train stage=c paths.stage_b={tmp_path}"


def test_an_experiment_of_one_stage_and_a_cache_have_no_next_command() -> None:
    assert describe_end(RUN, "a", ["experiment=paper_a"], **USUAL) == ""
    assert describe_end(RUN, "b", ["stage=b"], **USUAL, is_cached=True) == ""


def test_the_last_stage_draws_a_caption_of_its_images() -> None:
    (line,) = describe_end(RUN, "c", ["stage=c"], **USUAL).splitlines()
    program, *arguments = shlex.split(line)[3:]
    assert program == "wuerstchen_pl.sample"
    assert arguments == [f"model={RUN}", f"prompt={USUAL['caption']}"]


@pytest.mark.slow
def test_the_printed_commands_lead_from_stage_a_to_images(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Each stage runs with the arguments that the one before printed, and the test's sizes."""
    arguments = ["stage=a", f"paths.root={tmp_path}", "data.limit=24"]
    for stage in "abc":
        assert arguments[0] == f"stage={stage}"
        sizes = [a for a in small(stage, tmp_path) if a.split("=")[0] not in
                 [argument.split("=")[0] for argument in arguments]]  # fmt: skip
        assert run_program("train", [*arguments, *sizes]) == 0
        printed = capsys.readouterr().out
        command = re.findall("^next: (.*)$", printed, re.MULTILINE)[0]
        program, arguments = shlex.split(command)[2], shlex.split(command)[3:]
    assert program == "wuerstchen_pl.sample"
    folder = tmp_path / "samples"
    quick = [f"output_dir={folder}", "sample.prior_steps=1", "sample.decoder_steps=1"]
    assert run_program("sample", [*arguments, *quick]) == 0
    assert len(list(folder.glob("*.png"))) == 1


@pytest.mark.parametrize("stage", "ab")
def test_a_tuned_stage_has_no_next_one(stage: str) -> None:
    typed = [f"stage={stage}", "experiment=finetune", "init_from=model", "data.root=my/images"]
    assert describe_end(RUN, stage, typed, **USUAL) == ""
    assert "stage=c" in describe_end(RUN, "b", ["stage=b", "data.root=my/images"], **USUAL)
