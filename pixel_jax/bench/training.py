"""The cases with a gradient: scoring, instruction tuning, the reinforcement-learning update, and long sequences."""
# pyright: reportMissingImports=false
# TRL is installed only where it is compared with.

import dataclasses
import functools
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pixel_jax.bench.memory import array_bytes
from pixel_jax.bench.network import (
    HAS_TORCH,
    HAS_TRL,
    images,
    model_config,
    random_model,
    text_tokens,
    transformers_model,
    vocabulary,
)
from pixel_jax.bench.operations import close
from pixel_jax.bench.timing import Aim, Case, Run, Workload
from pixel_jax.models import LanguageModel, ModelConfig
from pixel_jax.models.flops import Work, forward_flops, row_work, training_flops
from pixel_jax.models.inputs import Visual
from pixel_jax.ops import patchify, pixel_values
from pixel_jax.training.batch import Batch
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, make_rl_step, make_score_step, make_sft_step

LEARNING_RATE, CLIP = 1e-4, 1.0
# On a CPU the recipes' attention, "kernel", is "chunked".
FORWARD = ForwardConfig(remat=True, implementation="chunked")
SCORING = ForwardConfig(remat=False, implementation="chunked")


def make_batch(rows: int, length: int, side: int) -> Batch[Visual]:
    """Rows of `length` tokens: an image of `side` x `side` pixels, then text, of which the second half carries loss."""
    words, patches = vocabulary(), (side // 14) ** 2
    pads = patches // 4
    tokens = text_tokens(rows, length)
    tokens[:, 0], tokens[:, 1 : pads + 1], tokens[:, pads + 1] = words.vision_start, words.image_pad, words.vision_end
    loss_mask = np.zeros((rows, length), bool)
    loss_mask[:, pads + 2 + (length - pads) // 2 :] = True

    def cut(image):
        return patchify(image, jnp.array([side, side]), max_patches=patches)

    logprobs = np.where(loss_mask, -9.0, 0).astype(np.float32)
    return Batch(
        tokens=tokens,
        valid=np.ones((rows, length), bool),
        loss_mask=loss_mask,
        logprobs=logprobs,
        old_logprobs=logprobs,
        visual=Visual(
            patches=jax.jit(jax.vmap(cut))(images(rows, side, side))[:, None],
            slices=jnp.zeros((rows, 1, 2), jnp.int32),
            grids=jnp.tile(jnp.array([[[1, side // 14, side // 14]]], jnp.int32), (rows, 1, 1)),
            seconds=jnp.zeros((rows, 1), jnp.float32),
        ),
        advantage=np.random.default_rng(0).normal(size=rows).astype(np.float32),
        weight=np.ones(rows, np.float32),
    )


def batch_of(quick: bool) -> Batch[Visual]:
    """The batch of the cases of one step."""
    return make_batch(2, 24, 56) if quick else make_batch(4, 512, 336)


def shown(batch: Batch[Visual]) -> Visual:
    """The images of a batch, which all of the bench's have."""
    assert batch.visual is not None
    return batch.visual


def work_of(batch: Batch[Visual], config: ModelConfig) -> Work:
    """The work of a batch without padding."""
    rows, length = batch.tokens.shape
    return row_work(np.full(rows, length), np.asarray(shown(batch).grids), config)


def optimizer() -> optax.GradientTransformation:
    """Makes AdamW with clipped gradients."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, weight_decay=0.0))


class TorchStep:
    """The same network, forward pass and losses in eager torch, as trainers around transformers write them."""

    def __init__(self, model, batch: Batch[Visual]):
        """Copies the weights and the batch to torch."""
        import torch

        self.torch, self.twin = torch, transformers_model(model)
        ids = torch.from_numpy(batch.tokens).long()
        patches = jnp.asarray(shown(batch).patches[:, 0])
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.from_numpy(batch.valid).long(),
            "mm_token_type_ids": (ids == self.twin.config.image_token_id).int(),
            "pixel_values": torch.from_numpy(np.array(pixel_values(patches, patches))).flatten(0, 1),
            "image_grid_thw": torch.from_numpy(np.array(shown(batch).grids[:, 0])).long(),
            "use_cache": False,
        }
        self.ids, self.loss_mask = ids, torch.from_numpy(batch.loss_mask)
        self.advantage = torch.from_numpy(batch.advantage)
        self.optimizer = torch.optim.AdamW(self.twin.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def logprobs(self):
        """Computes log-probabilities float32 [R, L], zero at the first token."""
        logits = self.twin(**self.inputs).logits[:, :-1]
        logprobs = -self.torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none"
        )
        return self.torch.nn.functional.pad(logprobs.view(len(self.ids), -1), (1, 0))

    def scores(self) -> np.ndarray:
        """Computes log-probabilities float32 [R, L] of the tokens that carry loss, zero elsewhere."""
        with self.torch.no_grad():
            return self.torch.where(self.loss_mask, self.logprobs(), 0.0).numpy()

    def update(self, loss) -> np.ndarray:
        """Does one step of the optimizer; returns the loss and the norm of the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = self.torch.nn.utils.clip_grad_norm_(self.twin.parameters(), CLIP)
        self.optimizer.step()
        return np.array([loss.item(), norm.item()])

    def sft(self) -> np.ndarray:
        """Does one step of instruction tuning."""
        return self.update(-self.logprobs()[self.loss_mask].mean())

    def rl(self) -> np.ndarray:
        """Does one update of reinforcement learning, after the scores of its rows."""
        old = self.torch.from_numpy(self.scores())
        config = PolicyLossConfig()
        ratio = self.torch.where(self.loss_mask, self.logprobs() - old, 0.0).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        advantage = self.advantage[:, None]
        tokens = self.torch.maximum(-ratio * advantage, -clipped * advantage)
        return self.update(tokens[self.loss_mask].sum() / (config.constant * len(self.ids)))


def _trl_settings() -> dict:
    return {"output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "report_to": []}


def trl_sft(model, batch: Batch[Visual]) -> Run:
    """The step with the loss of TRL's `SFTTrainer`, whose fused head never holds all logits."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    step = TorchStep(model, batch)
    # The trainer requires a data set, although it is not run.
    rows = Dataset.from_dict({"input_ids": batch.tokens.tolist()})
    settings = SFTConfig(max_length=None, **_trl_settings())
    trainer = SFTTrainer(step.twin, settings, train_dataset=rows, processing_class=vocabulary().tokenizer)
    inputs = step.inputs | {"labels": step.torch.where(step.loss_mask, step.ids, -100)}
    return lambda: step.update(trainer.compute_loss(step.twin, dict(inputs), num_items_in_batch=step.loss_mask.sum()))


def trl_rl(model, batch: Batch[Visual]) -> Run:
    """The step with the scores and the loss of TRL's `GRPOTrainer`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    step, rows, config = TorchStep(model, batch), len(batch.tokens), PolicyLossConfig()
    settings = GRPOConfig(
        loss_type="dr_grpo",
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        max_completion_length=int(config.constant),
        num_generations=rows,
        per_device_train_batch_size=rows,
        **_trl_settings(),
    )
    trainer = GRPOTrainer(
        step.twin,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [""] * rows}),
        processing_class=vocabulary().tokenizer,
    )
    prompt = int(np.argmax(batch.loss_mask[0]))  # in every row the last tokens carry loss
    ids, mask = step.ids, step.inputs["attention_mask"]
    visual = {name: step.inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    visual["num_images"] = [1] * rows
    inputs = {"prompt_ids": ids[:, :prompt], "prompt_mask": mask[:, :prompt], "advantages": step.advantage} | visual
    inputs |= {"completion_ids": ids[:, prompt:], "completion_mask": mask[:, prompt:]}

    def run():
        with step.torch.no_grad():
            old, *_ = trainer._get_per_token_logps_and_entropies(step.twin, ids, mask, ids.shape[1] - prompt, **visual)
        return step.update(trainer._compute_loss(step.twin, inputs | {"old_per_token_logps": old}))

    return run


def _shapes(batch: Batch[Visual]) -> str:
    rows, length = batch.tokens.shape
    pads = int(shown(batch).grids[0].prod()) // 4
    return f"{rows} rows of {length} tokens, {pads} of an image"


def build_scoring(quick: bool) -> Workload:
    """Log-probabilities of a batch."""
    model, batch = random_model(quick), batch_of(quick)

    def ours():
        score = make_score_step(SCORING)
        return lambda: score(model, batch)[0]

    alternatives: dict[str, Callable[[], Run]] = {"pixel_jax": ours}
    if HAS_TORCH:
        alternatives["torch eager"] = lambda: TorchStep(model, batch).scores
    flops = sum(forward_flops(model.config, work_of(batch, model.config)))
    read = array_bytes(model, batch)
    return Workload(_shapes(batch), alternatives, close(1e-5), flops=flops, bytes=read, memory=tuple(alternatives))


def _update(name: str, quick: bool) -> Workload:
    model, batch = random_model(quick), batch_of(quick)
    score = make_score_step(SCORING)
    if name == "sft":
        step, scored = make_sft_step(FORWARD, optimizer(), normalizer="token"), False
    else:
        step, scored = make_rl_step(FORWARD, PolicyLossConfig(), optimizer()), True

    def ours():
        state = [init_state(model, optimizer())]

        def run():
            scored_batch = batch._replace(old_logprobs=score(state[0].model, batch)[0]) if scored else batch
            state[0], report = step(state[0], scored_batch)
            return jnp.stack([report.metrics["loss"], report.metrics["grad_norm"]])

        return run

    alternatives, aims = {"pixel_jax": ours}, ()
    if HAS_TORCH:
        alternatives["torch eager"] = lambda: getattr(TorchStep(model, batch), name)
        aims = (Aim("torch eager", 1.0), Aim("torch eager", 3.0, memory=True))
        if HAS_TRL:
            alternatives["TRL"] = lambda: {"sft": trl_sft, "rl": trl_rl}[name](model, batch)
    state = jax.eval_shape(lambda: init_state(model, optimizer()))
    work = work_of(batch, model.config)
    flops = sum(training_flops(model.config, work)) + (sum(forward_flops(model.config, work)) if scored else 0)
    return Workload(
        _shapes(batch) + ", AdamW" + (", scored before" if scored else ""),
        alternatives,
        # Torch's norm of the gradient is off by 1e-4 at this size; ours agrees with a run in float64 to 1e-7.
        close(3e-4),
        flops=flops,
        bytes=2 * array_bytes(state),  # read and written
        aims=aims,
        memory=tuple(alternatives),
    )


def build_long(quick: bool) -> Workload:
    """A tuning step on one long row: its memory should be linear in the length, and its time follow the FLOPs."""
    lengths = (32, 64) if quick else (2048, 4096, 8192, 16384)
    config = model_config(True)
    if not quick:
        text = dataclasses.replace(
            config.text,
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_attention_heads=4,
            mrope_section=(8, 12, 12),
        )
        config = dataclasses.replace(config, text=text, vision=dataclasses.replace(config.vision, out_hidden_size=256))
    model = jax.jit(LanguageModel, static_argnums=0)(config, jax.random.key(0))
    step = make_sft_step(FORWARD, optimizer(), normalizer="token")

    def ours(length: int):
        batch = make_batch(1, length, 56)
        state = [init_state(model, optimizer())]

        def run():
            state[0], report = step(state[0], batch)
            return report.metrics["loss"]

        return run

    def flops(length: int) -> float:
        return sum(training_flops(config, work_of(make_batch(1, length, 56), config)))

    name = "{} tokens".format
    return Workload(
        "a tuning step on one row, 2 layers, attention 'chunked'; ratios are times over that of the shortest row",
        {name(length): functools.partial(ours, length) for length in lengths},
        lambda outputs: None,
        flops={name(length): flops(length) for length in lengths},
        memory=tuple(map(name, lengths)),
        rounds=2,
    )


CASES = (
    Case("scoring", build_scoring),
    Case("sft-step", functools.partial(_update, "sft")),
    Case("rl-update", functools.partial(_update, "rl")),
    Case("long-rows", build_long),
)
