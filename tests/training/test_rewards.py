"""The curiosity reward: the table of values and the switches; terms, built in and a user's; the advantages that follow."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.config import load
from pixel_jax.rollouts.trajectory import CallStatus
from pixel_jax.training.algorithms import group_advantage, nonzero_variance
from pixel_jax.training.rewards import (
    Call,
    RewardConfig,
    RewardError,
    Rewards,
    Row,
    Term,
    curiosity_reward,
    evaluate,
    of_batch,
    of_group,
    total,
)
from pixel_jax.training.rl import RLConfig


def looked(k, n=8):
    return np.array([[1] * k + [0] * (n - k)])


@pytest.mark.parametrize(
    "k, paper, image, video", [(1, 0.0875, 0.175, 0.2333), (2, 0.025, 0.025, 0.0333), (3, 0, 0, 0), (8, 0, 0, 0)]
)
def test_table_of_bonuses(k, paper, image, video):
    ops, wrong = looked(k), np.zeros((1, 8))
    for expected, options in [
        (paper, {}),
        (image, {"form": "released", "is_video": np.array([False])}),
        (video, {"form": "released", "is_video": np.array([True])}),
    ]:
        reward = curiosity_reward(wrong, ops, **options)
        np.testing.assert_allclose(reward[0, :k], expected, atol=5e-5)
        assert (reward[0, k:] == 0).all()


def test_operations_beyond_the_budget_cost():
    reward = curiosity_reward(np.ones((1, 4)), np.array([[0, 1, 2, 5]]))
    np.testing.assert_allclose(reward, [[1, 1, 0.95, 0.8]], rtol=1e-6)
    reward = curiosity_reward(np.ones((1, 4)), np.array([[0, 1, 2, 5]]), budget=2, beta=0.1)
    np.testing.assert_allclose(reward, [[1, 1, 1, 0.7]], rtol=1e-6)


def test_nobody_looks_and_groups_are_independent():
    ops = np.concatenate([np.zeros((1, 8), int), looked(1), looked(8)])
    for options in ({}, {"form": "released", "is_video": np.zeros(3, bool)}):
        reward = curiosity_reward(np.zeros((3, 8)), ops, **options)
        assert np.isfinite(reward).all() and (reward[0] == 0).all() and reward[1, 0] > 0 and (reward[2] == 0).all()


def test_traced_and_host_rewards_agree():
    rng = np.random.default_rng(0)
    correct, ops, video = rng.integers(0, 2, (5, 8)), rng.integers(0, 4, (5, 8)), rng.integers(0, 2, 5).astype(bool)
    for options in ({}, {"form": "released"}):
        host = curiosity_reward(correct, ops, is_video=video, **options)
        device = jax.jit(lambda c, o, v, options=options: curiosity_reward(c, o, is_video=v, **options))(
            jnp.asarray(correct), jnp.asarray(ops), jnp.asarray(video)
        )
        assert host.dtype == np.float32 and isinstance(device, jax.Array)
        np.testing.assert_allclose(host, device, rtol=1e-6)


def test_wrong_shapes_and_forms():
    with pytest.raises(ValueError, match=r"\(8,\)"):
        curiosity_reward(np.zeros(8), np.zeros(8))
    with pytest.raises(ValueError, match="'code'"):
        curiosity_reward(np.zeros((1, 8)), looked(1), form="code")
    with pytest.raises(ValueError, match="is_video"):
        curiosity_reward(np.zeros((1, 8)), looked(1), form="released")


LOOK = Call("crop_image_normalized", {}, CallStatus.DONE, "shown", 0, (0, 0, 10, 10))
FAIL, SPENT = Call("", {}, CallStatus.FAILED, "malformed"), Call("", {}, CallStatus.SPENT, "")


def row(looks=0, tokens=0, *, calls=None, **facts):
    return Row("", (), (LOOK,) * looks if calls is None else tuple(calls), "answer", np.zeros(tokens, int), **facts)


def test_terms_add_up_to_the_reward():
    """Eight rollouts, one of which looks twice: its bonus is .0875, its second look costs .05, its length .25."""
    lengths = [85, 80, 100, 101, 0, 20, 90, 79]
    rows = [row(2 * (i == 0), tokens) for i, tokens in enumerate(lengths)]
    right = {"answer": of_batch(lambda rows, examples: np.ones(len(rows), np.float32))}
    found = Rewards.of(RewardConfig(length_limit=100, length_buffer=20), None, right).values(rows, [None], 8)
    np.testing.assert_allclose(found["curiosity"], [0.0875] + [0] * 7, rtol=1e-6)
    np.testing.assert_allclose(found["budget"], [-0.05] + [0] * 7, rtol=1e-6)
    np.testing.assert_allclose(found["length"], [-0.25, 0, -1, -1, 0, 0, -0.5, 0])
    plain = curiosity_reward(np.ones((1, 8)), np.array([[2] + [0] * 7]))[0]
    np.testing.assert_allclose(total(found.values()), plain + found["length"], rtol=1e-6)
    assert total(found.values()).dtype == np.float32
    found = Rewards.of(RewardConfig(), None, right).values(rows, [None], 8)
    np.testing.assert_array_equal(total(found.values()), plain)
    with pytest.raises(ValueError, match="length_buffer 5 .* = 3"):
        RewardConfig(length_limit=3, length_buffer=5)


def test_what_failed_last():
    assert row(calls=[LOOK, FAIL]).failed_last and not row(calls=[FAIL, LOOK]).failed_last
    assert not row().failed_last and not row(calls=[LOOK, SPENT]).failed_last


@dataclasses.dataclass
class Shown:
    """An example, as far as rewards see it."""

    id: str
    answer: tuple[str, ...] = ("7",)
    question: str = "?"
    fields: dict = dataclasses.field(default_factory=dict)


def values(terms, rows, examples, n, **options):
    config = RewardConfig(terms=tuple((name, 1.0) for name in terms), **options)
    return Rewards.of(config, None).values(rows, examples, n)


def test_answers_are_held_against_the_example():
    rows = [row()._replace(response=text) for text in (r"\boxed{7}", r"\boxed{8}", "nothing", r"\boxed{8}")]
    found = values(["answer"], rows, [Shown("a"), Shown("b", ("8", "9"))], 2, unparsable=-1)
    assert found["answer"].tolist() == [1, 0, -1, 1]


def test_overlap_with_the_reference_box():
    crop = lambda *box, image=0: LOOK._replace(image=image, box=box)
    rows = [
        row(),
        row(calls=[crop(0, 0, 10, 10)]),
        row(calls=[crop(0, 0, 1, 1), FAIL, crop(5, 0, 15, 10)]),  # the best counts: 50 of 150
        row(calls=[crop(0, 0, 10, 10, image=1)]),  # of another image
    ]
    one, several = {"box": [0, 0, 10, 10]}, {"box": [[100, 100, 200, 200], [0.0, 0.0, 10, 5]]}
    found = values(["overlap"], rows + rows, [Shown("a", fields=one), Shown("b", fields=several)], 4)["overlap"]
    np.testing.assert_allclose(found, [0, 1, 50 / 150, 0, 0, 0.5, 25 / 125, 0], rtol=1e-6)
    for fields, words in [({}, "no field 'box', only the usual ones"), ({"box": [5, 0, 5, 9]}, "x1 < x2 and y1 < y2")]:
        with pytest.raises(RewardError, match=f"'overlap', row 0 .example a.: raises .*{words}"):
            values(["overlap"], rows, [Shown("a", fields=fields)], 4)


def test_terms_see_a_row_a_group_or_all():
    rows, examples = [row(tokens=i) for i in range(6)], ["a", "b"]
    single = Term(lambda row, example: len(row.tokens) + (example == "b"))
    assert evaluate("x", single, rows, examples, 3).tolist() == [0, 1, 2, 4, 5, 6]
    group = of_group(lambda rows, example: [len(rows) * len(row.tokens) for row in rows])
    assert evaluate("x", group, rows, examples, 3).tolist() == [0, 3, 6, 9, 12, 15]
    batch = of_batch(
        lambda rows, examples: jnp.array([len(r.tokens) * (e == "b") for r, e in zip(rows, examples, strict=True)])
    )
    found = evaluate("x", batch, rows, examples, 3)
    assert found.tolist() == [0, 0, 0, 3, 4, 5] and found.dtype == np.float32


@pytest.mark.parametrize(
    "term, words",
    [
        (Term(lambda row, example: 1 / 0 if len(row.tokens) == 4 else 1), "row 14 .example 'b'.: raises ZeroDivision"),
        (Term(lambda row, example: None), "row 10 .example 'a'.: returns None .*not a number"),
        (Term(lambda row, example: [1.0]), r"row 10 .*returns \[1.0\] .shape .1,..*not a number"),
        (Term(lambda row, example: "1"), "row 10 .*returns '1'.*not a number"),
        (of_group(lambda rows, example: 0.0), r"rows 10 to 12 .example 'a'.: returns 0.0 .*not 3 numbers"),
        (of_group(lambda rows, example: [1.0] * (3 + (example == "b"))), r"rows 13 to 15 .*shape .4,..*not 3 numbers"),
        (of_batch(lambda rows, examples: np.zeros((6, 1))), r": returns .*\(6, 1\).*not 6 numbers"),
        (of_batch(lambda rows, examples: [[1], [1, 2]]), ": returns .*not 6 numbers"),
        (of_batch(lambda rows: 0), ": raises TypeError"),
    ],
)
def test_a_term_that_gives_no_numbers_is_named(term, words):
    with pytest.raises(RewardError, match=f"^the reward term 'bad'.*{words}"):
        evaluate("bad", term, [row(tokens=i) for i in range(6)], ["a", "b"], 3, first=10)


def test_terms_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_terms.py").write_text(
        "from pixel_jax.training.rewards import of_group\n"
        "def brief(row, example): return -len(row.tokens)\n"
        "rank = of_group(lambda rows, example: range(len(rows)))\n"
        "three = 3\n"
    )
    found = values(["own_terms:brief", "own_terms:rank"], [row(tokens=i) for i in (5, 6)], [None], 2)
    assert found["own_terms:brief"].tolist() == [-5, -6] and found["own_terms:rank"].tolist() == [0, 1]
    with pytest.raises(RewardError, match="'own_terms:three' is 3, not a function"):
        values(["own_terms:three"], [], [], 2)
    for terms, words in [
        ((("curious", 1.0),), "no reward term is called 'curious'; known are answer, curiosity"),
        ((("answer", 1.0), ("answer", 2.0)), "each name once"),
        ((), "one or more"),
    ]:
        with pytest.raises(ValueError, match=words):
            RewardConfig(terms=terms)


def test_a_config_names_code_and_does_not_run_it(tmp_path, monkeypatch):
    """Settings come out of run directories and checkpoints, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_evil.py").write_text("raise SystemExit('was run')")
    config = load(RLConfig, {"iterations": 1, "reward": {"terms": [["own_evil:x", 1], ["answer", 0.5]]}})
    assert config.reward.terms == (("own_evil:x", 1.0), ("answer", 0.5))
    with pytest.raises(SystemExit):
        Rewards.of(config.reward, None)


