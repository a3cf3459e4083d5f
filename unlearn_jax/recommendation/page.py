"""The page of one or several studies: their tables, the missing cells, the paper's numbers, and a picture.

    python -m unlearn_jax.recommendation docs/unlearn-movielens unlearn/movielens_tallrec unlearn/movielens_llara

writes docs/unlearn-movielens.md, .json and .png from the finished cells; it computes none.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pixel_jax.files import write_file
from pixel_jax.state_files import write_json
from unlearn_jax.recommendation.cells import cells_of, read_cell
from unlearn_jax.recommendation.config import RatingsConfig, RecommendationConfig
from unlearn_jax.recommendation.methods import METHODS
from unlearn_jax.recommendation.table import COLUMNS, REPORTED, TableRow, rows_of, text

INTRODUCTION = """# Unlearning recommendations

Written by `python -m unlearn_jax.recommendation` from the results of `unlearn-jax eval` (docs/unlearning.md says how to go on).
What is changed after training are rows that an adapter has learned: removed, asked differently, answered differently.

- *retrain, cold*: the same recipe, start and order of batches on what should have been trained on; all divergences (KL, in nats,
  means over tokens) are from it. *Other order*: the same in another order, which is the noise of training. *Warm*: from the
  trained adapter.
- *corrupted*: the trained adapter, before any edit. *erase* is the default edit within its budget of epochs; all methods below it
  may cost as much, those with a learning rate with the one that comes nearest to the retrain on another seed.
- *forgotten*: the rows as they were trained on and should not have been; *corrected*: their right form; *kept*: other rows.
  *Membership AUC*: an attack by the loss, forgotten rows against test rows; .5 is chance, 1 means that they look like members.
- An interval (±) is Student's 95 % over seeds. A number of one seed has none; standard errors over test
  rows are below the tables.
"""
PAPER = """## What the paper reports

