"""A run directory holds one run: what may change, what changes the experiment, and what cannot change."""

import jax
import numpy
import pytest

from pixel_jax.identity import (
    CAME_LATER,
    KINDS,
    RUN,
    ChangeKind,
    RunError,
    kind_of,
    read_history,
    read_settings,
    settle,
)

FACTS = {
    "seed": 0,
    "out": "runs/a",
    "data": "a.jsonl",
    "data.answer": "12ab",
    "weights": "34cd",
    "sft": {"steps": 6, "batch_size": 4, "save_every": 2, "optimizer": {"learning_rate": 1e-3, "kind": "adamw"}},
}


def changed(**facts):
    sft = {**FACTS["sft"], **facts.pop("sft", {})}
    return {**FACTS, **facts, "sft": sft}


def test_the_same_run_goes_on_without_a_word(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/pixel-jax", "sft", "--config=a b.py"])
    for done in (None, 2, 6):
        settle(tmp_path, FACTS, done=done, of=6)
    assert capsys.readouterr().err == ""
    assert read_settings(tmp_path)["sft.optimizer.learning_rate"] == 1e-3
    found = read_history(tmp_path)
    assert [(x["what"], x["done"], x["of"], x["changed"]) for x in found] == [
        ("begun", None, 6, {}),
        ("went on", 2, 6, {}),
        ("already finished", 6, 6, {}),
    ]
    line = found[0]
    assert line["time"] and line["host"] and line["command"] == "pixel-jax sft '--config=a b.py'"
    assert line["versions"]["jax"] == jax.__version__ and line["versions"]["numpy"] == numpy.__version__
    assert line["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}


@pytest.mark.parametrize(
    "facts", [{"out": "/b"}, {"data": "/elsewhere/a.jsonl"}, {"sft": {"save_every": 9}}, {"mesh": {"data": 2}}]
)
def test_what_may_change_does_and_is_noted(facts, tmp_path):
    settle(tmp_path, FACTS)
    settle(tmp_path, changed(**facts), done=2)
    settle(tmp_path, changed(**facts), done=4)
    assert [(x["done"], len(x["changed"])) for x in read_history(tmp_path)] == [(None, 0), (2, 1), (4, 0)]


@pytest.mark.parametrize(
    ("facts", "name", "values"),
    [
        ({"data.answer": "99ef"}, "data.answer", "'12ab', now it is '99ef'"),
        ({"sft": {"steps": 3}}, "sft.steps", "6, now it is 3"),
        ({"sft": {"optimizer": {"learning_rate": 1.0, "kind": "adamw"}}}, "sft.optimizer.learning_rate", "0.001"),
        ({"a_setting_of_tomorrow": True}, "a_setting_of_tomorrow", "'not set', now it is True"),
    ],
)
def test_another_experiment_has_to_be_wanted_and_is_written_down(facts, name, values, tmp_path, capsys):
    settle(tmp_path, FACTS)
    with pytest.raises(RunError, match=f"{name} = {values}.*--resume_changed"):
        settle(tmp_path, changed(**facts), done=2, resume_changed=False)
    assert len(read_history(tmp_path)) == 1 and read_settings(tmp_path)["sft.steps"] == 6
    settle(tmp_path, changed(**facts), done=2, resume_changed=True)
    assert name in capsys.readouterr().err
    assert [(x["done"], list(x["changed"])) for x in read_history(tmp_path)] == [(None, []), (2, [name])]
    with pytest.raises(RunError, match=name):  # and back again is a change, too
        settle(tmp_path, FACTS, done=4, resume_changed=False)


LATER = {"rl": {"staleness": 0, "rollout_budget": {"tokens": None, "share": None}, "rollout": {"weights": None}}}


@pytest.mark.parametrize("resume_changed", [None, False, True])
def test_settings_that_came_after_a_run_was_begun_do_not_end_it(resume_changed, tmp_path, capsys):
    """Where they mean what it did, which is said once."""
    settle(tmp_path, FACTS)
    settle(tmp_path, {**FACTS, **LATER}, done=2, resume_changed=resume_changed)
    said = capsys.readouterr().err
    assert "it goes on with rl.staleness = 0, rl.rollout_budget.tokens = None" in said and "now it is" not in said
    assert read_history(tmp_path)[-1]["changed"]["rl.staleness"] == ["not set", 0]
    settle(tmp_path, {**FACTS, **LATER}, done=4, resume_changed=resume_changed)
    assert capsys.readouterr().err == "" and read_settings(tmp_path)["rl.staleness"] == 0
    with pytest.raises(RunError, match="rl.staleness = 0, now it is 1"):
        settle(tmp_path, {**FACTS, "rl": {**LATER["rl"], "staleness": 1}}, done=4, resume_changed=resume_changed)


@pytest.mark.parametrize("value", [1, 2])
def test_a_later_setting_that_means_something_else_is_a_change(value, tmp_path):
    settle(tmp_path, FACTS)
    with pytest.raises(RunError, match=f"rl.staleness = 'not set', now it is {value}: choose another directory$"):
        settle(tmp_path, {**FACTS, "rl": {"staleness": value}}, done=2, resume_changed=True)
    with pytest.raises(RunError, match="a_setting_of_tomorrow = 'not set', now it is None"):  # its meaning is not known
        settle(tmp_path, {**FACTS, "a_setting_of_tomorrow": None}, done=2, resume_changed=False)


@pytest.mark.parametrize("facts", [{"seed": 1}, {"weights": "ffff"}, {"sft": {"batch_size": 8}}])
def test_what_cannot_be_gone_on_from_is_refused(facts, tmp_path):
    settle(tmp_path, FACTS)
    for allowed in (False, True):
        with pytest.raises(RunError, match=r"now it is .*choose another directory$"):
            settle(tmp_path, changed(**facts), done=2, resume_changed=allowed)
    settle(tmp_path, changed(**facts))  # nothing of it was saved: it begins anew, as another run
    assert [x["what"] for x in read_history(tmp_path)] == ["begun", "begun anew"]


def test_where_nothing_may_change(tmp_path):
    settle(tmp_path, FACTS)
    with pytest.raises(RunError, match=r"sft.steps = 6, now it is 3: choose another directory$"):
        settle(tmp_path, changed(sft={"steps": 3}), done=2, resume_changed=None)


@pytest.mark.parametrize("content", [None, b"", b'{"seed": ', b"[]"])
def test_a_damaged_or_missing_note_is_said_and_made_again(content, tmp_path, capsys):
    settle(tmp_path, FACTS)
    (tmp_path / RUN).unlink() if content is None else (tmp_path / RUN).write_bytes(content)
    with pytest.raises(RunError, match="has no run.json that can be read"):
        read_settings(tmp_path)
    settle(tmp_path, FACTS, done=2)
    assert str(tmp_path / RUN) in capsys.readouterr().err
    assert read_history(tmp_path)[-1]["what"] == "what it was begun as is not known"
    assert read_settings(tmp_path)["seed"] == 0


def test_kinds_are_declared_for_settings_that_there_are():
    """A pattern that no setting has any more, or a misspelt one, would make nothing free or fixed."""
    import dataclasses
    import fnmatch

    from pixel_jax.config import load
    from pixel_jax.identity import flatten
    from pixel_jax.train_config import LoRAConfig, TrainConfig

    values = {
        "model": "m",
        "data": "d",
        "out": "o",
        "mesh": {"data": 1},
        "rollout_mesh": {"data": 1},
        "columns": {"question": "q"},
    }
    values |= {"lora": LoRAConfig(1, 1.0, "x"), "sft": {"steps": 1}}
    judge = {"rules": ("box", "judge"), "judge": {"url": "http://localhost:1/v1", "model": "m"}}
    values |= {"rl": {"iterations": 1, "reward": {"scorer": judge}}}
    names = set(flatten(dataclasses.asdict(load(TrainConfig, values)))) | {"weights", "adapter_weights", "tokenizer"}
    found = flatten(dataclasses.asdict(load(TrainConfig, values)))
    assert {name: found[name] for name in CAME_LATER} == CAME_LATER  # the value of a config that does not name it
    for pattern in KINDS:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in names), pattern
    free = {name for name in names if kind_of(name) is ChangeKind.FREE}
    assert {"rl.rollout.in_flight", "sft.forward.remat", "rl.writers", "sft.keep", "read_threads"} <= free
    another = ("rl.rollout.pad", "rl.reward.alpha", "sft.optimizer.learning_rate", "trace_tokens", "tokenizer")
    assert {kind_of(name) for name in another} == {ChangeKind.CHANGES}
