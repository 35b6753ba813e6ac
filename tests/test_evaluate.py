"""The evaluation command: generation, resumption, scores, reports and errors."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import run_program, small
from wuerstchen_pl.evaluation import generation
from wuerstchen_pl.evaluation.datasets import DatasetImages, run_data
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.clip import pickscore
from wuerstchen_pl.evaluation.metrics.distances import FrechetDistance
from wuerstchen_pl.evaluation.metrics.feature_networks import RandomConvFeatures, batched
from wuerstchen_pl.io.images import to_float
from wuerstchen_pl.pipelines.generate import autoencode
from wuerstchen_pl.pipelines.loading import load_pipeline
from wuerstchen_pl.sampling.config import SamplingConfig

ROOT = Path(__file__).parents[1]


def fast(*overrides: str) -> list[str]:
    """Small settings, without those that ``evaluate`` refuses since nothing would read them."""
    metrics = {m for o in overrides if o.startswith("metric=") for m in re.findall(r"\w+", o[7:])}
    settings = []
    if not any(o.startswith("images=") for o in overrides) and metrics != {"validation_loss"}:
        settings += ["sample.prior_steps=2", "sample.decoder_steps=1"]
    if metrics & {"fid", "kid", "is", "rfid"}:
        settings += ["fid_features=random", "fid_features.widths=[2,2]"]
    return settings


def arguments(cascade: Path, folder: Path, *more: str) -> list[str]:
    paths = [f"model={cascade / 'c'}", f"output_dir={folder}", f"cache_dir={folder}/kept"]
    return [*paths, *fast(*more), *more]


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def assert_close(actual: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Scores agree up to the effect of different rounding of pixels."""
    assert actual.keys() == expected.keys()
    for name, score in expected.items():
        for key in ("value", "low", "high"):
            assert actual[name][key] == pytest.approx(score[key], rel=2e-3), name


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel in the format of PickScore."""
    transformers = pytest.importorskip("transformers", reason="writes a CLIPModel")
    torch.manual_seed(0)
    shared = {"intermediate_size": 32, "num_attention_heads": 2, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(
        text_config={**shared, "hidden_size": 16, "num_hidden_layers": 1, "eos_token_id": 49407},
        vision_config={**shared, "hidden_size": 16, "num_hidden_layers": 1, "image_size": 32,
                       "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("judge")
    transformers.CLIPModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("red heart\nblue bird\ngreen frog\nblack cat\nwhite dog\nold tree\n")
    return path


@pytest.fixture(scope="module")
def evaluated(
    cascade: Path, judge: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A report of six images with FID, KID and PickScore of small networks."""
    folder = tmp_path_factory.mktemp("evaluated")
    more = ["metric=[fid,kid,pickscore]", f"pickscore.weights={judge}", f"prompts={prompts}"]
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 0
    return folder


def test_images_are_named_by_prompt_and_seed(evaluated: Path) -> None:
    names = [path.name for path in sorted((evaluated / "images").glob("*.png"))]
    assert names == [f"{i:06d}-{i}.png" for i in range(6)]


def test_the_report_has_intervals_counts_versions_and_hashes(
    evaluated: Path, judge: Path, cascade: Path
) -> None:
    report = json.loads((evaluated / "metrics.json").read_text())
    assert report["metrics"].keys() == {"fd_random", "kd_random", "pickscore"}  # no FID
    for score in report["metrics"].values():
        assert score["low"] <= score["value"] <= score["high"]
        assert score["number"] == 6
    assert report["metrics"]["fd_random"]["reference"] == len(
        list(DatasetImages(run_data(cascade / "c")))
    )
    assert report["format"] == "PNG"
    assert "bicubic" in report["resized_by"]
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(report["weights_sha256"]) == 64
    weights = report["metrics"]["pickscore"]["weights_sha256"]
    assert weights == pickscore(weights=str(judge)).weights_sha256
    assert report["settings"]["prior_steps"] == 2


def test_the_report_lists_all_scores_and_shows_the_extremes(evaluated: Path) -> None:
    with (evaluated / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["pickscore"]) for row in rows]
    assert [row["prompt"] for row in rows][:2] == ["red heart", "blue bird"]
    assert sum(scores) / 6 == pytest.approx(read_scores(evaluated)["pickscore"]["value"])
    page = (evaluated / "index.html").read_text()
    images, best, worst, *_ = page.split("<h2>")[1:]
    assert images.count("<figure") == 6
    for part, extreme in ((best, max(scores)), (worst, min(scores))):
        first = re.search(r'src="([^"]+)".*?<br>([-0-9.e]+)<', part)
        assert first is not None
        assert float(first[2]) == pytest.approx(extreme, rel=1e-3)
        assert (evaluated / first[1]).is_file()


