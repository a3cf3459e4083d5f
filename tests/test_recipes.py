"""The recipe's configs, number by number, against a table of the paper, its appendix and the released code."""

import pathlib

import jax
import pytest
from ml_collections.config_flags import config_flags

from pixel_jax.config import load
from pixel_jax.models.lora import add_lora
from pixel_jax.models.released import RELEASED, check_architecture, released, weight_shapes
from pixel_jax.train_config import TrainConfig

CONFIGS = pathlib.Path(__file__).parent.parent / "configs/pixel"
SIZES = ("3b", "7b", "32b", "72b")


def read(name: str) -> TrainConfig:
    """As `--config=configs/pixel/NAME` reads it, a word after a colon included."""
    parser = config_flags.ConfigFileFlagParser("config")
    return load(TrainConfig, parser.parse(str(CONFIGS / name)))


# (field, value, where it is said: P the paper, C the released code, and what of it). Sections are the reference's, §2.4
# for tuning, §1.8 for pixel budgets, §3.6 for reinforcement learning, §3.1 for the reward, §3.4 for the loss.
SFT = [
    ("sft.batch_size", 64, "2.4 P App.: batch 128; a packed row holds two traces"),
    ("sft.optimizer.learning_rate", 1e-6, "2.4 P App.: lr 1e-6"),
    ("sft.optimizer.warmup", 0.1, "2.4 P App.: warm-up 10 %; C sft.sh: warmup_ratio .1"),
    ("sft.optimizer.schedule", "cosine", "2.4 C sft.sh"),
    ("sft.optimizer.final_fraction", 0.0, "2.4 C sft.sh: cosine without a floor"),
    ("sft.steps", 307, "2.4 C sft.sh: 5 epochs; 7.85k rows / 128 = 61.3 an epoch"),
    ("sft.forward.compute_dtype", "bfloat16", "2.4 C sft.sh: bf16"),
    ("sft.forward.remat", True, "2.4 C sft.sh: gradient checkpointing"),
    ("seed", 49, "2.4 C sft.sh: data_seed 49"),
    ("sft.trainable", "(?!visual)", "2.4 C sft.sh: freeze_vision_modules"),
    ("sft.normalizer", "row", "2.3 C: mean over a row's tokens, one row a step of accumulation"),
    ("rollout.min_pixels", 3136, "1.8 C"),
    ("rollout.max_pixels", 5120 * 28 * 28, "1.8 C"),
    ("rollout.crop_max_pixels", 5120 * 28 * 28, "1.8 C"),
    ("rollout.select_max_pixels", 5120 * 28 * 28, "1.8 C"),
    ("rollout.video_max_pixels", 420 * 360, "1.8 C"),
    ("corrections", True, "2.2 P: error-induced self-correction traces are in"),
]
RL = [
    ("rl.prompts", 512, "3.6 README, P: 512 queries an episode"),
    ("rl.rollout.group_size", 8, "3.6 P: x 8 = 4096"),
    ("rl.rows", 4096, "3.6"),
    ("rl.train_batch", 256, "3.6 README: 256 samples"),
    ("rl.updates", 16, "3.6: 16 gradient steps a sync"),
    ("rl.iterations", 90, "3.6 README: at most 3 epochs of 15.4k / 512 = 30 rollouts"),
    ("rl.optimizer.learning_rate", 1e-6, "3.6 C, P"),
    ("rl.optimizer.schedule", "cosine", "3.6 C: cosine_with_min_lr"),
    ("rl.optimizer.final_fraction", 0.5, "3.6 C: to .5 lr"),
    ("rl.optimizer.warmup", 0.03, "3.6 C, P: 3 %"),
    ("rl.optimizer.kind", "adamw", "3.6 C"),
    ("rl.optimizer.b1", 0.9, "3.6 C"),
    ("rl.optimizer.b2", 0.95, "3.6 C"),
    ("rl.optimizer.weight_decay", 0.0, "3.6 C"),
    ("rl.optimizer.clip", 1.0, "3.6 C"),
    ("rl.forward.compute_dtype", "bfloat16", "3.6 C: bf16"),
    ("rl.forward.remat", True, "3.6 C: gradient checkpointing"),
    ("rl.rollout.temperature", 1.0, "3.6 C: first turn"),
    ("rl.rollout.later_temperature", 0.9, "3.6 C: after a tool call"),
    ("rl.rollout.top_p", 0.95, "3.6 C"),
    ("rl.rollout.top_k", 40, "3.6 C"),
    ("rl.rollout.min_tokens", 1, "3.6 C"),
    ("rl.rollout.max_new_tokens", 2048, "3.6 C: a turn"),
    ("rl.rollout.max_tokens", 12_048, "3.6 C: model len"),
    ("rl.rollout.max_response", 10_000, "1.8 C: generate_max_len"),
    ("rl.rollout.max_calls", 4, "1.8 C: at most 4 executed calls"),
    ("rl.rollout.max_images", 16, "1.8 C"),
    ("rl.rollout.max_pixels", 2000 * 28 * 28, "1.8 C, train: original image"),
    ("rl.rollout.crop_max_pixels", 1000 * 28 * 28, "1.8 C, train: crop"),
    ("rl.rollout.select_max_pixels", 400 * 28 * 28, "1.8 C, train: selected frames"),
    ("rl.rollout.video_max_pixels", 512 * 28 * 28, "1.8 C, train: video frames"),
    ("rl.rollout.min_pixels", 4 * 28 * 28, "1.8 C, train"),
    ("rl.rollout.crop_min_pixels", 4 * 28 * 28, "1.8 C, train"),
    ("rl.reward.alpha", 0.5, "3.1 P"),
    ("rl.reward.beta", 0.05, "3.1 P"),
    ("rl.reward.threshold", 0.3, "3.1 P: H"),
    ("rl.reward.budget", 1, "3.1 P: N"),
    ("rl.reward.form", "paper", "9: paper first"),
    ("rl.loss.clip_low", 0.2, "3.4 C"),
    ("rl.loss.clip_high", 0.35, "3.4 C"),
    ("rl.loss.normalizer", "constant", "3.4 C"),
    ("rl.loss.constant", 200.0, "3.4 C"),
    ("rl.scale_by_std", False, "3.4 C: no division by the deviation"),
    ("rl.replay.kind", "ssr", "3.5 P"),
    ("rl.replay.exponent", 1.0, "3.5 C: alpha 1"),
    ("rl.replay.threshold", 0.01, "3.5 C: mean absolute deviation .01"),
    ("rl.replay.capacity", 4096, "3.5 C: deque(maxlen=buffer size)"),
    ("rl.trainable", ".*", "3.4 C: the vision tower is trained"),
    ("rl.seed", 42, "3.5 C: seed 42"),
]


