"""The paper's crop, as the released checkpoints know it (Pixel Reasoner code, `experience_maker.py`)."""

from pixel_jax.tools.tool import Box, Number, Tool

CROP_IMAGE = Tool(
    "crop_image_normalized",
    "Zoom in on the image based on the bounding box coordinates. It is useful when the object or text in the image is "
    "too small to be seen.",
    (
        Box(
            "bbox_2d",
            "coordinates for bounding box of the area you want to zoom in. Values should be within [0.0,1.0].",
        ),
        Number(
            "target_image",
            "The index of the image to crop. Index from 1 to the number of images. Choose 1 to operate on original image.",
        ),
    ),
)
