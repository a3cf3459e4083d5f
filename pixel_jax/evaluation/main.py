"""`pixel-jax eval --config=...`: a model on benchmarks, without operations or with grey crops too, if the config says so.

`pixel-jax eval compare RUN RUN`: a paired test of two finished runs.
`pixel-jax eval select RUN RUN ...`: the best of several checkpoints' runs with operations, on held-out questions only.
`pixel-jax eval select TRAINING --config=...`: of all models and checkpoints of one run of sft or rl, which are asked first.

`--config.model` is the directory of a model, or of a run of sft or rl: RUN, whose newest model it is, or RUN@STEP.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pixel_jax.cli import UserError, check_output
from pixel_jax.config import define_flag
from pixel_jax.evaluation.config import EvalConfig, ModeName
from pixel_jax.run_lock import hold
from pixel_jax.state_files import write_json
from pixel_jax.terminal import print_table, say, table, warn

if TYPE_CHECKING:
    from pixel_jax.dialog import Language

FLAGS = flags.FLAGS
SETTINGS = "pixel_jax.evaluation.config:EvalConfig"  # whose fields `--help` lists
MODE: ModeName = "operations"  # the mode in which checkpoints are compared


def define_flags(command: str) -> None:
    """Declares the flags of `eval`."""
    define_flag(None, "The evaluation: a file, or a name as pixel/eval.")
    flags.DEFINE_string("adapter", None, "Directory of an adapter (PEFT's format) to put on the model.")
    flags.DEFINE_string("json", None, "Also write what compare or select finds to this file.")


def main(command: str, arguments: list[str]) -> None:
    """Evaluates, compares or selects, as the arguments say."""
    check_output("--json", FLAGS.json)
    match arguments:
        case ["compare", first, second]:
            result = compare_runs(first, second)
        case ["select", training] if FLAGS.config is not None:
            result = select_within(pathlib.Path(training))
        case ["select", _, _, *_]:
            result = select(arguments[1:])
        case ["compare" | "select", *_]:
            raise UserError(
                "compare needs two run directories"
                if arguments[0] == "compare"
                else "select needs at least two run directories, or one of sft or rl and the --config of an evaluation"
            )
        case [other, *_]:
            raise UserError(f"unexpected argument {other!r}; settings are given as --config.NAME=VALUE")
        case _:
            return run()
    if FLAGS.json and result:
        write_json(FLAGS.json, result)


def run() -> None:
    """Evaluates the config's model."""
    from pixel_jax.export import model_directory

    with evaluating() as config:
        answer(dataclasses.replace(config, model=str(model_directory(config.model))))


@contextlib.contextmanager
def evaluating() -> Iterator[EvalConfig]:
    """Reads the config, and holds its directory during the block. All processes that have joined call it."""
    from pixel_jax.config import load
    from pixel_jax.parallel.processes import fail_together, initialize, is_main_process
    from pixel_jax.training.progress import announce_compiles

    if FLAGS.config is None:
        raise UserError("give a config: --config=pixel/eval")
    config = load(EvalConfig, FLAGS.config)
    if FLAGS.adapter is not None:
        config = dataclasses.replace(config, adapter=FLAGS.adapter)
    initialize()
    with fail_together(), hold(config.out, is_main_process()):
        announce_compiles()
        yield config


def select_within(training: pathlib.Path) -> dict[str, Any]:
    """Evaluates every model and checkpoint of a run of sft or rl, each in a directory of its step, and selects the best.

    Returns:
        The result of `select`, with "step" and the directory of that model.

    Raises:
        UserError: the run has fewer than two.
    """
    from pixel_jax.export import candidates, model_directory
    from pixel_jax.parallel.processes import is_main_process

    with evaluating() as config:
        steps = {str(pathlib.Path(config.out) / f"step-{step}"): step for step in candidates(training)}
        if len(steps) < 2:
            raise UserError(f"{training} has {len(steps)} models: there is nothing to choose from")
        for out, step in steps.items():
            modes = (MODE,) if MODE in config.modes else config.modes  # the others would decide nothing
            answer(dataclasses.replace(config, model=str(model_directory(f"{training}@{step}")), out=out, modes=modes))
        if not is_main_process():
            return {}
        result = select(list(steps))
        say(f"The best is step {steps[result['best']]}: {result['model']}")
        return {**result, "step": steps[result["best"]]}


