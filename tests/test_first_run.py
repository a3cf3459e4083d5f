"""What a stranger does on a first day: 20 questions of their own, three commands, a reward curve in ten minutes on two cores."""

import json
import resource

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixel_jax.evaluation import transcript as traces
from pixel_jax.identity import read_history
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.state_files import read_json_lines, read_note
from pixel_jax.training.watch import LOOKS, numbered
from pixel_jax.training.writers import read_metrics
from tests.evaluation.test_report import Reader
from tests.rollouts import scripted_model
from tests.test_cli import command

CALL = scripted_model.CROP + "0.05, 0.11, 0.71, 0.82" + '], "target_image": 1' + scripted_model.CLOSE
MINUTES, CORES = 10, 2


def processor_seconds():
    """What the processes that this one has started and waited for have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def draw_cards(folder):
    """20 photographs, as it were, of a card with a 7 or a 3 on it, and their lines."""
    random, lines = np.random.default_rng(0), []
    for i in range(20):
        card = Image.new("RGB", (190, 180), tuple(random.integers(60, 255, 3).tolist()))
        pen, (x, y) = ImageDraw.Draw(card), random.integers(0, 110, 2).tolist()
        pen.rectangle([x, y, x + 60, y + 60], fill="white")
        pen.text((x + 22, y + 12), "73"[i % 2], fill="black", font_size=30)
        card.save(folder / f"{i}.png")
        answer = "73"[i % 2]
        turns = [CALL, f"\\boxed{{{answer}}}"]
        lines.append({"question": "Which digit?", "images": [f"{i}.png"], "answer": answer, "turns": turns})
    (folder / "cards.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.slow
def test_from_questions_to_a_reward_curve_in_three_commands(tmp_path):
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(scripted_model.model(), processor, tmp_path / "model")
    draw_cards(tmp_path)
    own = ("--config=pixel/own_data", "--config.data=cards.jsonl", "--config.watch.share=0.2")
    small = "--config.{0}.optimizer.learning_rate=2e-3"
    began = processor_seconds()

    def start(*arguments):
        code, out, error = command(*arguments, cwd=tmp_path)
        assert code == 0, error
        return out, error

    tuning = ("--config.sft.batch_size=4", "--config.sft.steps=8", small.format("sft"), "--config.keep_best=accuracy")
    out, _ = start("sft", *own, "--config.model=model", "--config.out=sft", *tuning)
    assert "16 traces" in out and "4 more examples are held out and judge the run" in out
    room = ("--config.rl.rollout.max_response=256", "--config.rl.rollout.max_new_tokens=32")
    learning = ("--config.rl.prompts=4", "--config.rl.train_batch=16", "--config.rl.iterations=6", small.format("rl"))
    out, error = start("rl", *own, "--config.model=sft/model", "--config.out=rl", *room, *learning)
    assert "rl 6/6" in error and "before the first step, on what is held out: accuracy" in out
    out, _ = start("view", "rl", "--out=page.html")
    assert "the run rl: drawn in page.html." in out
    # Of processors, not of the clock, which says how busy the machine is.
    assert processor_seconds() - began < MINUTES * 60 * CORES

    rl = tmp_path / "rl/rl"
    lines = read_metrics(rl / "metrics.jsonl")
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert len(rewards) == 6 and all(np.isfinite(rewards))
    looks = read_json_lines(rl / LOOKS, done=int)
    assert [x["done"] for x in looks] == [0, 2, 4, 6] and all(x["eval_questions"] == 4 for x in looks)
    for name, count in {"held_out": 4, "rollouts": 6}.items():
        files = numbered(rl / "traces" / name)
        assert len(files) == count and len(traces.load(files[-1])) == 4
    assert all(x.reward is not None and x.advantage is not None for x in traces.load(files[-1]))
    seen = Reader((tmp_path / "rl/report.html").read_text())
    assert {"reward", "accuracy", "rate of pixel-space reasoning"} <= set(seen.texts) and seen.tags.count(
        "article"
    ) > 20
    best = read_note(tmp_path / "sft/sft/best.json")
    assert best["by"] == "accuracy" and (tmp_path / "sft/best/model.safetensors").exists()
    (begun,) = read_history(rl)
    assert begun["what"] == "begun" and "jax" in begun["versions"]
    # Started again it says that there is nothing left to do, and the page has both starts.
    out, _ = start("rl", *own, "--config.model=sft/model", "--config.out=rl", *room, *learning)
    assert "rl: already finished, all 6 steps" in out
    assert "already finished from 6 of 6" in "\n".join(Reader((tmp_path / "rl/report.html").read_text()).texts)
