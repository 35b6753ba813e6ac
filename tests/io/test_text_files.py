"""Text files of any editor are decoded; what is not text is refused."""

import codecs

import pytest

from wuerstchen_pl.io.text_files import decode_text

TEXT = "ein H\u00e4schen\n\u5fc3 \U0001f9e1\n"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_marked_encodings_and_all_line_ends(mark: bytes, encoding: str, ends: str) -> None:
    assert decode_text(mark + TEXT.replace("\n", ends).encode(encoding)) == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be", "utf-32"])
def test_unmarked_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"codec can't decode|contains NUL"):
        decode_text("ein H\u00e4schen".encode(encoding))
