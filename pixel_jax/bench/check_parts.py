"""The parts of `pixel-jax check`, each of which runs in its own process.

    python -m pixel_jax.bench.check_parts NAME [--quick]

prints the part's figures as one line of JSON. A part is a function of `quick` (tiny shapes, as a smoke test) that returns its
figures and, in words, what is wrong. On CPUs shapes are always tiny.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.bench.inference import decoding
from pixel_jax.bench.machine import best_seconds, measure_machine
from pixel_jax.bench.memory import highest, taken
from pixel_jax.bench.network import images, model_config, text_tokens, vocabulary
from pixel_jax.bench.training import make_batch, optimizer
from pixel_jax.models import LanguageModel, Qwen2_5_VLConfig, kernels
from pixel_jax.models.attention import Mask, attention
from pixel_jax.models.flops import PEAK_FLOPS, row_work, training_flops
from pixel_jax.models.released import released
from pixel_jax.ops import crop_resize
from pixel_jax.planning.search import peak_bytes
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, make_rl_step

LAYERS = 4  # of the decoder and of the vision tower: float32 weights and moments of a 7B's four take 34 GB, most of it embeddings
# Largest difference from dense attention in float32, of the largest value. bfloat16 rounds to 1/256; kernels multiply float32
# numbers as TF32, which has 10 bits.
TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}
PLANNED = (0.7, 1.1)  # allowed ratio of a step's real to its planned memory
PartResult = tuple[dict[str, Any], list[str]]  # figures, and what is wrong


def machine(quick: bool) -> PartResult:
    """The peak rates of the machine, with which other parts are compared."""
    return dataclasses.asdict(measure_machine(quick)), []


def attention_kernels(quick: bool) -> PartResult:
    """Compares the platform's attention kernel with dense attention: values and gradients, at the shapes of a 7B."""
    figures, wrong = {}, []
    for kind in ("causal", "packed", "vision"):
        for dtype in TOLERANCE:
            name = f"{kind}, {dtype}"
            try:
                figures[name] = error = _kernel_error(kind, dtype, quick)
            except Exception as failure:  # a compiler may raise anything; the other cases go on
                wrong.append(f"{name}: {type(failure).__name__}: {failure}"[:1000])
                continue
            if not error <= TOLERANCE[dtype]:
                wrong.append(f"{name}: off by {error:.1e} of the largest value, {TOLERANCE[dtype]:.0e} is allowed")
    return figures, wrong


def _kernel_error(kind: str, dtype: str, quick: bool) -> float:
    """The largest difference of output and gradients from dense attention in float32, as a part of the largest value."""
    rows, length, heads, kv_heads, dim = (1, 160, 4, 2, 32) if quick else (2, 2000, 28, 4, 128)
    if kind == "vision" and not quick:
        heads, kv_heads, dim = 16, 16, 80
    causal, index = kind != "vision", np.arange(length)
    valid = np.tile(index < length - 37, (rows, 1))
    order = np.tile(index * causal, (rows, 1))
    segments = np.tile(index // (length // 3), (rows, 1)) if kind == "packed" else np.zeros_like(order)
    mask = Mask(*map(jnp.asarray, (order, np.where(valid, order, -1), segments, segments)))
    draw = jax.random.normal
    keys = jax.random.split(jax.random.key(0), 3)
    q = draw(keys[0], (rows, length, heads, dim), dtype)
    k, v = (draw(key, (rows, length, kv_heads, dim), dtype) for key in keys[1:])

    def kernel(q, k, v):
        if jax.default_backend() != "cpu":
            return attention(q, k, v, mask, causal=causal, implementation="kernel")
        assert mask.k_segment is not None and mask.q_segment is not None
        visible = jnp.where(mask.k_order >= 0, mask.k_segment, kernels.INVISIBLE)
        return kernels.triton(q, k, v, mask.q_segment, visible, causal=causal, interpret=True)

    def loss(attend, q, k, v):
        out = jnp.where(valid[..., None, None], attend(q, k, v), 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def both(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))

    ours = both(kernel)(q, k, v)
    with jax.default_matmul_precision("highest"):
        dense = functools.partial(attention, mask=mask, causal=causal)
        expected = both(dense)(*(x.astype(jnp.float32) for x in (q, k, v)))

    def difference(a, b):
        return jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))

    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(difference, ours, expected)))))