def answer(config: EvalConfig) -> None:
    """Answers all questions, in as many processes as have joined; the first one reports."""
    from pixel_jax.data.limits import use_limits
    from pixel_jax.dialog import Language
    from pixel_jax.models.io import read_network
    from pixel_jax.parallel.processes import barrier, is_main_process, waiting
    from pixel_jax.tools.named import find_format, find_tools

    use_limits(config.limits)
    language = Language(find_tools(config.tools), find_format(config.rollout.call_format))
    limits = config.rollout.for_model(read_network(config.model))
    # Everything is read before anything is answered: a mistake in the last benchmark shows at once.
    with waiting("reading the questions"):
        data = questions_of(config, language, pictures=limits.max_images > 0)
    out = pathlib.Path(config.out)
    directories: Directories = {(name, mode): out / name / mode for name in data for mode in config.modes}
    ask(config, data, directories)
    barrier("every question is answered")
    if is_main_process():
        with waiting("working out the numbers"):
            report(config, data, directories)


Data = Mapping[str, tuple[Sequence[Any], str | None]]  # of each benchmark its questions and split
Directories = Mapping[tuple[str, ModeName], pathlib.Path]  # of each benchmark in each mode


def questions_of(config: EvalConfig, language: "Language", *, pictures: bool) -> Data:
    """Reads the questions of all benchmarks; `pictures`: those without are refused."""
    from pixel_jax.evaluation.benchmarks import read

    return {
        name: read(
            x.format,
            x.data,
            x.images,
            image_folders=x.image_folders,
            columns=x.columns,
            split=x.split,
            sample=x.sample,
            seed=config.seed,
            language=language,
            pictures=pictures,
        )
        for name, x in config.benchmarks.items()
        if x.data is not None
    }


def ask(config: EvalConfig, data: Data, directories: Directories) -> None:
    """Answers this process's share of the questions of all benchmarks in all modes."""
    import jax

    from pixel_jax import from_pretrained
    from pixel_jax.data.digests import Digests, digest_adapter, digest_model
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.evaluation.run import evaluate
    from pixel_jax.evaluation.stages import EvaluationStages, Exam, Policy
    from pixel_jax.evaluation.stages import answer as answer_questions
    from pixel_jax.named import digest, is_name
    from pixel_jax.parallel import make_mesh
    from pixel_jax.parallel.processes import waiting
    from pixel_jax.rollouts.prompts import tables
    from pixel_jax.rollouts.rollout import host_rollouts
    from pixel_jax.tools.named import find_format, find_tools
    from pixel_jax.training.progress import use_compilation_cache

    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    use_compilation_cache(out / "compiled")
    # A process answers its own questions on its own devices; only files are shared.
    mesh = make_mesh(config.mesh, jax.local_devices()) if config.mesh else None
    model, processor = from_pretrained(config.model, mesh=mesh, adapter=config.adapter)
    if processor is None:
        raise UserError(f"{config.model} has no tokenizer")
    vocabulary, limits = Vocabulary.of(processor.tokenizer), config.rollout.for_model(model.config)
    tools, calls = find_tools(config.tools), find_format(config.rollout.call_format)
    cache = out / f"digests-{jax.process_index()}.json"
    with waiting("making digests of the model's files"), Digests(cache) as digests:
        identity: dict[str, Any] = {
            "model": str(pathlib.Path(config.model).resolve()),
            **digest_model(config.model, digests),
            **digest_adapter(config.adapter, digests),
        }
    with host_rollouts(config.tools, tools, vocabulary, config.host_tools) as rollouts:
        policy = Policy(model, vocabulary, tables(vocabulary, tools, calls))
        stages = EvaluationStages(answer=functools.partial(answer_questions, roll=rollouts))
        if code := {x: digest(x) for x in (*config.tools, config.rollout.call_format) if is_name(x)}:
            identity["code"] = code  # other code is another evaluation
        if rollouts is not None:
            identity["host_tools"] = dataclasses.asdict(config.host_tools)
        for (name, mode), directory in directories.items():
            questions, split = data[name]
            exam = Exam(
                config.benchmarks[name], limits, mode, config.batch, config.traces, config.seed, config.assistant_prefix
            )
            evaluate(
                policy,
                questions,
                exam,
                directory,
                settings={**identity, "split": split},
                shard=(jax.process_index(), jax.process_count()),
                digests=digests,
                stages=stages,
                label=f"{name} {mode}",
            )
            if rollouts is not None:
                counts = ", ".join(f"{x.removeprefix('host_tool_')} {n:g}" for x, n in rollouts.metrics().items())
                say(f"{name} {mode}: calls of tools that run on the host: {counts}")


