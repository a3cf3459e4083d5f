"""The cases of the whole multi-turn rollout: one XLA program compared with a loop around transformers, and the queue.

The loop replays the turns that our rollout sampled, so that both do the same work: it runs the network over the same tokens
and pixels, draws a token as `generate` does, and then uses ours. Its log-probabilities of our tokens must equal those that
our rollout recorded.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.bench.memory import array_bytes
from pixel_jax.bench.network import HAS_TORCH, images, prompts, rollout_config, transformers_model, zooming_model
from pixel_jax.bench.operations import close
from pixel_jax.bench.timing import Aim, Case, Workload
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.flops import forward_flops, row_work
from pixel_jax.models.rope import mrope_positions
from pixel_jax.rollouts.rollout import compiled_rollout, rollout
from pixel_jax.rollouts.trajectory import CallStatus, Trajectories, executed_calls, take_prompts, to_host


class TimedTurn(NamedTuple):
    """A turn of the policy, as a range of tokens."""

    start: int  # index of its first token
    end: int


class PackedConversation(NamedTuple):
    """One conversation without its padding."""

    tokens: np.ndarray  # int64 [L]
    indices: np.ndarray  # int [L], of the tokens in the trajectory
    positions: np.ndarray  # int64 [3, L]
    turns: list[TimedTurn]
    buffer: np.ndarray  # uint8 [h, w, 3]
    # Box and (height, width) of every image that was shown.
    views: list[tuple[tuple[int, int, int, int], tuple[int, int]]]


def replayed(t: Trajectories, buffers: np.ndarray, model) -> list[PackedConversation]:
    """Makes the conversations of a rollout, to be replayed. `buffers` are the images of the prompts."""
    tokens = jnp.asarray(t.tokens)
    positions, _ = jax.jit(
        lambda tokens, valid, grids, seconds: mrope_positions(
            model.is_visual(tokens), valid, grids, seconds, jnp.zeros(len(tokens), jnp.int32), model.config
        )
    )(tokens, t.valid, t.visual.grids, t.visual.seconds)
    positions, rows = np.asarray(positions), []
    for r in range(len(t.tokens)):
        indices = np.flatnonzero(t.valid[r])
        loss_mask = np.concatenate([[False], t.loss_mask[r][indices], [False]])
        starts, ends = np.flatnonzero(loss_mask[1:] & ~loss_mask[:-1]), np.flatnonzero(~loss_mask[1:] & loss_mask[:-1])
        buffer = buffers[t.prompt[r]]
        boxes = [(0, 0, buffer.shape[1], buffer.shape[0])]
        cropped = t.calls.status[r] == CallStatus.DONE
        boxes += map(tuple, t.calls.source.region[r, cropped, 0].tolist())
        sizes = [(14 * int(h), 14 * int(w)) for n, h, w in t.visual.grids[r] if n]
        rows.append(
            PackedConversation(
                np.asarray(t.tokens[r])[indices].astype(np.int64),
                indices,
                positions[:, r, indices].astype(np.int64),
                [TimedTurn(int(a), int(b)) for a, b in zip(starts, ends, strict=True)],
                buffer,
                list(zip(boxes, sizes, strict=True)),
            )
        )
    return rows


def transformers_loop(twin, rows: list[PackedConversation], width: int, keep_cache: bool) -> np.ndarray:
    """Log-probabilities float32 [R, width] of the policy's tokens, turn by turn, with one cache or a new one in every turn."""
    import torch
    from PIL import Image
    from transformers import DynamicCache
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from pixel_jax.bench.pillow import crop

    processor = Qwen2VLImageProcessorPil(do_resize=False)
    logprobs = np.zeros((len(rows), width), np.float32)

    def views(row: PackedConversation, first: int, last: int) -> list:
        picture = Image.fromarray(row.buffer)
        return [crop(picture, *view) for view in row.views[first:last]]

    def forward(ids, positions, mask, cache, pictures=()):
        inputs = {}
        if pictures:
            inputs = dict(processor(list(pictures), return_tensors="pt"))
        return twin(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            mm_token_type_ids=(ids == twin.config.image_token_id).int(),
            logits_to_keep=1,
            use_cache=True,
            **inputs,
        ).logits[:, -1]

    def padded(parts: list[tuple[PackedConversation, int, int]]):
        """Stacks ranges of the rows' tokens, padded on the left."""
        longest = max(last - first for _, first, last in parts)
        ids = np.zeros((len(parts), longest), np.int64)
        positions, mask = np.ones((3, len(parts), longest), np.int64), np.zeros((len(parts), longest), np.int64)
        for i, (row, first, last) in enumerate(parts):
            at = slice(longest - (last - first), longest)
            ids[i, at], positions[:, i, at], mask[i, at] = row.tokens[first:last], row.positions[:, first:last], 1
        return tuple(torch.from_numpy(x) for x in (ids, positions, mask))

    cache, seen_mask = None, None
    with torch.no_grad():
        for turn in range(max(len(row.turns) for row in rows)):
            # A kept cache holds all tokens but the last of the previous turn, which the network has not read yet.
            first = [row.turns[turn - 1].end - 1 if keep_cache and turn else 0 for row in rows]
            ids, positions, mask = padded([(row, a, row.turns[turn].start) for row, a in zip(rows, first, strict=True)])
            if not keep_cache or cache is None:
                cache, seen_mask = DynamicCache(), mask
                pictures = [view for row in rows for view in views(row, 0, turn + 1)]
            else:
                assert seen_mask is not None
                seen_mask = torch.cat([seen_mask, mask], dim=1)
                pictures = [view for row in rows for view in views(row, turn, turn + 1)]
            logits = forward(ids, positions, seen_mask, cache, pictures)
            for step in range(max(row.turns[turn].end - row.turns[turn].start for row in rows)):
                scores = torch.log_softmax(logits, dim=-1)
                torch.multinomial(scores.exp(), 1)  # draws a token as `generate` does; the replayed one is used
                at = [min(row.turns[turn].start + step, row.turns[turn].end - 1) for row in rows]
                token = torch.tensor([row.tokens[i] for row, i in zip(rows, at, strict=True)])[:, None]
                of_tokens = scores.gather(1, token)[:, 0].numpy()
                going = np.array([row.turns[turn].start + step < row.turns[turn].end for row in rows])
                for r in np.flatnonzero(going):
                    logprobs[r, rows[r].indices[at[r]]] = of_tokens[r]
                more = np.array([row.turns[turn].start + step + 1 < row.turns[turn].end for row in rows])
                if not more.any():
                    break
                position = torch.from_numpy(np.stack([row.positions[:, i] for row, i in zip(rows, at, strict=True)], 1))
                seen_mask = torch.cat([seen_mask, torch.from_numpy(more.astype(np.int64))[:, None]], dim=1)
                logits = forward(token, position[..., None], seen_mask, cache)
    return logprobs


