"""Call formats, the notations in which checkpoints write their calls. Each file has one, and names the code that it is from."""

from pixel_jax.dialog.formats.crop_image import CROP_IMAGE_PIXELS
from pixel_jax.dialog.formats.deepeyes import DEEPEYES
from pixel_jax.dialog.formats.format import IMAGES, Body, CallFormat, Spelled, Spelling
from pixel_jax.dialog.formats.mini_o3 import MINI_O3
from pixel_jax.dialog.formats.pixel_reasoner import PIXEL_REASONER
from pixel_jax.dialog.formats.qwen3_5 import QWEN3_5
from pixel_jax.dialog.formats.qwen3_vl import QWEN3_VL
from pixel_jax.tools.tool import Coordinates, ToolError

FORMATS = {known.name: known for known in (PIXEL_REASONER, CROP_IMAGE_PIXELS, DEEPEYES, MINI_O3, QWEN3_VL, QWEN3_5)}
MARKS = frozenset(mark for known in FORMATS.values() for mark in (known.opening, known.closing))


def call_format(name: str) -> CallFormat:
    """Returns the format of this name: one of the package's, or a user's own that `find_format` has imported.

    Raises:
      ToolError: no format has this name.
    """
    if name not in FORMATS:
        own = (
            "; it is code, which is imported only where a command line or a config file names it" if ":" in name else ""
        )
        raise ToolError(f"there is no call format {name!r}{own}: choose one of {[*FORMATS]}")
    return FORMATS[name]


__all__ = [
    "CROP_IMAGE_PIXELS",
    "DEEPEYES",
    "FORMATS",
    "IMAGES",
    "MARKS",
    "MINI_O3",
    "PIXEL_REASONER",
    "QWEN3_5",
    "QWEN3_VL",
    "Body",
    "CallFormat",
    "Coordinates",
    "Spelled",
    "Spelling",
    "call_format",
]
