"""A synthesis: every seed becomes a trace or is dropped, many at a time, with a report at the end.

The run directory holds `outcomes.jsonl` (a line for each seed, written when it is finished), `answers/` (those of the endpoint),
and at the end `traces.jsonl` for `pixel-jax sft`, its images in `images/`, and `report.json`. The results do not depend on
interruptions: rows are in the order of the seeds, and random numbers depend on the seed's number only.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TextIO

import numpy as np
from absl import logging

from pixel_jax.config import positive
from pixel_jax.data.digests import Digests
from pixel_jax.data.limits import Limits
from pixel_jax.data.synthesis import IMAGE_KINDS, VIDEO_KINDS, Mix
from pixel_jax.dialog.grammar import Language
from pixel_jax.endpoint import EndpointConfig, EndpointError, is_text
from pixel_jax.files import write_file
from pixel_jax.named import digest, is_name
from pixel_jax.run_lock import hold
from pixel_jax.state_files import LineLog, read_json_lines
from pixel_jax.synthesis.seeds import Seed, read_seeds
from pixel_jax.synthesis.traces import DIRECT, UNREADABLE, SeedOutcome, assign_kinds, fingerprint, make, possible_kinds
from pixel_jax.synthesis.writers import EndpointWriter, Templates
from pixel_jax.terminal import Waiting, print_table, say, table
from pixel_jax.tools import RELEASED
from pixel_jax.tools.named import DEFAULT, find_format, find_tools
from pixel_jax.training.progress import ProgressLine

MOST_FAILURES = 8  # seeds in a row for which the endpoint could not be used, before the run stops
DOWN = "the endpoint gave no answer"
FAILED = "an error, which the log has"


@dataclasses.dataclass(frozen=True)
class SynthConfig:
    """The settings of a synthesis. `configs/pixel/synth.py` makes one; any field can be set as `--config.FIELD=VALUE`."""

    seeds: str  # JSON lines (`pixel_jax.synthesis.seeds`)
    out: str  # run directory
    # Calls are written of the paper's crop and frame selection, where these are among the tools. Traces with other tools are
    # written by hand (docs/your-own-tool.md).
    tools: tuple[str, ...] = DEFAULT
    call_format: str = "pixel_reasoner"  # of `RolloutConfig`: how calls are written
    image_folders: tuple[str, ...] = ()  # other folders in which images may lie: ("/",) allows all
    endpoint: EndpointConfig | None = None  # the model that writes the analyses; None: they are templates
    temperature: float = 0.7  # of the endpoint's sampling
    max_tokens: int = 600  # of one analysis by the endpoint
    # Shares of single-pass, recrop, recrop twice and further zoom-in among traces about images; by default the paper's.
    image: tuple[float, float, float, float] = Mix.image
    video: tuple[float, float] = Mix.video  # shares of single-pass and reselect among traces about videos; the paper's
    attempts: int = 3  # attempts at each analysis
    pad: float | None = None  # of `RolloutConfig`: what the crop tool adds on each side of a box; None: the format's
    min_crop: int = 28  # of `RolloutConfig`
    limits: Limits = Limits()  # of the size of a picture, and of the memory that reading takes
    seed: int = 0  # of the kinds of traces, and of the boxes and frames of mistakes

    def __post_init__(self):
        positive(self, "max_tokens")
        for name in ("image", "video"):
            shares = getattr(self, name)
            if min(shares) < 0 or not sum(shares) > 0:
                raise ValueError(f"{name} must be shares, none negative and not all 0: {shares}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1: {self.attempts}")
        if self.pad is not None and not 0 <= self.pad < 0.5:
            raise ValueError(f"pad is a share of the image, in [0, 0.5): {self.pad}")


def synthesize(config: SynthConfig) -> dict[str, Any]:
    """Carries out a synthesis, or continues one that was interrupted, and returns the report.

    Raises:
      EndpointError: the endpoint cannot be used. What is finished stays; the run can be started again.
      LockError: another run is writing there.
    """
    language = language_of(config)
    if others := [tool.name for tool in language.tools if tool not in RELEASED]:
        say(f"No traces are synthesized that call {', '.join(others)}: those are written by hand.")
    with Waiting("reading the seeds"):
        seeds = read_seeds(config.seeds, config.image_folders)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        return _synthesize(seeds, config, out)


def language_of(config: SynthConfig) -> Language:
    """The language of the calls.

    Raises:
        ToolError: the tools cannot be used together, or with the format.
    """
    return Language(find_tools(config.tools), find_format(config.call_format))


def pad_of(config: SynthConfig, language: Language) -> float:
    """The padding of a box: the config's, or else the format's."""
    return language.format.pad if config.pad is None else config.pad


def _synthesize(seeds: list[Seed], config: SynthConfig, out: pathlib.Path) -> dict[str, Any]:
    kinds, impossible = plan(seeds, config)
    if config.endpoint is None:
        return _run(seeds, kinds, impossible, Templates(), 1, config, out)
    with config.endpoint.connect(cache=out / "answers") as endpoint:
        writer = EndpointWriter(endpoint, {"temperature": config.temperature, "max_tokens": config.max_tokens})
        return _run(seeds, kinds, impossible, writer, config.endpoint.workers, config, out)


def plan(seeds: list[Seed], config: SynthConfig) -> tuple[dict[int, str], dict[int, str]]:
    """The kind of trace of each seed, and the reasons why other seeds cannot become one; both by the seeds' indices."""
    language = language_of(config)
    pad = pad_of(config, language)
    possible = {i: possible_kinds(seed, pad, config.min_crop, language) for i, seed in enumerate(seeds)}
    impossible = {i: reason for i, reason in possible.items() if isinstance(reason, str)}
    kinds = {i: DIRECT for i, names in possible.items() if names == (DIRECT,)}
    for video, names, of_mix in ((False, IMAGE_KINDS, config.image), (True, VIDEO_KINDS, config.video)):
        shares = {name: share for name, share in zip(names, of_mix, strict=True) if share > 0}
        here = [i for i in possible if i not in impossible and i not in kinds and seeds[i].video == video]
        wanted = {i: [kind for kind in possible[i] if kind in shares] for i in here}
        impossible |= {i: "no kind of the mix fits the reference" for i in here if not wanted[i]}
        here = [i for i in here if wanted[i]]
        kinds |= dict(zip(here, assign_kinds([wanted[i] for i in here], shares, config.seed), strict=True))
    return kinds, impossible


