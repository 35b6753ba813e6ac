"""The evaluation command: what it draws, what it keeps, what it finds, and what it refuses."""

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

from tests.conftest import run_program, small
from wuerstchen_pl.evaluation import generation
from wuerstchen_pl.evaluation.datasets import DatasetImages, run_data
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.clip import pickscore
from wuerstchen_pl.evaluation.metrics.distances import FrechetDistance
from wuerstchen_pl.evaluation.metrics.feature_networks import RandomConvFeatures, batched
from wuerstchen_pl.pipelines.generate import SamplingConfig, autoencode
from wuerstchen_pl.pipelines.loading import load_pipeline

ROOT = Path(__file__).parents[2]
FAST = (
    "sample.prior_steps=2",
    "sample.decoder_steps=1",
    "fid_features=random",
    "fid_features.widths=[2,2]",
)


def arguments(cascade: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"model={cascade / 'c'}",
        f"output_dir={folder}",
        f"cache_dir={folder}/kept",
        *FAST,
        *more,
    ]


def numbers(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def alike(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """As far as images are whose pixels were rounded otherwise here and there."""
    assert ours.keys() == theirs.keys()
    for name, found in theirs.items():
        for key in ("value", "low", "high"):
            assert ours[name][key] == pytest.approx(found[key], rel=2e-3), name


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel in the layout of PickScore."""
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
    """A report of six images, by every metric that needs no download."""
    folder = tmp_path_factory.mktemp("evaluated")
    more = ["metric=[fid,kid,pickscore]", f"pickscore.weights={judge}", f"prompts={prompts}"]
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 0
    return folder


def test_images_are_named_by_prompt_and_seed(evaluated: Path) -> None:
    names = [path.name for path in sorted((evaluated / "images").glob("*.png"))]
    assert names == [f"{i:06d}-{i}.png" for i in range(6)]


def test_the_report_has_intervals_numbers_versions_and_hashes(
    evaluated: Path, judge: Path, cascade: Path
) -> None:
    told = json.loads((evaluated / "metrics.json").read_text())
    assert told["metrics"].keys() == {"fd_random", "kd_random", "pickscore"}  # no FID
    for found in told["metrics"].values():
        assert found["low"] <= found["value"] <= found["high"]
        assert found["number"] == 6
    assert told["metrics"]["fd_random"]["reference"] == len(
        list(DatasetImages(run_data(cascade / "c")))
    )
    assert told["format"] == "PNG"
    assert "bicubic" in told["resized_by"]
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(told["weights_sha256"]) == 64
    weights = told["metrics"]["pickscore"]["weights_sha256"]
    assert weights == pickscore(weights=str(judge)).weights_sha256
    assert told["settings"]["prior_steps"] == 2


def test_each_images_score_is_told_and_the_extremes_are_shown(evaluated: Path) -> None:
    with (evaluated / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["pickscore"]) for row in rows]
    assert [row["prompt"] for row in rows][:2] == ["red heart", "blue bird"]
    assert sum(scores) / 6 == pytest.approx(numbers(evaluated)["pickscore"]["value"])
    page = (evaluated / "index.html").read_text()
    best, worst = page.split("<h2>")[1:]
    for part, extreme in ((best, max(scores)), (worst, min(scores))):
        first = re.search(r'src="([^"]+)".*?<br>([-0-9.e]+)<', part)
        assert first is not None
        assert float(first[2]) == pytest.approx(extreme, rel=1e-3)
        assert (evaluated / first[1]).is_file()


def test_what_is_missing_alone_is_drawn_again_and_is_the_same(
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
    assert np.abs(pixels(removed) - before).max() <= 1  # alone, it is rounded otherwise
    assert [path.stat().st_mtime_ns for path in kept] == times
    alike(numbers(folder), numbers(evaluated))


def test_two_processes_and_small_batches_find_the_same(
    evaluated: Path, cascade: Path, judge: Path, prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Processes share a folder and no more, so that they may as well run one after the other."""
    more = ["metric=[fid,kid,pickscore]", f"pickscore.weights={judge}", f"prompts={prompts}"]
    more.append("sample.batch_size=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run_program("evaluate", arguments(cascade, tmp_path, *more)) == 0
        assert (tmp_path / "metrics.json").is_file() == (rank == "0")
    alike(numbers(tmp_path), numbers(evaluated))


@pytest.mark.slow
def test_torchrun_starts_such_processes(cascade: Path, prompts: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "wuerstchen_pl.evaluate"]
    told = arguments(cascade, tmp_path, "metric=[kid]", f"prompts={prompts}", "device=cpu")
    done = subprocess.run([*command, *told], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path)["kd_random"]["number"] == 6


def test_images_win_half_the_time_against_themselves(
    evaluated: Path, judge: Path, tmp_path: Path
) -> None:
    drawn = evaluated / "images"
    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    Image.new("RGB", (64, 64), "red").save(other / "000000-0.png")
    told = [f"images={drawn}", "metric=[pickscore]", f"pickscore.weights={judge}", "model=null"]
    told += [f"output_dir={tmp_path / 'report'}", f"baselines=[{drawn},{other}]"]
    assert run_program("evaluate", told) == 0
    found = numbers(tmp_path / "report")
    itself = found["win_rate/images"]
    assert (itself["value"], itself["won"], itself["tied"], itself["lost"]) == (0.5, 0, 6, 0)
    assert found["win_rate/other"]["tied"] == 5
    assert found["win_rate/other"]["value"] in (5 / 12, 7 / 12)
    assert found["pickscore"]["value"] == pytest.approx(numbers(evaluated)["pickscore"]["value"])


def test_features_of_a_reference_folder_are_kept_until_it_changes(
    evaluated: Path, cascade: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(evaluated / "images", reference)
    told = [f"images={evaluated / 'images'}", "metric=[fid]", f"reference={reference}", *FAST]
    told += [f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'kept'}", "prompts=data"]
    assert run_program("evaluate", told) == 0
    assert numbers(tmp_path)["fd_random"]["value"] == pytest.approx(0, abs=1e-6)
    assert run_program("evaluate", told) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
    Image.new("RGB", (64, 64), "red").save(reference / "000000-0.png")
    assert run_program("evaluate", told) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert numbers(tmp_path)["fd_random"]["value"] > 1e-4


@pytest.mark.parametrize("name", ["settings", "prompts"])
def test_images_of_something_else_are_not_mixed_with(
    name: str, evaluated: Path, cascade: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    more = ["metric=[kid]", f"prompts={prompts}"]
    more.append("sample.prior_guidance_scale=2" if name == "settings" else "num_prompts=4")
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 1
    other = "prior_guidance_scale" if name == "settings" else "prompts, seeds, sizes"
    assert f"holds images of other {other}; choose another" in capsys.readouterr().err
    assert len(list((folder / "images").glob("*.png"))) == 6


def test_a_damaged_image_is_named_and_the_others_kept(
    evaluated: Path, cascade: Path, judge: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    broken = folder / "images/000003-3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    more = ["metric=[fid]", f"prompts={prompts}"]
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 1
    said = capsys.readouterr().err
    assert "000003-3.png is damaged" in said
    assert "remove it if it was generated here, and run the command again" in said
    broken.unlink()
    assert run_program("evaluate", arguments(cascade, folder, *more)) == 0
    assert numbers(folder)["fd_random"] == numbers(evaluated)["fd_random"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["metric=[fid]", "fid_features.widths=[16,24,32]"], "metric=fid needs at least 73 images"),
        (["metric=[is]"], "metric=is is of Inception's classes; set fid_features=inception"),
        (["metric=[fid,bleu]"], "is unknown; choose from fid, kid, is, clip, pickscore"),
        (["metric=[fid]", "num_prompts=0"], "num_prompts=0 draws nothing"),
        (["metric=[retrieval]"], "use prompts=data"),
        (["metric=[fid]", "baselines=[x]"], "baselines= compares by PickScore"),
        (["metric=[fid]", "images=nowhere"], "images=nowhere holds no image"),
        (["metric=[fid]", "reference=nowhere"], "reference=nowhere holds no image"),
        (
            ["metric=[pickscore]", "pickscore.weights=nowhere"],
            "pickscore.weights=nowhere is not a folder",
        ),
        (
            ["metric=[clip]", "clip.weights=nowhere"],
            "clip.weights=nowhere is not a file, and no tag of",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    more: list[str], said: str, evaluated: Path, cascade: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    told = arguments(cascade, folder, f"prompts={prompts}", *more)
    assert run_program("evaluate", told) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert len(list((folder / "images").glob("*.png"))) == 6


def test_folders_that_do_not_fit_are_refused(
    evaluated: Path, judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drawn, fewer = evaluated / "images", tmp_path / "fewer"
    shutil.copytree(drawn, fewer)
    (fewer / "000005-5.png").unlink()
    (fewer / "images.json").unlink()
    told = ["metric=[pickscore]", f"pickscore.weights={judge}", f"output_dir={tmp_path}"]
    told += ["model=null"]
    assert run_program("evaluate", [*told, f"images={drawn}", f"baselines=[{fewer}]"]) == 1
    assert "holds 5 images, and there are 6 to compare with" in capsys.readouterr().err
    assert run_program("evaluate", [*told, f"images={fewer}"]) == 1
    assert "set prompts= to a file of them" in capsys.readouterr().err
    assert run_program("evaluate", [*told, f"images={fewer}", f"prompts={prompts}"]) == 1
    assert "holds 5 images, and there are 6 prompts" in capsys.readouterr().err
    shutil.copytree(drawn, tmp_path / "others")
    facts = json.loads((drawn / "images.json").read_text())
    facts["prompts"][2] = "green toad"
    (tmp_path / "others/images.json").write_text(json.dumps(facts))
    told.append(f"baselines=[{tmp_path / 'others'}]")
    assert run_program("evaluate", [*told, f"images={drawn}"]) == 1
    assert "was drawn for 'green toad', where" in capsys.readouterr().err


def test_images_of_several_sizes_are_spoken_of(evaluated: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(evaluated / "images", mixed)
    Image.new("RGB", (96, 48), "red").save(mixed / "000000-0.png")
    told = [f"images={mixed}", "metric=[fid]", f"reference={mixed}", *FAST, "model=null"]
    with pytest.warns(UserWarning, match="holds images of 2 sizes, 48 x 96 and 64 x 64 px"):
        assert run_program("evaluate", [*told, f"output_dir={tmp_path}", "cache_dir=null"]) == 0


def test_the_first_process_does_not_wait_for_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "STALL_TIMEOUT_S", 0.3)
    (tmp_path / "a.png").touch()
    with pytest.raises(TimeoutError, match="lacks 1 images that other processes were to draw"):
        generation._wait_for([tmp_path / "a.png", tmp_path / "b.png"])


def test_validation_losses_are_those_of_training(cascade: Path, tmp_path: Path) -> None:
    """The command finds what the last validation of each run logged, and tells it over t."""
    root = tmp_path / "runs"
    for stage in "bc":
        above = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
        more = ["trainer=cpu", f"paths.data={cascade.parent / 'data'}"]
        if stage == "c":
            above[1] = f"paths.stage_b={root / 'default/b'}"
        assert run_program("train", [*small(stage, root), *above, *more]) == 0
    told = [f"model={root / 'default/c'}", f"output_dir={tmp_path}", "metric=[validation_loss]"]
    assert run_program("evaluate", told) == 0
    found = numbers(tmp_path)
    for stage in "bc":
        log = (root / f"default/{stage}/metrics.csv").read_text().splitlines()
        logged = [float(line.split(",")[2]) for line in log if ",val/loss," in line]
        assert found[f"stage_{stage}/loss"]["value"] == pytest.approx(logged[-1], rel=1e-5)
        bands = {k: v for k, v in found.items() if k.startswith(f"stage_{stage}/loss_t")}
        whole = sum(v["value"] * v["number"] for v in bands.values())
        number = sum(v["number"] for v in bands.values())
        assert number == 4 * found[f"stage_{stage}/loss"]["number"]
        assert whole / number == pytest.approx(logged[-1], rel=1e-4)


def test_other_data_are_named_by_a_yaml(cascade: Path, tmp_path: Path) -> None:
    """Prompts at their images' sizes, and a reference: here the model's own, by another name."""
    told = ["metric=[kid]", "num_prompts=4"]
    yaml = cascade / "a/config.yaml"
    other = [f"prompts={yaml}", f"reference={yaml}"]
    for name, more in (("own", []), ("other", other)):
        assert run_program("evaluate", [*arguments(cascade, tmp_path / name, *told), *more]) == 0
    own, named = (numbers(tmp_path / name)["kd_random"] for name in ("own", "other"))
    assert own == named
    sizes = {Image.open(path).size for path in (tmp_path / "other/images").glob("*.png")}
    assert len(sizes) > 1


def test_a_yaml_of_something_else_is_refused(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other.yaml").write_text("_target_: os.getcwd\n")
    told = arguments(cascade, tmp_path / "report", "metric=[kid]", "num_prompts=2")
    assert run_program("evaluate", [*told, f"prompts={tmp_path / 'other.yaml'}"]) == 1
    assert "os.getcwd" in capsys.readouterr().err


def test_shares_are_by_number_whoever_began_first(
    evaluated: Path, cascade: Path, tmp_path: Path
) -> None:
    """The second process starts when the first has drawn some: none is left to nobody."""
    facts = json.loads((evaluated / "images/images.json").read_text())
    told = zip(facts["prompts"], facts["seeds"], facts["sizes"], strict=True)
    wanted = [generation.GenerationRequest(prompt, seed, *size) for prompt, seed, size in told]
    pipeline = load_pipeline(str(cascade / "c"), device="cpu")
    settings = SamplingConfig(prior_steps=1, decoder_steps=1)
    (tmp_path / "000000-0.png").touch()  # the first one's
    second = generation.DistInfo(rank=1, world_size=2)
    generation.generate_into(tmp_path, wanted, pipeline, settings, {}, second)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"000000-0.png", "000001-1.png", "000003-3.png", "000005-5.png"}


def test_a_command_that_drew_nothing_claims_nothing(
    cascade: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = arguments(cascade, tmp_path, "metric=[kid]", f"prompts={prompts}")
    assert run_program("evaluate", [*told, "height=10", "width=10"]) == 1
    assert "height=10 is not supported" in capsys.readouterr().err
    assert run_program("evaluate", [*told, "reference=/nowhere"]) == 1
    assert not list(tmp_path.rglob("*.png"))  # refused before anything was drawn
    assert run_program("evaluate", told) == 0


def test_other_weights_under_the_same_path_are_not_taken_for_the_same(
    cascade: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "mine"
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={model}"]) == 0
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    told = ["metric=[kid]", f"prompts={prompts}", f"reference={tmp_path}", *FAST]
    told += [f"model={model}", f"output_dir={tmp_path / 'report'}", "cache_dir=null"]
    assert run_program("evaluate", told) == 0
    assert len(json.loads((tmp_path / "report/metrics.json").read_text())["weights_sha256"]) == 64
    weights = next((model / "prior").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, weights)
    assert run_program("evaluate", told) == 1
    assert "holds images of other weights_sha256" in capsys.readouterr().err


def test_prompts_go_with_numbers_and_not_with_letters(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"image {number}.png")
    names = [path.name for path in ImageFolder(tmp_path).paths]
    assert names == [f"image {number}.png" for number in range(12)]


def test_a_reconstruction_does_not_depend_on_its_batch(cascade: Path, tmp_path: Path) -> None:
    shutil.copytree(cascade, tmp_path, dirs_exist_ok=True)
    config, found = tmp_path / "c/config.yaml", []
    text = config.read_text()
    assert "val_batch_size: null" in text
    for size in (1, 4):
        config.write_text(text.replace("val_batch_size: null", f"val_batch_size: {size}"))
        told = [f"model={tmp_path / 'c'}", "metric=[reconstruction]", *FAST]
        assert run_program("evaluate", [*told, f"output_dir={tmp_path}"]) == 0
        found.append(numbers(tmp_path)["stage_b/psnr"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_rfid_is_of_training_images_and_what_comes_back_of_them(
    cascade: Path, tmp_path: Path
) -> None:
    assert run_program("evaluate", arguments(cascade, tmp_path, "metric=[rfid]")) == 0
    found = numbers(tmp_path)
    assert found.keys() == {"stage_a_train/rfd_random", "stage_b_train/rfd_random"}
    pipeline, network = (
        load_pipeline(str(cascade / "c"), device="cpu"),
        RandomConvFeatures(widths=[2, 2]),
    )
    originals, back = [], []
    for batch in run_data(cascade / "c").in_order("train"):
        originals += list((batch["image"] * 255).round().byte())
        back += list((autoencode(pipeline, batch["image"]) * 255).round().byte())
    features = [
        torch.cat([network.features(b) for b in batched(each, 256)]) for each in (originals, back)
    ]
    wanted = FrechetDistance(features[0])(features[1])
    assert found["stage_a_train/rfd_random"]["value"] == pytest.approx(wanted, rel=1e-4)
    assert wanted > 1e-4
    assert len(json.loads((tmp_path / "metrics.json").read_text())["weights_sha256"]) == 64


def test_prompts_of_given_images_may_be_other_datas(
    cascade: Path, judge: Path, tmp_path: Path
) -> None:
    drawn = arguments(cascade, tmp_path / "drawn", "metric=[kid]", "num_prompts=4")
    assert run_program("evaluate", drawn) == 0
    images = tmp_path / "drawn/images"
    told = [
        f"images={images}",
        "metric=[pickscore]",
        f"pickscore.weights={judge}",
        "num_prompts=4",
    ]
    found = []
    for prompts in ("data", str(cascade / "c/config.yaml")):
        report = tmp_path / f"report {len(found)}"
        assert run_program("evaluate", [*told, f"prompts={prompts}", f"output_dir={report}"]) == 0
        found.append(numbers(report)["pickscore"])
        (images / "images.json").unlink(missing_ok=True)
    assert found[0] == found[1]