def crops(quick: bool) -> PartResult:
    """Compares crops of random boxes with Pillow's bit for bit, in the order of passes of the installed Pillow."""
    import PIL
    from PIL import Image

    count, height, width, most = (12, 120, 90, 56) if quick else (64, 1536, 2048, 1008)
    order = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal_first"
    image, random = images(1, height, width)[0], np.random.default_rng(0)
    corner = random.integers(0, [width // 2, height // 2], (count, 2))
    boxes = np.concatenate([corner, corner + random.integers(8, [width // 2, height // 2], (count, 2))], axis=1)
    sizes = random.integers(1, most // 28 + 1, (count, 2)) * 28
    buffer = jnp.asarray(image)
    cut = jax.jit(lambda image, box, size: crop_resize(image, box, size, (most, most), order=order))
    picture, differ, values = Image.fromarray(image), 0, 0
    for box, (tall, wide) in zip(boxes.astype(np.int32), sizes.astype(np.int32), strict=True):
        shown = picture.crop(tuple(box.tolist())).resize((int(wide), int(tall)), Image.Resampling.BICUBIC)
        ours = np.asarray(cut(buffer, box, np.array([tall, wide])))[:tall, :wide]
        differ, values = differ + int((ours != np.asarray(shown)).sum()), values + ours.size
    figures = {"crops": count, "values": values, "differ": differ, "Pillow": PIL.__version__, "order": order}
    return figures, [f"{differ} of {values} values differ from Pillow {PIL.__version__}"] if differ else []


def few_layers(name: str, quick: bool) -> Qwen2_5_VLConfig:
    """The released network with `LAYERS` layers in decoder and tower, and the special tokens of the bench's vocabulary."""
    words = vocabulary()
    config = model_config(True) if quick else released(f"qwen2.5-vl-{name}")
    if quick:
        return config
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_hidden_layers=LAYERS),
        vision=dataclasses.replace(config.vision, depth=LAYERS, fullatt_block_indexes=(LAYERS - 1,)),
        image_token_id=words.image_pad,
        video_token_id=words.video_pad,
        vision_start_token_id=words.vision_start,
        vision_end_token_id=words.vision_end,
    )


def update(name: str, quick: bool) -> PartResult:
    """An RL update of all weights: its time, its utilisation (MFU), and its memory compared with the planned."""
    network, before = few_layers(name, quick), taken()
    rows, length, side, turns = (2, 24, 56, 1) if quick else (8, 2048, 784, 4)
    batch = jax.device_put(make_batch(rows, length, side))
    forward = ForwardConfig(
        remat=True,
        implementation="kernel",
        micro_batches=turns,
        compute_dtype=None if quick else "bfloat16",  # bfloat16 is slow on CPUs
    )
    step = make_rl_step(forward, PolicyLossConfig(), optimizer())
    # In one program: built weight by weight, the state would need twice its memory, and more than the step.
    state = [jax.jit(lambda key: init_state(LanguageModel(network, key), optimizer()))(jax.random.key(0))]
    assert isinstance(step, jax.stages.Wrapped)
    compiled = step.lower(state[0], batch).compile()
    losses = []

    def run():
        state[0], report = compiled(state[0], batch)
        losses.append(report.metrics["loss"])
        return report

    real, seconds = highest(run, before), best_seconds(run, 3)
    flops = sum(training_flops(network, row_work(np.full(rows, length), np.asarray(batch.visual.grids), network)))
    planned, peak = peak_bytes(compiled), PEAK_FLOPS.get(jax.devices()[0].device_kind)
    figures = {
        "layers": network.text.num_hidden_layers,
        "tokens": rows * length,
        "seconds": seconds,
        "flops": flops,
        "mfu": None if peak is None else flops / seconds / peak,
        "planned_bytes": planned,
        "real_bytes": real,
        "losses": list(map(float, losses)),
    }
    wrong = [] if np.isfinite(figures["losses"]).all() else [f"losses are {figures['losses']}"]
    if not quick and real is not None and not PLANNED[0] <= real / planned <= PLANNED[1]:
        wrong.append(f"the step takes {real / 1e9:.1f} GB of memory, planned were {planned / 1e9:.1f}")
    return figures, wrong


def decode(quick: bool) -> PartResult:
    """Measures decoding of 8 rows at a 7B's shapes: bytes of weights and caches read per second, and their share of the peak."""
    model = jax.jit(
        functools.partial(LanguageModel, few_layers("7b", quick), dtype=jnp.float32 if quick else jnp.bfloat16)
    )(jax.random.key(0))
    rows, length, steps = (8, 16, 6) if quick else (8, 256, 128)
    work = decoding(model, text_tokens(rows, length), steps, quick)
    run, ceiling = work.prepare(model), measure_machine(quick).read
    seconds = best_seconds(run, 3)
    figures = {"rows": rows, "steps": steps, "seconds": seconds, "bytes_per_second": work.bytes / seconds}
    return figures | {"share_of_read": work.bytes / seconds / ceiling}, []


PARTS: dict[str, Callable[[bool], PartResult]] = {
    "machine": machine,
    "kernels": attention_kernels,
    "crops": crops,
    "decode": decode,
    "update-3b": functools.partial(update, "3b"),
    "update-7b": functools.partial(update, "7b"),
}


def main(name: str, quick: bool) -> None:
    """Prints the figures of a part."""
    device = jax.devices()[0]
    quick = quick or device.platform == "cpu"
    figures, wrong = PARTS[name](quick)
    print(json.dumps({"device": device.device_kind, "quick": quick, "figures": figures, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], quick="--quick" in sys.argv[2:])