def _run(seeds, kinds, impossible, writer, workers: int, config: SynthConfig, out: pathlib.Path) -> dict[str, Any]:
    language = language_of(config)
    pad = pad_of(config, language)
    # Settings that change no trace are left out of its fingerprint.
    irrelevant = {"seeds": "", "out": "", "limits": Limits(), "image_folders": ()}
    settings = dataclasses.asdict(dataclasses.replace(config, pad=pad, **irrelevant))
    sampling = {name: settings.pop(name) for name in ("temperature", "max_tokens")}
    settings["endpoint"] = config.endpoint and {"model": config.endpoint.model, **sampling}
    settings["code"] = {name: digest(name) for name in (*config.tools, config.call_format) if is_name(name)}
    with Waiting("making digests of the pictures"), Digests(out / "digests.json") as digests:
        prints = {i: fingerprint(seeds[i], kind, {**settings, "place": i}, digests) for i, kind in kinds.items()}
    outcomes = {i: SeedOutcome(None, reason, {}) for i, reason in impossible.items()}
    outcomes_before = _read_outcomes(out / "outcomes.jsonl")
    # An outcome that cannot be written is made again: an earlier run may have recorded half a surrogate pair.
    writable = {key: x for key, x in outcomes_before.items() if is_text(json.dumps(x, ensure_ascii=False))}
    outcomes |= {i: writable[key] for i, key in prints.items() if key in writable}

    def one(i: int) -> SeedOutcome:
        rng = np.random.default_rng([config.seed, i])
        return make(seeds[i], kinds[i], writer, rng, attempts=config.attempts, pad=pad, language=language)

    with LineLog(out / "outcomes.jsonl", durable=False) as log:

        def keep(i: int, outcome: SeedOutcome) -> None:
            outcomes[i] = outcome
            log.append([{"print": prints[i], **outcome._asdict()}])

        failed = _work([i for i in kinds if i not in outcomes], seeds, one, keep, workers)
    # Failures are not recorded, so that another run tries again.
    outcomes |= {i: SeedOutcome(None, why, {}) for i, why in failed.items()}
    with Waiting("writing the traces and their pictures"), Digests(out / "digests.json") as digests:
        rows = [
            row | {"images": [put_beside(path, out, digests) for path in seed.images]}
            for i, seed in enumerate(seeds)
            if (row := outcomes[i].row) is not None
        ]
    write_file(out / "traces.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report = report_of(seeds, kinds, outcomes, config)
    write_file(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def put_beside(picture: pathlib.Path, out: pathlib.Path, digests: Digests) -> str:
    """Puts an image beside the traces, named by its digest, so that readers need no access to other folders.

    It is a hard link where that is possible, which takes no space on the disk, else a copy.
    """
    name = f"images/{digests.file(picture)}{picture.suffix.lower()}"
    if not (out / name).exists():
        (out / name).parent.mkdir(exist_ok=True)
        new = out / f"{name}.new"
        new.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(picture), new)
        except OSError:  # on another disk, or on one that has no such links
            shutil.copyfile(picture, new)
        new.replace(out / name)
    return name


def _work(
    todo: list[int],
    seeds: Sequence[Seed],
    one: Callable[[int], SeedOutcome],
    keep: Callable[[int, SeedOutcome], None],
    workers: int,
) -> dict[int, str]:
    """Calls `one` for every seed of `todo`, and `keep` with its outcome; returns the reasons of failures by index.

    The failure of one seed is logged and does not end the others. Several failures in a row, or the failure of all seeds, end the
    run: then the cause is not in the seeds.
    """
    total = len(seeds)
    done = total - len(todo)
    progress, dropped, in_a_row = ProgressLine("seeds", total, done), 0, 0
    failed: dict[int, str] = {}
    running: dict[Future, int] = {}
    waiting = iter(todo)
    with Waiting(f"the first of {len(todo)} seeds") as first, ThreadPoolExecutor(workers) as pool:
        while True:
            # No more seeds are submitted than there are workers: an interruption waits for all that were submitted.
            while len(running) < workers and (i := next(waiting, None)) is not None:
                running[pool.submit(one, i)] = i
            if not running:
                return failed
            ended = wait(running, return_when=FIRST_COMPLETED).done
            first.end()
            for future in ended:
                i = running.pop(future)
                error = future.exception()
                if error is not None:
                    down, in_a_row = isinstance(error, EndpointError), in_a_row + 1
                    if not isinstance(error, Exception):
                        raise error
                    if in_a_row >= MOST_FAILURES or in_a_row == total:
                        if down:
                            error = EndpointError(
                                f"{error}; {done} of {total} seeds are finished, start again to go on"
                            )
                        raise error
                    failed[i] = DOWN if down else f"{FAILED}: {type(error).__name__}"
                    why = f"seed {seeds[i].id!r} failed and is left for another run: {type(error).__name__}: {error}"
                    logging.error("%s", why, exc_info=None if down else error)
                    continue
                keep(i, future.result())
                done, in_a_row, dropped = done + 1, 0, dropped + (future.result().row is None)
                progress.update(done, {"dropped": dropped})


def _read_outcomes(path: pathlib.Path) -> dict[str, SeedOutcome]:
    """The outcomes of earlier runs: fingerprint -> outcome. Damaged lines are left out, so that their seeds are done again."""
    lines = read_json_lines(path, print=str, row=dict | None, reason=str | None, rejected=dict)
    return {line["print"]: SeedOutcome(line["row"], line["reason"], line["rejected"]) for line in lines}


def report_of(
    seeds: list[Seed], kinds: Mapping[int, str], outcomes: Mapping[int, SeedOutcome], config: SynthConfig
) -> dict[str, Any]:
    """The report: the traces of each kind, their shares, and the reasons for dropped seeds and rejected texts."""
    kinds_made: dict[str, dict[str, Any]] = {}
    for group, names, shares in (
        ("image", IMAGE_KINDS, config.image),
        ("video", VIDEO_KINDS, config.video),
        ("without a look", (DIRECT,), (1.0,)),
    ):
        here = [
            kinds[i]
            for i, seed in enumerate(seeds)
            if outcomes[i].row is not None
            and (not seed.looks if group == "without a look" else seed.looks and seed.video == (group == "video"))
        ]
        counts = Counter(here)
        kinds_made[group] = {
            name: {
                "made": counts[name],
                "share": round(counts[name] / len(here), 4) if here else None,
                "wanted": round(share / sum(shares), 4),
            }
            for name, share in zip(names, shares, strict=True)
        }
    dropped = [(seed.id, str(outcomes[i].reason)) for i, seed in enumerate(seeds) if outcomes[i].row is None]

    def kind_of(reason: str) -> str:
        """The reason without the error of the one file that cannot be read."""
        return UNREADABLE if reason.startswith(UNREADABLE) else reason

    rejected: Counter[str] = Counter()
    for outcome in outcomes.values():
        rejected.update(outcome.rejected)
    return {
        "seeds": len(seeds),
        "made": len(seeds) - len(dropped),
        "kinds": kinds_made,
        "dropped": dict(Counter(kind_of(reason) for _, reason in dropped).most_common()),
        "rejected_texts": dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
        "dropped_seeds": [{"id": name, "reason": reason} for name, reason in dropped],
        "writer": config.endpoint.model if config.endpoint else "templates",
    }


def show(report: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Prints the report: the traces of each kind, and the reasons for what was dropped."""
    title = f"{report['made']} traces of {report['seeds']} seeds, analyses by {report['writer']}"
    rows = [
        (group, name, str(kind["made"]), f"{kind['share']:.1%}", f"{kind['wanted']:.0%}")
        for group, kinds in report["kinds"].items()
        if any(kind["made"] for kind in kinds.values())
        for name, kind in kinds.items()
    ]
    print_table(table(("", "kind", "made", "share", "wanted"), rows, words=2, title=title), stream)
    for title, counts in (("dropped seeds", report["dropped"]), ("rejected texts", report["rejected_texts"])):
        if counts:
            rows = [(reason, str(count)) for reason, count in counts.items()]
            print_table(table(("why", "count"), rows, title=f"{sum(counts.values())} {title}"), stream)
