"""The commands of the README and docs/ run, with few steps and small networks."""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_config import composed
from tests.conftest import run_program, small, what_cache_reads
from tests.data.factories import image, shards
from wuerstchen_pl import WuerstchenPipeline, evaluate, train
from wuerstchen_pl.cli.config import check_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs/data.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
FINETUNING = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")


def commands(name: str, text: str = README + DATA + EVALUATION) -> list[list[str]]:
    """The distinct arguments of every ``python -m wuerstchen_pl.<name>`` in the code blocks of
    documents; without those that tune a model, which ``finetuning_commands`` has."""
    return [one for one in all_commands(name, text) if not tunes(one)]


def finetuning_commands(name: str) -> list[list[str]]:
    """The commands of the README and docs/finetuning.md that tune a model, or use the result."""
    return [one for one in all_commands(name, README + FINETUNING) if tunes(one)]


def all_commands(name: str, text: str) -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = [shlex.split(line) for line in blocks.splitlines() if line.startswith("python -m")]
    matches = [line[3:] for line in lines if line[2] == f"wuerstchen_pl.{name}"]
    return [one for i, one in enumerate(matches) if one not in matches[:i]]


def tunes(arguments: list[str]) -> bool:
    names = ("style", "rex", "edges", "outputs/fast")
    return any(a.startswith("init_from=") or any(n in a for n in names) for a in arguments)


def test_the_readme_is_short_and_has_every_command() -> None:
    assert len(README.splitlines()) <= 200
    assert len(commands("train")) >= 6
    assert commands("sample")
    assert commands("evaluate")


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    assert targets >= {"demo", "test", "help"}
    assert not [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]


def test_paths_in_the_readme_exist() -> None:
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    assert not [path for path in links if not (ROOT / path.partition("#")[0]).exists()]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The working directory, with the images that the README's commands use."""
    (tmp_path / "my/images").mkdir(parents=True)
    for i in range(12):
        (tmp_path / f"my/images/{i}.jpg").write_bytes(image(str(i), 64 + i, 64))
        (tmp_path / f"my/images/{i}.txt").write_text(f"number {i}")
    return tmp_path


def with_local_data(arguments: list[str], workdir: Path) -> list[str]:
    """Create the data of a command, and replace a dataset on the Hub with a local one."""
    if "data=shards" in arguments:
        folder = "my/shards" if "data.urls=my/shards" in arguments else "shards"
        shards(workdir / folder, 10, 2)
    if "data=cached" in arguments:
        return [*arguments, "data.num_workers=0"]
    if "data.mask=file" in arguments:
        for i in range(6):
            (workdir / f"my/images/{i}.mask.png").write_bytes(image("mask", kind="PNG"))
    if "data=hf" in arguments:
        datasets = pytest.importorskip("datasets", reason="extra: hf")
        images = {"image": [str(p) for p in sorted((workdir / "my/images").glob("*.jpg"))]}
        table = datasets.Dataset.from_dict({**images, "text": ["a"] * 12})
        table = table.cast_column("image", datasets.Image())
        datasets.DatasetDict(train=table).save_to_disk(str(workdir / "saved"))
        arguments = [a for a in arguments if not a.startswith("data.name=")]
        arguments.append(f"data.name={workdir / 'saved'}")
    return [*arguments, "data.num_workers=0", "data.max_upscale=null"]


