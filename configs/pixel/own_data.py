"""Tune a Qwen2.5-VL directory on JSON-lines files of your own or on the released data: first `pixel-jax sft`, then
`pixel-jax rl` on its result.

    pixel-jax sft --config=configs/pixel/own_data.py --config.model=DIR --config.data=traces.jsonl --config.out=runs/sft
    pixel-jax rl  --config=configs/pixel/own_data.py --config.model=runs/sft/model --config.data=questions.jsonl \
                  --config.out=runs/rl

Words after a colon choose adapters in the place of all weights, and another algorithm for `rl` than the paper's, as in
`pixel_jax/recipe.py`: `own_data.py:lora`, `own_data.py:gspo`, `own_data.py:lora,gspo`.

The formats are described in `pixel_jax/data/own.py` and `pixel_jax/data/released.py`. How large batches are is worked out
from the data, pictures and videos alike, and from the machine's memory: from a small model on two cores to a 7B on a TPU host
nothing has to be set. Fields that are not set here have
the paper's values; any can be set as `--config.FIELD=VALUE` (`--config.rl.reward.alpha=0.3`).
"""

from ml_collections import ConfigDict, config_dict

from pixel_jax.recipe import ADAPTERS, LEARNING_RATES, read_words
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.training.algorithms import algorithm


def get_config(words: str = "full") -> ConfigDict:
    weights, other = read_words(words)
    config = ConfigDict()
    config.model = config_dict.placeholder(str)
    config.data = config_dict.placeholder(str)
    config.out = config_dict.placeholder(str)
    # Axis sizes; -1 takes the devices that are left. An empty mesh runs on one device.
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.rollout = ConfigDict()
    config.host_tools = ConfigDict()  # of tools that run on the host (`pixel_jax.tools.host.HostToolsConfig`)
    config.watch = ConfigDict()  # what is held out and looked at meanwhile (`pixel_jax.training.watch.WatchConfig`)

    config.sft = ConfigDict()
    config.sft.optimizer = {}
    # Four epochs, unless `config.sft.epochs` or `config.sft.steps` says otherwise.
    config.sft.batch_size = 128  # packed rows, of one trace or more
    config.sft.forward = {"compute_dtype": "bfloat16"}

    config.rl = ConfigDict()
    config.rl.iterations = 90
    config.rl.prompts = 512
    config.rl.rollout = ConfigDict()
    config.rl.train_batch = 256
    config.rl.time_operations = 10  # iterations
    config.rl.update({name: {} for name in ("reward", "replay", "loss", "optimizer")})
    config.rl.reward.scorer = ConfigDict()
    config.rl.forward = {"compute_dtype": "bfloat16"}

    if weights == "lora":
        config.lora = ADAPTERS
        for phase in (config.sft, config.rl):
            phase.trainable, phase.optimizer.learning_rate = ".*lora_", LEARNING_RATES["lora"]
    if other:
        config.rl.update(algorithm(other, longest=RolloutConfig().max_response))
    return config
