"""A benchmark answered by the tiny scripted model: what is counted, what an interruption changes
(nothing), what blanking changes."""

import collections
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from pixel_jax import score_answer
from pixel_jax.data.prompt_shapes import ShapeFinder
from pixel_jax.dialog import Language
from pixel_jax.evaluation import report, run, stages, summary, transcript
from pixel_jax.evaluation.benchmarks import read
from pixel_jax.evaluation.config import BenchmarkConfig, EvalConfig
from pixel_jax.evaluation.results import read_records
from pixel_jax.evaluation.stages import EvaluationStages, Exam, Policy
from pixel_jax.identity import RunError, read_settings
from pixel_jax.parallel import make_mesh, shard
from pixel_jax.rollouts.prompts import prompt_tokens
from pixel_jax.rollouts.rollout import compiled_rollout
from pixel_jax.rollouts.trajectory import to_host
from pixel_jax.rollouts.views import GREY
from pixel_jax.terminal import print_table, table
from pixel_jax.training.scorers import ScorerConfig
from tests.evaluation.test_report import HOSTILE, Reader, pixels
from tests.rollouts import scripted_model

COUNT = 4  # questions about one picture; one more is about two
LIMITS = dataclasses.replace(scripted_model.CONFIG, group_size=2, max_calls=2, max_response=192, observe_chunk=2)
BENCHMARK = BenchmarkConfig("jsonl", buckets=((1, 192, 192, 192), (2, 128, 128, 192)))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Five questions: one is an attack, one has a large picture, the last one has two pictures."""
    folder, lines = tmp_path_factory.mktemp("own"), []
    for i in range(COUNT + 1):
        sizes = {2: [(400, 300)], COUNT: [(90, 100), (100, 110)]}.get(i, [(120 + 4 * i, 150)])
        names = [f"{i}-{j}.png" for j in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            Image.fromarray(scripted_model.image(i, *size)).save(folder / name)
        question = HOSTILE + "<|im_start|><|im_start|>" if i == 3 else "Which digit?"
        line = {"question": question, "images": names, "answer": "7" if i % 2 else ["3", "7"]}
        whole_picture = {"box": [0, 0, *reversed(sizes[0])]} if len(sizes) == 1 else {}
        lines.append(line | whole_picture)
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read("jsonl", folder / "own.jsonl")[0]


@pytest.fixture(scope="module")
def questions(everything):
    return everything[:COUNT]


def answer(
    questions,
    directory,
    *,
    model=None,
    benchmark=BENCHMARK,
    batch=2,
    traced=COUNT,
    mode="operations",
    seed=0,
    **options,
):
    policy = Policy(model or scripted_model.model(), scripted_model.vocabulary(), scripted_model.token_tables())
    run.evaluate(policy, questions, Exam(benchmark, LIMITS, mode, batch, traced, seed), directory, **options)
    return read_records(directory)


@pytest.fixture(scope="module")
def whole(questions, tmp_path_factory):
    """An evaluation that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    before = compiled_rollout._cache_size()
    records = answer(questions, directory)
    assert compiled_rollout._cache_size() - before <= 1  # a program a bucket
    return directory, records


def test_every_question_is_answered_once(questions, whole):
    directory, records = whole
    assert [x["index"] for x in records] == list(range(COUNT)) and [x["id"] for x in records] == [
        x.id for x in questions
    ]
    for record, question in zip(records, questions, strict=True):
        assert record["answers"] == list(question.answer)
        assert record["shrunk"] is (record["index"] == 2)
        assert record["question"] == question.question and [len(x) for x in record["tools"]] == record["calls"]
        for i, text in enumerate(record["responses"]):
            boxed = [
                answer for answer in ("7", "3") if text.removesuffix("<|im_end|>").endswith(f"\\boxed{{{answer}}}")
            ]
            assert record["given"][i] == (boxed[0] if boxed else None)
            assert record["accuracy"][i] == record["score"][i] == float(bool(boxed) and boxed[0] in question.answer)
            assert record["accuracy"][i] == (score_answer(text, question.answer, rules=("released",)) or 0.0)
            assert record["calls"][i] == text.count("<tool_call>")
            assert record["operations"][i] + record["failed"][i] == record["executed"][i] <= record["calls"][i]
            assert (record["stop"][i] == "answer") is ("<tool_call>" not in text.rsplit("<|im_end|>", 2)[-2])
            # What is no call here is what cannot be read: a box without its end.
            assert record["unrecognised"][i] == sum("; }}" in turn for turn in text.split("<|im_end|>"))
    assert sum(sum(x["operations"]) for x in records) > 1
    assert len({x for record in records for x in record["responses"]}) > 4