def useful_flops(sampled: Trajectories, prompt: np.ndarray, config: ModelConfig) -> float:
    """The FLOPs of a rollout that reads every prompt once and every other token of a row once.

    A token attends to the tokens before it, and only the policy's tokens have logits.

    Args:
        sampled: the rollout.
        prompt: int [prompts], lengths of the prompts.
        config: the config of the network.
    """
    rows, length = prompt[sampled.prompt], np.sum(sampled.valid, axis=1)
    _, first = np.unique(sampled.prompt, return_index=True)
    shown = [sampled.visual.grids[first, 0], sampled.visual.grids[:, 1:]]  # the question's image; what was looked at
    work = row_work(prompt, np.concatenate([grids.reshape(-1, 3) for grids in shown]), config)
    work = work._replace(
        tokens=work.tokens + (length - rows).sum(),
        pairs=work.pairs + (length**2 - rows**2).sum() / 2,
        predictions=sampled.loss_mask.sum(),
    )
    return float(sum(forward_flops(config, work)))


def build_rollout(quick: bool) -> Workload:
    """A rollout in which every row zooms in twice."""
    model, questions, config, key = zooming_model(quick), prompts(quick), rollout_config(quick), jax.random.key(0)
    sampled = to_host(rollout(model, questions, key, config))
    executed = executed_calls(sampled)
    if not (executed == 2).all():
        raise ValueError(f"every row was to zoom in twice; rows did so {executed.tolist()} times")
    shape = sampled.tokens.shape
    buffers = images(2, 112, 112) if quick else images(8, 768, 1024)

    def ours():
        # A method of every jitted function, which the types of JAX leave out. The first call compiles again.
        compiled_rollout.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        return lambda: rollout(model, questions, key, config).logprobs

    alternatives, aims = {"pixel_jax": ours}, ()
    if HAS_TORCH:
        rows = replayed(sampled, buffers, model)

        def loop(keep_cache: bool):
            twin = transformers_model(model)
            return lambda: transformers_loop(twin, rows, shape[1], keep_cache)

        alternatives["transformers, every turn prefilled again"] = lambda: loop(False)
        alternatives["transformers, cache kept"] = lambda: loop(True)
        aims = tuple(Aim(name, ratio) for name, ratio in zip(list(alternatives)[1:], (6.0, 3.0), strict=True))
    tokens, read = int(sampled.loss_mask.sum()), int(sampled.valid.sum())

    def check(outputs) -> None:
        first, *others = (np.asarray(output) for output in outputs.values())
        for other in others:
            np.testing.assert_allclose(first, other, atol=2e-3)

    length, steps = np.sum(sampled.valid, axis=1), int(np.sum(sampled.loss_mask, axis=1).max())
    return Workload(
        f"{len(questions.length)} prompts x {config.group_size} rows, two zooms each; {tokens} tokens written, {read} in all, "
        f"rows of {length.min()} to {length.max()}",
        alternatives,
        check,
        flops={"pixel_jax": useful_flops(sampled, np.asarray(questions.length), model.config)},
        # The tokens of the longest row come one after the other, and each reads all weights.
        bytes=steps * array_bytes(model.language_model.layers, model.lm_head),
        aims=aims,
        memory=tuple(alternatives),
        rounds=2,
        details={"tokens written": tokens},
    )


