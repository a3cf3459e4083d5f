"""A small study of wrong answers: what is learned, what is scored, its cells, its page, and the commands."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score
from small_noisy import FEW, make_config

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError
from pixel_jax.data.example import Example
from pixel_jax.models.io import from_pretrained
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, split
from unlearn_jax.noisy_responses.answerer import first_logits
from unlearn_jax.noisy_responses.questions import ChoiceQuestion
from unlearn_jax.noisy_responses.report import REPORT
from unlearn_jax.noisy_responses.study import COMMANDS, NoisyResponsesStudy, choice_scores
from unlearn_jax.studies.cells import Cell, cells_of, read_cell, run_cells
from unlearn_jax.studies.methods import METHODS
from unlearn_jax.studies.page import write_page
from unlearn_jax.studies.study import alone

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = (
    pytest.mark.slow
)  # a base model is trained first; `test_choice_readers.py` and `test_photographs.py` are fast


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small study with a few methods."""
    config = make_config(tmp_path_factory.mktemp("noisy"))
    study = NoisyResponsesStudy.of(config)
    run_cells(study, cells_of(config))
    return config, study


def row(config, method, seed=0):
    return read_cell(config, Cell("response", 0.4, seed, method))["row"]


def moved(study, seed=0):
    """An adapter that changes a lot."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=x.shape), jnp.float32) for name, x in study.answerer.shape.items()}


def test_two_fifths_of_the_answers_are_wrong_and_pictures_are_held_out(run):
    _, study = run
    case = study.case("response", 0.4, 0)
    different = [i for i, (a, b) in enumerate(zip(case.rows, case.corrupted, strict=True)) if a.answer != b.answer]
    assert different == case.touched.tolist() and len(different) == 8
    assert not {x.picture for x in case.rows} & {x.picture for x in study.tested}
    assert len({x.picture for x in study.tested}) > 1
    for i in different:
        assert case.corrupted[i].answered(case.rows[i].answer) == case.rows[i]
    (correction,) = case.edits
    assert type(correction).__name__ == "CorrectResponse" and correction.ids == [case.names[i] for i in case.touched]
    other = study.case("response", 0.4, 1)
    assert other.names != case.names


def test_features_in_the_place_of_pictures_change_nothing(run):
    """The logits are those of the whole model for the same tokens and the picture itself, in the layout of transformers."""
    config, study = run
    adapter = moved(study)
    rows = study.unseen
    found = jax.vmap(lambda example: study.loss.z(adapter, example))(rows)
    model, processor = from_pretrained(pathlib.Path(config.out) / "base")
    model = add_lora(model, jax.random.key(0), **dataclasses.asdict(config.adapter))
    model = combine(adapter, split(model, LoRAWeight)[1])
    import pixel_jax

    for i, question in enumerate(study.tested[:4]):
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.example.question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        inputs = processor(text=text + question.answer, images=[question.pixels()])
        length = inputs["input_ids"].shape[1]
        np.testing.assert_array_equal(rows["tokens"][i, :length], inputs["input_ids"][0])
        expected = pixel_jax.forward(model, **inputs)[0, -2]
        np.testing.assert_allclose(found[i, 0], expected, rtol=1e-4, atol=1e-4)
        assert rows["labels"][i, 0] == inputs["input_ids"][0, -1]


def test_the_likeliest_of_the_options_is_chosen(run):
    _, study = run
    adapter = moved(study, 1)
    logits = np.asarray(first_logits(study.loss, adapter, study.unseen, study._choices))
    whole = np.asarray(jax.vmap(lambda example: study.loss.z(adapter, example))(study.unseen))[:, 0]
    letters = [study.answerer.writer.said(letter)[0] for letter in "ABCD"]
    np.testing.assert_allclose(logits, whole[:, letters], rtol=1e-5, atol=1e-5)
    right = np.mean([q.answer == "ABCD"[i] for q, i in zip(study.tested, logits.argmax(axis=1), strict=True)])
    assert study.scores(alone(adapter))["accuracy"] == pytest.approx(right)


def test_scores_by_type_and_f1():
    ask = lambda answer, category, choices: ChoiceQuestion(
        Example("", "?", (), (answer,), category=category), choices, ""
    )
    letters = ("A", "B")
    questions = [ask("A", "Shape", letters), ask("B", "Shape + Colour", letters), ask("A", "Colour", letters)]
    found = choice_scores(questions, np.array([0, 0, 0]))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_error"] == pytest.approx(np.sqrt(2 / 27))
    assert found["accuracy: Shape"] == found["accuracy: Colour"] == found["worst_category"] == 0.5
    assert found["accuracy_of_categories"] == 0.5 and "f1" not in found
    random = np.random.default_rng(0)
    meant, said = random.integers(0, 2, (2, 40))
    questions = [ask(("Yes", "No")[i], "", ("Yes", "No")) for i in meant]
    assert choice_scores(questions, said)["f1"] == pytest.approx(f1_score(meant == 0, said == 0))


def test_cells_hold_what_the_page_shows(run, tmp_path):
    config, _ = run
    assert len(list(pathlib.Path(config.cells).iterdir())) == len(FEW) == len(cells_of(config))
    for name in FEW:
        found = row(config, name)
        assert 0 <= found["accuracy"] <= 1 and found["kl_right"] >= -1e-6 and 0 <= found["auc_member"] <= 1
    assert row(config, "retrain, cold")["kl_right"] == pytest.approx(0, abs=1e-6)
    assert row(config, "corrupted")["kl_right"] > 1e-6
    assert row(config, "retrain, cold")["loss_forget"] > row(config, "corrupted")["loss_forget"]
    write_page({"tiny": config}, tmp_path / "page", REPORT)
    page = (tmp_path / "page.md").read_text()
    assert "3 of 3 cells are done" in page and "| mean over types |" in page and "0.8100 | unknown" in page
    numbers = json.loads((tmp_path / "page.json").read_text())["studies"]["tiny"]["rows"]
    assert {x["method"] for x in numbers} == set(FEW)


def test_membership_compares_answers_of_the_same_kind(run):
    """The attack on wrong answers is against held-out questions with wrong answers: a model that learned none is at chance."""
    _, study = run
    strange, unseen = study.unseen_like("response"), study.unseen
    assert (strange["labels"] != unseen["labels"]).all()
    np.testing.assert_array_equal(strange["features"], unseen["features"])
    case = study.case("response", 0.4, 0)
    fresh = case.forgetting(alone(study.fresh(0)))
    assert 0.1 < fresh["auc_member"] < 0.9


def test_the_base_model_is_trained_once(run):
    config, study = run
    assert NoisyResponsesStudy.of(config).digest == study.digest
    other = dataclasses.replace(config, base=dataclasses.replace(config.base, agreement=0.5))
    with pytest.raises(ConfigError, match=r"config\.base\.agreement is 0\.5, the model in .* has 0\.7"):
        NoisyResponsesStudy.of(other)
    with pytest.raises(ConfigError, match=r"config\.base\.agreement is 0\.5, the cell .* has 0\.7"):
        read_cell(other, cells_of(config)[0])


def test_a_directory_is_a_model(run, tmp_path):
    """The trained base model, named as any model is; pictures and questions as the reader makes them."""
    config, study = run
    named = dataclasses.replace(config, model=str(pathlib.Path(config.out) / "base"), out=str(tmp_path / "other"))
    assert NoisyResponsesStudy.of(named).digest == study.digest
    assert named.identity()["model"] == "base" and "base" not in named.identity()


def test_what_a_study_cannot_do_is_said(run, tmp_path):
    config, _ = run
    change = lambda **fields: dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
    for wrong, message in (
        (change(reader="pope"), r"config\.data\.reader must be of photographs, mm_spubench, r_bench, not 'pope'"),
        (change(tests=1000), r"config\.data\.tests is 1000, the data have 24"),
        (dataclasses.replace(config, edits=("remove",)), r"config\.edits must be of response, not 'remove'"),
    ):
        with pytest.raises(ConfigError, match=message):
            NoisyResponsesStudy.of(wrong)
    short = NoisyResponsesStudy.of(change(length=12))
    with pytest.raises(ConfigError, match=r"has \d+ \+ 1 tokens, over 12 or 1: raise config\.data\.length"):
        short.unseen  # noqa: B018
    vision = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, targets=".*"))
    with pytest.raises(ConfigError, match=r"match visual\..*: only the decoder has an adapter"):
        NoisyResponsesStudy.of(vision)
    with pytest.raises(UserError, match="noisy_responses carries out no requests"):
        COMMANDS.edit(config, [])


def test_every_method_by_the_commands(tmp_path):
    """train, erase and eval one after the other, each a process of its own; then the page."""
    network = {"width": 16, "layers": 1, "mlp": 16, "vision_width": 16, "vision_layers": 1, "vision_mlp": 16}
    network |= {"heads": 2, "kv_heads": 2, "vision_heads": 2}
    settings = {
        "base.network": network,
        "out": tmp_path / "out",
        "cells": tmp_path / "cells",
        "base.each": 4,
        "base.training.epochs": 1,
    }
    settings |= {"data.each": 6, "data.examples": 20, "data.tests": 16, "training.epochs": 2, "training.batch": 5}
    settings |= {"erasure.micro_batch": 10, "batch": 5, "rows": 8, "seeds": "(0,)", "adapter.rank": 2}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as users have
    counts = []
    for command in ("train", "erase", "eval", "eval"):
        line = [sys.executable, "-c", "from unlearn_jax.cli import main; main()", command]
        line += ["--config=unlearn/noisy_responses", *flags]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        counts.append(len(list((tmp_path / "cells").iterdir())))
    tuned = [name for name in METHODS if METHODS[name].tuned]
    assert counts == [4, 6, len(METHODS) + 1 + 2 * len(tuned), counts[2]]
    assert "| erase | 1 |" in done.stdout + done.stderr
