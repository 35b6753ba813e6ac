"""Distances between sets of images: torch-fidelity's own, and closed forms."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as port

from wuerstchen_pl.evaluation.metrics.distances import (
    FrechetDistance,
    check_enough,
    inception_score,
    kernel_distance,
)
from wuerstchen_pl.evaluation.metrics.feature_networks import (
    Inception,
    RandomConvFeatures,
    batched,
    square,
)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Inception's tensors, random ones, under which images still differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        net = port.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    rng = torch.Generator().manual_seed(0)
    for name, value in net.named_parameters():
        if value.ndim > 1:
            nn.init.kaiming_normal_(value, generator=rng)
        elif "bias" in name:
            value.zero_()
    net.fc.weight.mul_(50)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def frechet(ours: Tensor, reference: Tensor) -> float:
    return FrechetDistance(reference)(ours)


def images(number: int, seed: int) -> Tensor:
    """(N, 3, 64, 64) bytes of coarse random colors."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=rng)
    return (nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear") * 255).byte()


class Given(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
def test_fid_kid_and_is_are_torch_fidelitys(inception_file: Path) -> None:
    ours = torch.stack([square(image, 128) for image in images(24, 0)])
    reference = torch.stack([square(image // 2, 128) for image in images(24, 1)])
    net = Inception(weights=str(inception_file))
    found = [torch.cat([net.features(b) for b in each.split(8)]) for each in (ours, reference)]
    logits = torch.cat([net.logits(b) for b in ours.split(8)])
    wanted: dict[str, Any] = calculate_metrics(
        input1=Given(ours), input2=Given(reference), fid=True, kid=True, isc=True, cuda=False,
        kid_subset_size=24, kid_subsets=1, isc_splits=1, verbose=False, batch_size=8,
        feature_extractor_weights_path=str(inception_file), save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert frechet(*found) == pytest.approx(wanted["frechet_inception_distance"], rel=1e-3)
    assert kernel_distance(*found) == pytest.approx(
        wanted["kernel_inception_distance_mean"], rel=1e-3
    )
    score = inception_score(logits, splits=1)
    assert score - 1 == pytest.approx(wanted["inception_score_mean"] - 1, rel=1e-3)
    assert score > 1.01  # or all logits are the same
    assert frechet(*found) > 0.01


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); of diagonal S, sum of (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 6))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    s1, s2 = np.array([1, 2, 3, 0.5, 1, 1]), np.array([2, 2, 1, 0.1, 4, 1])
    mean = np.array([0.3, 0, -1, 0, 2, 0])
    wanted = (mean**2).sum() + ((s1 - s2) ** 2).sum()
    found = frechet(torch.from_numpy(white * s1), torch.from_numpy(white * s2 + mean))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_kid_has_no_bias_and_grows_with_the_distance() -> None:
    rng = torch.Generator().manual_seed(0)
    same = [
        kernel_distance(torch.randn(30, 4, generator=rng), torch.randn(30, 4, generator=rng))
        for _ in range(200)
    ]
    mean, error = np.mean(same), np.std(same) / math.sqrt(len(same))
    assert abs(mean) < 4 * error
    moved = kernel_distance(
        torch.randn(30, 4, generator=rng) + 1, torch.randn(30, 4, generator=rng)
    )
    assert moved > 100 * abs(mean)


def test_subsets_of_kid_are_the_same_every_time() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 4, generator=rng), torch.randn(50, 4, generator=rng)
    assert kernel_distance(a, b, subset_size=20) == kernel_distance(a, b, subset_size=20)
    assert kernel_distance(a, b, subset_size=20) == pytest.approx(kernel_distance(a, b), abs=0.3)


def test_inception_scores_closed_forms() -> None:
    """As many as there are classes, each equally often and for certain; 1 where all are alike."""
    certain = 50 * torch.eye(5).repeat(40, 1)
    assert inception_score(certain, splits=1) == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.zeros(40, 5)) == pytest.approx(1)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="metric=fid needs at least 8 images on both sides"):
        check_enough("fid", 7, 9, 7)
    check_enough("fid", 7, 8, 8)
    with pytest.raises(ValueError, match="metric=kid needs at least 2 images on both sides"):
        check_enough("kid", 7, 1, 9)


def test_a_square_is_the_middle_resized_once_with_antialiasing() -> None:
    stripes = (torch.arange(640) % 2 * 255).byte().expand(3, 320, 640)
    found = square(stripes, 32)
    assert found.shape == (3, 32, 32)
    assert (found.int() - 128).abs().max() <= 6  # aliased, it would be black and white
    halves = torch.zeros(3, 20, 60, dtype=torch.uint8)
    halves[:, :, 20:40] = 200
    assert (square(halves, 20) == 200).all()


def test_features_do_not_depend_on_the_batch() -> None:
    net, given = RandomConvFeatures(), list(images(7, 0))
    whole = torch.cat([net.features(b) for b in batched(given, 32, 7)])
    parts = torch.cat([net.features(b) for b in batched(given, 32, 2)])
    torch.testing.assert_close(whole, parts)


def test_random_features_tell_sets_apart() -> None:
    net = RandomConvFeatures(widths=(4, 4))
    one, two = (torch.cat([net.features(b) for b in batched(images(40, s), 32)]) for s in (0, 1))
    dark = torch.cat([net.features(b) for b in batched(images(40, 2) // 2, 32)])
    assert frechet(one, dark) > 5 * frechet(one, two)


def test_inception_that_cannot_be_had_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match=r"name a file of them \(weights-inception.*random"):
        Inception()
    with pytest.raises(FileNotFoundError, match="is not a file; name Inception's"):
        Inception(weights=str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no Inception-v3"):
        Inception(weights=str(tmp_path / "other.pth"))


def refuse(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("harm"), "done")


def test_a_file_of_features_that_wants_to_run_code_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(ValueError, match="holds more than tensors; it is not loaded"):
        Inception(weights="harm.pth")
    assert not Path("harm").exists()