def test_only_missing_images_are_generated_again(
    evaluated: Path, cascade: Path, judge: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(evaluated, folder)
    (folder / "metrics.json").unlink()
    removed, *kept = sorted((folder / "images").glob("*.png"))
    before, times = pixels(removed), [path.stat().st_mtime_ns for path in kept]
    removed.unlink()
    more = ["metric=[pickscore,fid,kid]", f"pickscore.weights={judge}", f"prompts={prompts}"]
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 0
    assert np.abs(pixels(removed) - before).max() <= 1  # a batch of one rounds differently
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert_close(read_scores(folder), read_scores(evaluated))


def test_two_processes_and_small_batches_give_the_same_scores(
    evaluated: Path, cascade: Path, judge: Path, prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Processes only share a folder, so the test can run them one after the other."""
    more = ["metric=[fid,kid,pickscore]", f"pickscore.weights={judge}", f"prompts={prompts}"]
    more.append("sample.batch_size=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run_program("evaluate", arguments(cascade, tmp_path, *more)) == 0
        assert (tmp_path / "metrics.json").is_file() == (rank == "0")
    assert_close(read_scores(tmp_path), read_scores(evaluated))


@pytest.mark.slow
def test_two_processes_of_torchrun(cascade: Path, prompts: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "wuerstchen_pl.evaluate"]
    overrides = arguments(cascade, tmp_path, "metric=[kid]", f"prompts={prompts}", "device=cpu")
    done = subprocess.run(
        [*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_scores(tmp_path)["kd_random"]["number"] == 6


def test_images_tie_with_themselves(evaluated: Path, judge: Path, tmp_path: Path) -> None:
    images = evaluated / "images"
    other = tmp_path / "other"
    shutil.copytree(images, other)
    Image.new("RGB", (64, 64), "red").save(other / "000000-0.png")
    overrides = [
        f"images={images}",
        "metric=[pickscore]",
        f"pickscore.weights={judge}",
        "model=null",
    ]
    overrides += [f"output_dir={tmp_path / 'report'}", f"baselines=[{images},{other}]"]
    assert run_program("evaluate", overrides) == 0
    scores = read_scores(tmp_path / "report")
    itself = scores["win_rate/images"]
    assert (itself["value"], itself["won"], itself["tied"], itself["lost"]) == (0.5, 0, 6, 0)
    assert scores["win_rate/other"]["tied"] == 5
    assert scores["win_rate/other"]["value"] in (5 / 12, 7 / 12)
    assert scores["pickscore"]["value"] == pytest.approx(
        read_scores(evaluated)["pickscore"]["value"]
    )


def test_features_of_a_reference_folder_are_cached_until_it_changes(
    evaluated: Path, cascade: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(evaluated / "images", reference)
    overrides = [f"images={evaluated / 'images'}", "metric=[fid]", f"reference={reference}"]
    overrides += fast(*overrides)
    overrides += [f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'kept'}", "prompts=data"]
    assert run_program("evaluate", overrides) == 0
    assert read_scores(tmp_path)["fd_random"]["value"] == pytest.approx(0, abs=1e-6)
    assert run_program("evaluate", overrides) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
    Image.new("RGB", (64, 64), "red").save(reference / "000000-0.png")
    assert run_program("evaluate", overrides) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert read_scores(tmp_path)["fd_random"]["value"] > 1e-4


@pytest.mark.parametrize("name", ["settings", "prompts"])
def test_images_of_other_settings_or_prompts_are_not_mixed(
    name: str, evaluated: Path, cascade: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    more = ["metric=[kid]", f"prompts={prompts}"]
    more.append("sample.prior_guidance_scale=2" if name == "settings" else "num_prompts=4")
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 1
    other = "prior_guidance_scale=4.0, but now it is 2" if name == "settings" else "prompts=["
    assert f"images was begun with {other}" in capsys.readouterr().err
    assert len(list((folder / "images").glob("*.png"))) == 6


def test_a_damaged_image_is_named_and_the_other_ones_are_kept(
    evaluated: Path, cascade: Path, judge: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    broken = folder / "images/000003-3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    more = ["metric=[fid]", f"prompts={prompts}"]
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 1
    error = capsys.readouterr().err
    assert "000003-3.png is damaged" in error
    assert "if it was generated here, remove it and run the command again" in error
    broken.unlink()
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 0
    assert read_scores(folder)["fd_random"] == read_scores(evaluated)["fd_random"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["metric=[fid]", "fid_features.widths=[16,24,32]"], "metric=fid needs at least 73 images"),
        (["metric=[is]"], "metric=is needs Inception's classes; set fid_features=inception"),
        (["metric=[fid,bleu]"], "is unknown; choose from fid, kid, is, clip, pickscore"),
        (["metric=[fid]", "num_prompts=0"], "num_prompts=0 is out of range; use 1 or more"),
        (["metric=[retrieval]"], "use prompts=data"),
        (["metric=[fid]", "baselines=[x]"], "baselines= are compared by PickScore"),
        (["metric=[fid]", "images=nowhere"], "images=nowhere contains no images"),
        (["metric=[fid]", "reference=nowhere"], "reference=nowhere contains no images"),
        (
            ["metric=[pickscore]", "pickscore.weights=nowhere"],
            "pickscore.weights=nowhere is not a folder",
        ),
        (
            ["metric=[clip]", "clip.weights=nowhere"],
            "clip.weights=nowhere is neither a file nor a tag of",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_that_cannot_be_measured_are_rejected(
    more: list[str], message: str, evaluated: Path, cascade: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    overrides = arguments(cascade, folder, f"prompts={prompts}", *more)
    assert run_program("evaluate", overrides) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert len(list((folder / "images").glob("*.png"))) == 6


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the networks and layers that are built during a test."""
    names: list[str] = []
    initialize = nn.Module.__init__

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        names.append(type(module).__name__)
        initialize(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", spy)
    return names


def of_black_images(cascade: Path, prompts: Path, folder: Path) -> list[str]:
    """A command of which only the weights of the judge are missing."""
    for number in range(6):
        Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
    right = ["metric=[fid,pickscore]", f"prompts={prompts}", f"reference={folder}"]
    right += ["pickscore.weights=nowhere", f"output_dir={folder / 'report'}"]
    return [*right, f"model={cascade / 'c'}", *fast(*right)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["reference=nowhere"], "reference=nowhere contains no images"),
        (["images=nowhere"], "images=nowhere contains no images"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt is not a file"),
        (["baselines=[nowhere]"], "baselines=nowhere contains no images"),
        (["metric=[fid,bleu]"], "is unknown; choose from"),
        (["model=nowhere/b", "prompts=data"], "model=nowhere/b is not a run"),
        (["model={cascade}/b"], "is a run of Stage B"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_inputs_are_checked_before_any_network_is_built(
    wrong: list[str], message: str, cascade: Path, prompts: Path, tmp_path: Path,
    built: list[str], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    right = of_black_images(cascade, prompts, tmp_path)
    wrong_keys = {key.partition("=")[0] for key in wrong}
    overrides = [key for key in right if key.partition("=")[0] not in wrong_keys]
    overrides += [key.format(cascade=cascade) for key in wrong]
    if "images" in wrong_keys:
        overrides = [key for key in overrides if not key.startswith("sample.")]
    assert run_program("evaluate", overrides) == 1
    assert message in capsys.readouterr().err
    assert built == []
    assert not (tmp_path / "report").exists()


def test_networks_are_built_once_the_inputs_are_right(
    cascade: Path, prompts: Path, tmp_path: Path, built: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert run_program("evaluate", of_black_images(cascade, prompts, tmp_path)) == 1
    assert "pickscore.weights=nowhere is not a folder" in capsys.readouterr().err
    assert "RandomConvFeatures" in built


def test_folders_that_do_not_match_are_rejected(
    evaluated: Path, judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images, fewer = evaluated / "images", tmp_path / "fewer"
    shutil.copytree(images, fewer)
    (fewer / "000005-5.png").unlink()
    (fewer / "images.json").unlink()
    overrides = ["metric=[pickscore]", f"pickscore.weights={judge}", f"output_dir={tmp_path}"]
    overrides += ["model=null"]
    assert run_program("evaluate", [*overrides, f"images={images}", f"baselines=[{fewer}]"]) == 1
    assert "contains 5 images, but there are 6 to compare with" in capsys.readouterr().err
    assert run_program("evaluate", [*overrides, f"images={fewer}"]) == 1
    assert "set prompts= to a file of prompts" in capsys.readouterr().err
    assert run_program("evaluate", [*overrides, f"images={fewer}", f"prompts={prompts}"]) == 1
    assert "contains 5 images for 6 prompts" in capsys.readouterr().err
    shutil.copytree(images, tmp_path / "mismatch")
    manifest = json.loads((images / "images.json").read_text())
    manifest["prompts"][2] = "green toad"
    (tmp_path / "mismatch/images.json").write_text(json.dumps(manifest))
    overrides.append(f"baselines=[{tmp_path / 'mismatch'}]")
    assert run_program("evaluate", [*overrides, f"images={images}"]) == 1
    assert "was generated for 'green toad', but" in capsys.readouterr().err


def test_images_of_several_sizes_cause_a_warning(evaluated: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(evaluated / "images", mixed)
    Image.new("RGB", (96, 48), "red").save(mixed / "000000-0.png")
    overrides = [f"images={mixed}", "metric=[fid]", f"reference={mixed}", "model=null"]
    overrides += fast(*overrides)
    with pytest.warns(
        UserWarning, match="contains images of 2 sizes, such as 48 x 96 and 64 x 64 px"
    ):
        assert (
            run_program("evaluate", [*overrides, f"output_dir={tmp_path}", "cache_dir=null"]) == 0
        )


def test_rank_0_does_not_wait_forever_for_stopped_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "STALL_TIMEOUT_S", 0.3)
    (tmp_path / "a.png").touch()
    with pytest.raises(TimeoutError, match="lacks 1 image that other processes should have"):
        generation._wait_for([tmp_path / "a.png", tmp_path / "b.png"])


def test_validation_losses_equal_those_of_training(cascade: Path, tmp_path: Path) -> None:
    """The loss equals the last one logged in training; the bins over t average to it."""
    root = tmp_path / "runs"
    for stage in "bc":
        above = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
        more = ["trainer=cpu", f"paths.data={cascade.parent / 'data'}"]
        if stage == "c":
            above[1] = f"paths.stage_b={root / 'default/b'}"
        assert run_program("train", [*small(stage, root), *above, *more]) == 0
    overrides = [
        f"model={root / 'default/c'}",
        f"output_dir={tmp_path}",
        "metric=[validation_loss]",
    ]
    assert run_program("evaluate", overrides) == 0
    scores = read_scores(tmp_path)
    for stage in "bc":
        log = (root / f"default/{stage}/metrics.csv").read_text().splitlines()
        logged = [float(line.split(",")[2]) for line in log if ",val/loss," in line]
        assert scores[f"stage_{stage}/loss"]["value"] == pytest.approx(logged[-1], rel=1e-5)
        bins = {k: v for k, v in scores.items() if k.startswith(f"stage_{stage}/loss_t")}
        total = sum(v["value"] * v["number"] for v in bins.values())
        number = sum(v["number"] for v in bins.values())
        assert number == 4 * scores[f"stage_{stage}/loss"]["number"]
        assert total / number == pytest.approx(logged[-1], rel=1e-4)
    for split, suffix in (("val", ""), ("train", "_train")):
        with (tmp_path / f"{split}_losses.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in (f"stage_b{suffix}/loss", f"stage_c{suffix}/loss"):
            mean = sum(float(row[name]) for row in rows) / len(rows)
            assert scores[name]["value"] == pytest.approx(mean, rel=1e-5)
    assert run_program("evaluate", arguments(cascade, tmp_path, "metric=[retrieval]")) == 0
    assert not list(tmp_path.glob("*_losses.csv"))  # of the earlier evaluation


@pytest.mark.slow
def test_a_yaml_selects_other_data(cascade: Path, tmp_path: Path) -> None:
    """Prompts and reference of a YAML: here another config of the model's own data."""
    overrides = ["metric=[kid]", "num_prompts=4"]
    yaml = cascade / "a/config.yaml"
    other = [f"prompts={yaml}", f"reference={yaml}"]
    for name, more in (("default", []), ("other", other)):
        assert (
            run_program("evaluate", [*arguments(cascade, tmp_path / name, *overrides), *more]) == 0
        )
    default, named = (read_scores(tmp_path / name)["kd_random"] for name in ("default", "other"))
    assert default == named
    sizes = {pixels(path).shape for path in (tmp_path / "other/images").glob("*.png")}
    assert len(sizes) > 1


def test_retrieval_by_the_captions_of_other_data(cascade: Path, tmp_path: Path) -> None:
    """Images of other captions are searched among the images that have these captions."""
    (tmp_path / "other").mkdir()
    for name, gray in (("black", 0), ("white", 255)):
        Image.new("RGB", (64, 64), (gray, gray, gray)).save(tmp_path / f"other/{name}.png")
        (tmp_path / f"other/{name}.txt").write_text(f"{name} square")
    target = "wuerstchen_pl.data.factories.folder"
    yaml = {"_target_": target, "root": str(tmp_path / "other"), "image_size": 64, "batch_size": 2}
    yaml |= {"val_fraction": 0.0, "num_workers": 0}
    (tmp_path / "other.yaml").write_text(json.dumps(yaml))
    more = ["metric=[retrieval]", f"prompts={tmp_path / 'other.yaml'}"]
    assert run_program("evaluate", [*arguments(cascade, tmp_path / "out"), *more]) == 0
    prompts = json.loads((tmp_path / "out/images/images.json").read_text())["prompts"]
    assert sorted(prompts) == ["black square", "white square"]
    scores = read_scores(tmp_path / "out")
    means = [pixels(tmp_path / f"out/images/{i:06d}-{i}.png").mean() for i in range(2)]
    right = [
        (mean > 127.5) == (prompt == "white square")
        for mean, prompt in zip(means, prompts, strict=True)
    ]
    assert scores["retrieval/top1"]["value"] == sum(right) / 2
    assert scores["retrieval/top1"]["chance"] == 0.5


def test_a_yaml_without_a_data_module_is_rejected(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other.yaml").write_text("_target_: os.getcwd\n")
    overrides = arguments(cascade, tmp_path / "report", "metric=[kid]", "num_prompts=2")
    assert run_program("evaluate", [*overrides, f"prompts={tmp_path / 'other.yaml'}"]) == 1
    assert "os.getcwd" in capsys.readouterr().err


def test_shares_do_not_depend_on_which_process_starts_first(
    evaluated: Path, cascade: Path, tmp_path: Path
) -> None:
    """Images are split by index, even if rank 0 has already generated some of them."""
    manifest = json.loads((evaluated / "images/images.json").read_text())
    rows = zip(manifest["prompts"], manifest["seeds"], manifest["sizes"], strict=True)
    requests = [generation.GenerationRequest(prompt, seed, *size) for prompt, seed, size in rows]
    pipeline = load_pipeline(str(cascade / "c"), device="cpu")
    settings = SamplingConfig(prior_steps=1, decoder_steps=1)
    second = generation.DistInfo(rank=1, world_size=2)
    generation.generate_into(tmp_path, requests, pipeline, settings, {}, second)  # claims it
    for path in tmp_path.glob("*.png"):
        path.unlink()
    (tmp_path / "000000-0.png").touch()  # of rank 0
    generation.generate_into(tmp_path, requests, pipeline, settings, {}, second)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"000000-0.png", "000001-1.png", "000003-3.png", "000005-5.png"}


def test_a_run_without_images_does_not_claim_the_folder(
    cascade: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = arguments(cascade, tmp_path, "metric=[kid]", f"prompts={prompts}")
    assert run_program("evaluate", [*overrides, "height=10", "width=10"]) == 1
    assert "height=10 is not supported" in capsys.readouterr().err
    assert run_program("evaluate", [*overrides, "reference=/nowhere"]) == 1
    assert not list(tmp_path.rglob("*.png"))  # rejected before anything is generated
    assert run_program("evaluate", overrides) == 0


def test_changed_weights_under_the_same_path_are_detected(
    cascade: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "mine"
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={model}"]) == 0
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    overrides = ["metric=[kid]", f"prompts={prompts}", f"reference={tmp_path}"]
    overrides += fast(*overrides)
    overrides += [f"model={model}", f"output_dir={tmp_path / 'report'}", "cache_dir=null"]
    assert run_program("evaluate", overrides) == 0
    assert len(json.loads((tmp_path / "report/metrics.json").read_text())["weights_sha256"]) == 64
    weights = next((model / "prior").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, weights)
    assert run_program("evaluate", overrides) == 1
    assert "images was begun with weights_sha256=" in capsys.readouterr().err


def test_images_are_in_natural_order(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"image {number}.png")
    names = [path.name for path in ImageFolder(tmp_path).paths]
    assert names == [f"image {number}.png" for number in range(12)]


@pytest.mark.slow
def test_reconstructions_do_not_depend_on_the_batch_size(cascade: Path, tmp_path: Path) -> None:
    shutil.copytree(cascade, tmp_path, dirs_exist_ok=True)
    config, values = tmp_path / "c/config.yaml", []
    text = config.read_text()
    assert "val_batch_size: null" in text
    for size in (1, 4):
        config.write_text(text.replace("val_batch_size: null", f"val_batch_size: {size}"))
        overrides = [f"model={tmp_path / 'c'}", "metric=[reconstruction]", *fast()]
        assert run_program("evaluate", [*overrides, f"output_dir={tmp_path}"]) == 0
        values.append(read_scores(tmp_path)["stage_b/psnr"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_rfid_compares_training_images_with_their_reconstructions(
    cascade: Path, tmp_path: Path
) -> None:
    assert run_program("evaluate", arguments(cascade, tmp_path, "metric=[rfid]")) == 0
    scores = read_scores(tmp_path)
    assert scores.keys() == {"stage_a_train/rfd_random", "stage_b_train/rfd_random"}
    pipeline, network = (
        load_pipeline(str(cascade / "c"), device="cpu"),
        RandomConvFeatures(widths=[2, 2]),
    )
    originals, reconstructions = [], []
    for batch in run_data(cascade / "c").in_order("train"):
        originals += list(batch["image"])
        reconstructed = autoencode(pipeline, to_float(batch["image"]))
        reconstructions += list((reconstructed * 255).round().byte())
    features = [
        torch.cat([network.features(b) for b in batched(each, 256)])
        for each in (originals, reconstructions)
    ]
    expected = FrechetDistance(features[0])(features[1])
    assert scores["stage_a_train/rfd_random"]["value"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4
    assert len(json.loads((tmp_path / "metrics.json").read_text())["weights_sha256"]) == 64


def test_prompts_of_existing_images_may_come_from_a_yaml(
    cascade: Path, judge: Path, tmp_path: Path
) -> None:
    generate = arguments(cascade, tmp_path / "generated", "metric=[kid]", "num_prompts=4")
    assert run_program("evaluate", generate) == 0
    images = tmp_path / "generated/images"
    overrides = [
        f"images={images}",
        "metric=[pickscore]",
        f"pickscore.weights={judge}",
        "num_prompts=4",
    ]
    scores = []
    for prompts in ("data", str(cascade / "c/config.yaml")):
        report = tmp_path / f"report {len(scores)}"
        command = [*overrides, f"prompts={prompts}", f"output_dir={report}"]
        with pytest.warns(UserWarning, match="contains images of 2 sizes"):
            assert run_program("evaluate", command) == 0
        scores.append(read_scores(report)["pickscore"])
        (images / "images.json").unlink(missing_ok=True)
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["metric=[clip]", "lpips=vgg"], "lpips"),
        (["metric=[retrieval]", "clip.name=ViT-B-32"], "clip.name"),
        (["metric=[fid]", "pickscore.weights=x"], "pickscore.weights"),
        (["metric=[retrieval]", "fid_features=random"], "fid_features"),
        (["metric=[retrieval]", "reference=x"], "reference"),
        (["metric=[retrieval]", "height=64"], "height"),
        (["metric=[clip]", "images=x", "sample.prior_steps=2"], "sample.prior_steps"),
    ],
)
def test_a_key_that_no_metric_reads_is_refused(
    overrides: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_program("evaluate", [*overrides, f"output_dir={tmp_path}"]) == 1
    assert f"error: {key} is not read by metric=" in capsys.readouterr().err


def test_an_exported_model_has_no_training_data(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model"
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={model}"]) == 0
    assert run_program("evaluate", [f"model={model}", f"output_dir={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert f"model={model} is not a run, so it has no training data" in error
    assert "set model= to a run" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", "ab")
def test_a_run_of_another_stage_is_refused(
    stage: str, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [f"model={cascade / stage}", f"output_dir={tmp_path / 'out'}"]
    assert run_program("evaluate", command) == 1
    error = capsys.readouterr().err
    assert f"is a run of Stage {stage.upper()}, which generates no images" in error
