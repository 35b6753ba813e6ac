"""The rows of the check's table: what was measured, and what was expected of it."""

from typing import NamedTuple

HEADER = "| section | what | measured | expected | |"


class Row(NamedTuple):
    """One line of the table."""

    what: str
    measured: str
    expected: str = ""
    ok: bool | None = None
    """Whether the expectation was met; None if there is none, or if it is not judged."""

    @property
    def verdict(self) -> str:
        """``ok``, ``MISSED``, ``not judged``, or empty where nothing is expected."""
        if self.ok is None:
            return "not judged" if self.expected else ""
        return "ok" if self.ok else "MISSED"

    def in_table(self, section: str) -> str:
        """The row in Markdown."""
        cells = (section, self.what, self.measured, self.expected, self.verdict)
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def at_least(what: str, value: float, bound: float, form: str, *, judged: bool = True) -> Row:
    """Expect ``value >= bound``; ``form`` formats both, such as ``{:.1%}``."""
    ok = value >= bound if judged else None
    return Row(what, form.format(value), f"at least {form.format(bound)}", ok)


def at_most(what: str, value: float, bound: float, form: str, *, judged: bool = True) -> Row:
    """Expect ``value <= bound``; ``form`` formats both."""
    ok = value <= bound if judged else None
    return Row(what, form.format(value), f"at most {form.format(bound)}", ok)


def within(what: str, ratio: float, tolerance: float, *, judged: bool = True) -> Row:
    """Expect a ratio of 1 up to ``tolerance``, as shares."""
    ok = abs(ratio - 1) <= tolerance if judged else None
    return Row(what, f"{ratio:.3f}", f"1 within {tolerance:.0%}", ok)


def equal(what: str, value: object, expected: object) -> Row:
    """Expect exactly this value."""
    return Row(what, str(value), str(expected), value == expected)


def failed(what: str, reason: object) -> Row:
    """A computation that did not finish; its first line says why."""
    lines = str(reason).strip().splitlines() or [""]
    return Row(what, f"{type(reason).__name__}: {lines[0][:200]}", "to finish", False)