@pytest.mark.slow
def test_the_commands_that_tune_a_model_run_one_after_the_other(
    cascade: Path, workdir: Path
) -> None:
    few = ["trainer.max_steps=2", "trainer.accelerator=cpu", "callbacks.sample_grids=null"]
    few += ["callbacks.loss_by_timestep=null", "data.val_fraction=0.2", "logger=csv"]
    base = {"init_from": cascade / "c", "compressor": cascade / "c", "decoder": cascade / "c"}

    def local(arguments: list[str]) -> list[str]:
        pairs = [a.partition("=")[::2] for a in arguments]
        return [f"{key}={base.get(key, value)}" for key, value in pairs]

    trained = [one for one in finetuning_commands("train") if "dry_run=true" not in one]
    exported, sampled = finetuning_commands("export"), finetuning_commands("sample")
    assert [len(group) for group in (trained, exported, sampled)] == [6, 6, 5]
    for arguments in trained:
        arguments = with_local_data(local(arguments), workdir)
        assert run_program("train", [*arguments, *few]) == 0
    for number, arguments in enumerate(exported):
        to = next(a for a in arguments if a.startswith("to="))
        arguments = [a for a in arguments if a != to]
        assert run_program("export", [*arguments, f"to=models/{number}"]) == 0
        if not (workdir / to[3:]).exists():
            (workdir / "models" / str(number)).rename(workdir / to[3:])
    for arguments in sampled:
        arguments = [a.replace("outputs/mine/c", str(cascade / "c")) for a in arguments]
        steps = ["sample.prior_steps=1", "sample.decoder_steps=1"]
        assert run_program("sample", [*arguments, *steps]) == 0
    assert (workdir / "style/pytorch_lora_weights.safetensors").is_file()
    assert (workdir / "rex/learned_embeds.safetensors").is_file()
    assert (workdir / "edges/controlnet.safetensors").is_file()


ON_GPUS = [c for c in commands("train") if "trainer=fsdp_a100" in c]
ON_ONE = [one for c in commands("train") if c not in ON_GPUS for one in train.for_each_stage(c)]


def long_ones_slow(all_arguments: list[list[str]]) -> list[Any]:
    """Parameters of a test, of which some are slow; a fast test checks the keys of all.

    These are the sweeps, and all but the first command with a choice of data and experiment.
    """
    parameters, chosen = [], set()
    for arguments in all_arguments:
        choice = frozenset(a for a in arguments if a.startswith(("data=", "experiment=")))
        is_slow = "-m" in arguments or (choice in chosen and len(choice) > 0)
        chosen.add(choice)
        marks = [pytest.mark.slow] * is_slow
        parameters.append(pytest.param(arguments, id=" ".join(arguments)[:60], marks=marks))
    return parameters


@pytest.mark.parametrize("arguments", long_ones_slow(ON_ONE))
def test_training_commands(arguments: list[str], cascade: Path, workdir: Path) -> None:
    stage = next(a.partition("=")[2] for a in arguments if a.startswith("stage="))
    if "hydra/sweeper=optuna" in arguments:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="extra: sweep")
        arguments = [a.replace("n_trials=4", "n_trials=1") for a in arguments]
    arguments = [a for a in arguments if not a.startswith("trainer.max_steps=")]
    shrink = [a for a in small(stage, workdir, steps=2) if a.split("=")[0] not in keys(arguments)]
    if "preset=tiny_v1" in arguments:
        shrink = [a for a in shrink if not a.startswith("stage.diffnext")]
        shrink += ["stage.paella.codebook_size=16"] if stage == "b" else []
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    if "data=cached" in arguments:
        cache = what_cache_reads(small("c", workdir, 2))
        assert run_program("cache", [*cache, *stage_paths, "out=outputs/cache"]) == 0
        shrink = [a for a in shrink if not a.startswith(("data.limit", "data.val_fraction"))]
    elif any(a.startswith("data=") for a in arguments):
        shrink = [a for a in shrink if not a.startswith("data.limit")]
        arguments = with_local_data(arguments, workdir)
    before = set(workdir.rglob("*.ckpt"))
    assert run_program("train", [*arguments, *shrink, *stage_paths]) == 0
    assert set(workdir.rglob("step0000002.ckpt")) > before


def swept(arguments: list[str]) -> Iterator[list[str]]:
    """Command lines of a sweep that have each value, without the keys of a launcher."""
    overrides = [a for a in arguments if a != "-m" and not a.startswith("hydra/launcher")]
    choices = [
        [f"{key}={value}" for value in values.split(",")] if "," in values else [f"{key}={values}"]
        for key, _, values in (a.partition("=") for a in overrides)
    ]
    for i in range(max(map(len, choices))):
        yield [values[i % len(values)] for values in choices]


def on_several_devices() -> list[list[str]]:
    """The training commands of the README and docs/training.md that need several devices."""
    lines = re.findall(r"^(?:torchrun .*|python) -m wuerstchen_pl\.train (.*)$", TRAINING, re.M)
    all_arguments = [*ON_GPUS, *map(shlex.split, lines)]
    by_stage = [one for arguments in all_arguments for one in train.for_each_stage(arguments)]
    singles = [one for arguments in by_stage for one in swept(arguments)]
    return [one for i, one in enumerate(singles) if one not in singles[:i]]


