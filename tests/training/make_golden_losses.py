"""Writes golden_losses.json: losses and gradients of TRL's own trainers and of verl, and TRL's overlong punishment.

    python tests/training/make_golden_losses.py VERL    (needs trl, torch, accelerate, datasets; made with trl 1.16.0)

`GRPOTrainer._compute_loss` and `RLOOTrainer._compute_loss` are called as they are, on an object that stands for the trainer:
its model is a table of log-probabilities. VERL is the folder of an unpacked wheel of verl 0.9.1, of which the loss functions
alone are executed. Importance weights: the statement of `GRPOTrainer` that makes them is executed, too.
"""

import ast
import collections
import inspect
import json
import math
import pathlib
import sys
import textwrap
import types
from typing import Any, Optional

import numpy as np
import torch
import trl
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

ROWS, LENGTH, LONGEST = 6, 9, 50


def inputs(scale: float, silent: int = 0, far: float = 0.0) -> dict[str, np.ndarray]:
    """Rows of unlike lengths with a stretch of observation; `scale`: how far the policy has moved; the first `silent` rows
    are masked; one token of every row has moved by `far` nats, and one reference."""
    random = np.random.default_rng(7)
    old = -random.exponential(1.0, (ROWS, LENGTH))
    mask = np.ones((ROWS, LENGTH), int)
    for row in range(ROWS):
        mask[row, 3 + row :] = 0
        mask[row, 1 : 1 + row % 3] = 0
    mask[:silent] = 0
    moved, apart = np.zeros_like(old), np.zeros_like(old)
    moved[:, 0], apart[:, 4] = far, far
    return {
        "old": old,
        "logprobs": old + scale * random.normal(size=old.shape) + moved,
        "sampler": old + 0.4 * random.normal(size=old.shape),
        "reference": old + 0.3 * random.normal(size=old.shape) + apart,
        "advantage": random.normal(size=ROWS),
        "mask": mask,
    }


class Accelerator:
    num_processes = 1

    gather = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def compute(trainer, values, **settings):
    """(loss, gradient with respect to the log-probabilities) of `trainer._compute_loss`."""
    logprobs = torch.tensor(values["logprobs"], requires_grad=True)
    mask = torch.tensor(values["mask"])
    blank = torch.zeros((ROWS, 1), dtype=torch.long)
    old = torch.tensor(values["old"])
    cap, mode = settings.pop("cap", None), settings.pop("mode", "token_truncate")
    stand_in = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        model=types.SimpleNamespace(training=True),
        accelerator=Accelerator(),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        **{"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    )
    vars(stand_in).update(settings)
    given = {
        "prompt_ids": blank,
        "prompt_mask": blank,
        "completion_ids": torch.zeros((ROWS, LENGTH), dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(values["advantage"]),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": torch.tensor(values["reference"]),
        "num_items_in_batch": mask.sum().double(),
        "importance_sampling_ratio": importance(values, cap, mode),
    }
    loss = trainer._compute_loss(stand_in, None, given)
    loss.backward()
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist()}


def importance(values, cap: float | None, mode: str) -> torch.Tensor:
    """The weights of GRPOTrainer, by its own statement."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    condition = "self.use_vllm and self.vllm_importance_sampling_correction"
    found = [x for x in ast.walk(tree) if isinstance(x, ast.If) and ast.unparse(x.test) == condition]
    statement = next(x for x in found if "per_sequence_logps_diff" in ast.unparse(x))
    names = {
        "self": types.SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=cap or math.inf,
        ),
        **{"torch": torch, "math": math, "tool_mask": None, "completion_mask": torch.tensor(values["mask"])},
        **{"old_per_token_logps": torch.tensor(values["old"])},
        **{"sampling_per_token_logps": torch.tensor(values["sampler"])},
    }
    exec(compile(ast.Module([statement], []), "trl", "exec"), names)
    return names["vllm_importance_sampling_ratio"]


class VerlConfig(types.SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def verl(folder: pathlib.Path, name: str, values, kl: float = 0.0, sequence_cap: float | None = None, **settings):
    """(loss, gradient) of verl's policy loss called `name`, with its k3 penalty."""
    space: dict[str, Any] = {
        "torch": torch,
        "Any": Any,
        "Optional": Optional,
        "ActorConfig": VerlConfig,
        "AlgoConfig": (),
    }
    for file, wanted in (
        ("utils/torch_functional.py", ("masked_sum", "masked_mean")),
        ("trainer/ppo/core_algos.py", ("agg_loss", f"compute_policy_loss_{name}", "kl_penalty_forward")),
        ("trainer/ppo/rollout_corr_helper.py", ("compute_rollout_correction_weights", "_parse_rollout_is_threshold")),
    ):
        tree = ast.parse((folder / "verl" / file).read_text("utf-8"))
        kept = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in wanted]
        for function in kept:
            function.decorator_list = []
        exec(compile(ast.Module(kept, []), file, "exec"), space)
        if "masked_sum" in wanted:
            space["verl_F"] = types.SimpleNamespace(**{x: space[x] for x in wanted})
    space |= {"SAFETY_BOUND": 20.0, "compute_is_metrics": lambda **_: {}}
    logprobs = torch.tensor(values["logprobs"], requires_grad=True)
    old, mask = torch.tensor(values["old"]), torch.tensor(values["mask"])
    agg = settings.pop("agg", "seq-mean-token-mean")
    config = VerlConfig(
        clip_ratio=0.2,
        **{"clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 1e9, "global_batch_info": {}},
    )
    vars(config).update(settings)
    weights = None
    if sequence_cap is not None:
        weights = space["compute_rollout_correction_weights"](
            old - torch.tensor(values["sampler"]), mask, rollout_is="sequence", rollout_is_threshold=sequence_cap
        )[0]
    advantage = torch.tensor(values["advantage"])[:, None].expand_as(old)
    loss, _ = space[f"compute_policy_loss_{name}"](old, logprobs, advantage, mask, agg, config, weights)
    if kl:
        penalty = space["kl_penalty_forward"](logprobs, torch.tensor(values["reference"]), "k3")
        loss = loss + kl * space["agg_loss"](penalty, mask, agg, **config.global_batch_info)
    loss.backward()
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist()}