def field(config: TrainConfig, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phase, table", [("sft", SFT), ("rl", RL)])
def test_every_number_of_the_recipe(phase, table, size):
    config = read(f"qwen2_5_vl_{size}_{phase}.py")
    wrong = [(path, field(config, path), value) for path, value, _ in table if field(config, path) != value]
    assert not wrong
    assert config.architecture == f"qwen2.5-vl-{size}" and config.lora is None
    assert (config.rl is None) == (phase == "sft") and (config.sft is None) == (phase == "rl")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phase, table", [("sft", SFT), ("rl", RL)])
def test_adapters_are_one_word(phase, table, size):
    """What they train and how fast differs, and nothing else."""
    config = read(f"qwen2_5_vl_{size}_{phase}.py:lora")
    differ = {path: field(config, path) for path, value, _ in table if field(config, path) != value}
    assert differ == {f"{phase}.trainable": ".*lora_", f"{phase}.optimizer.learning_rate": 1e-5}
    model = weight_shapes(released(config.architecture))
    lora = {"rank": config.lora.rank, "alpha": config.lora.alpha, "targets": config.lora.targets}
    adapted = jax.eval_shape(lambda model: add_lora(model, jax.random.key(0), **lora), model)
    layers = adapted.language_model.layers
    for linear in (layers.self_attn.q_proj, layers.self_attn.o_proj, layers.mlp.gate_proj, layers.mlp.down_proj):
        assert linear.lora_a.shape == (linear.weight.shape[0], 64, linear.weight.shape[2])
    assert adapted.visual.merger.mlp["0"].lora_a is None


@pytest.mark.parametrize("size", SIZES)
def test_the_mesh_and_the_micro_batches_divide(size):
    """Heads by `tensor`, and a micro-batch's rows by data x fsdp on the meshes the recipe is planned for."""
    for phase in ("sft", "rl"):
        config = read(f"qwen2_5_vl_{size}_{phase}.py")
        text, tensor = released(config.architecture).text, config.mesh["tensor"]
        assert text.num_key_value_heads % tensor == 0 and text.num_attention_heads % tensor == 0
        part = getattr(config, phase)
        rows = part.batch_size if phase == "sft" else part.train_batch
        for chips in {"3b": (64, 128), "7b": (64, 256), "32b": (256, 512), "72b": (512,)}[size]:
            assert rows // part.forward.micro_batches % (chips // tensor) == 0
        # Nothing that is shown is larger than the room there is for it.
        if phase == "sft":
            assert config.trace_patches >= 4 * config.rollout.max_pixels // 28**2
            assert config.video_frames == 16 + 2 * 8 and config.video_patches >= 728 * 1288 // 14**2
        else:
            assert config.rl.rollout.max_pixels <= config.image_buffer[1] * config.image_buffer[2]
            assert config.prompt_width > config.rl.rollout.max_pixels // 28**2
            assert config.video_prompt_width > 16 // 2 * config.rl.rollout.video_max_pixels // 28**2


def test_ablations_change_what_they_are_named_for():
    """Table 1 of the paper: without curiosity, without warm start, without correction data."""
    full, tuning = read("qwen2_5_vl_7b_rl.py"), read("qwen2_5_vl_7b_sft.py")

    def changes(name, than):
        def flat(values, path=""):
            for key, value in vars(values).items():
                if hasattr(value, "__dataclass_fields__"):
                    yield from flat(value, f"{path}{key}.")
                else:
                    yield path + key, value

        before = dict(flat(than))
        return {key: value for key, value in flat(read(f"ablations/{name}.py")) if before[key] != value}

    out = "runs/7b_"
    assert changes("no_curiosity", full) == {"out": out + "no_curiosity", "rl.reward.alpha": 0.0, "rl.reward.beta": 0.0}
    assert changes("no_warm_start", full) == {"out": out + "no_warm_start", "model": tuning.model}
    assert changes("no_correction_sft", tuning) == {"out": out + "no_correction_sft", "corrections": False}
    chained = {"out": out + "no_correction_rl", "model": out + "no_correction_sft/model"}
    assert changes("no_correction_rl", full) == chained
    assert full.model == f"{tuning.out}/model"


def test_another_algorithm_is_one_word():
    """Of the recipe's fields an algorithm sets its own; the reward's shaping and the rest stay."""
    paper, dapo = read("qwen2_5_vl_7b_rl.py"), read("qwen2_5_vl_7b_rl.py:dapo")
    assert dapo.rl.scale_by_std and dapo.rl.loss.clip_high == 0.28 and dapo.rl.replay.kind == "dynamic"
    assert (dapo.rl.reward.length_limit, dapo.rl.reward.length_buffer) == (10_000, 2000)
    assert dapo.rl.reward.alpha == 0.5 and dapo.rl.rollout == paper.rl.rollout
    assert read("qwen2_5_vl_7b_rl.py:dr_grpo").rl.loss.constant == 10_000
    both = read("qwen2_5_vl_72b_rl.py:lora,rloo").rl
    assert both.trainable == ".*lora_" and both.baseline == "leave_one_out" and both.loss.ratio == "product"
    assert read("ablations/no_curiosity.py:gspo").rl.loss.ratio == "sequence"


def test_unknown_words_and_sizes_are_named():
    with pytest.raises(ValueError, match="'full' or 'lora', not 'qlora'"):
        read("qwen2_5_vl_7b_sft.py:qlora")
    for words in ("ppo", "lora,ppo"):
        with pytest.raises(ValueError, match="no algorithm is called 'ppo'"):
            read(f"qwen2_5_vl_7b_rl.py:{words}")
    with pytest.raises(ValueError, match="qwen2.5-vl-8b"):
        released("qwen2.5-vl-8b")


# Parameters of the released checkpoints: `total_size` of model.safetensors.index.json / 2 bytes.
PARAMETERS = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_have_as_many_weights_as_their_files(name):
    assert sum(x.size for x in jax.tree.leaves(weight_shapes(released(name)))) == PARAMETERS[name]


@pytest.mark.torch
@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_have_the_shapes_of_transformers(name):
    """A checkpoint's keys and shapes, from the network that transformers builds of the same `config.json`."""
    import torch
    import transformers

    from pixel_jax.models.checkpoint import named_weights

    config = transformers.Qwen2_5_VLConfig(**released(name).to_hf())
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    theirs = {released(name).names.ours(key): tuple(weight.shape) for key, weight in model.named_parameters()}
    ours = {}
    for _, key, weight in named_weights(weight_shapes(released(name))):
        if weight.axes[0] == "layers":
            ours |= {key.format(i): weight.shape[1:] for i in range(weight.shape[0])}
        else:
            ours[key] = weight.shape
    assert ours == theirs


def test_a_directory_with_another_network_is_refused():
    with pytest.raises(ValueError, match=r"models/x does not hold the network qwen2.5-vl-7b: .* has shape"):
        check_architecture(weight_shapes(released("qwen2.5-vl-3b")), "qwen2.5-vl-7b", "models/x")
    check_architecture(weight_shapes(released("qwen2.5-vl-3b")), "qwen2.5-vl-3b", "models/x")
