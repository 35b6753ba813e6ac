"""Control images: closed forms of edges, low resolution and masks."""

import pytest
import torch

from wuerstchen_pl.models.control_images import GRAY, Edges, LowResolution, Masked


@pytest.mark.parametrize("angle", ["vertical", "horizontal"])
def test_edges_are_the_two_lines_beside_each_step_of_lightness(angle: str) -> None:
    gray = torch.zeros(1, 3, 12, 20)
    gray[..., 5:] += 0.3
    gray[..., 10:] += 0.05  # below the threshold
    gray[..., 15:] += 0.11
    expected = torch.zeros(1, 3, 12, 20)
    expected[..., [4, 5, 14, 15]] = 1
    if angle == "horizontal":
        gray, expected = gray.mT, expected.mT
    assert torch.equal(Edges(threshold=0.1)(gray), expected)


def test_edges_are_of_lightness() -> None:
    """Green is six times as light as blue, so that its edge is stronger."""
    green, blue = torch.zeros(2, 1, 3, 8, 8)
    green[:, 1, :, 4:], blue[:, 2, :, 4:] = 1, 1
    edges = Edges(threshold=0.3)
    assert (edges(green).sum(), edges(blue).sum()) == (3 * 8 * 2, 0)


def test_low_resolution_averages_squares_and_enlarges_them() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 16, generator=rng)
    low = LowResolution(factor=4)(images)
    means = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5))
    assert low.shape == images.shape
    # linear interpolation: the outer corners have the values of the outer squares
    corners = (slice(None), slice(None), slice(None, None, 7), slice(None, None, 15))
    torch.testing.assert_close(low[corners], means[..., [0, -1], :][..., [0, -1]])
    between = means[..., 1] + (means[..., 2] - means[..., 1]) * 0.125  # columns 5.5 and 9.5; at 6
    torch.testing.assert_close(low[:, :, 0, 6], between[..., 0])
    constant = torch.full((1, 3, 7, 5), 0.25)
    torch.testing.assert_close(LowResolution(factor=3)(constant), constant)


def test_a_mask_is_a_rectangle_or_an_ellipse_of_the_given_size_and_place() -> None:
    images = torch.zeros(2, 3, 80, 40)
    uniform = torch.tensor([[0.5, 0.5, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0, 0.9]])
    masked = Masked().of_training(images, uniform)
    rectangle, ellipse = masked[:, 0] == GRAY
    expected = torch.zeros(80, 40, dtype=torch.bool)
    expected[:40, 20:] = True  # half of the sides, at the top and the right
    assert torch.equal(rectangle, expected)
    assert (ellipse <= rectangle).all()
    assert float(ellipse.sum()) == pytest.approx(torch.pi / 4 * 40 * 20, rel=0.02)
    assert torch.equal(masked[masked != GRAY], images[masked != GRAY])


def test_masks_stay_inside_and_an_image_of_a_user_is_masked_already() -> None:
    uniform = torch.rand(200, 5, generator=torch.Generator().manual_seed(0))
    images = torch.rand(200, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    shares = (Masked().of_training(images, uniform) == GRAY).float().mean(dim=(1, 2, 3))
    assert (float(shares.min()) > 0.03) & (float(shares.max()) < 0.6)
    assert torch.equal(Masked()(images), images)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Edges(threshold=0), "threshold=0 is out of range"),
        (lambda: LowResolution(factor=1), "factor=1 is out of range"),
    ],
)
def test_wrong_arguments_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
