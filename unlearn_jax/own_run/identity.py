"""Checks that model, adapter, code and data are those that a run recorded."""

import pathlib
from collections.abc import Mapping, Sequence

from pixel_jax.data.digests import UNREADABLE, Digests, digest_adapter, digest_example, digest_model, digest_sources
from pixel_jax.data.example import Example
from pixel_jax.identity import ChangeKind, kind_of, read_history
from pixel_jax.named import digest
from pixel_jax.run_record import FILE, RunRecord, TrainedExample, distinct
from unlearn_jax.requests.request import EditRequestError

MOST_SAID = 5  # examples that one message names
RL = (
    "was trained by reinforcement learning: its adapter learned from answers that it sampled itself, which the run does not "
    "keep, so there is no loss of an example to edit. Take the questions out of the data and start `pixel-jax rl` again in "
    "another config.out"
)


def check_run(phase: pathlib.Path, record: RunRecord) -> None:
    """Raises EditRequestError for a run that cannot be edited at all: of another kind, or of two experiments."""
    if record.command == "rl":
        raise EditRequestError(f"{phase.parent} {RL}")
    for start in read_history(phase):
        changed = [name for name in start["changed"] if kind_of(name) is not ChangeKind.FREE]
        if start["what"] == "went on" and changed:
            raise EditRequestError(
                f"{phase.parent} went on with another {', '.join(changed)} ({start['time']}): its adapter was trained on two "
                f"experiments, of which {FILE} has only the last. Train again in another config.out"
            )


def check_files(run: pathlib.Path, record: RunRecord, model: str, adapter: pathlib.Path, digests: Digests) -> None:
    """Raises EditRequestError unless base model, adapter and the user's own code are those of the run."""
    for name, actual in digest_model(model, digests).items():
        if actual != record.settings.get(name):
            raise EditRequestError(
                f"the {name} in {model} are not those that {run} began with: their hash is {actual}, it was "
                f"{record.settings.get(name)}. Say where the model lies with --config.model=DIR"
            )
    actual = digest_adapter(adapter, digests)["adapter_weights"]
    if actual != record.adapter:
        raise EditRequestError(
            f"{adapter} is not the adapter that {run} trained: its hash is {actual}, it was {record.adapter}"
        )
    start, then = record.settings.get("adapter"), record.settings.get("adapter_weights")
    if isinstance(start, str) and (now := digest_adapter(start, digests)["adapter_weights"]) != then:
        raise EditRequestError(f"{start} is not the adapter that {run} went on with: its hash is {now}, it was {then}")
    for name, then in record.settings.items():
        if name.startswith("code.") and (now := digest(name.removeprefix("code."))) != then:
            raise EditRequestError(
                f"{name.removeprefix('code.')} has changed since {run}: its hash is {now}, it was {then}"
            )


def matched(run: pathlib.Path, record: RunRecord, examples: Sequence[Example], digests: Digests) -> list[Example]:
    """Returns the examples of a run in its order, matched with those of the data by their texts and pictures.

    Rows may have been added to the data, or moved.

    Raises:
        EditRequestError: an example is missing, or a picture of it cannot be read. The message names it.
    """
    pictures = digest_sources([x.images for x in examples], digests)
    texts = [digest_example(x) for x in examples]
    by_content = {(text, tuple(shown)): x for text, shown, x in zip(texts, pictures, examples, strict=True)}
    now = {
        name: TrainedExample(name, text, tuple(shown))
        for name, text, shown in zip(distinct([x.id for x in examples]), texts, pictures, strict=True)
    }
    missing = [x for x in record.examples if (x.said, x.pictures) not in by_content or UNREADABLE in x.pictures]
    if missing:
        named = "; ".join(_difference(x, now) for x in missing[:MOST_SAID])
        more = f"; and {len(missing) - MOST_SAID} more" if len(missing) > MOST_SAID else ""
        raise EditRequestError(
            f"{run} was not trained on this data: {len(missing)} of its {len(record.examples)} examples differ: {named}{more}. "
            f"Say where the data lies with --config.data=FILE"
        )
    return [by_content[x.said, x.pictures] for x in record.examples]


def _difference(then: TrainedExample, data: Mapping[str, TrainedExample]) -> str:
    now = data.get(then.name)
    if now is None:
        return f"{then.name} is not there"
    differences = [] if now.said == then.said else [f"says something else (hash {now.said}, it was {then.said})"]
    if len(now.pictures) != len(then.pictures):
        differences.append(f"shows {len(now.pictures)} pictures, not {len(then.pictures)}")
    else:
        for number, (new, old) in enumerate(zip(now.pictures, then.pictures, strict=True), 1):
            if UNREADABLE in (new, old):
                differences.append(f"picture {number} cannot be read")
            elif new != old:
                differences.append(f"shows another picture {number} (hash {new}, it was {old})")
    return f"{then.name} {', '.join(differences)}"
