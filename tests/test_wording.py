"""The project's words: one word for one thing, plain technical English, American spelling."""

import ast
import re
import subprocess
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (".py", ".yaml", ".md", ".toml", ".sh")
FILES = [
    path
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if (path := ROOT / name).suffix in TEXT and path.is_file() and path != Path(__file__)
]
PYTHON = [path for path in FILES if path.suffix == ".py"]
RENAMINGS = ROOT / "CHANGELOG.md"  # which names the old words beside the new

BANNED = {
    # phrases that a native reader stumbles over
    r"\b(go|goes|going|gone|went) on\b": "resume, continue",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"in the midst": "during",
    r"\bas of `": "see",
    r"\bstands? (on|in)\b": "depends on, is in",
    r"\bstranger": "untrusted",
    r"\btold\b": "reported",
    r"\bheed(ed|s)?\b": "followed",
    r"\bbetray": "is detected",
    r"for want of": "without",
    r"no one's fault|cannot lie|hears the latents|however many lives": "a plain statement",
    r"read by nothing|stands in no|nothing that can be called": "not used, not in",
    r"(?<!there )(?<!There )\b(is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b)": "is not a",
    # one word for one thing
    r"\bpictures?\b": "image",
    r"\b(moments)\b": "optimizer state",
    r"\b[Cc]ritic\b": "discriminator",
    r"\baverages\b": "EMA weights",
    r"\bdigests?\b(?!\()(?!_size)": "sha256, hash, cached conditioning",
    r"\bledgers?\b": "stats",
    # British spelling
    r"\b\w*(optimis|quantis|normalis|initialis|minimis|maximis)\w*": "z",
    r"\b\w*(rasteris|generalis|synchronis)\w*": "z",
    r"\b\w*(colour|behaviour|favour|neighbour)\w*": "or",
    r"\b\w*(licence|centre|labelled|cancelled|modelling)\w*": "US",
    r"\blearnt\b|\bgrey\b": "learned, gray",
    # names that were replaced
    r"\b(put_off|PutOff|hand_over|in_parts|one_file|OneFile|BUILDABLE|refuse_foreign)\b": "renamed",
    r"\b(FullySharded|GlobalBatchNorm2d|globalise|all_processes|GeluResponseNorm)\b": "renamed",
    r"\b(at_work|as_many|Draws|loss_bands|LossBands|LossByTime|hold_frozen|text_of)\b": "renamed",
    r"\b(revive\w*|lr_factor|FiniteSteps|RunRecord|MetricsCSV|KnownToInterpolations)\b": "renamed",
    r"\b(stretches|PICTURE_HASH|OF_SETS|OF_TEXTS|OF_THE_RUN|size_12|size_24|torture)\b": "renamed",
    # documents that are not in the repository
    r"\b(DESIGN|GLOSSARY|STACK_NOTES|PERF_NOTES|PAPER_FACTS|USER_NEEDS|HOUSE_STYLE)\.md\b": "docs/",
}
"""Pattern -> what to write instead."""

UNCOUNTED = re.compile(
    r"(\}|%d|%\.0f) (images|samples|shards|steps|threads|tensors|jobs|prompts|checkpoints)\b(?!=)"
)
"""A number of things in a message that would say "1 images"."""

VAGUE = set(
    """
    found given taken held own others told how known place put_off PutOff hand_over in_parts
    one_file OneFile BUILDABLE follow refuse_foreign durable publish aside gathered set_rows
    FullySharded all_processes GlobalBatchNorm2d layouts outward inward Link trusted skeleton
    pipeline_at pipeline_of assemble Settings How Known constrain Place at_work conditions
    Inputs Digest as_many response_norm GeluResponseNorm draws Draws once derived loss_bands
    LossByTime hold_frozen counted text_of revive_every_steps lr_factor Signals Stopped
    FiniteSteps Memory trial Norms RunRecord Grids metrics_csv Drawn turn Ledger Bad Opened
    Opener family facts Request spare Pictures Plan stretches addresses downloads claims survey
    caching During own_data pictures Wanted Subject Process OF_SETS OF_TEXTS OF_THE_RUN
    KnownToInterpolations READ size_12 size_24 recipe against licence in_background torture
    rehearsal made ours theirs
    """.split()  # noqa: SIM905
)
"""Names that say nothing of their value, and names that were replaced by standard terms."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hits(text: str) -> list[str]:
    """``line: word (write: replacement)`` for every banned word of a text."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} (write: {instead})"
        for pattern, instead in BANNED.items()
        for match in re.finditer(pattern, text, re.IGNORECASE if pattern.islower() else 0)
    ]


def bound_names(source: str) -> set[str]:
    """Names of variables, attributes, parameters, functions and classes that a module binds."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def single_backticks(source: str) -> list[str]:
    """The code in single backticks in the docstrings of a module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented)
    )
    return re.findall(r"(?<!`)`[^`\n]+`(?!`)", "\n".join(docstrings))


def failures(
    check: Callable[[str], Collection[str]], files: Iterable[Path]
) -> dict[str, Collection[str]]:
    """What a check finds in the text of files, by their names."""
    by_file = {relative(path): check(path.read_text(encoding="utf-8")) for path in files}
    return {name: problems for name, problems in by_file.items() if problems}


def test_files_use_the_words_of_the_field() -> None:
    assert failures(hits, [p for p in FILES if p != RENAMINGS]) == {}


def test_nouns_in_messages_agree_with_their_numbers() -> None:
    """By ``wuerstchen_pl.plural``."""
    package = [p for p in FILES if p.is_relative_to(ROOT / "wuerstchen_pl")]
    assert failures(UNCOUNTED.findall, package) == {}


def test_names_say_what_they_hold() -> None:
    assert failures(lambda text: bound_names(text) & VAGUE, PYTHON) == {}


def test_docstrings_mark_code_with_double_backticks() -> None:
    assert failures(single_backticks, PYTHON) == {}


def test_single_backticks_are_found() -> None:
    assert single_backticks('"""A `Source`, and ``seed``."""') == ["`Source`"]


@pytest.mark.parametrize("text", ['f"{n} images"', '"%d steps"', '"{len(x)} shards"'])
def test_an_uncounted_noun_is_found(text: str) -> None:
    assert UNCOUNTED.search(text)


@pytest.mark.parametrize(
    "text", ["it goes on", "the picture", "is no model", "def f(found): pass", "quantisation"]
)
def test_a_banned_word_is_found(text: str) -> None:
    names = bound_names(text) if text.startswith("def") else set()
    assert hits(text) or names & VAGUE
