"""Images, captions and files as users have them: odd, damaged, and dangerous.

``IMAGES`` and ``CAPTIONS`` vary one file of a sample; ``FILES`` are whole folders. The expected
answer is stated where a sample cannot be used.
"""

import codecs
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.data.factories import encode, image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
UNREADABLE, NO_CAPTION = "unreadable image", "no caption"


def noise(mode: str) -> Image.Image:
    rgb = Image.fromarray(PIXELS[..., :3].copy())
    if mode == "RGBA":
        return Image.fromarray(PIXELS)
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 2**16, (12, 20), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(RNG.integers(0, 2**31, (12, 20)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(RNG.random((12, 20)).astype(np.float32))
    return rgb.quantize(16) if mode == "P" else rgb.convert(mode)


MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "gif": ("L", "P", "RGB"),
    "tiff": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "bmp": ("1", "L", "P", "RGB"),
    "ppm": ("L", "RGB", "I;16"),
}
PIL_NAMES = {"jpg": "JPEG", "tiff": "TIFF", "ppm": "PPM"}


def in_all_modes() -> Iterator[tuple[str, bytes]]:
    for suffix, modes in MODES.items():
        for mode in modes:
            kind = PIL_NAMES.get(suffix, suffix.upper())
            img = noise("I" if suffix == "ppm" and mode == "I;16" else mode)
            if suffix == "ppm" and mode == "I;16":
                img = Image.fromarray(np.asarray(img) % 65536)
            yield f"{mode.replace(';', '-')}-of.{suffix}", encode(img, kind)


def oriented(value: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(noise("RGB"), kind, exif=exif)


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (20, 12), color) for color in ("red", "blue", "lime")]
    return encode(images[0], kind, save_all=True, append_images=images[1:])


def odd_images() -> Iterator[tuple[str, bytes]]:
    jpeg, png = encode(noise("RGB"), "JPEG"), encode(noise("RGB"), "PNG")
    for value in (*range(10), 65535):
        yield f"turned-{value}.jpg", oriented(value, "JPEG")
        yield f"turned-{value}.png", oriented(value, "PNG")
    yield from ((f"frames.{kind.lower()}", frames(kind)) for kind in ("GIF", "WEBP", "TIFF"))
    yield "frames.png", frames("PNG")
    yield "two-images.jpg", frames("MPO")
    yield "progressive.jpeg", encode(noise("RGB"), "JPEG", progressive=True)
    yield "subsampled.jfif", encode(noise("RGB"), "JPEG", subsampling=2)
    yield "extra-bytes.jpg", jpeg[:2] + jpeg[2:4] + jpeg[4:20] + b"\x00" * 7 + jpeg[20:]
    yield "bytes-after.jpg", jpeg + b"trailing bytes" * 9
    yield "bytes-after.png", png + b"trailing bytes" * 9
    yield "is-a-png.jpg", png
    yield "is-a-jpeg.png", jpeg
    yield "is-a-bmp.webp", encode(noise("RGB"), "BMP")
    yield "upper-case.JPG", jpeg
    yield "mixed-case.Png", png
    yield "transparent-color.png", encode(noise("RGB"), "PNG", transparency=(0, 0, 0))
    yield "transparent-entry.gif", encode(noise("P"), "GIF", transparency=0)
    yield "one-pixel.png", encode(Image.new("RGB", (1, 1), "red"), "PNG")
    yield "narrow.png", encode(Image.new("RGB", (3, 900), "red"), "PNG")


