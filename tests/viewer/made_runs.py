"""Directories of runs, as the commands write them, made without a model."""

import functools
import json

import numpy as np

from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.results import Results
from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript
from pixel_jax.identity import settle
from pixel_jax.state_files import write_json
from pixel_jax.training.writers import MetricsLog

TOOLS = ("crop_image", "select_frames")


@functools.cache
def uri(seed, top=0, bottom=120, left=0, right=180, step=1):
    """A part of a photograph, as it stands in a trace."""
    return traces.data_uri(photograph(seed)[top:bottom:step, left:right:step])


@functools.cache
def photograph(seed, height=120, width=180):
    """Something that looks like a picture: soft coloured spots."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for _ in range(12):
        cy, cx, r = random.uniform(0, height), random.uniform(0, width), random.uniform(8, 60)
        image += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / r**2)[..., None] * random.uniform(0, 200, 3)
    return np.clip(image + 30, 0, 255).astype(np.uint8)


def conversation(seed, *, title="q", question="Which digit is on the sign?", right=True, calls=1, text="", **more):
    """A conversation with a crop for each call."""
    box = (20, 30, 95, 90)
    boxes = tuple((i + 1, box[0] + 9 * i, box[1], box[2] + 9 * i, box[3]) for i in range(calls))
    pictures = (Picture(uri(seed), 180, 120, f"image{text}", boxes),)
    overview = (Picture(uri(seed, step=4), 45, 30, f"image as the model first sees it{text}"),)
    turns = []
    for i in range(calls):
        crop = uri(seed, 30, 90, 20 + 9 * i, 95 + 9 * i)
        shown = (Picture(crop, 75, 60, "what it saw"),)
        turns.append(ShownTurn("assistant", f"The sign is small: I look closer.{text}", **chosen(seed + i, text)))
        observed = f"Here is the zoomed-in image (Image Size: 75x60).{text}"
        turns.append(ShownTurn("tool", observed, shown, tool=TOOLS[i % 2] + text))
    turns.append(ShownTurn("assistant", f"It is a seven: \\boxed{{7}}{text}", **chosen(seed + 9, text)))
    known = {"answer": "7" + text if right else "3" + text, "reference": "7" + text, "correct": right}
    return Transcript(question + text, pictures, overview, tuple(turns), "answer" + text, title=title, **known, **more)


def chosen(seed, text):
    """Tokens and log-probabilities of a turn."""
    pieces = ["The", " sign", " is", " small", ":", " I", " look", " closer", ".", f"{text}é", "<|im_end|>"]
    log_probs = np.round(-np.random.default_rng(seed).exponential(0.8, len(pieces)), 4)
    return {"pieces": tuple(pieces), "log_probs": tuple(log_probs.tolist())}


def training(out, *, seed=0, steps=40, text="", settings=None, phase="rl"):
    """A directory of `pixel-jax rl`."""
    (out / phase).mkdir(parents=True)
    settle(out / phase, {"data": text, "rl": {"iterations": steps, "alpha": 0.5}} | (settings or {}), of=steps)
    random, log = np.random.default_rng(seed), MetricsLog(out / phase / "metrics.jsonl", 0)
    for step in range(steps):
        part = (step + 1) / steps
        noise = random.normal(0, 0.03, 6)
        log.write(step, {
            "accuracy": float(np.clip(0.3 + 0.5 * part + noise[0], 0, 1)), "rapr": float(np.clip(part + noise[1], 0, 1)),
            "reward": 0.3 + part * 0.8 + noise[2], "reward_answer": 0.3 + part * 0.5, "reward_curiosity": 0.3 * part,
            "loss": 1 / (1 + step) + noise[3], "entropy": float(1.5 - part + noise[4]), "grad_norm": None if step == 3 else 0.2,
        })  # fmt: skip
        if step % 8 == 7:
            log.write(step, {"eval_accuracy": 0.3 + 0.4 * part, "eval_rapr": part})
    log.close()
    for name, numbers in {"held_out": range(0, steps + 1, 8), "rollouts": range(1, steps + 1, 4)}.items():
        folder = out / phase / "traces" / name
        folder.mkdir(parents=True)
        for number in numbers:
            right = [(i + number + seed) % 3 != 0 for i in range(4)]
            rows = [
                conversation(i, title=f"photo {i}{text}", right=right[i], calls=i % 3, text=text, category=f"kind {i % 2}{text}",
                             reward=float(right[i]), advantage=right[i] - 0.6, terms={"answer" + text: float(right[i])})
                for i in range(4)
            ]  # fmt: skip
            traces.save(folder / f"{number:06}.json", rows)
    write_json(out / "settings.json", {"model": "m" + text, "data": "d", "out": str(out)})
    return out


def record(index, *, right=True, tools=(), text="", category="spatial", answers=1):
    """A record of an evaluation."""
    one = [f"I look at it.{text} \\boxed{{{'B' if right else 'C'}}}"] * answers
    return {
        "index": index, "id": f"q{index:05}{text}", "category": category + text,
        "answers": ["B" + text],
        "question": f"Where is the red bag relative to the bench, seen from the entrance, number {index}?{text}",
        "given": ["B" if right else "C" + text] * answers, "score": [float(right)] * answers,
        "accuracy": [float(right)] * answers,
        "operations": [len(tools)] * answers, "executed": [len(tools)] * answers, "failed": [0] * answers,
        "calls": [len(tools)] * answers, "tools": [list(tools)] * answers, "unrecognised": [0] * answers,
        "tokens": [40] * answers, "stop": ["answer" + text] * answers, "responses": one, "shrunk": False,
    }  # fmt: skip


def evaluation(out, count, *, seed=0, text="", traced=4, mode="operations"):
    """A directory of `pixel-jax eval` that has not ended: `count` questions of one benchmark in one mode."""
    directory, random = out / "vstar" / mode, np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tools = [x + text for x in TOOLS[: random.integers(0, 3)]] if mode != "none" else []
        category = ("spatial", "attribute")[i % 2]
        rows.append(record(i, right=bool(random.random() < 0.7), tools=tools, text=text, category=category))
    Results(directory).append(rows)
    (directory / "traces").mkdir()
    for row in rows[:traced]:
        item = conversation(
            row["index"], title=row["id"], question=row["question"], right=row["score"][0] > 0.5, text=text
        )
        traces.save(directory / "traces" / f"{row['index']}.json", [item])
    return out


def torn(path):
    """Leaves the beginning of a line at the end of a file, as a writer does that has not finished."""
    with path.open("a") as file:
        file.write(json.dumps({"step": 99, "accuracy": 1.0})[:-7])
