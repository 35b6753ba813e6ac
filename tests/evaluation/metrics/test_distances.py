"""Distances between sets of images equal torch-fidelity's and closed forms."""

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
    """Random Inception weights whose features differ between images."""
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


def frechet(features: Tensor, reference: Tensor) -> float:
    return FrechetDistance(reference)(features)


def images(number: int, seed: int) -> Tensor:
    """(N, 3, 64, 64) uint8 images of coarse random colors."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=rng)
    return (nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear") * 255).byte()


class ImageDataset(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
def test_fid_kid_and_is_equal_torch_fidelity(inception_file: Path) -> None:
    generated = torch.stack([square(image, 128) for image in images(24, 0)])
    reference = torch.stack([square(image // 2, 128) for image in images(24, 1)])
    net = Inception(weights=str(inception_file))
    features = [torch.cat([net.features(b) for b in x.split(8)]) for x in (generated, reference)]
    logits = torch.cat([net.logits(b) for b in generated.split(8)])
    expected: dict[str, Any] = calculate_metrics(
        input1=ImageDataset(generated), input2=ImageDataset(reference), fid=True, kid=True,
        isc=True, kid_subset_size=24, kid_subsets=1, isc_splits=1, verbose=False,
        batch_size=8, cuda=False,
        feature_extractor_weights_path=str(inception_file), save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert frechet(*features) == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert kernel_distance(*features) == pytest.approx(
        expected["kernel_inception_distance_mean"], rel=1e-3
    )
    score = inception_score(logits, splits=1)
    assert score - 1 == pytest.approx(expected["inception_score_mean"] - 1, rel=1e-3)
    assert score > 1.01  # the logits are not constant
    assert frechet(*features) > 0.01


def test_the_frechet_distance_of_gaussians_equals_the_closed_form() -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); for diagonal S, the sum of (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 6))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    s1, s2 = np.array([1, 2, 3, 0.5, 1, 1]), np.array([2, 2, 1, 0.1, 4, 1])
    mean = np.array([0.3, 0, -1, 0, 2, 0])
    expected = (mean**2).sum() + ((s1 - s2) ** 2).sum()
    distance = frechet(torch.from_numpy(white * s1), torch.from_numpy(white * s2 + mean))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_kid_is_unbiased_and_grows_with_the_shift() -> None:
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


def test_kid_subsets_are_reproducible() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 4, generator=rng), torch.randn(50, 4, generator=rng)
    assert kernel_distance(a, b, subset_size=20) == kernel_distance(a, b, subset_size=20)
    assert kernel_distance(a, b, subset_size=20) == pytest.approx(kernel_distance(a, b), abs=0.3)


def test_inception_score_equals_closed_forms() -> None:
    """The number of classes for certain, balanced predictions; 1 for identical ones."""
    certain = 50 * torch.eye(5).repeat(40, 1)
    assert inception_score(certain, splits=1) == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.zeros(40, 5)) == pytest.approx(1)


def test_too_few_images_are_rejected() -> None:
    with pytest.raises(ValueError, match="metric=fid needs at least 8 images in both sets"):
        check_enough("fid", 7, 9, 7)
    check_enough("fid", 7, 8, 8)
    with pytest.raises(ValueError, match="metric=kid needs at least 2 images in both sets"):
        check_enough("kid", 7, 1, 9)


def test_square_resizes_with_antialiasing_and_crops_the_center() -> None:
    stripes = (torch.arange(640) % 2 * 255).byte().expand(3, 320, 640)
    resized = square(stripes, 32)
    assert resized.shape == (3, 32, 32)
    assert (resized.int() - 128).abs().max() <= 6  # black and white if aliased
    halves = torch.zeros(3, 20, 60, dtype=torch.uint8)
    halves[:, :, 20:40] = 200
    assert (square(halves, 20) == 200).all()


def test_features_do_not_depend_on_the_batch() -> None:
    net, inputs = RandomConvFeatures(), list(images(7, 0))
    one_batch = torch.cat([net.features(b) for b in batched(inputs, 32, 7)])
    small_batches = torch.cat([net.features(b) for b in batched(inputs, 32, 2)])
    torch.testing.assert_close(one_batch, small_batches)


def test_random_features_distinguish_sets() -> None:
    net = RandomConvFeatures(widths=(4, 4))
    one, two = (torch.cat([net.features(b) for b in batched(images(40, s), 32)]) for s in (0, 1))
    dark = torch.cat([net.features(b) for b in batched(images(40, 2) // 2, 32)])
    assert frechet(one, dark) > 5 * frechet(one, two)


def test_missing_inception_weights_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail_download)
    with pytest.raises(FileNotFoundError, match=r"use a local copy of weights-inception.*random"):
        Inception()
    with pytest.raises(FileNotFoundError, match="is not a file; use Inception's"):
        Inception(weights=str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not an Inception-v3"):
        Inception(weights=str(tmp_path / "other.pth"))


def fail_download(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("harm"), "done")


def test_a_malicious_weights_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"a": Malicious()}, tmp_path / "harm.pth")
    with pytest.raises(ValueError, match="was not loaded: it is damaged or contains more than"):
        Inception(weights="harm.pth")
    assert not Path("harm").exists()
