import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.factories import fake_sample
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.sources import openmoji as module
from wuerstchen_pl.data.sources.openmoji import OpenMoji, drawings, group_key, select
from wuerstchen_pl.data.sources.source import Holdout, Sample
from wuerstchen_pl.io.images import decode_image


def samples_of(source: OpenMoji) -> list[Sample]:
    (group,) = source.groups("train")
    return [s for shard in group.shards for s in source.open(shard).samples]


def test_counts_match_the_docstring() -> None:
    everything = drawings()
    assert len(everything) == len({d.caption for d in everything}) == 1659
    assert len(select(everything, ["animals-nature"], None)) == 161
    assert len(select(everything, ["food-drink"], None)) == 130
    by_caption = {d.caption: d for d in everything}
    assert by_caption["red heart"].key == "2764"
    assert by_caption["orca"].group == "animals-nature"
    assert by_caption["red apple"].group == "food-drink"
    assert by_caption["rocket"].group == ""
    assert not any(set(d.caption) & set("_:’“”") - {":"} for d in everything)


def test_limit_is_deterministic_and_a_larger_one_adds_drawings() -> None:
    everything = drawings()
    few = select(everything, ["food-drink"], 20)
    assert few == select(everything[::-1], ["food-drink"], 20)
    assert set(few) < set(select(everything, ["food-drink"], 40))
    with pytest.raises(ValueError, match=r"data\.limit=131 exceeds the 130 drawings"):
        select(everything, ["food-drink"], 131)


def test_unknown_group_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^groups=\['cars'\]"):
        OpenMoji(root="x", image_size=64, groups=["cars"])


def test_webdataset_reads_the_same_shards(openmoji: OpenMoji) -> None:
    samples = {s.key: s for s in samples_of(openmoji)}
    reference = list(webdataset.WebDataset(str(openmoji.folder / "00000.tar"), shardshuffle=False))
    assert {row["__key__"] for row in reference} == set(samples)
    for row in reference:
        sample = samples[row["__key__"]]
        assert openmoji.read(sample) == row["png"]
        assert sample.captions[0].encode() == row["txt"]
        metadata = json.loads(row["json"])
        assert decode_image(row["png"]).shape[:2] == (metadata["height"], metadata["width"])
        assert metadata["license"] == "CC BY-SA 4.0"
        assert metadata["codepoints"] == sample.key


def test_manifest_describes_the_shards(openmoji: OpenMoji) -> None:
    manifest = json.loads((openmoji.folder / "shards.json").read_text())
    (shard,) = manifest["shards"]
    data = (openmoji.folder / shard["name"]).read_bytes()
    assert shard["samples"] == 24
    assert shard["bytes"] == len(data)
    assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["settings"]["image_size"] == 64


def test_each_crop_fits_its_bucket_within_the_multiple(openmoji: OpenMoji) -> None:
    multiple = 8
    buckets = Buckets(policy="area", image_size=64, multiple=multiple)
    used = set()
    for sample in samples_of(openmoji):
        height, width = buckets.assign(sample, 0)
        used.add((height, width))
        scale = max(height / sample.height, width / sample.width)
        assert scale < 1, "enlarged"
        # What the crop costs is less than a bucket one multiple thinner would differ by.
        mismatch = abs(math.log(sample.width / sample.height * height / width))
        assert mismatch <= math.log1p(multiple / min(height, width)), sample.captions
        assert math.isclose(sample.width * sample.height, (1.15 * 64) ** 2, rel_tol=0.03)
    assert len(used) > 2


def test_each_drawing_has_white_margins_and_touches_no_border(openmoji: OpenMoji) -> None:
    for sample in samples_of(openmoji):
        img = decode_image(openmoji.read(sample))
        border = np.concatenate([img[0], img[-1], img[:, 0], img[:, -1]])
        assert (border == 255).all(), sample.captions
        ink_rows, ink_columns = np.nonzero((img < 250).any(2))
        gaps = (img.shape[1] - np.ptp(ink_columns), img.shape[0] - np.ptp(ink_rows))
        assert min(gaps) < 0.15 * max(img.shape), f"{sample.captions} is not cropped"


def test_holdout_keeps_groups_together_and_is_stable() -> None:
    assert group_key("man cook") == group_key("woman cook") == group_key("cook") == "cook"
    assert group_key("man running facing right") == group_key("person running") == "running"
    assert group_key("woman") == "woman"
    group_keys = {group_key(d.caption) for d in drawings()}
    few, more = (
        {key for key in group_keys if fake_sample("s", 0, group_key=key) in held_out}
        for held_out in (Holdout(fraction, [sorted(group_keys)]) for fraction in (0.1, 0.2))
    )
    assert 0.07 < len(few) / len(group_keys) < 0.13
    assert few < more


def test_group_keys_are_derived_from_the_captions(openmoji: OpenMoji) -> None:
    assert [s.group_key for s in samples_of(openmoji)] == [
        group_key(s.captions[0]) for s in samples_of(openmoji)
    ]


def test_a_second_prepare_renders_nothing(
    openmoji: OpenMoji, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rasterize", None)
    openmoji.prepare()


def test_settings_determine_the_folder_and_the_bytes(openmoji: OpenMoji, tmp_path: Path) -> None:
    again = OpenMoji(root=str(tmp_path), image_size=64, limit=24)
    assert again.folder.name == openmoji.folder.name
    assert OpenMoji(root=str(tmp_path), image_size=64, limit=25).folder != again.folder
    again.prepare()
    assert (again.folder / "00000.tar").read_bytes() == (openmoji.folder / "00000.tar").read_bytes()
    (again.folder / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"does not match its shards\.json"):
        again.prepare()


def test_failure_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(module, "rasterize", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        OpenMoji(root=str(tmp_path), image_size=64, limit=2).prepare()
    assert list(tmp_path.iterdir()) == []
