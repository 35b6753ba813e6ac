"""Prompt sets, read from small files in the real formats."""

import json
from pathlib import Path

import pytest

from wuerstchen_pl.evaluation.prompt_sets import read_prompts, subsample

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 203564, "file_name": "COCO_val2014_000000203564.jpg", "height": 400}],
    "licenses": [],
    "annotations": [
        {"image_id": 203564, "id": 37, "caption": "A bicycle replica.\n"},
        {"image_id": 179765, "id": 48, "caption": "A black Honda  motorcycle"},
        {"image_id": 179765, "id": 38, "caption": "A Honda motorcycle in a garage"},
    ],
}
NARRATIVES = (
    {"dataset_id": "mscoco_val2017", "image_id": "137576", "annotator_id": 93,
     "caption": "In this image there are group of cows.", "timed_caption": [], "traces": []},
    {"dataset_id": "mscoco_val2017", "image_id": "137576", "annotator_id": 94,
     "caption": "Cows, on \"grass\"."},
)  # fmt: skip
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBasic\n"
    'the word "START" in 24" letters\tOutdoor Scenes\tWriting & Symbols\t\n'
)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "captions.json",
            json.dumps(COCO),
            ["A Honda motorcycle in a garage", "A bicycle replica."],
        ),
        (
            "narratives.jsonl",
            "\n".join(map(json.dumps, NARRATIVES)) + "\n",
            ["In this image there are group of cows.", 'Cows, on "grass".'],
        ),
        ("PartiPrompts.tsv", PARTI, ["bond", 'the word "START" in 24" letters']),
        ("prompts.txt", "\ufeffa red heart\r\n\n  a  blue bird \n", ["a red heart", "a blue bird"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"images": []}', "cannot be read as COCO captions: KeyError"),
        ("a.json", "[1, 2", "cannot be read as COCO captions: JSONDecodeError"),
        ("a.jsonl", '{"image_id": "1"}', "cannot be read as Localized Narratives: KeyError"),
        ("a.tsv", "Text\tCategory\na\tb\n", "cannot be read as PartiPrompts: KeyError"),
        ("a.txt", " \n\n", "contains no prompts; write one per line"),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts=none\.txt is not a file"):
        read_prompts("none.txt")


def test_subsets_are_reproducible_and_keep_the_order() -> None:
    prompts = [f"{i:03d}" for i in range(100)]
    chosen = subsample(prompts, 10, seed=1)
    assert chosen == subsample(prompts, 10, seed=1) == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen != subsample(prompts, 10, seed=2)
    assert subsample(prompts, None, seed=1) == subsample(prompts, 200, seed=1) == prompts
