"""One decoder for the text files that users provide."""

import codecs

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def text_encoding(start: bytes) -> str:
    """The encoding of a text file, from its first two bytes: UTF-8, or UTF-16 if it says so."""
    return "utf-16" if start.startswith(_UTF16_MARKS) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    r"""Decode UTF-8, or UTF-16 with a byte order mark, without the mark; line ends become ``\n``.

    Raises:
        ValueError: if it is neither. UTF-16 without a mark is valid UTF-8 with NUL characters,
            which no text contains.
    """
    text = data.decode(text_encoding(data))
    if "\0" in text:
        raise ValueError("it contains NUL characters; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
