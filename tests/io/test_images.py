"""Images of any mode and format are decoded to upright RGB; damaged and dangerous ones raise."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.data.factories import encode, photo
from wuerstchen_pl.data.loading.transforms import resize
from wuerstchen_pl.io.images import decode_image, to_float, upright_size


def color(data: bytes, pixel: tuple[int, int] = (4, 4)) -> tuple[int, int, int]:
    img = decode_image(data)
    assert img.shape[2:] == (3,)
    return tuple(img[pixel].tolist())


def test_cmyk_becomes_rgb() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.allclose(color(data), (255, 0, 0), atol=3)


@pytest.mark.parametrize("value", [0, 257 * 51, 257 * 128, 65535])
def test_sixteen_bits_are_scaled_not_clipped(value: int) -> None:
    gray = np.full((8, 8), value, dtype=np.uint16)
    assert color(encode(Image.fromarray(gray), "PNG")) == (value // 257,) * 3


def test_palette_with_a_transparent_entry_is_shown_on_white() -> None:
    img = Image.new("P", (8, 8), 0)
    img.putpalette([10, 20, 30, 200, 100, 50])
    img.putpixel((0, 0), 1)
    data = encode(img, "PNG", transparency=0)
    assert color(data) == (255, 255, 255)
    assert color(data, (0, 0)) == (200, 100, 50)


def test_alpha_is_blended_with_white() -> None:
    assert color(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    half = color(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG"))
    assert half == (255, 204, 204)
    gray = color(encode(Image.new("LA", (8, 8), (0, 51)), "PNG"))
    assert gray == (204, 204, 204)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_gives_the_upright_image(orientation: int) -> None:
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
    assert np.array_equal((decode_image(encode(img, "PNG", exif=exif))), upright)


def test_unreadable_bytes_raise() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(b"no image")


def test_formats_that_run_programs_are_rejected() -> None:
    script = encode(Image.new("RGB", (8, 8)), "EPS")
    assert Image.open(io.BytesIO(script)).format == "EPS"  # PIL would hand it to Ghostscript
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(script)
    assert upright_size(script) is None


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert color(data) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("damage", ["cut", "head only", "noise", "empty"])
def test_damaged_files_of_any_format_raise_os_errors(kind: str, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), kind)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "head only": whole[:24],
        "noise": whole[:8] + bytes(noise.tobytes()[:500]),
        "empty": b"",
    }[damage]
    decode_image(whole)
    with pytest.raises(OSError, match=r".+"):
        decode_image(damaged)


def test_a_decompression_bomb_is_rejected_before_decoding() -> None:
    header = b"P6 40000 40000 255\n"  # 1.6 billion pixels
    with pytest.raises(OSError, match="exceeds limit"):
        decode_image(header)


def test_a_jpeg_decoded_at_reduced_size_matches_the_resized_image() -> None:
    data = encode(photo(1024, 768), "JPEG", quality=95)
    drafted = decode_image(data, cover=(384, 512))
    assert drafted.shape == (384, 512, 3)
    whole = resize(decode_image(data), (0, 0, 1024, 768), (384, 512))
    error = np.mean((drafted.astype(float) - whole) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_decoded_image_always_covers_the_target(kind: str) -> None:
    data = encode(photo(1000, 601), kind, exif=exif_of(6))
    for cover in ((512, 256), (100, 300), (64, 64), (999, 600)):
        img = decode_image(data, cover=cover)
        height, width = img.shape[:2]
        assert 1 / 2 < max(cover[0] / height, cover[1] / width) <= 1
        assert abs(height / width - 1000 / 601) < 0.02


def test_a_large_png_is_averaged_over_squares() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    reduced = decode_image(encode(Image.fromarray(pixels), "PNG"), cover=(16, 20))
    means = pixels.reshape(16, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(reduced - means).max() <= 0.5


def test_exif_after_the_pixels_of_a_png_is_read() -> None:
    data = encode(photo(30, 20), "PNG", exif=exif_of(6))
    length = int.from_bytes(data[data.index(b"eXIf") - 4 :][:4])
    start = data.index(b"eXIf") - 4
    chunk, rest = data[start : start + length + 12], data[:start] + data[start + length + 12 :]
    late = rest[:-12] + chunk + rest[-12:]  # before IEND
    assert upright_size(late) == upright_size(data) == (20, 30)
    assert np.array_equal(decode_image(late), decode_image(data))


def test_the_size_of_a_png_is_read_without_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("was decoded"))
    assert upright_size(encode(photo(30, 20), "PNG")) == (30, 20)
    assert upright_size(encode(photo(30, 20), "PNG", exif=exif_of(6))) == (20, 30)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_decoder_matches_pil(mode: str) -> None:
    data = encode(photo(301, 203).convert(mode), "JPEG", quality=85)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data) - expected).max() <= 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_are_divided_in_ieee_float32(device: str) -> None:
    """Multiplying by 1 / 255, as CUDA does with a Python number, rounds 126 of them differently."""
    values = np.arange(256, dtype=np.uint8)
    expected = values.astype(np.float32) / np.float32(255)
    pixels = torch.from_numpy(values).to(device)
    assert np.array_equal(to_float(pixels).cpu().numpy(), expected)
    assert torch.equal((to_float(pixels) * 255).round().byte(), pixels)
    reciprocal = values.astype(np.float32) * (np.float32(1) / np.float32(255))
    assert np.count_nonzero(reciprocal != expected) == 126
