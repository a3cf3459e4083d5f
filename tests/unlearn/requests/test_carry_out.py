"""Requests carried out on a softmax regression: outcomes, their log, interruption, and everything that can be wrong."""

import dataclasses
import errno
import os
import resource
import shutil

import numpy as np
import pytest
from linear_task import LinearTask, answer, file_of, remove
from safetensors.numpy import load_file

from unlearn_jax import cg
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests import carry_out as module
from unlearn_jax.requests import log as log_module
from unlearn_jax.requests.carry_out import State, carry_out
from unlearn_jax.requests.log import ADAPTER, LOG, PAGE, REPORT, REQUEST, LogError, read_log, verify
from unlearn_jax.requests.request import EditRequestError
from unlearn_jax.requests.task import RequestsConfig, refuse_another_training

REQUESTS = [remove("p3"), answer("p5", "1"), remove("p7", "p8")]
UNSEEN = remove("p9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return LinearTask(tmp_path_factory.mktemp("trained")).train().directory


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """A run in which all requests have been carried out."""
    directory = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(trained, directory)
    entries = carry_out(LinearTask(directory), REQUESTS)
    return directory, entries


@pytest.fixture
def task(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return LinearTask(tmp_path / "run")


def test_requests_in_order_come_near_the_retrain(done):
    directory, entries = done
    assert [entry.outcome for entry in entries] == ["edited"] * 3
    assert [entry.ids for entry in entries] == [["p3"], ["p5"], ["p7", "p8"]]
    task = LinearTask(directory)
    state = State.of(task)
    assert state.items["p5"].labels[0] == 1 and not {"p3", "p7", "p8"} & state.items.keys()
    weights = np.array([float(name in state.items) for name in state.first])
    exact = task.retrain({**state.first, **state.items}, weights).adapter["w"]
    before, after = (load_file(path)["w"] for path in (directory / ADAPTER, state.adapter_path(directory)))
    assert np.linalg.norm(after - exact) < 0.1 * np.linalg.norm(before - exact)
    # Weight zero is the same as not there.
    gone = task.objective(state.items).gradient({"w": exact})["w"]
    assert np.abs(np.asarray(gone)).max() < 1e-5
    assert verify(directory / LOG) == (entries, [])


def test_asked_twice_it_does_nothing_twice(done):
    directory, _ = done
    before = file_of(directory)
    assert carry_out(LinearTask(directory), REQUESTS) == [] and file_of(directory) == before
    assert carry_out(LinearTask(directory), [REQUESTS[0], REQUESTS[0]]) == [] and file_of(directory) == before


def test_what_was_done_already_is_logged_as_nothing_to_do(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    task = LinearTask(tmp_path / "run")
    entries = carry_out(
        task, [remove("p3", who="C. Person"), answer("p5", "1"), answer("p6", str(task.items()["p6"].labels[0]))]
    )
    assert [entry.outcome for entry in entries] == ["nothing to do"] * 2
    assert entries[0].adapter_after == done[1][-1].adapter_after == entries[1].adapter_after
    assert ADAPTER not in entries[0].files and verify(task.directory / LOG)[1] == []
    (entry,) = carry_out(task, [remove("p3", "p9")])  # half of it was done
    assert entry.outcome == "edited" and State.of(task).items.keys() == State.of(LinearTask(done[0])).items.keys() - {
        "p9"
    }


def test_every_kind_is_an_edit(task, tmp_path):
    one = answer("p1", "0")
    requests = [
        dataclasses.replace(one, kind="question", value="0.5"),
        dataclasses.replace(one, kind="mask", value="the second"),
        dataclasses.replace(one, kind="image", value="", image=b"\x10\x20\x30\x40"),
    ]
    entries = carry_out(task, requests)
    assert [entry.outcome for entry in entries] == ["edited"] * 3
    item = State.of(task).items["p1"]  # read back from what the run stored
    assert item.x.tolist() == [0.25, 0.5, 0.75, 1.0] and item.mask == (True, False)
    assert carry_out(task, requests) == []
    assert {path.name[:7] for path in (task.directory / "requests" / "0003").iterdir()} >= {"sha256-", "request"}


# ---- escalation


def test_a_limit_that_is_not_allowed_is_escalated_to_the_exact_replay(task):
    task.requests = RequestsConfig(allow=())
    task.erasure = ErasureConfig(weight_decay=1e-2, newton_steps=1, solver=cg(rtol=1e-9, max_steps=1))
    (entry,) = carry_out(task, [remove("p3", "p4")])
    assert entry.outcome == "escalated" and "the limit 'solver' is not allowed" in entry.why and task.retrained == 1
    state = State.of(task)
    left = load_file(state.adapter_path(task.directory))
    assert np.abs(np.asarray(task.objective(state.items).gradient(left)["w"])).max() < 1e-5
    task.requests = RequestsConfig(allow=("solver",))
    (entry,) = carry_out(task, [remove("p5")])
    assert entry.outcome == "edited" and task.retrained == 1


def test_an_edit_that_does_not_improve_is_escalated(task, monkeypatch):
    real = module.erase

    def worse(*arguments, **options):
        found = real(*arguments, **options)
        report = dataclasses.replace(found.report, verdict="not_improved", reason="it rose")
        return found._replace(report=report)

    monkeypatch.setattr(module, "erase", worse)
    (entry,) = carry_out(task, [remove("p3")])
    assert entry.outcome == "escalated" and entry.why == "not improved: it rose; retrained from the beginning"


def test_an_edit_that_is_dearer_than_the_training_is_not_computed(task, monkeypatch):
    short = ErasureConfig(weight_decay=1e-2, training_epochs=1.0)
    task.erasure = short
    monkeypatch.setattr(module, "erase", lambda *arguments, **options: pytest.fail("computed"))
    (entry,) = carry_out(task, [remove("p3")])
    assert entry.outcome == "escalated" and task.retrained == 1
    assert "'dearer' is not allowed: an edit costs at least 1.58 epochs of gradients, the training cost 1" in entry.why
    other = LinearTask(task.directory.parent / "other", scale=3.0, erasure=short)
    shutil.copytree(task.directory, other.directory, ignore=shutil.ignore_patterns("requests*"))
    unchanged(other, "with this base model: the gradient of the training's objective is .* training left")


def test_an_edit_may_cost_no_more_than_the_training(task, monkeypatch):
    task.erasure, real, budgets = ErasureConfig(weight_decay=1e-2, training_epochs=3.0), module.erase, []

    def watched(*arguments, **options):
        budgets.append(arguments[4].budget)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "erase", watched)
    assert task.erasure.budget == 6
    carry_out(task, [remove("p3")])
    task.requests = RequestsConfig(allow=(*RequestsConfig().allow, "dearer"))
    carry_out(task, [remove("p4")])
    assert budgets == [3, 6]


# ---- interruption


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize("place", ["erase", "draw_page", "append"])
def test_interrupted_it_goes_on_to_the_same_files(place, task, done, monkeypatch):
    calls, real = [], getattr(module, place)

    def die(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(module, place, die)
    with pytest.raises(Killed):
        carry_out(task, REQUESTS)
    assert len(read_log(task.directory / LOG)) == 1
    monkeypatch.setattr(module, place, real)
    assert len(carry_out(task, REQUESTS)) == 2
    assert file_of(task.directory).keys() == file_of(done[0]).keys()
    adapters = [load_file(x / "requests" / "0003" / ADAPTER)["w"] for x in (task.directory, done[0])]
    np.testing.assert_array_equal(*adapters)
    assert verify(task.directory / LOG)[1] == []


def test_a_line_that_a_kill_has_cut_off_is_none(task):
    carry_out(task, REQUESTS[:2])
    path = task.directory / LOG
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert any("in the middle of a line" in fault for fault in verify(path)[1])
    (entry,) = carry_out(task, REQUESTS[:2])
    assert entry.number == 2 and verify(path)[1] == []


def test_a_full_disk(task, monkeypatch):
    carry_out(task, REQUESTS[:1])
    before = file_of(task.directory)
    real = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(LOG):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(log_module.os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written .No space left on device.: log and adapter are as they were"):
        carry_out(task, REQUESTS)
    assert file_of(task.directory) == before
    monkeypatch.setattr(log_module.os, "fsync", real)
    assert len(carry_out(task, REQUESTS)) == 2 and verify(task.directory / LOG)[1] == []


@pytest.mark.parametrize("name", [REQUEST, REPORT, PAGE])
def test_a_disk_that_is_full_before_the_log_is_reached(name, task, monkeypatch):
    carry_out(task, REQUESTS[:1])
    before, real = file_of(task.directory), os.fsync

    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        carry_out(task, REQUESTS[:2])
    assert file_of(task.directory) == before
    monkeypatch.setattr(os, "fsync", real)
    assert len(carry_out(task, REQUESTS[:2])) == 1 and verify(task.directory / LOG)[1] == []


def test_a_disk_that_takes_half_a_line(task):
    """The kernel writes what fits below the limit of a file's size, and refuses the rest."""
    entries = carry_out(task, REQUESTS[:1])
    path = task.directory / LOG
    before = path.read_bytes()
    again = dataclasses.replace(entries[0], number=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        with pytest.raises(OSError, match="log and adapter are as they were"):
            log_module.append(path, again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


# ---- what is refused, with log and adapter as they were


def unchanged(task, message, requests=(UNSEEN,), error=EditRequestError):
    before = file_of(task.directory)
    with pytest.raises(error, match=message):
        carry_out(task, list(requests))
    assert file_of(task.directory) == before


def test_requests_that_cannot_be_carried_out(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    task = LinearTask(tmp_path / "run")
    unchanged(
        task, r"request 2 of 2: no training example has the id 'p33': did you mean 'p3'", [remove("p1"), remove("p33")]
    )
    unchanged(task, "'p3' was removed by an earlier request, which this one contradicts", [answer("p3", "1")])
    unchanged(task, "request 2 of 2: 'p1' was removed by an earlier", [remove("p1"), answer("p1", "1")])
    unchanged(task, "'7' is no class", [remove("p1"), answer("p2", "7")])
    unchanged(task, "removes the last training example", [remove(*task.items())])


def test_an_answer_that_replaces_an_earlier_one_is_said(task, capsys):
    first, second = answer("p4", "1"), answer("p4", "2")
    carry_out(task, [first])
    assert "an earlier one gave" not in capsys.readouterr().out
    carry_out(task, [first, second])
    assert "request 2 of 2 replaces the answer that an earlier one gave 'p4'" in capsys.readouterr().out


def test_an_adapter_that_was_not_trained_on_these_examples(task):
    other = LinearTask(task.directory, seed=1)
    unchanged(other, "was not trained on these examples: their hash is")
    changed = LinearTask(task.directory, scale=3.0)
    unchanged(changed, "with this base model: the gradient of the training's objective is .* training left")
    task.save(task.directory / ADAPTER, {"w": np.ones((4, 3), np.float32)})
    unchanged(task, "is not the adapter that was trained: its hash is")
    (task.directory / "trained.json").unlink()
    unchanged(task, "has no training record: run `unlearn-jax train`")


def test_files_that_were_changed(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    task = LinearTask(tmp_path / "run")
    with pytest.raises(EditRequestError, match="train in another --config.out"):
        refuse_another_training(task.directory, {})
    folder = task.directory / "requests" / "0003"
    kept = (folder / ADAPTER).read_bytes()
    task.save(folder / ADAPTER, {"w": np.ones((4, 3), np.float32)})
    unchanged(task, "is not the adapter of the log", error=LogError)
    (folder / ADAPTER).write_bytes(kept)
    stored = folder / "request.json"
    stored.write_bytes(stored.read_bytes().replace(b"p7", b"p1"))
    unchanged(task, "is not the request of the log: it was changed", error=LogError)