def test_records_say_how_much_of_the_evidence_crops_hold(questions, whole):
    """The reference is the whole picture: a crop holds as much of it as it shows. One picture was made smaller."""
    directory, records = whole
    assert [("evidence" in x, "crop_area" in x) for x in records] == [(True, True)] * COUNT
    cropped = 0
    for record in records:
        assert record["evidence"] == pytest.approx(record["crop_area"])
        (made,) = transcript.load(directory / "traces" / f"{record['index']}.json")
        (drawn,) = made.pictures
        areas = [(x2 - x1) * (y2 - y1) / (drawn.width * drawn.height) for _, x1, y1, x2, y2 in drawn.boxes]
        assert record["crop_area"][0] == pytest.approx(max(areas, default=0), abs=0.02)
        cropped += len(areas)
        assert all(
            (share > 0) <= (calls > 0) for share, calls in zip(record["evidence"], record["operations"], strict=True)
        )
    assert cropped > 0 and max(x for record in records for x in record["evidence"]) > 0


@pytest.mark.slow
def test_without_looking_and_with_the_evidence_alone(questions, tmp_path):
    """Another question cannot be asked about its evidence; what is shown is grey, or cut out; an answer can be begun."""
    blind = answer(questions[:2], tmp_path / "blind", mode="blind")
    (made,) = transcript.load(tmp_path / "blind" / "traces" / "1.json")
    assert (pixels(made.pictures[0]) == GREY).all() and all(x["operations"] == [0, 0] for x in blind)
    asked = [questions[0]._replace(fields={}), questions[1]]
    found = answer(asked, tmp_path / "evidence", mode="evidence")
    assert "there is no reference box" in found[0]["unanswered"] and "unanswered" not in found[1]
    policy = Policy(scripted_model.model(), scripted_model.vocabulary(), scripted_model.token_tables())
    exam = Exam(BENCHMARK, LIMITS, "none", 2, 0, assistant_prefix="I see \\boxed{")
    run.evaluate(policy, questions[:2], exam, tmp_path / "begun")
    texts = [text for record in read_records(tmp_path / "begun") for text in record["responses"]]
    assert texts and all(text.startswith("I see \\boxed{") for text in texts)


def test_an_interrupted_run_goes_on_and_ends_the_same(questions, whole, tmp_path, monkeypatch, capsys):
    calls, real = collections.Counter(), stages.rollout

    def dies(*arguments, **options):
        calls["rollout"] += 1
        if calls["rollout"] == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(stages, "rollout", dies)
    with pytest.raises(KeyboardInterrupt):
        answer(questions, tmp_path)
    assert len(read_records(tmp_path)) == 2
    with (tmp_path / "results-0.jsonl").open("a") as file:
        file.write('{"index": 3, "id": "3", "torn')  # as a kill in the middle of a write leaves it
    records = answer(questions, tmp_path)
    assert records == whole[1]
    assert calls["rollout"] == 3  # two batches, and one that died
    # The line of progress has the mean of all answers so far, those before the interruption among them.
    shown = float(capsys.readouterr().err.split("score ")[-1].split()[0])
    assert shown == pytest.approx(np.mean([np.mean(x["score"]) for x in records]), abs=1e-3)
    answer(questions, tmp_path)
    assert calls["rollout"] == 3  # nothing was left to do


