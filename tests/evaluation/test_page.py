"""The page of an evaluation: images first, then groups of metrics; failures, controls, the plot."""

import re
from pathlib import Path

import pytest
from PIL import Image

from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.score import Score, mean_score, proportion_score
from wuerstchen_pl.evaluation.page import NUM_LOSSES, extreme_indices, html_page
from wuerstchen_pl.evaluation.scored_images import ScoredImages, in_folder

NUMBER = 6


def loss(value: float) -> Score:
    return Score(value=value, low=value - 0.1, high=value + 0.1, number=NUMBER)


SCORES = {
    "pickscore": mean_score([float(i) for i in range(NUMBER)]),
    "retrieval/top1": proportion_score([1.0, 0.0, 1.0, 1.0, 1.0, 0.0]),
    "retrieval/top5": proportion_score([1.0] * NUMBER),
    "retrieval_shuffled/top1": proportion_score([0.0] * NUMBER),
    "fd_random": loss(3.0),
    "stage_a/psnr": loss(24.0),
    "codebook/dead": loss(1.0),
    "stage_c/loss": loss(0.6),
    **{f"stage_{s}/loss_t{t / 10 + 0.05:.2f}": loss(0.5 + t) for s in "bc" for t in range(10)},
    "something/else": loss(1.0),
}


@pytest.fixture
def page(tmp_path: Path) -> str:
    for i in range(NUMBER):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    images = ImageFolder(tmp_path, prompts=[f"<prompt {i}>" for i in range(NUMBER)])
    per_image = {name: s.per_sample for name, s in SCORES.items() if s.per_sample}
    scored = in_folder(images, per_image, tmp_path)
    return html_page(SCORES, {"model": "m"}, scored, [with_losses(5), with_losses(71)])


def with_losses(number: int) -> ScoredImages:
    """Images of which number ``i`` has a loss of ``7 * i % number``."""
    labels = [f"{kind} {i}<" for kind in ("name", "caption", "source") for i in range(number)]
    names, captions, sources = (labels[i * number : (i + 1) * number] for i in range(3))
    losses = {f"loss_of_{number}": [float(7 * i % number) for i in range(number)]}
    return ScoredImages(
        file=f"{number}.csv", names=names, prompts=captions, sources=sources, scores=losses
    )


def sections(page: str) -> dict[str, str]:
    return {title: rest for title, rest in re.findall(r"<h2>(.*?)</h2>(.*?)(?=<h2>|$)", page, re.S)}


def test_images_come_first_and_every_metric_is_in_one_group(page: str) -> None:
    assert list(sections(page)) == [
        "Images", "best by pickscore", "worst by pickscore", "best by retrieval/top1",
        "worst by retrieval/top1", "best by retrieval/top5",
        "Images and a reference", "Images and prompts", "Retrieval", "Reconstruction", "Codebook",
        "Losses", "Other", "Validation loss over t",
        "Images by loss_of_5", "Images by loss_of_71",
    ]  # fmt: skip
    assert sections(page)["Images"].count("<figure") == NUMBER
    for name in SCORES:
        assert page.count(f"<th>{name}</th>") == (0 if "loss_t" in name else 1)
    for title in list(sections(page))[6:-2]:
        assert re.match("<p>[A-Z][^<]*[.]</p>", sections(page)[title])


def test_the_worst_of_an_accuracy_are_its_failures(page: str) -> None:
    worst = re.findall(r'src="(\d)[.]png"', sections(page)["worst by retrieval/top1"])
    assert worst == ["1", "5"]
    assert "<prompt 1>".replace("<", "&lt;").replace(">", "&gt;") in page


def test_no_image_is_both_among_the_best_and_the_worst() -> None:
    for number in range(20):
        best, worst = extreme_indices([float(7 * i % 19) for i in range(number)]).values()
        assert set(best).isdisjoint(worst)
    assert extreme_indices([3.0, 1.0, 2.0, 4.0]) == {"best": [3, 0], "worst": [1, 2]}


def test_the_plot_has_an_axis_per_stage(page: str) -> None:
    plot = sections(page)["Validation loss over t"]
    assert plot.count("<svg") == 1
    for text in ("stage b", "stage c"):
        assert f"<!-- {text} -->" in plot
    assert plot.count("<!-- t -->") == plot.count("<!-- loss -->") == 2


@pytest.mark.parametrize("number", [5, 71])
def test_losses_are_listed_with_their_images_highest_first(page: str, number: int) -> None:
    """Of many images, those with the highest and the lowest losses."""
    rows = re.findall(
        r'src="source (\d+)&lt;".*?>([\d.]+)</td><td>caption (\d+)&lt;</td><td>name (\d+)&lt;</td>',
        sections(page)[f"Images by loss_of_{number}"],
    )
    assert all(source == caption == name for source, _, caption, name in rows)
    assert all(7 * int(name) % number == float(loss) for _, loss, _, name in rows)
    losses = [int(loss) for _, loss, _, _ in rows]
    expected = list(range(number))[::-1]
    cut = [*expected[:NUM_LOSSES], *expected[-NUM_LOSSES:]]
    assert losses == (expected if number == 5 else cut)
    assert f"{number}.csv lists all" in page
