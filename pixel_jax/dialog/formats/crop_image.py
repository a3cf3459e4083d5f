"""The format of the first Pixel Reasoner checkpoints: the crop is called `crop_image` and is asked for in pixels.

Source: TIGER-AI-Lab/Pixel-Reasoner before commit 555a984 (2025-06-08), `experience_maker.py`, class `CropImage`: its schema
says that a coordinate's "maximum value is the width/height of the image"; four numbers below 1 are read as shares all the
same. There the padding was at most 600 pixels (`min(0.1, 600 / side)`), here it is a share alone (`pad`).
"""

from pixel_jax.dialog.formats.format import CallFormat, Spelled, Spelling
from pixel_jax.tools.tool import Box, Number

SCHEMA = (
    '{"type": "function", "function": {"name": "crop_image", "description": "Zoom in on the image based on the bounding box '
    'coordinates.", "parameters": {"type": "object", "properties": {"bbox_2d": {"type": "array", "description": "coordinates '
    "for bounding box of the area you want to zoom in. minimum value is 0 and maximum value is the width/height of the "
    'image.", "items": {"type": "number"}}, "target_image": {"type": "number", "description": "The index of the image to '
    'crop. Index from 1 to the number of images. Choose 1 to operate on original image."}}, "required": ["bbox_2d", '
    '"target_image"]}}}'
)
CROP_IMAGE_PIXELS = CallFormat(
    "crop_image",
    spellings=(
        Spelling(
            "crop_image_normalized",
            "crop_image",
            (Spelled("bbox_2d", Box("bbox_2d")), Spelled("target_image", Number("target_image"))),
            schema=SCHEMA,
        ),
    ),
    pad=0.1,
)
