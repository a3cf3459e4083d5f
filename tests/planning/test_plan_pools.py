"""The time of an iteration from plans that were made before: hand arithmetic, and the command on the files in `docs`."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from pixel_jax.planning.pools import Work, chips_of, iterations, read_plans
from pixel_jax.planning.search import Plan

ROOT = pathlib.Path(__file__).parents[2]
MESH = {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
FULL = {"fits": True, "bytes_per_chip": 1.0, "flops_per_chip": 1.0, "bytes_moved": 1.0, "collectives": {}}


def plan_of(step, seconds, topology="v5p:2x2x2", **sharding):
    return Plan(topology=topology, step=step, sharding=MESH | sharding, seconds=seconds, bound="memory", **FULL)


def test_an_iteration_by_hand():
    """4 updates of 3 s with scores of 1 s are 16 s; a rollout of rows of full length 24 s on 8 chips, 40 s on 4 others.

    Two prompts for a slot and mean rows of a quarter of the longest: (1/4 + 1) / 2 of the time to all rows' ends; 1/4 where
    rows carry over, with half an update's rows read again: .5 s by 8 chips, 1 s by 4. The weights, 5 GB at 2.5 GB/s, take 2 s.
    """
    training = {"update": plan_of("update", 3.0), "score": plan_of("score", 1.0)}
    four = dataclasses.replace(plan_of("rollout", 40.0, "v5e:2x2"), sharding={"data": 4})
    work = Work(updates=4, moved=5 * 10**9, network=2.5e9, mean_share=0.25, rounds=2, reread=0.5)
    found = {x.name: x for x in iterations(training, four, plan_of("rollout", 24.0), work)}
    assert {name: x.seconds for name, x in found.items()} == {
        "together": 16 + 15,
        "together, rows carry over": 16 + 6 + 0.5,
        "apart": 25 + 2,
        "apart, rows carry over": 16,
    }
    assert [x.chips for x in found.values()] == [8, 8, 12, 12]
    assert found["apart"].used == (16 / 27, 1.0) and found["apart, rows carry over"].used == (1.0, 13 / 16)
    assert found["together"].used == (1.0, 1.0)


def test_chips_of_a_mesh_that_leaves_some_and_of_chips_of_two_devices():
    assert chips_of(plan_of("update", 1.0, "v5p:4x4x4")) == 8
    assert chips_of(plan_of("update", 1.0, "tpu7x:2x2x1")) == 4


@pytest.fixture(scope="module")
def command():
    def run(*arguments):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", code, "plan", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        return ended.returncode, ended.stdout, ended.stderr

    return run


def test_the_command_of_the_page(command):
    """`docs/scale.md`: 16 updates of 11.19 + 2.68 s; 8.29 x 10^9 trained weights in bfloat16; 55 s on v6e."""
    files = ["docs/plan-7b-rl-v5p.json", "docs/plan-7b-rl-v6e.json"]
    code, out, error = command("--config=pixel/qwen2_5_vl_7b_rl", *(f"--pools={name}" for name in files))
    assert code == 0, error
    rows = {
        line[:26].strip(): line[26:].split()
        for line in out.splitlines()
        if "together" in line or "apart" in line.lower()
    }
    v5p, v6e = (read_plans(str(ROOT / name)) for name in files)
    train = 16 * (v5p["update"].seconds + v5p["score"].seconds)
    assert rows["together"][:4] == [
        "64",
        f"{train:.4g}",
        f"{v5p['rollout'].seconds:.4g}",
        f"{train + v5p['rollout'].seconds:.4g}",
    ]
    moving = 16.58e9 / (100e9 / 8)
    assert rows["apart"][0] == "320" and float(rows["apart"][2]) == pytest.approx(
        v6e["rollout"].seconds + moving, rel=1e-3
    )
    assert "16.58 GB of weights move" in out


def test_adapters_alone_move(command):
    code, out, error = command("--config=pixel/qwen2_5_vl_7b_rl:lora", "--pools=docs/plan-7b-rl-v5p.json")
    assert code == 0, error
    moved = float(out.split("Apart, ")[1].split(" GB")[0])
    assert 0.05 < moved < 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--pools=docs/nothing.json"], "nothing.json"),
        (
            ["--pools=docs/plan-7b-sft.json"],
            "has plans of v5p:4x4x4, v5e:16x16, v6e:16x16: name one, as docs/plan-7b-sft.json@",
        ),
        (["--pools=docs/plan-7b-sft.json@v5p:4x4x4"], "has plans of sft: an iteration needs update and rollout"),
        (["--pools=docs/plan-7b-rl-v5p.json", "--mean_response=0"], "a mean response of 0 tokens"),
        (["--pools=docs/plan-7b-rl-v5p.json", "--mean_response=nan"], "a mean response of nan tokens"),
        (["--pools=docs/plan-7b-rl-v5p.json", "--pool_gigabits=0"], "0 Gb/s between the pools must be positive"),
        (["--pools=docs/bench.json"], "has plans of no machine"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words, monkeypatch):

    from pixel_jax.planning import pools

    given = dict(x.removeprefix("--").split("=", 1) for x in arguments)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pools, "moved_bytes", lambda recipe: 1)
    recipe = type("R", (), {})()
    from pixel_jax.config import load
    from pixel_jax.train_config import TrainConfig

    values = {"model": "m", "data": "d", "out": "o", "rl": {"iterations": 1}}
    recipe.config = load(TrainConfig, values)
    mean = float(given["mean_response"]) if "mean_response" in given else None
    with pytest.raises((ValueError, OSError), match=words.replace(".", r"\.")):
        pools.compared(recipe, [given["pools"]], mean, float(given.get("pool_gigabits", 100)))
