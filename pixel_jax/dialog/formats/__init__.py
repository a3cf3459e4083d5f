"""Call formats: how a checkpoint writes its calls. One file a format."""

from pixel_jax.dialog.formats.format import CallFormat, Coordinates, Spelled, Spelling
from pixel_jax.dialog.formats.pixel_reasoner import PIXEL_REASONER

FORMATS = {PIXEL_REASONER.name: PIXEL_REASONER}
MARKS = frozenset(mark for known in FORMATS.values() for mark in (known.opening, known.closing))

__all__ = ["FORMATS", "MARKS", "PIXEL_REASONER", "CallFormat", "Coordinates", "Spelled", "Spelling"]
