"""The size at which a Qwen vision tower sees an image of a given size."""


def smart_resize(height, width, *, factor=28, min_pixels, max_pixels):
    """(height, width): host ints give Python ints, traced give int32."""
    raise NotImplementedError