@pytest.mark.parametrize("arguments", on_several_devices(), ids=lambda a: " ".join(a)[:60])
def test_commands_for_several_devices_have_only_used_keys(arguments: list[str]) -> None:
    check_config(composed(*arguments), train.KNOWN_KEYS)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_commands_have_only_used_keys(name: str) -> None:
    known_keys = {"train": train, "evaluate": evaluate}[name].KNOWN_KEYS
    of_one_process = ON_ONE if name == "train" else commands(name)
    assert sum("-m" in arguments for arguments in of_one_process) >= 2
    for arguments in of_one_process:
        for one in swept([a for a in arguments if not re.match(r"hydra|.*[(\[]", a)]):
            check_config(composed(*one, program=name), known_keys)


@pytest.mark.slow
def test_the_papers_phases_run_with_one_command(cascade: Path, workdir: Path) -> None:
    command = next(c for c in ON_GPUS if any("paper_c_4" in a for a in c))
    shards(workdir / "tars", 2, 8)
    command = [a for a in command if not a.startswith(("data.urls", "trainer="))]
    shrink = [a for a in small("c", workdir, steps=2) if not a.startswith(("stage=", "data."))]
    data = [f"data.urls={workdir / 'tars'}", "data.val_fraction=0.5", "data.num_workers=0"]
    data += ["data.max_upscale=null", "data.batch_size=2", "global_batch=2", "image_size_at_12=64"]
    data += [
        "image_size_at_24=96",
        "data.bucket_multiple=16",
        "trainer.precision=32-true",
        "preset=tiny",
    ]
    data += [f"data.filters.{key}=null" for key in ("min_size", "min_aesthetic")]
    data += [f"data.filters.{key}=null" for key in ("max_pwatermark", "max_punsafe")]
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    command += [*shrink, *data, *stage_paths, "callbacks.sample_grids=null"]
    assert run_program("train", command) == 0
    for phase in range(1, 5):
        assert (workdir / f"paper_c_{phase}/c/checkpoints/step0000002.ckpt").is_file()


@pytest.mark.parametrize("arguments", finetuning_commands("train"), ids=lambda a: " ".join(a)[:60])
def test_the_commands_that_tune_a_model_have_only_used_keys(arguments: list[str]) -> None:
    check_config(composed(*arguments), train.KNOWN_KEYS)


