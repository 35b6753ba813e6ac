"""Changes of captions in training: trigger word, shuffled and dropped tags, default caption."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.factories import FakeSource, image, sample, write
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source

TAGS = [f"tag {i}" for i in range(6)]
CAPTION = ",".join(TAGS)


def drawn(captions: Captions, caption: str = CAPTION, count: int = 2000) -> list[list[str]]:
    return [captions.augmented(caption, str(i)).split(", ") for i in range(count)]


def test_without_a_setting_captions_are_unchanged() -> None:
    for caption in ("a, b ,c", "", "A dog. A cat,"):
        assert Captions().augmented(caption, "x") == Captions().plain(caption) == caption
    assert Captions().changes == {}
    assert Captions(trigger="t", keep_first=0).changes == {"trigger": "t"}


def test_every_order_of_the_tags_is_equally_likely() -> None:
    orders = Counter(map(tuple, drawn(Captions(shuffle_tags=True), "a, b, c", 6000)))
    assert len(orders) == 6
    # standard deviation 29
    assert all(abs(number - 1000) < 150 for number in orders.values())


def test_tags_are_dropped_independently_with_the_probability() -> None:
    results = drawn(Captions(drop_tag_prob=0.25))
    counts = Counter(tag for tags in results for tag in tags)
    assert all(tags == [tag for tag in TAGS if tag in tags] for tags in results if tags != [""])
    for tag in TAGS:  # standard deviation 0.01
        assert abs(counts[tag] / 2000 - 0.75) < 0.05
    both = sum({"tag 0", "tag 1"} <= set(tags) for tags in results) / 2000
    assert abs(both - 0.75**2) < 0.055


def test_the_first_tags_keep_their_place_and_are_never_dropped() -> None:
    results = drawn(Captions(shuffle_tags=True, drop_tag_prob=0.5, keep_first=2))
    assert all(tags[:2] == TAGS[:2] for tags in results)
    assert {len(tags) for tags in results} == {2, 3, 4, 5, 6}
    assert len({tuple(tags) for tags in results if len(tags) == 6}) > 12
    assert Captions(drop_tag_prob=1, keep_first=1).augmented(CAPTION, "x") == "tag 0"
    assert Captions(drop_tag_prob=1).augmented(CAPTION, "x") == ""


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [
        (",", "a,b , c,", "t, a, b, c"),
        (";", "a, b; c", "t; a, b; c"),
        (". ", "A dog. A cat", "t. A dog. A cat"),
        (" ", "a b", "t a b"),
    ],
)
def test_tags_are_split_and_joined_by_the_separator(
    separator: str, caption: str, expected: str
) -> None:
    captions = Captions(separator=separator, trigger="t", keep_first=9, shuffle_tags=True)
    assert captions.augmented(caption, "x") == expected


def test_trigger_and_default_apply_in_validation_too() -> None:
    captions = Captions(trigger="sks", default="a dog", drop_tag_prob=1)
    assert captions.plain("one, two") == "sks, one, two"
    assert captions.plain("") == "sks, a dog" == captions.of_uncaptioned
    assert captions.augmented("one, two", "x") == "sks"
    assert Captions(default="a dog").augmented("", "x") == "a dog"
    assert Captions(default="a dog").augmented("a cat", "x") == "a cat"
    assert Captions(trigger="sks").of_uncaptioned == "sks"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"separator": ""}, "^separator='' is empty; use"),
        ({"keep_first": -1}, "^keep_first=-1 is below 0; use"),
        ({"drop_tag_prob": 1.5}, r"^drop_tag_prob=1\.5 is not a probability; use"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Captions(**settings)


def module(source: Source, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 4, "bucket_multiple": 16}
    data = ImageTextDataModule(source=source, **settings | {"val_fraction": 0.3} | changes)
    data.prepare_data()
    data.setup()
    return data


def seen(data: ImageTextDataModule, epochs: int) -> list[str]:
    """Captions by sample and epoch, in an order that does not depend on batches."""
    loader = data.train_dataloader()
    pairs = [
        (key, caption)
        for _ in range(epochs)
        for batch in loader
        for key, caption in zip(batch["key"], batch["caption"], strict=True)
    ]
    return [f"{key}: {caption}" for key, caption in pairs]


def test_captions_change_per_epoch_with_the_seed_in_training_only() -> None:
    source = FakeSource.with_sizes({"a": 12}, captions=(CAPTION,))
    options = {"captions": Captions(shuffle_tags=True, trigger="sks"), "crop": "center"}
    results = seen(module(source, **options), epochs=4)
    assert results == seen(module(source, **options), epochs=4)
    assert results != seen(module(source, **options, seed=1), epochs=4)
    assert len(set(results)) > 0.9 * len(results)  # no sample repeats its order
    for loader in (module(source, **options).val_dataloader(),):
        assert {c for batch in loader for c in batch["caption"]} == {f"sks, {CAPTION}"}


def test_a_resumed_run_draws_the_same_captions() -> None:
    source = FakeSource.with_sizes({"a": 12}, captions=(CAPTION, "one, two, three"))
    options = {"captions": Captions(shuffle_tags=True, drop_tag_prob=0.3)}
    data = module(source, **options)
    loader = data.train_dataloader()
    batches = [batch["caption"] for _ in range(3) for batch in loader]
    again = module(source, **options)
    loader, state, rest = again.train_dataloader(), {}, []
    next(iter(loader))
    state = again.state_dict()
    resumed = module(source, **options)
    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    rest = [batch["caption"] for _ in range(3) for batch in loader]
    assert rest == batches[1:]


@pytest.mark.parametrize(
    ("settings", "caption"), [({"default": "a dog"}, "a dog"), ({"trigger": "sks"}, "sks")]
)
def test_images_without_a_caption_get_the_default(
    tmp_path: Path, settings: dict[str, Any], caption: str
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(image(str(i), 40, 40))
    source = FolderSource(root=str(tmp_path))
    with pytest.raises(ValueError, match=r"3 no caption\); .*set data\.captions\.default=CAPTION"):
        module(source)
    data = module(source, captions=Captions(**settings), batch_size=1)
    assert {c for batch in data.train_dataloader() for c in batch["caption"]} == {caption}
    assert {c for batch in data.val_dataloader() for c in batch["caption"]} == {caption}


def test_one_of_several_captions_is_drawn_per_epoch_and_validation_uses_the_first() -> None:
    source = FakeSource.with_sizes({"a": 12}, captions=("one", "two", "three"))
    data = module(source, captions=Captions(trigger="sks"), batch_size=1)
    counts = Counter(pair.split(": ")[1] for pair in seen(data, epochs=60))
    total = sum(counts.values())
    assert total > 300
    assert counts.keys() == {"sks, one", "sks, two", "sks, three"}
    assert all(abs(number / total - 1 / 3) < 0.1 for number in counts.values())
    assert {c for batch in data.val_dataloader() for c in batch["caption"]} == {"sks, one"}


LINES = b"a dog\n\n  a brown \t dog \r\nanimal"


@pytest.mark.parametrize(
    ("caption_lines", "captions"),
    [(False, ("a dog a brown dog animal",)), (True, ("a dog", "a brown dog", "animal"))],
)
def test_a_caption_file_is_one_caption_or_one_per_line(
    tmp_path: Path, caption_lines: bool, captions: tuple[str, ...]
) -> None:
    members = {"a.jpg": image("a"), "a.txt": LINES} | sample("b", captions=["one", "two"])
    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path / "s.tar", members)
    for other in (not caption_lines, caption_lines):  # the index of the other must not be used
        shards = ShardSource(urls=str(tmp_path / "s.tar"), caption_lines=other)
        read = {s.key: s.captions for s in shards.open(str(tmp_path / "s.tar")).samples}
    assert read == {"a": captions, "b": ("one", "two")}
    folder: Source = FolderSource(root=str(tmp_path), caption_lines=caption_lines)
    folder = pickle.loads(pickle.dumps(folder))
    read = {s.key: s.captions for s in folder.open(folder.groups("train")[0].shards[0]).samples}
    assert read == {"a.jpg": captions, "b.jpg": ("one", "two")}
