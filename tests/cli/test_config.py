"""Config validation: every shipped combination is valid, and errors name the wrong key."""

import copy
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from tests.conftest import small
from wuerstchen_pl import convert, evaluate, export, sample, train
from wuerstchen_pl.cli.config import check_config, conf_dir, group_choices
from wuerstchen_pl.cli.errors import is_typo
from wuerstchen_pl.programs import base_model
from wuerstchen_pl.programs import train as train_program
from wuerstchen_pl.signatures import _locate, _matches, _objects, _parameters

CONF = Path(conf_dir())
NETWORKS = [
    (stage, preset)
    for preset in group_choices("preset")
    for stage in group_choices(f"preset/{preset}")
]
USUAL = {"data": "openmoji", "experiment": "null", "logger": "default", "trainer": "auto"}
CHOICES = [
    {"data": data, "experiment": experiment, "logger": logger, "trainer": trainer}
    for data, experiment, logger, trainer in product(
        group_choices("data"),
        ["null", *group_choices("experiment")],
        group_choices("logger"),
        group_choices("trainer"),
    )
    if experiment == "null" or data == "openmoji"  # an experiment sets its own data
]


def composed(*overrides: str, program: str = "train") -> DictConfig:
    """The config that a program gets from a command line, with mandatory values filled in."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    for key in OmegaConf.missing_keys(cfg):
        mandatory = {"weights", "urls", "root", "name", "sources", "captions", "text"}
        mandatory |= {"from", "to", "ckpt"} if program != "train" else set()
        name = key.rpartition(".")[2]
        assert name in mandatory, f"{key} has no default"
        OmegaConf.update(cfg, key, {} if name == "sources" else "given")
    return cfg


@pytest.fixture(scope="module")
def stage_a() -> DictConfig:
    return composed("stage=a")


@pytest.fixture
def cfg(stage_a: DictConfig) -> DictConfig:
    """A config of Stage A that a test may change."""
    return copy.deepcopy(stage_a)


# composing takes 0.1 s: the fast test covers the usual choices, and the slow test all combinations
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "preset"), NETWORKS)
def test_every_shipped_combination_has_only_used_keys(stage: str, preset: str, fast: bool) -> None:
    max_changed = 0 if fast else 4
    for chosen in CHOICES:
        changed = {group: name for group, name in chosen.items() if USUAL[group] != name}
        if len(changed) <= max_changed:
            overrides = [f"{group}={name}" for group, name in changed.items()]
            check_config(
                composed(f"stage={stage}", f"preset={preset}", *overrides), train.KNOWN_KEYS
            )


@pytest.mark.parametrize(
    ("program", "known_keys"),
    [
        ("sample", sample.KNOWN_KEYS),
        ("evaluate", evaluate.KNOWN_KEYS),
        ("convert", convert.KNOWN_KEYS),
        ("export", export.KNOWN_KEYS),
    ],
)
def test_the_other_programs_have_only_used_keys(program: str, known_keys: dict[str, Any]) -> None:
    cfg = composed(program=program)
    check_config(cfg, known_keys)
    assert known_keys.keys() == cfg.keys()


def test_every_key_of_train_is_used() -> None:
    source = "".join(Path(m.__file__).read_text() for m in (train_program, base_model))
    in_program = {f"{m}" for m in re.findall(r"cfg\.(paths\.\w+|\w+)", source)}
    in_yaml = {
        m for path in CONF.rglob("*.yaml") for m in re.findall(r"\$\{([\w.]+)\}", path.read_text())
    }
    assert train.KNOWN_KEYS.keys() - in_program - in_yaml == set()


@pytest.mark.parametrize("typed", ["widht", "wdth", "widthh", "wadth"])
def test_one_wrong_letter_is_a_typo(typed: str) -> None:
    assert is_typo(typed, "width")
    assert not is_typo(typed, "weight")
    assert not is_typo("width", "width")


@pytest.mark.parametrize("overrides", [("stage=a",), ("stage=b", "data=shards"), ("stage=c",)])
def test_no_argument_is_taken_for_a_typo_of_another_key(overrides: tuple[str, ...]) -> None:
    nodes = _objects(OmegaConf.to_container(composed(*overrides)))
    constructors = [(_locate(node["_target_"]), node) for _, node in nodes]
    pairs = [
        (argument, key)
        for constructor, node in constructors
        if constructor is not None
        for argument in _parameters(constructor)[0] - node.keys()
        for key in node
    ]
    assert len(pairs) > 300
    assert [pair for pair in pairs if is_typo(*pair)] == []


@pytest.mark.parametrize("program", [path.stem for path in CONF.glob("*.yaml")])
def test_no_group_hides_a_key(program: str) -> None:
    """Hydra reads ``name=value`` as a choice where a group ``name`` exists."""
    config = yaml.safe_load((CONF / f"{program}.yaml").read_text())
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = {str(key) for entry in config.get("defaults", ()) for key in entry}
    values = {key for key, value in config.items() if not isinstance(value, dict)}
    assert values & groups - chosen == set()


@pytest.mark.parametrize("group", ["experiment", "preset"])
def test_a_folder_of_stages_belongs_to_a_choice(group: str) -> None:
    folders = {path.name for path in (CONF / group).iterdir() if path.is_dir()}
    assert folders <= set(group_choices(group))
    stages = {stage for name in folders for stage in group_choices(f"{group}/{name}")}
    assert stages <= set(group_choices("stage"))


REFUSED = {
    "depht": ("stage.vqgan.depht", 3, "stage.vqgan.depht is not an argument of .*VQGAN"),
    "root": ("surplus", 1, "surplus is not used; remove it"),
    "path": ("paths.surplus", "x", "paths.surplus is not used"),
    "target": (
        "stage.ema._target_",
        "os.nothing",
        "stage.ema._target_=os.nothing cannot be imported or called",
    ),
    "module": (
        "stage.ema._target_",
        "os.path",
        "stage.ema._target_=os.path cannot be imported or called",
    ),
    "number": ("stage.ema._target_", 3, "stage.ema._target_=3 cannot be imported or called"),
    "trainer": (
        "trainer.max_stepss",
        3,
        "trainer.max_stepss is not an argument of lightning.Trainer",
    ),
    "kwargs": (
        "logger.tensorboard.save_dirr",
        "x",
        "logger.tensorboard.save_dirr is not an argument",
    ),
    "optimizer": ("stage.optimizer.momentum", 0.9, "stage.optimizer.momentum is not an argument"),
    "missing": ("data.batch_size", "???", "data.batch_size is missing; set data.batch_size="),
    "word": ("stage.vqgan.width", "wide", "stage.vqgan.width is 'wide', and must be int"),
    "fraction": ("stage.vqgan.width", 1.5, "stage.vqgan.width is 1.5, and must be int"),
    "truth": ("data.batch_size", True, "data.batch_size is True, and must be int"),
    "null": ("data.image_size", None, "data.image_size is null, and must be int"),
    "object": ("stage.ema", 3, "stage.ema is 3, and must be EMA"),
    "list": ("stage.optimizer.betas", [0.9, "x"], "stage.optimizer.betas is"),
    "choice": ("trainer.precision", "half", "trainer.precision is 'half'"),
    "seed": ("seed", "abc", "seed is 'abc', and must be int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_key_or_value_in_a_yaml_is_an_error_that_names_it(
    cfg: DictConfig, case: str
) -> None:
    key, value, message = REFUSED[case]
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ValueError, match=message):
        check_config(cfg, train.KNOWN_KEYS)


def test_a_missing_mandatory_key_is_named(cfg: DictConfig) -> None:
    with open_dict(cfg):
        del cfg.stage.vqgan
    with pytest.raises(ValueError, match=r"stage\.vqgan is missing, and .*StageA needs it"):
        check_config(cfg, train.KNOWN_KEYS)


def test_keyword_arguments_that_a_logger_forwards_are_accepted(cfg: DictConfig) -> None:
    OmegaConf.update(cfg, "logger.tensorboard.flush_secs", 5, force_add=True)
    check_config(cfg, train.KNOWN_KEYS)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True), (1.0, int, False), (True, int, False), (1, bool, False),
        (None, int | None, True), (None, int, False), ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False), ([1, None], list[int | None], True),
        ([1, "x"], tuple[int, ...], False), (3, list[int], False), ("x", Path, True),
        ({"_target_": "x"}, DictConfig, True), ("x", DictConfig, False), (3, Any, True),
    ],
)  # fmt: skip
def test_a_value_fits_its_annotation(value: object, hint: object, fits: bool) -> None:
    assert _matches(value, hint) is fits


COMMAND_LINES = {
    "no stage": ([], "stage is missing; choose stage=a or stage=b or stage=c"),
    "stage d": (["stage=d"], "stage=d is unknown; choose from a, b, c"),
    "stage 1": (["stage=1"], "stage=1 is unknown; choose from a, b, c"),
    "preset": (["stage=ldm", "preset=v1"], "no networks for stage=ldm; choose from paper, tiny"),
    "experiment": (["stage=a", "experiment=x"], "experiment=x is unknown; choose from baseline_"),
    "logger": (["stage=a", "logger=null"], "logger=null is unknown; choose from csv, default"),
    "root key": (["stage=a", "sede=1"], "sede is not a key; did you mean seed?"),
    "group": (["stage=a", "experimnt=demo"], "experimnt is not a key; did you mean experiment?"),
    "a folder as a group": (["stage=a", "paths=/x"], "paths=x is unknown; choose from default"),
    "key": (["stage=a", "stage.vqgan.widht=1"], "did you mean stage.vqgan.width?"),
    "not in YAML": (["stage=a", "trainer.benchmark=true"], "add it with +trainer.benchmark=..."),
    "nothing like it": (["stage=a", "zzz=1"], "zzz is not a key; remove it"),
    "added": (["stage=a", "+zzz=1"], "zzz is not used; remove it"),
    "word": (["stage=c", "stage.prior.depth=abc"], "stage.prior.depth is 'abc', and must be int"),
    "empty": (["stage=a", "trainer.max_steps="], "trainer.max_steps is '', and must be int"),
    "interpolation": (["stage=a", "image_size=${no}"], "image_size: Interpolation key 'no' not"),
    "grammar": (["stage=a", "name=a,b:]"], "'name=a,b:]' cannot be read; write key=value, and"),
    "size": (["stage=a", "image_size=8"], "data.image_size=8 pixels"),
    "swept stage": (["-m", "stage=a,b"], "cannot be swept; run once for each value"),
    "resume": (["stage=a", "ckpt=/no/such.ckpt"], "/no/such.ckpt does not exist"),
    "precision": (["stage=a", "trainer.precision=16-mixed"], "16-mixed overflows"),
}  # fmt: skip


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "outputs"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_wrong_command_line_ends_with_one_line(
    case: str, program: Any, capsys: pytest.CaptureFixture, nothing_written: Path
) -> None:
    arguments, message = COMMAND_LINES[case]
    assert program("train", *arguments, f"paths.root={nothing_written}") == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def test_a_size_that_the_stages_cannot_divide_is_refused_before_training(
    cascade: Path, program: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    valid = [*small("b", tmp_path), f"paths.stage_a={cascade / 'a'}"]
    wrong = ["image_size=24", "data.bucket_multiple=8", "stage.diffnext.patch_size=4"]
    assert program("train", *valid, *wrong) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "set data.bucket_multiple=" in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_of_a_users_own_yaml_is_refused(
    program: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "experiment" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("# @package _global_\n" + yaml.dump({"stage": {"vqgan": {"depht": 3}}}))
    arguments = ["--config-dir", str(tmp_path), "stage=a", "experiment=mine"]
    assert program("train", *arguments, f"paths.root={tmp_path / 'out'}") == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "stage.vqgan.depht" in stderr
    assert not (tmp_path / "out").exists()


WRONG_VALUES = {
    "sample.prior_timesteps": ("sample", ["prompt=a", "sample.prior_timesteps=[0.5,1]"]),
    "sample.guidance_interval": ("sample", ["prompt=a", "sample.guidance_interval=[0.5]"]),
    "clip.name": ("evaluate", ["metric=[clip]", "clip.name=x"]),
    "clip.weights": ("evaluate", ["metric=[clip]", "clip.weights=x"]),
    "fid_features.weights": ("evaluate", ["metric=[fid]", "fid_features.weights=x"]),
    "callbacks.checkpoints.every_steps": (
        "train",
        ["stage=a", "callbacks.checkpoints.keep=0", "data.limit=4"],
    ),
    "data.ratios": ("train", ["stage=a", "data.ratios=[-1]"]),
    "data.filters.max_ratio": ("train", ["stage=a", "data.filters.max_ratio=0.5"]),
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_an_error_names_a_key_of_the_config(
    key: str, program: Any, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    name, overrides = WRONG_VALUES[key]
    if name == "evaluate":  # of images that exist, as inputs are checked before networks are built
        prompts, images = tmp_path / "prompts.txt", tmp_path / "images"
        prompts.write_text("a\n" * 4)
        images.mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64)).save(images / f"{i}.png")
        inputs = [f"images={images}", f"prompts={prompts}"]
        inputs += [f"reference={images}"] * ("fid" in overrides[0])
        overrides = [*overrides, "model=null", *inputs]
    folder = "paths.root" if name == "train" else "output_dir"
    assert program(name, *overrides, f"{folder}={tmp_path / 'out'}") == 1
    printed = re.match(r"error: ([\w.]+)=", capsys.readouterr().err.splitlines()[-1])
    assert printed is not None
    config = composed(*overrides, program=name)
    assert OmegaConf.select(config, printed[1], throw_on_missing=False) is not None
    assert printed[1].rpartition(".")[0] == key.rpartition(".")[0]


@pytest.mark.parametrize(
    ("name", "key", "overrides"),
    [
        ("cache", "out", ["stage=c"]),
        ("train", "paths.output_dir", ["stage=a"]),
        ("sample", "output_dir", ["prompt=a"]),
    ],
)
def test_an_output_folder_in_the_way_is_named_by_its_key(
    name: str, key: str, overrides: list[str], program: Any, capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    assert program(name, *overrides, f"{key}={tmp_path / 'file'}") == 1
    assert f"error: {key}={tmp_path / 'file'} is not a folder" in capsys.readouterr().err
