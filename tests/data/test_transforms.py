import io

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_pl.data.transforms import CENTRE, crop, crop_place, decode, resize_to_cover


def encode(img: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(data: bytes, place: tuple[int, int] = (4, 4)) -> tuple[int, int, int]:
    img = decode(data)
    assert img.mode == "RGB"
    return img.getpixel(place)


def test_cmyk_becomes_rgb() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.allclose(colour(data), (255, 0, 0), atol=3)


@pytest.mark.parametrize("value", [0, 257 * 51, 257 * 128, 65535])
def test_sixteen_bits_are_scaled_not_clipped(value: int) -> None:
    grey = np.full((8, 8), value, dtype=np.uint16)
    assert colour(encode(Image.fromarray(grey), "PNG")) == (value // 257,) * 3


def test_palette_with_a_transparent_entry_is_shown_on_white() -> None:
    img = Image.new("P", (8, 8), 0)
    img.putpalette([10, 20, 30, 200, 100, 50])
    img.putpixel((0, 0), 1)
    data = encode(img, "PNG", transparency=0)
    assert colour(data) == (255, 255, 255)
    assert colour(data, (0, 0)) == (200, 100, 50)


def test_alpha_is_blended_with_white() -> None:
    assert colour(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    half = colour(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG"))
    assert half == (255, 204, 204)
    grey = colour(encode(Image.new("LA", (8, 8), (0, 51)), "PNG"))
    assert grey == (204, 204, 204)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_gives_the_upright_picture(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16] = (255, 0, 0)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    img = Image.fromarray(np.ascontiguousarray(stored))
    assert np.array_equal(np.array(decode(encode(img, "PNG", exif=exif))), upright)


def test_unreadable_bytes_raise() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        decode(b"no picture")


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (64, 64), (13, 7)])
def test_resize_just_covers(size: tuple[int, int]) -> None:
    img = resize_to_cover(Image.new("RGB", size, (1, 2, 3)), 48, 32)
    assert img.shape[1] == 48 or img.shape[2] == 32
    assert img.shape[1] >= 48
    assert img.shape[2] >= 32
    assert img[:, 5, 5].tolist() == [1, 2, 3]


def test_resize_is_antialiased() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    img = resize_to_cover(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 16, 16)
    assert (img.float() - 127.5).abs().max() < 2


def test_crops_reach_both_ends_and_the_centre() -> None:
    img = torch.arange(10 * 12).view(1, 10, 12)
    assert torch.equal(crop(img, 4, 4, (0.0, 0.0)), img[:, :4, :4])
    assert torch.equal(crop(img, 4, 4, (0.999, 0.999)), img[:, 6:, 8:])
    assert torch.equal(crop(img, 4, 4, CENTRE), img[:, 3:7, 4:8])


def test_crop_places_are_uniform_and_repeatable() -> None:
    places = torch.tensor([crop_place(3, batch, i) for batch in range(50) for i in range(40)])
    assert torch.equal(places[41], torch.tensor(crop_place(3, 1, 1)))
    # 2,000 draws: the mean of a uniform number strays by 0.0065, a correlation by 0.022.
    assert (places.mean(0) - 0.5).abs().max() < 0.03
    assert torch.corrcoef(places.T)[0, 1].abs() < 0.1
    assert len(set(places[:, 0].tolist())) > 1990