def broken_images() -> Iterator[tuple[str, bytes]]:
    jpeg, png = encode(noise("RGB"), "JPEG"), encode(noise("RGB"), "PNG")
    yield "empty.jpg", b""
    yield "text.png", b"no image"
    yield "page.jpg", b"<!doctype html><title>404</title>"
    yield "cut.jpg", jpeg[: len(jpeg) // 2]
    yield "cut.png", png[: len(png) // 2]
    yield "cut.webp", encode(noise("RGB"), "WEBP")[:40]
    yield "head-only.jpg", jpeg[:24]
    yield "script.png", encode(noise("RGB"), "EPS")
    yield "drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "bomb.ppm", b"P6 40000 40000 255\n"
    yield "no-pixels.ppm", b"P6 0 0 255\n"
    yield "I-of.tiff", encode(noise("I"), "TIFF")
    yield "F-of.tiff", encode(noise("F"), "TIFF")


IMAGES: dict[str, bytes] = dict(in_all_modes()) | dict(odd_images()) | dict(broken_images())
"""Encoded images by file name."""
UNREADABLE_IMAGES = frozenset(dict(broken_images()))

CAPTIONS: dict[str, tuple[bytes | None, str]] = {
    "plain": (b"a red heart", "a red heart"),
    "marked": (codecs.BOM_UTF8 + b"a red heart", "a red heart"),
    "utf-16-le": (codecs.BOM_UTF16_LE + "a réd heart".encode("utf-16-le"), "a réd heart"),
    "utf-16-be": (codecs.BOM_UTF16_BE + "a réd heart".encode("utf-16-be"), "a réd heart"),
    "utf-16-unmarked": ("a red heart".encode("utf-16-le"), "!caption is not UTF-8"),
    "latin-1": ("a réd heart".encode("latin-1"), "!caption is not UTF-8"),
    "binary": (b"\x00\x01\x02\x03", "!caption is not UTF-8"),
    "two lines": (b"a red\nheart\n", "a red heart"),
    "windows lines": (b"a red\r\nheart\r\n", "a red heart"),
    "old lines": (b"a red\rheart", "a red heart"),
    "spaces": (b"  a   red\theart ", "a red heart"),
    "separators": ("a red\u2028heart\u3000".encode(), "a red heart"),
    "other scripts": ("قلب 心 \U0001f9e1".encode(), "قلب 心 \U0001f9e1"),
    "markup": (b'<b>&amp;"quoted", ${oc.env:HOME}', '<b>&amp;"quoted", ${oc.env:HOME}'),
    "empty": (b"", "!no caption"),
    "blank": (b" \r\n\t ", "!no caption"),
    "only a mark": (codecs.BOM_UTF8, "!no caption"),
    "missing": (None, "!no caption"),
    "long": (b"word " * 20_000, ("word " * 20_000).strip()),
}
"""The content of a caption file, and its caption or "!" and the reason why there is none."""


class TarLink(NamedTuple):
    target: str
    hard: bool = False


class Special(NamedTuple):
    kind: str  # "pipe" or "folder"


Content = bytes | TarLink | Special


def sample(key: str, **extra: Content) -> dict[str, Content]:
    return {f"{key}.jpg": image(key), f"{key}.txt": f"caption of {key}".encode(), **extra}


def metadata(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


FILES: dict[str, Content] = {
    **sample("plain"),
    # names
    **{
        name: content
        for key in (
            *("with space", "-dash", "dots.in.name", "dots..twice", "herz \u2764", "e\u0301"),
            *("\u00e9", "'quoted'", "100%", "#1", "a,b;c", "new\nline", "x" * 200, "jpg"),
            *("folder/in/folder", "$HOME", "~", "con", "back\\slash", "UPPER"),
        )
        for name, content in sample(key).items()
    },
    "shouted.JPEG": image("shouted"),
    "shouted.TXT": b"shouted caption",
    "kohya.png": image("kohya", kind="PNG"),
    "kohya.caption": b"caption of kohya",
    # what is not a sample
    "._plain.jpg": b"\x00\x05\x16\x07 of macOS",
    "._plain.txt": b"\x00\x05\x16\x07 of macOS",
    ".DS_Store": b"\x00",
    ".thumbnails/small.jpg": image("small"),
    ".thumbnails/small.txt": b"small",
    "Thumbs.db": b"\x00",
    "readme.md": b"# images",
    "alone.txt": b"a caption without an image",
    "phone.heic": b"\x00\x00\x00\x18ftypheic",
    "phone.txt": b"caption of phone",
    "drawing.svg": b"<svg/>",
    # several images of one name
    **sample("pair", **{"pair.png": image("pair 2", kind="PNG"), "pair.heic": b"x"}),
    **sample("masked", **{"masked.mask.png": image("mask", kind="PNG")}),
    **sample("measured", **{"measured.depth.png": image("depth", kind="PNG")}),
    "numbered.1.jpg": image("numbered 1"),
    "numbered.1.txt": b"first",
    "numbered.2.jpg": image("numbered 2"),
    "numbered.2.txt": b"second",
    # metadata
    **sample("listed", **{"listed.json": metadata({"captions": ["one", " two\n", "", 7]})}),
    "only-listed.jpg": image("only listed"),
    "only-listed.json": metadata({"captions": ["from the list"]}),
    **sample("none-listed", **{"none-listed.json": metadata({"captions": []})}),
    **sample("damaged-json", **{"damaged-json.json": b"{broken"}),
    **sample("no-object", **{"no-object.json": metadata([1, 2])}),
    **sample("deep-json", **{"deep-json.json": b"[" * 100_000}),
    **sample("marked-json", **{"marked-json.json": codecs.BOM_UTF8 + b'{"pwatermark": 0.5}'}),
    **sample("scores", **{"scores.json": b'{"pwatermark": 0.5, "punsafe": NaN, "aesthetic": "7"}'}),
    "stats.json": metadata({"count": 3}),
    # links and special files
    "linked.jpg": TarLink("plain.jpg"),
    "linked.txt": TarLink("plain.txt"),
    "hard.jpg": TarLink("plain.jpg", hard=True),
    "hard.txt": TarLink("plain.txt", hard=True),
    "folder/up.jpg": TarLink("../plain.jpg"),
    "folder/up.txt": b"caption of up",
    "twice.jpg": TarLink("linked.jpg"),
    "twice.txt": b"caption of twice",
    "gone.jpg": TarLink("nowhere.jpg"),
    "gone.txt": b"caption of gone",
    "round.jpg": TarLink("round.jpg"),
    "round.txt": b"caption of round",
    "uncaptioned.jpg": image("uncaptioned"),
    "uncaptioned.txt": TarLink("nowhere.txt"),
    "pipe.jpg": Special("pipe"),
    "pipe.txt": b"caption of pipe",
    "pipe-caption.jpg": image("pipe caption"),
    "pipe-caption.txt": Special("pipe"),
    "is-folder.jpg": Special("folder"),
    "is-folder.txt": b"caption of is-folder",
}
NOT_USED = {
    "._plain": "hidden file",
    ".thumbnails/small": "hidden file",
    "alone": "no image",
    "phone": "unsupported image format",
    "drawing": "unsupported image format",
    "pair": "additional image",
    "measured.depth": "additional image",
    "gone": "no image",
    "round": "no image",
    "uncaptioned": "no caption",
    "pipe": "no image",
    "pipe-caption": "no caption",
    "is-folder": "no image",
}


def write_folder(root: Path, files: dict[str, Content]) -> Path:
    """Write files below ``root``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Special):
            path.mkdir() if content.kind == "folder" else os.mkfifo(path)
        elif content.hard:
            os.link(root / content.target, path)
        else:
            path.symlink_to(content.target)
    return root


def write_tar(path: Path, files: dict[str, Content], *, prefix: str = "") -> Path:
    """Write a tar file of these members."""
    kinds = {"pipe": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE}
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                continue
            if isinstance(content, Special):
                member.type = kinds[content.kind]
            else:
                member.type = tarfile.LNKTYPE if content.hard else tarfile.SYMTYPE
                member.linkname = prefix + content.target if content.hard else content.target
            tar.addfile(member)
    return path
