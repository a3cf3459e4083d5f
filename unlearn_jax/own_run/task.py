"""A finished run of `pixel-jax sft` as a `RequestTask`: everything but the edits comes from the run's record."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pixel_jax.cli import UserError
from pixel_jax.data.digests import Digests
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.limits import use_limits
from pixel_jax.data.packed import PackedRow, Packing
from pixel_jax.data.read import read_examples
from pixel_jax.data.shapes import PACKED, largest
from pixel_jax.data.sources import Embedded, Source
from pixel_jax.data.traces import TraceRow, assemble, render, write_rows
from pixel_jax.dialog.grammar import Language
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import write_file
from pixel_jax.models.io import from_pretrained, read_network
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.models.model import Model
from pixel_jax.models.peft import FOLDER, load_adapter, save_adapter
from pixel_jax.parallel import make_mesh, process_shard
from pixel_jax.parallel.processes import is_main_process, waiting
from pixel_jax.phases import read_model
from pixel_jax.rollouts.drawings import row_images
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.trajectory import Tables
from pixel_jax.run_record import RunRecord
from pixel_jax.tools.named import find_format, find_tools
from pixel_jax.train_config import TrainConfig, recorded
from pixel_jax.training.batch import from_trajectories
from pixel_jax.training.loop import EARLY
from pixel_jax.training.progress import use_compilation_cache
from pixel_jax.training.sft import replay
from pixel_jax.training.state import cast
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.loss import MASK, Loss
from unlearn_jax.own_run.config import RunEditConfig
from unlearn_jax.own_run.identity import check_files, check_run, matched
from unlearn_jax.own_run.item import RunItem, changed
from unlearn_jax.requests.log import ADAPTER, LOG, sha256
from unlearn_jax.requests.request import EditRequestError, Request
from unlearn_jax.requests.state import same_item
from unlearn_jax.requests.task import Description, RequestsConfig, Retrained, TrainingRecord, record_training
from unlearn_jax.vision_language import adapter_loss, examples, mask_text

Items = Mapping[str, RunItem]


@dataclasses.dataclass(frozen=True, eq=False)
class RunTask:
    """The task of a finished run: its traces, loss, batches and adapter, as its record describes them."""

    config: RunEditConfig
    record: RunRecord
    trained: TrainConfig  # of the run
    examples: Sequence[Example]  # of the record, in its order
    base: Model  # without the adapter, in the run's compute dtype
    loss: Loss
    like: Params  # the adapter's shapes
    vocabulary: Vocabulary
    tables: Tables
    mesh: Mesh | None

    @classmethod
    def of(cls, config: RunEditConfig) -> "RunTask":
        """Reads a run, and checks that model, adapter, code and data are those that it recorded.

        Raises:
            EditRequestError: one is not; the run has no record; or it cannot be edited.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"{jax.process_count()} processes have joined; a run is edited by one, with the run's own mesh"
            )
        run, phase = pathlib.Path(config.run), config.phase
        record = RunRecord.read(phase)
        check_run(phase, record)
        trained = recorded(record.settings)[1]
        moved = {name: x for name in ("model", "data") if (x := getattr(config, name)) is not None}
        trained = dataclasses.replace(trained, **moved)
        use_limits(trained.limits)
        tools, calls = find_tools(trained.tools), find_format(trained.rollout.call_format)
        trained = trained.for_model(read_network(trained.model))
        adapter = run / "model" / FOLDER
        with waiting("reading the data"):
            data, _ = read_examples(
                trained.data,
                turns=True,
                drop=trained.bad_rows == "drop",
                image_folders=trained.image_folders,
                columns=trained.columns,
                language=Language(tools, calls),
                pictures=trained.rollout.max_images > 0,
            )
        with waiting("making digests of the run's files"), Digests(run / "digests.json") as digests:
            check_files(run, record, trained.model, adapter, digests)
            in_order = matched(run, record, data, digests)
        pathlib.Path(config.out).mkdir(exist_ok=True)
        use_compilation_cache(pathlib.Path(config.out) / "compiled")
        mesh = make_mesh(trained.mesh) if trained.mesh else None
        mesh = None if mesh is None or mesh.size == 1 else mesh
        model, processor = from_pretrained(trained.model, mesh=mesh)
        if processor is None:
            raise UserError(f"{trained.model} has no tokenizer")
        forward = trained.tuning.forward
        model = cast(load_adapter(model, adapter), forward.compute_dtype)
        # Dense and chunked attention can be differentiated twice; a kernel cannot.
        loss, like = adapter_loss(
            model, remat=bool(forward.remat), implementation="dense" if forward.implementation == "dense" else "chunked"
        )
        vocabulary = Vocabulary.of(processor.tokenizer)
        token_tables = tables(vocabulary, tools, calls)
        base = split(model, LoRAWeight)[1]
        task = cls(config, record, trained, in_order, base, loss, like, vocabulary, token_tables, mesh)
        task._begin(like)
        return task

    def _begin(self, adapter: Params) -> None:
        """Saves the run's adapter as the one from which requests start, unless there is a log already."""
        before = TrainingRecord.read(self.directory)
        if (self.directory / LOG).exists():
            if before is None or sha256(_saved(adapter)) != before.adapter:
                raise EditRequestError(
                    f"{self.config.run} was trained again after its first request: {self.directory} has the edits of the "
                    f"adapter before. Move that directory away, and file the requests again"
                )
            return
        self.save(self.directory / ADAPTER, adapter)
        record_training(self, self.record.gradient_norm)

    @property
    def directory(self) -> pathlib.Path:
        """See `RequestTask.directory`."""
        return pathlib.Path(self.config.out)

    @property
    def erasure(self) -> ErasureConfig:
        """See `RequestTask.erasure`. The reduction follows the normalizer of the run."""
        reduction = "per_example" if self.trained.tuning.normalizer == "row" else "per_token"
        epochs = len(self.record.order) / self.record.epoch
        return dataclasses.replace(self.config.erasure, reduction=reduction, training_epochs=epochs)

    @property
    def requests(self) -> RequestsConfig:
        """See `RequestTask.requests`."""
        return self.config.requests

    def settings(self) -> dict[str, Any]:
        """See `RequestTask.settings`."""
        edit = dataclasses.asdict(dataclasses.replace(self.config, erasure=self.erasure))
        return json.loads(json.dumps({"edit": edit, "run": dict(self.record.settings)}))

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """{name: index in the record} of every example that a step has used."""
        return {self.record.examples[i].name: i for i in self.record.seen}

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """The pictures of the data by digest."""
        pairs = zip(self.record.examples, self.examples, strict=True)
        return {name: source for then, now in pairs for name, source in zip(then.pictures, now.images, strict=True)}

    def items(self) -> dict[str, RunItem]:
        """See `RequestTask.items`. Examples that no step has used are left out."""
        return {name: self._item(i) for name, i in self.numbers.items()}

    def _item(self, number: int) -> RunItem:
        then, now = self.record.examples[number], self.examples[number]
        fields = (now.turns, now.answer, now.video, now.seconds, now.text_first)
        return RunItem(now.question, then.pictures, *fields)

    def _example(self, name: str, item: RunItem) -> Example:
        images = tuple(self.sources[x] if isinstance(x, str) else Embedded(x, "the new image") for x in item.pictures)
        fields = {field: getattr(item, field) for field in ("turns", "answer", "video", "seconds", "text_first")}
        return Example(name, item.question, images, **fields)

    def change(self, item: RunItem, request: Request) -> RunItem:
        """See `RequestTask.change`. The new form must be valid for the run's settings, and fit the rows of its batches."""
        new, name = changed(item, request), request.ids[0]
        try:
            rows, frames = self._rendered({name: new})
            assemble(rows, frames, self.trained.rollout, rows[0].shape)  # raises for too many calls
        except ValueError as error:
            raise EditRequestError(f"the new form of {name!r} cannot be written: {error}") from None
        if not any(shape.holds(rows[0].shape) for shape in self.record.shapes):
            shapes = ", or ".join(map(str, self.record.shapes))
            raise EditRequestError(
                f"the new form of {name!r} takes {rows[0].shape}; rows of the run have room for {shapes}"
            )
        return new

    def encode(self, items: Items) -> dict[str, Any]:
        """See `RequestTask.encode`."""
        rows, frames = self._rendered(items)
        trajectories = assemble(rows, frames, self.trained.rollout, largest([row.shape for row in rows]))
        arrays = examples(from_trajectories(trajectories), list(items))
        for row, item in enumerate(items.values()):
            for text in item.masked:
                mask_text(arrays["labels"][row], arrays[MASK][row], text, self.vocabulary)
        return arrays

    def _rendered(self, items: Items) -> tuple[list[TraceRow], list[list[np.ndarray]]]:
        """The rows of examples, and the frames that they show."""
        written = [self._example(name, item) for name, item in items.items()]
        queries = [example.query() for example in written]
        traces = [example.trace(query) for example, query in zip(written, queries, strict=True)]
        rows = write_rows(traces, self.vocabulary, self.tables, self.trained.rollout)
        return rows, [render(row, query.images) for row, query in zip(rows, queries, strict=True)]

    def neighbours(self, names: Sequence[str], forgotten: Sequence[str]) -> list[bool]:
        """Examples about the same pictures, or with the same question."""
        items = self.items()
        pictures = {x for name in forgotten for x in items[name].pictures}
        questions = {items[name].question for name in forgotten}
        return [not pictures.isdisjoint(items[x].pictures) or items[x].question in questions for x in names]

    def describe(self, item: RunItem) -> Description:
        """See `RequestTask.describe`. The pictures are followed by those that the trace's calls returned."""
        texts = {"question": item.question}
        for number, turn in enumerate(item.turns, 1):
            texts[f"turn {number}"] = "".join(text for text, _ in turn.parts)
        texts |= {f"masked {number}": text for number, text in enumerate(item.masked, 1)}
        (row,), _ = self._rendered({"": item})
        images = row.trace.query.images
        buffers = row_images(Images(tuple(images)), row.calls, row.tools)
        shown = [(buffers[view.image], view.region) for view in row.views[len(images) :]]
        return Description(texts, [*images, *(picture[y1:y2, x1:x2] for picture, (x1, y1, x2, y2) in shown)])

    def load(self, path: pathlib.Path) -> Params:
        """See `RequestTask.load`."""
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error})") from None
        shapes = lambda adapter: {key: (x.shape, str(x.dtype)) for key, x in adapter.items()}
        if shapes(tensors) != shapes(self.like):
            raise UserError(f"{path} holds {shapes(tensors)}, the adapter of this run {shapes(self.like)}")
        return {name: jax.device_put(x, self.like[name].sharding) for name, x in tensors.items()}

    def save(self, path: pathlib.Path, adapter: Params) -> None:
        """See `RequestTask.save`. The adapter is written in PEFT's format as well, into the same directory."""
        data = _saved(adapter)
        save_adapter(combine(dict(adapter), self.base), path.parent, base=self.trained.model)
        if is_main_process():
            write_file(path, data)

    def retrain(self, items: Items, weights: np.ndarray) -> Retrained:
        """Repeats the run from the last checkpoint before any of the edited examples was used (`training.sft.replay`).

        If a new form does not fit into the packed row of the old one, the examples are packed anew, and the replay begins at the
        first step.
        """
        first, now, edited = self.items(), list(self.examples), set[int]()
        masked: dict[int, tuple[str, ...]] = {}
        for (name, item), weight in zip(items.items(), weights, strict=True):
            number = self.numbers[name]
            if not weight or not same_item(item, first[name]):
                edited.add(number)
            if weight and not same_item(item, first[name]):
                now[number], masked[number] = self._example(name, item), item.masked
        without = {self.numbers[name] for name, weight in zip(items, weights, strict=True) if not weight}
        config = self.trained
        section = dataclasses.replace(config.tuning, steps=len(self.record.order), epochs=None)
        packing = Packing(
            now,
            self.vocabulary,
            self.tables,
            config.rollout,
            self.record.shapes,
            size=section.batch_size,
            seed=config.seed,
            report=ReadReport(config.data),
        )
        for number, texts in masked.items():
            _mask(packing.rows[number], texts, self.vocabulary)
        for number in without:
            packing.rows[number].loss_mask = bytearray(len(packing.rows[number].loss_mask))
        order = [row for rows in self.record.order for row in rows]
        before, anew = self.record.first_step(edited), ""
        if not all(self._fits(packing, row) for row in order if not edited.isdisjoint(row.traces)):
            order = [packing.order[i] for i in range(len(order))]
            before, anew = 0, ", in other rows: a new form is too long"
        model, _, mesh = read_model(config)
        shard = process_shard(mesh)
        reading = {"threads": config.read_threads, "ahead": config.read_ahead}
        batches = packing.batches(shard.index, shard.count, order=order, **reading)
        early = self.config.phase / EARLY
        replayed = replay(model, batches, section, early=early, before=before, mesh=mesh, epoch=self.record.epoch)
        batches.close()
        adapter = {name: np.asarray(x) for name, x in split(replayed.model, LoRAWeight)[0].items()}
        spent = sum(len(row.traces) for row in order[replayed.begun * section.batch_size :])
        since = f"the checkpoint after step {replayed.begun}" if replayed.begun else "the beginning"
        on_devices = {name: jax.device_put(x, self.like[name].sharding) for name, x in adapter.items()}
        return Retrained(on_devices, float(spent), f"{since}{anew}")

    def _fits(self, packing: Packing, row: PackedRow) -> bool:
        shapes = np.array([packing.rows[i].shape for i in row.traces])
        capacity = np.array(self.record.shapes[row.bucket])
        together = shapes[:, :PACKED].sum(axis=0) <= capacity[:PACKED]
        return bool(together.all() and (shapes <= capacity).all())


def _mask(row: TraceRow, texts: Sequence[str], vocabulary: Vocabulary) -> None:
    """Takes the loss off the tokens of a row that have a byte of these texts, in place."""
    learned = np.flatnonzero(np.frombuffer(row.loss_mask, bool))
    tokens, mask = np.array(row.ids)[learned], np.ones(len(learned), bool)
    for text in texts:
        mask_text(tokens, mask, text, vocabulary)
    for position in learned[~mask].tolist():
        row.loss_mask[position] = 0


def _saved(adapter: Params) -> bytes:
    return save({name: np.asarray(x) for name, x in adapter.items()}, metadata={"format": "np"})