def test_advantages():
    rewards = np.array([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
    np.testing.assert_allclose(group_advantage(rewards), [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]])
    scaled = group_advantage(rewards, scale_by_std=True)
    np.testing.assert_allclose(scaled[0], np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-4), rtol=1e-6)
    assert (scaled[1] == 0).all()
    for options in ({"scale_by_std": True}, {"baseline": "leave_one_out"}):
        with pytest.raises(ValueError, match="two rollouts"):
            group_advantage(np.ones((3, 1)), **options)


def test_leave_one_out():
    """A row against the mean of the others (Back to Basics, §2.3), in loops."""
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    expected = [[row[i] - np.mean([row[j] for j in range(5) if j != i]) for i in range(5)] for row in rewards]
    np.testing.assert_allclose(group_advantage(rewards, baseline="leave_one_out"), expected, rtol=1e-5)


@pytest.mark.torch
def test_scaled_advantages_are_those_of_trl():
    import torch

    rewards = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    flat = torch.tensor(rewards).reshape(-1)
    mean = flat.view(-1, 8).mean(dim=1).repeat_interleave(8)
    std = flat.view(-1, 8).std(dim=1).repeat_interleave(8)
    expected = ((flat - mean) / (std + 1e-4)).view(-1, 8).numpy()
    np.testing.assert_allclose(group_advantage(rewards, scale_by_std=True), expected, rtol=1e-5, atol=1e-6)


def test_uniform_groups_teach_nothing():
    rewards = np.array([[1.0] * 8, [1.0] * 7 + [0.0], [0.0] * 7 + [0.0875], [0.0] * 7 + [0.025]])
    # the third and fourth deviate on average by 2 x 7/64 of their bonus: .0191 and .0055
    assert nonzero_variance(rewards).tolist() == [False, True, True, False]
    assert nonzero_variance(rewards, threshold=0.001).tolist() == [False, True, True, True]