LLMEraser's numbers (arXiv:2412.00383) are of LLaMA2-7B on other data, so that only differences between methods can be
compared with those above. MovieLens' test set has 95 users. The standard error is binomial, of the valid answers that the numbers
are shares of; for BookCrossing the number of test rows is not known.
"""
SHORT = {"auc": "AUC", "hit_ratio": "hit ratio of valid"}  # what the picture shows of each form


def write_page(studies: Mapping[str, RecommendationConfig], stem: pathlib.Path) -> None:
    """Writes the page, its numbers and its picture to `stem`.md, .json and .png."""
    parts, numbers, pictures = [INTRODUCTION], {}, []
    for name, config in studies.items():
        wanted = [cell for cell in cells_of(config) if cell.seed != config.tuning_seed]
        finished = [cell for cell in map(lambda cell: read_cell(config, cell), wanted) if cell is not None]
        rows = rows_of(finished)
        parts.append(_study(name, config, rows, len(finished), len(wanted)))
        numbers[name] = {"setting": config.identity(), "rows": [row._asdict() for row in rows]}
        if rows:
            pictures.append((name, config, rows))
    lines = ["| task | metric | method | value | standard error |", "|---|---|---|---|---|"]
    for x in REPORTED:
        error = "unknown" if x.error is None else f"{x.error:.3f} ({x.right} of {x.valid})"
        lines.append(f"| {x.task} | {x.metric} | {x.method} | {x.value:.4f} | {error} |")
    if pictures:
        draw(pictures, stem.with_suffix(".png"))
        parts.append(f"## Forgetting, utility and cost\n\n![forgetting against utility, and cost]({stem.name}.png)\n")
    parts.append(PAPER + "\n" + "\n".join(lines) + "\n")
    write_file(stem.with_suffix(".md"), "\n".join(parts))
    reported = [{**x._asdict(), "error": x.error} for x in REPORTED]
    write_json(stem.with_suffix(".json"), {"studies": numbers, "paper": reported})


def _study(name: str, config: RecommendationConfig, rows: Sequence[TableRow], done: int, all_of_them: int) -> str:
    data, adapter, training = config.data, config.adapter, config.training
    lines = [
        f"## {name}",
        "",
        f"{data.examples} rows of as many users at most, {training.epochs} epochs of AdamW (learning rate "
        f"{training.learning_rate:g}, batches of {training.batch}); a LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on "
        f"the top {adapter.layers} layers. {_tested(data)} {done} of {all_of_them} cells are done.",
        "",
        text(rows),
        "",
    ]
    for row in rows:
        if row.method == "corrupted" and row.errors:
            errors = ", ".join(f"{COLUMNS[column]} {error:.3f}" for column, error in row.errors.items())
            lines += [f"Standard errors over test rows ({row.edit.replace('_', ' ')}, {row.share:.0%}): {errors}.", ""]
    if missing := list(_missing(config, rows)):
        lines += ["Missing:", "", *(f"- {line}" for line in missing), ""]
    return "\n".join(lines)


def _tested(data: RatingsConfig) -> str:
    """Sentences about the test rows and the films."""
    rows = "One row" if data.test_rows is None else f"{data.test_rows} rows"
    whose = "of each test user" if data.test_rows is None else "of the test users"
    films = "" if data.title is None else f" Films whose titles have more than {data.title} tokens are left out."
    verb = "is" if data.test_rows is None else "are"
    return f"{rows} {whose} ({data.test_share:.0%} of the users) {verb} tested.{films}"


def _missing(config: RecommendationConfig, rows: Sequence[TableRow]) -> Iterator[str]:
    """Yields a line for each part of the table in which cells are missing."""
    done = {(row.edit, row.share, row.method): row.seeds for row in rows}
    for edit in config.edits:
        for share in config.shares:
            lacking: dict[tuple[int, ...], list[str]] = {}
            for method in config.methods or METHODS:
                seeds = tuple(seed for seed in config.seeds if seed not in done.get((edit, share, method), []))
                lacking.setdefault(seeds, []).append(method)
            lacking.pop((), None)
            for seeds, names in lacking.items():
                where = f"{edit.replace('_', ' ')}, {share:.0%}, seeds {', '.join(map(str, seeds))}"
                yield f"{where}: {'; '.join(names)}"


def draw(studies: Sequence[tuple[str, RecommendationConfig, Sequence[TableRow]]], path: pathlib.Path) -> None:
    """Draws two plots for each study and edit: the test score and the cost, against the divergence on forgotten rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [
        (name, config, edit, share, [row for row in rows if (row.edit, row.share) == (edit, share)])
        for name, config, rows in studies
        for edit, share in dict.fromkeys((row.edit, row.share) for row in rows)
    ]
    figure, axes = pyplot.subplots(len(parts), 2, figsize=(11, 3.6 * len(parts)), squeeze=False, layout="constrained")
    marks = dict(zip(METHODS, "osDPv^<>hXd*", strict=True))
    for (left, right), (name, config, edit, share, rows) in zip(axes, parts, strict=True):
        score = next(column for column in SHORT if any(column in row.values for row in rows))
        for row in rows:
            for axis, column in ((left, score), (right, "epochs")):
                if column in row.values and "kl_forget" in row.values:
                    x, y = (row.values[key]["mean"] for key in ("kl_forget", column))
                    y = y / config.training.epochs if column == "epochs" else y
                    axis.plot(max(x, 1e-7), y, marks[row.method], label=row.method, markersize=7)
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_xlabel("KL from the cold retrain on forgotten rows (nats)")
            axis.grid(alpha=0.3)
        left.set_ylabel(f"{SHORT[score]} on test rows")
        right.set_ylabel("cost / that of the training")
        left.set_title(f"{name.rpartition('/')[2]}: {edit.replace('_', ' ')}, {share:.0%}", fontsize=10)
        right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def shipped(names: Sequence[str]) -> dict[str, RecommendationConfig]:
    """Loads the studies of config files, or of names of shipped ones."""
    from pixel_jax.config import ConfigFileParser, load

    parser: Any = ConfigFileParser("config", lock_config=False)
    return {name: load(RecommendationConfig, parser.parse(name)) for name in names}
