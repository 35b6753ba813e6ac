"""Arguments that are read from a stage's source are those of its constructor."""

import pytest

from wuerstchen_pl.checkpointing.allowed import STAGE_TARGETS
from wuerstchen_pl.checkpointing.stage_arguments import stage_arguments
from wuerstchen_pl.signatures import KWARGS_TARGETS, _locate, _parameters


@pytest.mark.parametrize("target", sorted(STAGE_TARGETS))
def test_they_are_those_of_the_constructor(target: str) -> None:
    constructors = filter(None, map(_locate, (target, KWARGS_TARGETS.get(target, ""))))
    accepted, required = set[str](), set[str]()
    for all_names, names_without_default in map(_parameters, constructors):
        accepted |= all_names
        required |= names_without_default
    assert stage_arguments(target) == (accepted, required)
