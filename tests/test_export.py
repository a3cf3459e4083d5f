"""A checkpoint of a run that was stopped becomes the model that the run would have saved at that step."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import pixel_jax
from pixel_jax.cli import UserError
from pixel_jax.data.batches import MemoryBatches
from pixel_jax.data.digests import Digests
from pixel_jax.export import candidates, export, model_directory, phase_of, split_step
from pixel_jax.identity import flatten
from pixel_jax.models.io import dtype_of
from pixel_jax.models.lora import add_lora, merge_lora
from pixel_jax.models.processor import Processor
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.train_config import LoRAConfig, TrainConfig, recorded, run_settings
from pixel_jax.training.checkpoint import CheckpointError
from pixel_jax.training.loop import Identity
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.sft import SFTConfig, sft
from pixel_jax.training.steps import ForwardConfig
from tests.rollouts import scripted_model
from tests.training.tiny_model import make_batch

LORA = LoRAConfig(rank=2, alpha=4.0, targets=r"model\.layers\.\{\}\.self_attn\.q_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The scripted model in bfloat16."""
    directory = tmp_path_factory.mktemp("base")
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    pixel_jax.save_pretrained(scripted_model.model(), processor, directory, "bfloat16")
    return directory


def tune(base, out, lora, adapter=None):
    """Three steps with all checkpoints kept, and the models after two and after three."""
    section = SFTConfig(
        steps=3,
        batch_size=4,
        trainable=".*lora_" if lora or adapter else r"(?!visual)",
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0),
        forward=ForwardConfig(remat=False),
        save_every=1,
        keep=3,
    )
    config = TrainConfig(
        model=str(base),
        data="d.jsonl",
        out=str(out),
        sft=section,
        lora=lora,
        adapter=adapter,
        rollout=RolloutConfig(max_calls=2),
    )
    with Digests(out / "digests.json") as digests:
        facts = run_settings("sft", config, [], digests)
    models = []
    for steps in (2, 3):
        model, _ = pixel_jax.from_pretrained(base, adapter=adapter)
        if lora is not None:
            model = add_lora(model, jax.random.key(config.seed), **dataclasses.asdict(lora))
        data = MemoryBatches(make_batch(8)._replace(visual=None), 4, seed=0)
        models.append(
            sft(
                model,
                data,
                dataclasses.replace(section, steps=steps),
                directory=out / "sft" if steps == 3 else None,
                identity=Identity(facts),
            )
        )
    return config, models


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """One from elsewhere, of two linear layers."""
    directory = tmp_path_factory.mktemp("adapter")
    lora = {**dataclasses.asdict(LORA), "targets": r"model\.layers\.\{\}\.self_attn\.[qv]_proj"}
    pixel_jax.save_adapter(add_lora(pixel_jax.from_pretrained(base)[0], jax.random.key(3), **lora), directory)
    return str(directory)


