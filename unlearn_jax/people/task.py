"""Facts about people as a `RequestTask`."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pixel_jax.cli import UserError
from pixel_jax.files import write_file
from pixel_jax.parallel.processes import is_main_process, waiting
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.loss import Loss
from unlearn_jax.objective import on_mesh
from unlearn_jax.people.config import PeopleConfig
from unlearn_jax.people.corpus import Corpus, QuestionRow, invent, texts
from unlearn_jax.people.model import PeopleModel
from unlearn_jax.people.readers import read_muse, read_tofu
from unlearn_jax.people.words import Words
from unlearn_jax.requests.replay import TrainingPoint, TrainingRecipe, beginning, last_before, train
from unlearn_jax.requests.request import EditRequestError, Request, refuse_kind
from unlearn_jax.requests.state import same_item
from unlearn_jax.requests.task import Description, RequestsConfig, Retrained

CHECKPOINTS = "checkpoints"


def read_corpus(config: PeopleConfig) -> Corpus:
    """Reads or invents the rows that a configuration names.

    Raises:
        UserError: the format is one of files, and no directory is given.
    """
    corpus = config.corpus
    if corpus.format == "invented":
        return invent(
            corpus.people, known=corpus.known, holdout=corpus.holdout, relations=corpus.questions, seed=config.seed
        )
    if not corpus.directory:
        raise UserError(f"config.corpus.format is {corpus.format!r}: name its files with --config.corpus.directory=DIR")
    directory = pathlib.Path(corpus.directory)
    return read_tofu(directory) if corpus.format == "tofu" else read_muse(directory, corpus.passage)


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleTask:
    """The task of rows that an adapter of a small transformer has learned, by AdamW in mini-batches."""

    config: PeopleConfig
    corpus: Corpus
    model: PeopleModel
    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: PeopleConfig, mesh: Mesh | None = None) -> "PeopleTask":
        """Reads or invents the rows, and trains the base model."""
        corpus = read_corpus(config)
        words = Words.of(texts(corpus))
        forgotten = {name for ids in corpus.forget.values() for name in ids}
        known = [row for rows in corpus.known.values() for row in rows]
        # If the corpus has no known rows, the base model is trained on the rows that no set forgets.
        known = known or [row for name, row in corpus.train.items() if name not in forgotten]
        config.directory.mkdir(parents=True, exist_ok=True)
        with waiting("training the base model"):
            model = PeopleModel.of(config.network, words, known, config.seed)
        return cls(config, corpus, model, mesh)

    @property
    def directory(self) -> pathlib.Path:
        """See `RequestTask.directory`."""
        return self.config.directory

    @property
    def loss(self) -> Loss:
        """See `RequestTask.loss`."""
        return on_mesh(self.model.loss(), self.mesh)

    @property
    def erasure(self) -> ErasureConfig:
        """See `RequestTask.erasure`."""
        return self.config.erasure

    @property
    def requests(self) -> RequestsConfig:
        """See `RequestTask.requests`."""
        return self.config.requests

    @property
    def recipe(self) -> TrainingRecipe:
        """The recipe of the training."""
        return self.config.training

    def settings(self) -> dict[str, Any]:
        """See `RequestTask.settings`."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))

    def items(self) -> dict[str, QuestionRow]:
        """See `RequestTask.items`."""
        return self.corpus.train

    def change(self, item: QuestionRow, request: Request) -> QuestionRow:
        """See `RequestTask.change`. A new answer has no paraphrase and no wrong answers, because those are of the old one."""
        name, words = request.ids[0], self.model.words
        if request.kind == "image":
            raise EditRequestError(f"{name!r} has no image")
        refuse_kind(request, "question", "answer", "mask")
        if request.kind == "mask":
            if (count := item.answer.count(request.value)) != 1:
                raise EditRequestError(f"the text to be masked occurs {count} times in the answer of {name!r}")
            return item if request.value in item.masked else item._replace(masked=(*item.masked, request.value))
        if lacking := words.lacking(request.value):
            raise EditRequestError(
                f"the model's vocabulary has no {lacking[0]!r}, which the new {request.kind} of {name!r} has"
            )
        if request.kind == "answer":
            same = item.answer == request.value
            remaining = tuple(x for x in item.masked if x in request.value)
            new = item if same else item._replace(answer=request.value, paraphrase="", wrong=(), masked=remaining)
        else:
            new = item._replace(question=request.value)
        if not words.fits(new.question, new.answer):
            raise EditRequestError(
                f"the new {request.kind} of {name!r} is too long: an example has {words.length} words"
            )
        return new

    def encode(self, items: Mapping[str, QuestionRow]) -> dict[str, Any]:
        """See `RequestTask.encode`."""
        rows = list(items.values())
        pairs = [(row.question, row.answer) for row in rows]
        return {"id": np.array(list(items)), **self.model.words.encode(pairs, [row.masked for row in rows])}

    def neighbours(self, names: Sequence[str], forgotten: Sequence[str]) -> list[bool]:
        """Rows about the same people."""
        groups = {self.corpus.train[name].group for name in forgotten}
        return [self.corpus.train[name].group in groups for name in names]

    def describe(self, item: QuestionRow) -> Description:
        """See `RequestTask.describe`."""
        fields = {"question": item.question, "answer": item.answer}
        return Description(fields | {f"masked {i}": x for i, x in enumerate(item.masked, 1)}, ())

    def load(self, path: pathlib.Path) -> Params:
        """See `RequestTask.load`."""
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): run `unlearn-jax train` first") from None
        shapes = {name: np.shape(x) for name, x in _flat(self.model.fresh).items()}
        if {name: x.shape for name, x in tensors.items()} != shapes:
            raise UserError(f"{path} is not an adapter of this configuration, whose shapes are {shapes}")
        nested: dict[str, dict[str, jax.Array]] = {}
        for name, x in tensors.items():
            module, factor = name.split(".")
            nested.setdefault(module, {})[factor] = jnp.asarray(x)
        return on_mesh(nested, self.mesh)

    def save(self, path: pathlib.Path, adapter: Params) -> None:
        """See `RequestTask.save`."""
        if is_main_process():
            write_file(path, save({name: np.asarray(x) for name, x in _flat(adapter).items()}))

    def retrain(self, items: Mapping[str, QuestionRow], weights: np.ndarray) -> Retrained:
        """Repeats the training from the last checkpoint before any of the edited rows was used."""
        pairs = zip(items.values(), self.corpus.train.values(), strict=True)
        edited = [i for i, (now, then) in enumerate(pairs) if not weights[i] or not same_item(now, then)]
        checkpoints = self.directory / CHECKPOINTS
        begin = last_before(self.recipe, len(items), np.array(edited, int), self.model.fresh, checkpoints)
        adapter, spent = self.train(items, weights, begin)
        since = f"the checkpoint after step {begin.step}" if begin.step else "the beginning"
        return Retrained(adapter, spent, since)

    def train(
        self,
        items: Mapping[str, QuestionRow],
        weights: np.ndarray,
        begin: TrainingPoint | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Params, float]:
        """Trains from `begin`; returns the adapter and the example-gradients spent.

        Args:
            items: the rows in their order.
            weights: [n], zero for rows that do not count, otherwise one.
            begin: None: the fresh adapter.
            keep: keep the checkpoints of the first epoch.
        """
        begin = beginning(self.recipe, self.model.fresh) if begin is None else begin
        steps = len(self.recipe.order(len(items)))
        progress = ProgressLine("AdamW", steps)

        def log(step: int, value: float) -> None:
            if is_main_process():
                progress.update(step, {"loss": value})

        examples = {name: x for name, x in self.encode(items).items() if name != "id"}
        directory = self.directory / CHECKPOINTS if keep and is_main_process() else None
        adapter = train(self.recipe, self.model.loss(), begin, examples, weights, checkpoints=directory, log=log)
        return adapter, float((steps - begin.step) * self.recipe.batch)


def _flat(adapter: Params) -> dict[str, Any]:
    return {f"{module}.{factor}": x for module, pair in adapter.items() for factor, x in pair.items()}