def test_other_pictures_are_other_questions(questions, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    picture = tmp_path / "elsewhere.png"
    shutil.copy(questions[1].images[0], picture)
    moved = [x._replace(id=f"{x.id} moved", images=(picture,) if i == 1 else x.images) for i, x in enumerate(questions)]
    assert answer(moved, tmp_path / "run") == whole[1]  # the same content: nothing is asked again
    shutil.copy(questions[0].images[0], picture)
    with pytest.raises(RunError, match="question '.*:2 moved' was answered about other pictures than .*elsewhere.png"):
        answer(moved, tmp_path / "run")
    other = [x._replace(answer=("8",)) if i == 1 else x for i, x in enumerate(questions)]
    with pytest.raises(RunError, match="questions.answer = .* choose another directory"):
        answer(other, tmp_path / "run")


def test_whatever_note_is_damaged_a_run_goes_on(questions, whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    directory = tmp_path / "run"
    results = directory / "results-0.jsonl"
    results.write_bytes(b"\0\0\0\n" + results.read_bytes() + b'{"index": "x"}\n')
    damaged = [directory / "run.json", directory / "digests-0.json", directory / "traces" / "0.json"]
    for path in damaged:
        # Digests of pictures that have just been written are not kept.
        path.write_bytes(path.read_bytes()[:20] if path.exists() else b'{"cut')
    assert answer(questions, directory) == whole[1]
    row = {"split": "val", "modes": {"operations": summary.summarise(whole[1])}, "unanswered": {}, "differences": {}}
    metrics = {"first_mode": "operations", "benchmarks": {"own": row}}
    page = summary.page("title", metrics, {("own", "operations"): directory})
    assert Reader(page).tags.count("article") == COUNT - 1
    said = capsys.readouterr().err
    assert all(str(path) in said for path in damaged) and f"{results}:1" in said and f"{results}:6" in said


def test_processes_share_the_questions(questions, whole, tmp_path):
    for process in (1, 0):
        answer(questions, tmp_path, shard=(process, 2))
    shares = [
        {json.loads(line)["index"] for line in (tmp_path / f"results-{i}.jsonl").read_text().splitlines()}
        for i in (0, 1)
    ]
    assert shares == [{0, 2}, {1, 3}]
    assert read_records(tmp_path) == whole[1]


@pytest.mark.slow
def test_on_a_mesh_and_in_two_buckets_the_answers_are_the_same(everything, whole, tmp_path):
    before = compiled_rollout._cache_size()
    alone = answer(everything, tmp_path / "alone", traced=0)
    assert compiled_rollout._cache_size() - before == 1  # of the second bucket; the first one's is there
    assert alone[:COUNT] == whole[1] and not alone[COUNT]["shrunk"]
    mesh = make_mesh({"data": 2, "fsdp": 2})
    records = answer(everything, tmp_path / "mesh", model=shard(scripted_model.model(), mesh), traced=0, batch=4)
    assert [x["responses"] for x in records] == [x["responses"] for x in alone]


@pytest.mark.slow
def test_without_operations_nothing_is_executed(questions, tmp_path):
    records = answer(questions[:2], tmp_path, mode="none")
    assert all(x["operations"] == x["executed"] == [0, 0] for x in records)
    stops = {stop for record in records for stop in record["stop"]}
    assert "answer" in stops and "too many calls" in stops  # the scripted model calls out of habit
    (made,) = transcript.load(tmp_path / "traces" / "1.json")
    assert all(turn.role == "assistant" for turn in made.turns)
    row = summary.summarise(records)["all"]
    assert row["rapr"]["mean"] == 0 and row["operation_errors"]["mean"] is None


def test_without_operations_no_tools_are_offered(questions):
    limits = Exam(BENCHMARK, LIMITS, "none").limits
    assert limits.max_calls == 0 and not limits.blank and limits.max_side == BENCHMARK.max_side
    words = scripted_model.vocabulary()
    for mode, offered in {"operations": True, "blank": True, "none": False}.items():
        ids = prompt_tokens(questions[1].query(), words, LIMITS, Exam(BENCHMARK, LIMITS, mode).guidelines)
        assert (b"crop_image_normalized" in words.to_bytes(ids)) is offered


@pytest.mark.slow
def test_blanked_operations_show_grey(questions, whole, tmp_path, monkeypatch):
    found, real = {}, stages.rollout
    for mode in ("operations", "blank"):
        keep = lambda *arguments, mode=mode: found.setdefault(mode, to_host(real(*arguments)))
        monkeypatch.setattr(stages, "rollout", keep)
        answer(questions[:2], tmp_path / mode, mode=mode)
    sharp, grey = found["operations"], found["blank"]
    looked = 0
    for row in range(4):
        first = np.argmax(np.flatnonzero(sharp.loss_mask[row])[:-1] + 1 != np.flatnonzero(sharp.loss_mask[row])[1:])
        turn = np.flatnonzero(sharp.loss_mask[row])[: first + 1]  # the tokens before anything is shown
        np.testing.assert_array_equal(grey.tokens[row, turn], sharp.tokens[row, turn])
        np.testing.assert_array_equal(grey.logprobs[row, turn], sharp.logprobs[row, turn])
        if scripted_model.outcomes(sharp)[row, 0] != scripted_model.CROPPED:
            continue
        looked += 1
        after = slice(turn[-1] + 1, None)
        assert (grey.logprobs[row, after] != sharp.logprobs[row, after]).any()  # the scripted model does look
    assert looked > 0
    shown = {mode: [] for mode in found}
    for mode, seen in shown.items():
        for index in range(2):
            (made,) = transcript.load(tmp_path / mode / "traces" / f"{index}.json")
            seen += [pixels(picture) for turn in made.turns for picture in turn.pictures]
            assert (pixels(made.overview[0]) != GREY).any()
    assert shown["blank"] and all((image == GREY).all() for image in shown["blank"])
    assert shown["operations"] and all((image != GREY).any() for image in shown["operations"])


def test_another_configuration_does_not_continue_a_run(questions, whole):
    directory, _ = whole
    with pytest.raises(RunError, match="was begun with seed = 0, now it is 1"):
        answer(questions, directory, seed=1)
    with pytest.raises(RunError, match="was begun with mode = 'operations', now it is 'blank'"):
        answer(questions, directory, mode="blank")
    with pytest.raises(RunError, match="questions"):
        answer(questions[:-1], directory)
    with pytest.raises(RunError, match="weights = 'not set', now it is 'another'"):
        answer(questions, directory, settings={"weights": "another"})
    assert read_settings(directory)["seed"] == 0
    with pytest.raises(RunError, match="is no run"):
        read_settings(directory.parent / "nowhere")


def test_the_scorer_is_the_benchmarks(questions, tmp_path, whole):
    class Half:
        def __call__(self, responses, references):
            assert references[0].question
            return [0.5 if "7" in text else None for text in responses]

    records = answer(questions[:2], tmp_path, scorer=Half(), traced=0)
    assert [x["accuracy"] for x in records] == [x["accuracy"] for x in whole[1][:2]]
    assert {value for record in records for value in record["score"]} <= {0.0, 0.5}
    assert all((0.5 if "7" in text else 0.0) == x["score"][i] for x in records for i, text in enumerate(x["responses"]))


def test_a_stage_of_ones_own(questions, tmp_path, whole):
    def longest(context, answered):
        return stages.Judged(
            answered, {name: [float(len(x)) for x in answered.texts] for name in ("score", "accuracy")}
        )

    records = answer(questions[:2], tmp_path, stages=EvaluationStages(judge=longest), traced=0)
    assert [x["responses"] for x in records] == [x["responses"] for x in whole[1][:2]]
    assert all(x["score"] == [len(text) for text in x["responses"]] for x in records)


@pytest.mark.slow
def test_shapes_that_are_worked_out_change_no_answer(questions, whole, tmp_path):
    records = answer(questions, tmp_path / "run", benchmark=dataclasses.replace(BENCHMARK, buckets=None), traced=0)
    assert not any(x["shrunk"] for x in records)
    assert [x["responses"] for x in records] == [x["responses"] for x in whole[1]]


def test_buckets_are_chosen_by_size_and_length(everything):
    """Pictures and videos that share a bucket are asked apart."""

    def find(i, buckets):
        shapes = run.shapes_of(buckets, LIMITS, scripted_model.model().config, 4)
        return ShapeFinder(scripted_model.vocabulary(), LIMITS).assign_all([everything[i].outline], shapes)[0]

    held = lambda place: (place.shape.images, place.shape.height, place.shape.width, place.shape.tokens)
    small, large, pair = (1, 128, 160, 160), (1, 512, 512, 160), (2, 128, 160, 160)
    assert held(find(1, (small, large, pair))) == small
    assert held(find(2, (small, large, pair))) == large
    assert find(2, (small, large, pair)).prompt[:2] == (1.0, [(400, 300)])
    assert held(find(4, (small, large, pair))) == pair
    shrunk = find(2, (small,))
    assert shrunk.prompt.scale < 1 and shrunk.prompt.sizes == [(128, 96)]
    assert "2 images are more than the 1" in str(find(4, (small, large)))
    assert "tokens does not fit the width of 20" in str(find(1, ((1, 192, 192, 20),)))
    # None given: each question has room, its pictures as they are.
    for i in range(len(everything)):
        assert find(i, None).prompt.scale == 1.0 and find(i, None).shape.tokens % 64 == 0


def test_questions_that_cannot_be_asked_are_wrong_and_end_nothing(everything, whole, tmp_path):
    """A picture cut off in its pixels, one without a header, one that no bucket holds; and a whole batch of them."""
    broken = {1: "cut.jpg", 2: "none.png"}
    Image.fromarray(scripted_model.image(1, 124, 150)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "none.png").write_bytes(b"no image")
    asked = [x._replace(images=(tmp_path / broken[i],)) if i in broken else x for i, x in enumerate(everything)]
    benchmark = dataclasses.replace(BENCHMARK, buckets=BENCHMARK.buckets[:1])
    records = answer(asked, tmp_path / "run", benchmark=benchmark, batch=1)
    assert [x["index"] for x in records] == list(range(COUNT + 1))
    assert [records[i] for i in (0, 3)] == [whole[1][i] for i in (0, 3)]
    for i, why in {1: "cut.jpg' cannot be read", 2: "none.png cannot be read", 4: "2 images are more than"}.items():
        assert why in records[i]["unanswered"] and records[i]["score"] == records[i]["accuracy"] == [0.0, 0.0]
        assert records[i]["answers"] == list(everything[i].answer) and records[i]["responses"] == []
    assert not (tmp_path / "run" / "traces" / "1.json").exists()
    row = summary.summarise(records)["all"]
    answers = [x for i in (0, 3) for x in whole[1][i]["tokens"]]
    assert (row["questions"], row["unanswered"]) == (5, 3) and row["tokens"]["mean"] == pytest.approx(np.mean(answers))
    assert row["score"]["mean"] == pytest.approx(sum(sum(x["score"]) for x in records) / 10)
    assert list(summary.unanswered(records)) == ["own.jsonl:2", "own.jsonl:3", "own.jsonl:5"]
    summary.table_rows({"own": {"modes": {"operations": summary.summarise([records[1]])}}})  # nothing to make rates of
    # Mended, and started again: these are answered, the others are not asked again.
    Image.fromarray(scripted_model.image(1, 124, 150)).save(tmp_path / "cut.jpg")
    again = answer(asked, tmp_path / "run", benchmark=benchmark, batch=1)
    assert "unanswered" not in again[1] and len(again[1]["responses"]) == 2 and again[2:] == records[2:]


def test_greedy_answers_are_not_averaged():
    with pytest.raises(ValueError, match="8 greedy answers are all alike"):
        EvalConfig(
            "m",
            "o",
            {"a": BenchmarkConfig("vstar", "x")},
            rollout=dataclasses.replace(LIMITS, group_size=8, temperature=0.0),
        )
    with pytest.raises(ValueError, match="no benchmark has data"):
        EvalConfig("m", "o", {"a": BenchmarkConfig("vstar")})
    with pytest.raises(ValueError, match="folder"):
        EvalConfig("m", "o", {"../a": BenchmarkConfig("vstar", "x")})


def records_of(scores, category=lambda i: "", **more):
    """Hand-made records: {question: scores of its answers}."""
    made = []
    for i, values in enumerate(scores):
        k = len(values)
        record = {
            "index": i,
            "id": f"q{i}",
            "category": category(i),
            "answers": ["7"],
            "given": ["7"] * k,
            "score": values,
            "accuracy": values,
            "operations": [1, 0][:k] + [0] * (k - 2),
            "executed": [2, 0][:k] + [0] * (k - 2),
            "failed": [1, 0][:k] + [0] * (k - 2),
            "calls": [2] * k,
            "unrecognised": [1, 0][:k] + [0] * (k - 2),
            "tokens": [10 + i] * k,
            "stop": ["answer"] * (k - 1) + ["too many calls"],
            "responses": ["x"] * k,
            "shrunk": False,
        }
        made.append(record | more)
    return made


def test_numbers_of_hand_made_records():
    found = summary.summarise(records_of([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], lambda i: "ab"[i % 2]))
    assert list(found) == ["all", "a", "b"] and [row["questions"] for row in found.values()] == [3, 2, 1]
    row = found["all"]
    assert row["answers"] == 2 and row["score"]["mean"] == pytest.approx(0.5)
    assert row["rapr"]["mean"] == pytest.approx(0.5) and row["operation_errors"]["mean"] == pytest.approx(0.5)
    assert row["tokens"]["mean"] == pytest.approx(11) and row["finished"]["mean"] == pytest.approx(0.5)
    assert row["unrecognised"]["mean"] == pytest.approx(0.5)
    assert row["score"]["low"] == 0 and row["score"]["high"] == 1
    assert found["a"]["score"]["mean"] == pytest.approx(0.25) and found["b"]["score"]["mean"] == 1
    assert list(summary.summarise(records_of([[1.0]]))) == ["all"]
    named = summary.summarise(records_of([[1.0, 0.0], [1.0, 1.0]], lambda i: ("all", "b")[i]))
    assert [(name, row["questions"]) for name, row in named.items()] == [("all", 2), ("all (category)", 1), ("b", 1)]


def test_a_warning_names_the_format_that_the_answers_are_in():
    call = '<grounding>{"bbox_2d": [0.1, 0.2, 0.5, 0.6], "source": "original_image"}</grounding><|im_end|>'
    odd = records_of([[1.0]] * 2, responses=[call])
    found = {"operations": [*odd, *records_of([[1.0]] * 30)], "blank": records_of([[1.0]] * 30), "none": odd}
    (said,) = summary.format_warnings("v*", found, Language())
    assert said.startswith("v* operations: 2 of 32 answers hold calls that are none in the format 'pixel_reasoner'")
    assert "'mini_o3'" in said
    assert summary.format_warnings("v*", {"none": odd}, Language()) == []


def test_runs_are_compared_question_by_question():
    first = records_of([[0.0]] * 12 + [[1.0]] * 8)
    second = list(reversed(records_of([[1.0]] * 10 + [[0.0]] * 2 + [[1.0]] * 8)))
    found = summary.compare(first, second)
    assert (found["better"], found["worse"], found["n"]) == (10, 0, 20)
    assert found["difference"] == 0.5 and found["p"] == pytest.approx(2 / 2**10)
    with pytest.raises(ValueError, match="different questions: 1 of them .*'q19'"):
        summary.compare(first, records_of([[0.0]] * 19))
    with pytest.raises(ValueError, match="has the answers"):
        summary.compare(first, records_of([[0.0]] * 20, answers=["8"]))


def test_the_page_shows_numbers_and_traces_and_runs_nothing(questions, whole):
    directory, records = whole
    hostile = summary.summarise([record | {"category": HOSTILE if record["index"] % 2 else "b"} for record in records])
    test = summary.compare(records, records)
    metrics = {
        "first_mode": "operations",
        "benchmarks": {
            "own": {
                "modes": {"operations": hostile},
                "differences": {"blank": test},
                "unanswered": {"operations": {HOSTILE: HOSTILE}},
            }
        },
    }
    page = summary.page(HOSTILE, metrics, {("own", "operations"): directory})
    seen = Reader(page)
    assert seen.runs == 0 and "img" not in seen.tags and "onerror" not in seen.attributes
    assert seen.tags.count("article") == COUNT and sum(HOSTILE in text for text in seen.texts) >= 4
    assert any("blank − operations: +0.0 points" in text for text in seen.texts)
    report.write(directory / "report.html", page)


def test_the_table_shows_what_it_is_given(capsys):
    rows = summary.table_rows({"own": {"modes": {"operations": summary.summarise(records_of([[1.0, 0.0]] * 5))}}})
    rows.append(["[red]x[/red]", "\x1b[31mx", *rows[0][2:]])
    print_table(table(summary.HEAD, rows, words=3))
    out = capsys.readouterr().out
    assert "5 × 2" in out and "50.0 [28.3, 71.7]" in out and "[red]x[/red]" in out and "\x1b" not in out
    assert len(out.splitlines()) == 3


def test_scorers_come_from_the_config():
    assert BENCHMARK.scorer == ScorerConfig() and BENCHMARK.scorer.rules == ("box",)
    assert jax.device_count() == 8
