"""A trajectory's record read back: outcomes by name, and where its views were cut from."""

import numpy as np

from pixel_jax.dialog.observations import Kind
from pixel_jax.rollout.rollout import static_shape
from pixel_jax.training.batch import from_trajectories, with_patches
from pixel_jax.training.origins import RowShape, origins, see


def outcomes(t, token_tables) -> list[list[str]]:
    """Of each row, what each call came to; "" of one that was not carried out."""
    return [
        [Kind(int(kind)).name if kind >= 0 else "" for kind in row[:count]]
        for row, count in zip(t.calls.observation, t.num_calls, strict=True)
    ]


def views(t) -> list[list[list[int]]]:
    """Of each row's calls that showed something: the call, the canvas, the region."""
    found = []
    for row in range(len(t.stop)):
        shown = []
        for call in range(int(t.num_calls[row])):
            kind = t.calls.observation[row, call]
            if kind == Kind.CROP:
                shown.append([call, int(t.calls.canvas[row, call]), *t.calls.box[row, call].tolist()])
            elif kind == Kind.FRAMES:
                shown += [[call, frame] for frame in t.calls.frames[row, call].tolist() if frame >= 0]
        found.append(shown)
    return found


def again(prompts, t, config) -> np.ndarray:
    """The patches of a rollout's rows, from its record and its prompts' images."""
    shape = static_shape(prompts, config, None)
    rows = with_patches(from_trajectories(t), origins(prompts, t.calls, config, shape))
    room = RowShape(rows.tokens.shape[1], *prompts.canvases.shape[1:4], shape.views, shape.patches)
    return np.asarray(see(rows, room, config, shape, None))