def test_the_papers_phases_are_one_command() -> None:
    phases = [a for a in on_several_devices() if any("experiment=paper_c" in x for x in a)]
    names = {next(x for x in a if x.startswith("experiment=")) for a in phases}
    assert names == {f"experiment=paper_c_{n}" for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("arguments", commands("data"), ids=lambda a: " ".join(a)[:60])
def test_data_commands(arguments: list[str], workdir: Path) -> None:
    fast = ["image_size=64"] + (["num_workers=0"] if arguments[0] == "build" else [])
    assert run_program("data", [*arguments, *fast]) == 0
    to = next((a[3:] for a in arguments if a.startswith("to=")), "")
    written = "outputs/check/sizes.png" if arguments[0] == "check" else f"{to}/shards.json"
    assert (workdir / written).is_file()


@pytest.mark.parametrize("arguments", commands("cache"), ids=lambda a: " ".join(a)[:60])
def test_caching_commands(arguments: list[str], cascade: Path, workdir: Path) -> None:
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    shrink = [a for a in small("c", workdir, 2) if a.split("=")[0] not in keys(arguments)]
    assert run_program("cache", [*arguments, *what_cache_reads(shrink), *stage_paths]) == 0
    assert (workdir / "outputs/cache/cache.json").is_file()


def keys(arguments: list[str]) -> set[str]:
    """The keys that a command line sets."""
    return {a.split("=")[0] for a in arguments}


@pytest.mark.parametrize("arguments", commands("sample"), ids=lambda a: " ".join(a)[:60])
def test_sampling_commands(arguments: list[str], cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red heart\na blue bird\n")
    arguments = [a for a in arguments if not a.startswith("model=")]
    fewer = ["sample.decoder_steps=1"]
    if "sample.prior_steps" not in keys(arguments):
        fewer.append("sample.prior_steps=2")
    assert run_program("sample", [*arguments, *fewer, f"model={cascade / 'c'}"]) == 0
    assert list((tmp_path / "outputs/samples").glob("0000-*.png"))


TO_DOWNLOAD = [c for c in commands("evaluate") if "metric=[fid,is,clip,pickscore]" in c]
"""The paper's protocol, which needs COCO and three downloaded networks."""


@pytest.mark.parametrize(
    "arguments", long_ones_slow([c for c in commands("evaluate") if c not in TO_DOWNLOAD])
)
def test_evaluation_commands(arguments: list[str], cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red heart\na blue bird\n")
    if "images=outputs/demo/evaluation/images" in arguments:
        images = tmp_path / "outputs/demo/evaluation/images"
        images.mkdir(parents=True)
        for i in range(8):
            (images / f"{i}.png").write_bytes(image(str(i), 64, 64))
    arguments = [a for a in arguments if not a.startswith(("num_prompts=", "output_dir="))]
    arguments = [re.sub(r"=(\w+),[\w,]+,(\w+)$", r"=\1,\2", a) for a in arguments]  # the ends
    arguments = [re.sub(r"steps=\d+,\d+$", "steps=2,3", a) for a in arguments]
    arguments = [re.sub(r"outputs/\w+/(c|ldm)\b", str(cascade / "c"), a) for a in arguments]
    fast = ["num_prompts=6", "sample.decoder_steps=1", "fid_features.widths=[2,2]"]
    fast = fast if "fid_features=random" in arguments else fast[:2]
    fast += [] if "model" in keys(arguments) else [f"model={cascade / 'c'}"]
    fast += [] if "sample.prior_steps" in keys(arguments) else ["sample.prior_steps=2"]
    if "images" in keys(arguments):  # nothing is generated
        fast = [a for a in fast if not a.startswith("sample.")]
    assert run_program("evaluate", [*arguments, *fast, "output_dir=out"]) == 0
    runs = math.prod(a.count(",") + 1 for a in arguments if "=[" not in a)
    assert len(list(Path("out").rglob("metrics.json"))) == runs


def test_the_papers_protocol_has_only_used_keys() -> None:
    (command,) = TO_DOWNLOAD
    check_config(composed(*command, program="evaluate"), evaluate.KNOWN_KEYS)


@pytest.fixture(scope="module")
def exported(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "mine"
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={path}"]) == 0
    return path


@pytest.mark.parametrize("arguments", commands("export") + commands("convert"))
def test_exporting_and_converting_commands(
    arguments: list[str], exported: Path, cascade: Path, tmp_path: Path
) -> None:
    settings = [a for a in arguments if not a.startswith(("ckpt=", "from=", "to="))]
    to = f"to={tmp_path / 'written'}"
    if arguments in commands("export"):
        assert run_program("export", [*settings, f"ckpt={cascade / 'c'}", to]) == 0
    else:
        assert run_program("convert", [*settings, f"from={exported}", to]) == 0
    assert (tmp_path / "written" / "wuerstchen_pl.json").is_file()


def test_the_readmes_python_runs(cascade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small cascade instead of the published one, and on the CPU."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    from_pretrained = WuerstchenPipeline.from_pretrained
    requested: list[tuple[str, ...]] = []

    def load_small(path: str, prior: str | None = None) -> WuerstchenPipeline:
        requested.append((path, prior or ""))
        return from_pretrained(cascade / "c")

    monkeypatch.setattr(WuerstchenPipeline, "from_pretrained", load_small)
    names: dict[str, Any] = {}
    small_code = code.replace('"cuda", torch.bfloat16', "torch.bfloat16").replace(
        "1024, 1536", "64, 96"
    )
    exec(small_code, names)
    assert requested == [
        ("warp-ai/wuerstchen", "warp-ai/wuerstchen-prior"),
        ("outputs/demo/c", ""),
    ]
    sizes = {name: names[name].size for name in ("image", "again", "green", "other", "inpainted")}
    assert set(sizes.values()) == {(64, 64)}
