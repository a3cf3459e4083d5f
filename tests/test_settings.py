"""The help of a command lists every setting with its value, its default and what the code says of it."""

import dataclasses
import importlib

import pytest

from pixel_jax.cli import COMMANDS
from pixel_jax.settings import comments, listing, settings
from unlearn_jax.cli import COMMANDS as UNLEARN_COMMANDS


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5  # of learning
    # One sentence.
    # And another one.
    sizes: tuple[int, ...] = (1, 2)  # not this one

    count: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    """Not a comment: # nothing"""

    steps: int  # updates
    name: str = "a # b"  # with a hash
    inner: Inner = Inner(rate=0.25)
    long: dict[str, int] = dataclasses.field(  # of several lines
        default_factory=dict
    )
    maybe: Inner | None = None
    many: dict[str, Inner] = dataclasses.field(default_factory=dict)  # by name

    def __post_init__(self):
        steps = 3  # no field
        assert steps


def test_comments_are_those_of_the_field():
    assert comments(Inner) == {"rate": "of learning", "sizes": "One sentence. And another one."}
    expected = {"steps": "updates", "name": "with a hash", "long": "of several lines", "many": "by name"}
    assert comments(Outer) == expected


def test_values_and_defaults_are_those_that_are_loaded():
    values = {"steps": 3, "inner": {"count": 4}, "many": {"x": {"rate": 1.0}}}
    found = {s.key: (s.value, s.default) for s in settings(Outer, values)}
    assert found["config.steps"] == (3, dataclasses.MISSING)
    assert found["config.inner.rate"] == (0.25, 0.25)  # the parent's, not the class's
    assert found["config.inner.count"] == (4, 3)
    assert found["config.many.x.rate"] == (1.0, 0.5)
    assert found["config.maybe"] == (None, None)
    assert "config.maybe.rate" in {s.key for s in settings(Outer)}


def test_the_listing_marks_what_must_be_given_and_what_differs():
    text = listing(Outer, {"inner": {"count": 4}})
    assert "--config.steps  (must be given)\n      updates\n" in text
    assert "--config.inner.count=4  (default: 3)" in text
    assert "--config.name='a # b'\n      with a hash\n" in text


PLACES = {
    module.SETTINGS
    for commands in (COMMANDS, UNLEARN_COMMANDS)
    for name, _ in commands.values()
    if hasattr(module := importlib.import_module(name), "SETTINGS")
}


@pytest.mark.parametrize("place", sorted(PLACES))
def test_every_setting_of_a_command_is_explained(place):
    module, _, cls = place.partition(":")
    found = list(settings(getattr(importlib.import_module(module), cls)))
    assert len(found) > 5
    assert [s.key for s in found if not s.about] == []