# name: (trainer, how far the policy has moved, settings of the trainer)
CASES = {
    "grpo": (GRPOTrainer, 0.4, {}),
    "grpo with kl": (GRPOTrainer, 0.4, {"beta": 0.04}),
    "grpo with truncated importance sampling": (GRPOTrainer, 0.4, {"cap": 1.2}),
    "dr_grpo": (GRPOTrainer, 0.4, {"loss_type": "dr_grpo"}),
    "dapo": (GRPOTrainer, 0.4, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with all": (GRPOTrainer, 0.4, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1, "cap": 1.5}),
    "gspo": (
        GRPOTrainer,
        1e-3,
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "rloo": (RLOOTrainer, 0.1, {}),
    "grpo with sequence truncated": (GRPOTrainer, 0.4, {"cap": 1.2, "mode": "sequence_truncate"}),
    "grpo with sequence masked": (GRPOTrainer, 0.4, {"cap": 1.2, "mode": "sequence_mask"}),
    "grpo with token masked": (GRPOTrainer, 0.4, {"cap": 1.2, "mode": "token_mask"}),
    "grpo silent": (GRPOTrainer, 0.4, {"silent": 2}),
    "dr_grpo silent": (GRPOTrainer, 0.4, {"silent": 2, "loss_type": "dr_grpo"}),
    "dapo silent": (GRPOTrainer, 0.4, {"silent": 2, "loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo silent": (
        GRPOTrainer,
        1e-3,
        {"silent": 2, "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
}
WHOLE = {"global_batch_info": {"global_batch_size": ROWS}}
# name: (verl's loss, how far the policy has moved, settings)
VERL = {
    "grpo verl": ("vanilla", 0.4, {}),
    "grpo verl silent": ("vanilla", 0.4, {"silent": 2, **WHOLE}),
    "grpo verl left_out": ("vanilla", 0.4, {"silent": 2}),
    "dapo verl silent": ("vanilla", 0.4, {"silent": 2, "agg": "token-mean", "clip_ratio_high": 0.28}),
    "grpo verl dual": ("vanilla", 0.9, {"clip_ratio_c": 3.0}),
    "grpo verl sequence": ("vanilla", 0.4, {"sequence_cap": 1.2}),
    "grpo verl far kl": ("vanilla", 0.4, {"kl": 0.1, "far": 100.0}),
    "grpo verl below kl": ("vanilla", 0.4, {"kl": 0.1, "far": -100.0}),
    "gspo verl far": ("gspo", 0.4, {"far": 300.0, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
}
LENGTHS = [0, 1, 39, 40, 41, 45, 49, 50, 51, 90]

if __name__ == "__main__":
    golden = {"trl": trl.__version__, "longest": LONGEST, "cases": {}}
    for name, (trainer, scale, settings) in CASES.items():
        values = inputs(scale, silent=settings.pop("silent", 0))
        found = compute(trainer, values, **settings)
        golden["cases"][name] = {key: np.round(x, 12).tolist() for key, x in values.items()} | found
    for name, (loss, scale, settings) in VERL.items():
        values = inputs(scale, silent=settings.pop("silent", 0), far=settings.pop("far", 0.0))
        found = verl(pathlib.Path(sys.argv[1]), loss, values, **settings)
        golden["cases"][name] = {key: np.round(x, 12).tolist() for key, x in values.items()} | found
    punish = get_soft_overlong_punishment(max_completion_len=LONGEST, soft_punish_cache=10)
    golden["overlong"] = {"lengths": LENGTHS, "punishment": punish([[0] * n for n in LENGTHS])}
    pathlib.Path(__file__).with_name("golden_losses.json").write_text(json.dumps(golden))