def report(config: EvalConfig, data: Data, directories: Directories) -> None:
    """Writes the numbers of all benchmarks to `metrics.json`, to a page and to the terminal."""
    from pixel_jax.dialog import Language
    from pixel_jax.evaluation import summary
    from pixel_jax.evaluation.evidence import FIELD, misread
    from pixel_jax.evaluation.exchange import exchange
    from pixel_jax.evaluation.modes import USED
    from pixel_jax.tools.named import find_format, find_tools

    out = pathlib.Path(config.out)
    language = Language(find_tools(config.tools), find_format(config.rollout.call_format))
    metrics: dict[str, Any] = {"model": config.model, "first_mode": config.modes[0], "benchmarks": {}, "warnings": []}
    for name, (questions, split) in data.items():
        by_mode = {mode: complete_records(directories[name, mode], len(questions)) for mode in config.modes}
        metrics["benchmarks"][name] = {
            "split": split,
            "rules": list(config.benchmarks[name].scorer.rules),
            "modes": {mode: summary.summarise(records) for mode, records in by_mode.items()},
            "unanswered": {mode: summary.unanswered(records) for mode, records in by_mode.items()},
            "differences": {
                mode: summary.compare(by_mode[config.modes[0]], by_mode[mode]) for mode in config.modes[1:]
            },
            "exchange": {
                mode: exchange(records, by_mode[USED])
                for mode, records in by_mode.items()
                if USED in by_mode and mode != USED
            },
        }
        metrics["warnings"] += summary.format_warnings(name, by_mode, language)
        if odd := misread(questions):
            metrics["warnings"].append(
                f"{name}: the field {FIELD!r} of {len(odd)} questions, such as {odd[0]!r}, holds no x1, y1, x2, y2 in pixels of "
                "one picture: it is not counted where the evidence lies"
            )
    write_json(out / "metrics.json", metrics)
    summary.redraw(out)
    print_table(table(summary.HEAD, summary.table_rows(metrics["benchmarks"]), words=3))
    if rows := summary.exchange_rows(metrics["benchmarks"]):
        print_table(table(summary.EXCHANGE_HEAD, rows, words=3))
    for warning in metrics["warnings"]:
        warn(warning)
    for name, benchmark in metrics["benchmarks"].items():
        for mode, test in benchmark["differences"].items():
            say(f"{name}: {summary.sentence(config.modes[0], mode, test)}")
        for mode, reasons in benchmark["unanswered"].items():
            for question, why in list(reasons.items())[:1]:
                say(
                    f"{name} {mode}: {len(reasons)} questions could not be asked and count as wrong, the first one is "
                    f"{question!r}: {why}"
                )
    say(f"Numbers are in {out / 'metrics.json'}, traces in {out / 'report.html'}.")