@pytest.fixture(scope="module", params=["all weights", "a new adapter", "an adapter from elsewhere"])
def run(base, adapter, request, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    lora = LORA if request.param == "a new adapter" else None
    return out, *tune(base, out, lora, adapter if "elsewhere" in request.param else None)


def weights(model):
    return [np.asarray(x.astype("float32")) for x in jax.tree.leaves(model)]


@pytest.mark.parametrize(("step", "dtype"), [(None, None), (2, "float32")])
def test_a_checkpoint_is_the_model_after_its_step(run, base, step, dtype, tmp_path):
    out, config, (second, third) = run
    assert export(phase_of(out), str(tmp_path), step=step, dtype=dtype) == (step or 3, [1, 2, 3])
    found, processor = pixel_jax.from_pretrained(tmp_path)
    wanted = second if step == 2 else third
    if config.adapts:  # beside the merged model it lies as it was trained, bit for bit
        beside = pixel_jax.load_adapter(pixel_jax.from_pretrained(base)[0], tmp_path / "adapter")
        for a, b in zip(weights(beside), weights(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
        assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
            base
        )
        wanted = merge_lora(wanted, dtype or "bfloat16")
    assert (tmp_path / "adapter").is_dir() == config.adapts
    wanted = jax.tree.map(lambda x: x.astype(dtype or "bfloat16"), wanted)
    for a, b in zip(weights(found), weights(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(weights(found), weights(pixel_jax.from_pretrained(base)[0]), strict=True))
    assert dtype_of(found) == json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == (dtype or "bfloat16")
    assert processor is not None and json.loads((tmp_path / "rollout.json").read_text())["max_calls"] == 2


def test_what_a_run_noted_of_itself_is_its_config(run):
    out, config, _ = run
    settings = {"command": "sft", "weights": "12ab", "data.count": 3, **flatten(dataclasses.asdict(config))}
    assert recorded(settings) == ("sft", config)
    with pytest.raises(ValueError, match="was not begun by"):
        recorded({"steps": 3})


def test_a_checkpoint_that_is_not_there_or_not_whole(run, tmp_path):
    out, *_ = run
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2, 3"):
        export(out / "sft", str(tmp_path / "model"), step=7)
    shutil.copytree(out, tmp_path / "copy")
    noted = json.loads((tmp_path / "copy/sft/checkpoints.checksums/3.0.json").read_text())["files"]
    (tmp_path / "copy/sft/checkpoints/3" / next(iter(noted))).write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint 3 is damaged"):
        export(tmp_path / "copy/sft", str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "copy/sft/checkpoints.checksums")  # killed before any file was noted
    for path in (tmp_path / "copy/sft/checkpoints/3/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint 3 cannot be read"):
        export(tmp_path / "copy/sft", str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_another_model_than_the_run_began_with(run, tmp_path):
    """Only weights that were not trained can tell."""
    out, *_ = run
    processor = Processor(scripted_model.vocabulary().tokenizer)
    other = jax.tree.map(lambda x: x + 1, scripted_model.model())
    pixel_jax.save_pretrained(other, processor, tmp_path / "other", "bfloat16")
    with pytest.raises(CheckpointError, match="frozen"):
        export(out / "sft", str(tmp_path / "model"), model=str(tmp_path / "other"))
    with pytest.raises(UserError, match="say where it lies with --model"):
        export(out / "sft", str(tmp_path / "model"), model=str(tmp_path / "nowhere"))


def test_a_run_stands_for_its_models(run, tmp_path, capsys):
    """Its checkpoints, exported when they are asked for; models that it kept; the one at its end."""
    out, config, (second, third) = run
    shutil.copytree(out, tmp_path / "run")
    place = tmp_path / "run"
    names = lambda: {step: path.name for step, path in candidates(place).items()}
    assert names() == {1: "1", 2: "2", 3: "3"}
    found = model_directory(f"{place}@2")
    assert found == place / "models/2" and f"{place}@2 is the model of step 2: {found}" in capsys.readouterr().out
    wanted = merge_lora(second, "bfloat16") if config.adapts else second
    for a, b in zip(weights(pixel_jax.from_pretrained(found)[0]), weights(wanted), strict=True):
        np.testing.assert_array_equal(
            a, b.astype(a.dtype) if config.adapts else jax.numpy.asarray(b, "bfloat16").astype("float32")
        )
    stamp = (found / "config.json").stat().st_mtime_ns
    assert model_directory(f"{place}@2") == found and (found / "config.json").stat().st_mtime_ns == stamp
    assert model_directory(str(place)) == place / "models/3"  # it was stopped: the newest checkpoint
    shutil.copytree(found, place / "models/40")  # kept, its checkpoint long gone
    assert names() == {1: "1", 2: "2", 3: "3", 40: "40"} and model_directory(str(place / "sft")).name == "40"
    shutil.rmtree(place / "models/40")
    shutil.copytree(place / "models/3", place / "model")
    assert model_directory(str(place)) == place / "model" and names() == {1: "1", 2: "2", 3: "model"}
    assert model_directory(str(place / "model")) == place / "model"
    assert model_directory("nowhere") == pathlib.Path("nowhere")  # which is said where it is read
    with pytest.raises(UserError, match="has no model or checkpoint of step 7; it has 1, 2, 3"):
        model_directory(f"{place}@7")
    with pytest.raises(
        FileNotFoundError, match="is not a model directory: it has no config.json. It holds one: .*model"
    ):
        pixel_jax.from_pretrained(place)


@pytest.mark.parametrize(
    ("name", "found"), [("a/b", ("a/b", None)), ("a/b@12", ("a/b", 12)), ("a@b", ("a@b", None)), ("@3", ("", 3))]
)
def test_a_run_may_have_a_step(name, found):
    assert split_step(name) == (pathlib.Path(found[0]), found[1])


def test_a_directory_of_two_phases_is_asked_about(tmp_path):
    for phase in ("sft", "rl"):
        (tmp_path / phase / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"choose one: .*sft, .*rl"):
        phase_of(tmp_path)
    assert phase_of(tmp_path / "rl") == tmp_path / "rl"


def test_a_model_without_an_adapter_leaves_none_of_another(run, base, tmp_path):
    """An adapter that lay beside the model that was there before goes with it."""
    out, *_ = run
    export(phase_of(out), str(tmp_path))
    model, processor = pixel_jax.from_pretrained(tmp_path)
    pixel_jax.save_pretrained(model, processor, tmp_path)
    assert not list((tmp_path / "adapter").glob("*"))


def test_an_adapter_is_new_or_gone_on_with(adapter):
    with pytest.raises(ValueError, match="adapter '.*' is gone on with, lora makes a new one"):
        TrainConfig(model="m", data="d", out="o", lora=LORA, adapter=adapter)