def build_queue(quick: bool) -> Workload:
    """Rows that zoom in up to four times, most of them less often: in a queue, and in successive calls."""
    model, questions, key = zooming_model(quick, answers=0.4), prompts(quick), jax.random.key(0)
    batch, calls = len(questions.length), 2 if quick else 4
    config = dataclasses.replace(rollout_config(quick), max_calls=4, max_response=128 if quick else 512)
    queued = dataclasses.replace(config, in_flight=batch // calls)

    def one_after_the_other():
        size = batch // calls
        parts = [take_prompts(questions, slice(i * size, (i + 1) * size)) for i in range(calls)]
        return lambda: jnp.concatenate([rollout(model, part, key, config).logprobs for part in parts])

    alternatives = {
        "pixel_jax": lambda: lambda: rollout(model, questions, key, queued).logprobs,
        f"pixel_jax, {calls} calls": one_after_the_other,
    }
    sampled = to_host(rollout(model, questions, key, queued))
    spread = np.bincount(executed_calls(sampled)).tolist()
    return Workload(
        f"{batch} prompts x {config.group_size} rows, {queued.in_flight} prompts at a time; rows with 0, 1, ... zooms: {spread}",
        alternatives,
        close(1e-4),
        rounds=2,
        details={"tokens written": int(sampled.loss_mask.sum())},
    )


CASES = (Case("rollout", build_rollout), Case("rollout-queue", build_queue))