def complete_records(directory: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """The records of a benchmark in a mode.

    Raises:
        UserError: there are fewer than `count`, the number of questions.
    """
    from pixel_jax.evaluation.results import read_records

    records = read_records(directory)
    if len(records) != count:
        raise UserError(
            f"{directory} has {len(records)} of {count} questions: are all processes writing to the same file system? "
            "Start the run again, and it goes on"
        )
    return records


def runs_in(directory: str) -> dict[str, pathlib.Path]:
    """The benchmarks in a run directory: {"BENCHMARK MODE": directory}."""
    directories = {
        f"{path.parent.parent.name} {path.parent.name}": path.parent
        for path in sorted(pathlib.Path(directory).glob("*/*/run.json"))
    }
    if not directories:
        raise UserError(f"{directory} holds no runs of benchmarks")
    return directories


def compare_runs(first: str, second: str) -> dict[str, Any]:
    """The paired test of every benchmark and mode that both run directories have, printed and returned."""
    from pixel_jax.evaluation import summary
    from pixel_jax.evaluation.results import read_records

    one, other = runs_in(first), runs_in(second)
    shared = [name for name in one if name in other]
    if not shared:
        raise UserError(f"{first} ({', '.join(one)}) and {second} ({', '.join(other)}) have no benchmark in common")
    tests = {}
    for name in shared:
        tests[name] = summary.compare(read_records(one[name]), read_records(other[name]))
        say(f"{name}: {summary.sentence(first, second, tests[name])}")
    return {"first": first, "second": second, "tests": tests}


def select(directories: Sequence[str]) -> dict[str, Any]:
    """The best of several runs (checkpoints) by the mean score over their benchmarks, on held-out questions only.

    Scores are those with operations; runs that have only one other mode are compared in that.

    Raises:
        UserError: a run answered a test set, or the runs did not answer the same benchmarks.
    """
    from pixel_jax.evaluation import summary
    from pixel_jax.evaluation.results import read_records
    from pixel_jax.identity import read_settings

    mode, chosen = comparable(directories)
    records = {run: {name: read_records(path) for name, path in parts.items()} for run, parts in chosen.items()}
    scores: dict[str, dict[str, Any]] = {}
    for run, benchmarks in records.items():
        each = {name: summary.summarise(x)[summary.ALL]["score"] for name, x in benchmarks.items()}
        # Every benchmark counts alike, however many questions it has.
        scores[run] = {"mean": sum(x["mean"] for x in each.values()) / len(each), "benchmarks": each}
    best = max(scores, key=lambda run: scores[run]["mean"])  # the first of equals
    tests = {
        run: {name: summary.compare(x, records[best][name]) for name, x in records[run].items()}
        for run in directories
        if run != best
    }
    choice_table(directories, best, mode, scores, tests)
    model = read_settings(next(iter(chosen[best].values())))["model"]
    return {"best": best, "model": model, "mode": mode, "scores": scores, "tests": tests}


def comparable(directories: Sequence[str]) -> tuple[str, dict[str, dict[str, pathlib.Path]]]:
    """The mode in which runs are compared, and {run: {benchmark: directory}} in that mode.

    Raises:
        UserError: the runs cannot be compared.
    """
    from pixel_jax.identity import read_settings

    # A benchmark's name has no space in it.
    runs = {run: [(*name.split(" "), path) for name, path in runs_in(run).items()] for run in directories}
    modes = set.intersection(*({mode for _, mode, _ in parts} for parts in runs.values()))
    if MODE not in modes and len(modes) != 1:
        raise UserError(
            f"the runs have these modes in common: {', '.join(sorted(modes)) or 'none'}; {MODE!r} would decide"
        )
    mode = MODE if MODE in modes else modes.pop()
    if mode != MODE:
        say(f"The runs have no answers in the mode {MODE!r} in common: those in the mode {mode!r} decide.")
    chosen = {run: {name: path for name, m, path in parts if m == mode} for run, parts in runs.items()}
    names = list(chosen[directories[0]])
    for run, parts in chosen.items():
        if list(parts) != names:
            raise UserError(
                f"in the mode {mode!r} {run} has {', '.join(parts)}, {directories[0]} has {', '.join(names)}"
            )
        for path in parts.values():
            split = read_settings(path).get("split")
            if split != "val":
                raise UserError(
                    f"{path} answered the split {split!r}: checkpoints are chosen on a held-out split ('val'), never on "
                    "a test set"
                )
    return mode, chosen


def choice_table(
    directories: Sequence[str], best: str, mode: str, scores: Mapping[str, Any], tests: Mapping[str, Any]
) -> None:
    """Prints the scores of runs, each compared with the best."""
    from pixel_jax.evaluation import summary

    names = list(scores[best]["benchmarks"])

    def cell(run: str, name: str) -> str:
        score = summary.percent(scores[run]["benchmarks"][name])
        return score + (f", p = {tests[run][name]['p']:.2g}" if run in tests else "")

    def row(run: str) -> list[str]:
        mean = f"{100 * scores[run]['mean']:.1f}"
        return [run, "best" if run == best else "", mode, mean, *(cell(run, name) for name in names)]

    head = ("run", "", "mode", "mean score %", *(f"{name} %" for name in names))
    print_table(table(head, map(row, directories), words=3))
