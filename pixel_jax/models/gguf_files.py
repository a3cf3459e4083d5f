"""Language models in llama.cpp's GGUF files: one file with the configuration, the tokenizer and quantised weights.

Weights are dequantised to float32 by the package `gguf`. llama.cpp permutes the rows of Llama's query and key weights, which is
undone here.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixel_jax.files import FileError, open_regular
from pixel_jax.models.config import ModelConfig, RopeScaling
from pixel_jax.models.families import config_from_hf
from pixel_jax.models.processor import Processor
from pixel_jax.models.rope import scaled
from pixel_jax.models.tensors import Tensor

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # whose names are those of `config.json`, too
# Metadata of an architecture: the field of `config.json` it stands for.
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"  # the divisors of the rotary frequencies of Llama 3.1 and later
# Regular expressions that split text before merges, by the name that files give them.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"llama-bpe": rf"{LETTERS}\p{{N}}{{1,3}}{REST}", "qwen2": rf"{LETTERS}\p{{N}}{REST}"}
OF_GPT2 = ("gpt-2", "default", "smollm")  # text is split as in GPT-2; in smollm every digit is split off
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokens: transformers' name, that of the file
# Types of tokens. Merges make NORMAL tokens only; text never becomes an UNKNOWN or a CONTROL token; a USER token is matched as a
# whole. Others are unused, or those of bytes.
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4
# What llama.cpp takes where a file with a tokenizer of SentencePiece says nothing.
OF_SENTENCEPIECE = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
SPACE = "\u2581"  # stands for a space in tokens of SentencePiece
LONGEST = 512  # characters of a token of SentencePiece: each of its splits is tried


def find_gguf(path: Path) -> Path | None:
    """Returns the GGUF file at a path: the path itself, or the only GGUF file of a directory; None if it has none."""
    if path.suffix == SUFFIX:
        return path
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if len(files) > 1:
        raise FileError(f"{path} holds {len(files)} GGUF files; name one: {', '.join(x.name for x in files[:5])}")
    return files[0] if files else None


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor], Processor | None]:
    """Reads configuration, tensors and processor from a GGUF file.

    Returns:
        The configuration; the tensors by our names of them, dequantised when they are asked for; and the processor, None if
        the file has no tokenizer.

    Raises:
        FileError: the file is damaged, or of a kind that is not supported, or the package `gguf` is not installed. The message
            says which.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise FileError(f"{path} needs the package gguf: pip install 'pixel_jax[gguf]'") from None
    open_regular(path).close()
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of any type: the package has no special error for a damaged file
        raise FileError(f"{path}: truncated or damaged: {type(error).__name__}: {str(error)[:200]}") from None
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FileError(f"{path}: the architecture is {architecture!r}; supported are {', '.join(ARCHITECTURES)}")
    config = _config(path, fields, reader)
    return config, _tensors(path, config, reader), _processor(path, config, fields)


def _config(path: Path, fields: dict[str, Any], reader: "GGUFReader") -> ModelConfig:
    architecture = fields["general.architecture"]
    names = {tensor.name for tensor in reader.tensors}
    own = {
        name.removeprefix(f"{architecture}."): x for name, x in fields.items() if name.startswith(f"{architecture}.")
    }
    values: dict[str, Any] = {field: own[name] for name, field in FIELDS.items() if name in own}
    if missing := [
        name for name in FIELDS if name not in own and name not in ("attention.key_length", "rope.freq_base")
    ]:
        raise FileError(f"{path}: {architecture}.{missing[0]} is missing")
    width = {tensor.name: tensor.shape for tensor in reader.tensors}.get("token_embd.weight")
    if width is None:
        raise FileError(f"{path}: 1 missing tensors: token_embd.weight")
    values |= {
        "model_type": architecture,
        "vocab_size": int(width[-1]),
        "tie_word_embeddings": "output.weight" not in names,
    }
    values["attention_bias"] = "blk.0.attn_q.bias" in names
    for name in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            values[f"{name}_token_id"] = token
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise FileError(f"{path}: {architecture}.rope.scaling.type is {kind!r}; supported are 'none' and 'linear'")
    if kind == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": float(own["rope.scaling.factor"])}
    elif FREQUENCIES in names:
        values["rope_scaling"] = _llama3(path, values, reader)
    return config_from_hf(values, str(path))


def _llama3(path: Path, values: dict[str, Any], reader: "GGUFReader") -> dict[str, Any]:
    """The rotary scaling of Llama 3.1 (a factor of 8) or 3.2 (of 32). The file has only the divisors of the frequencies."""
    divisors = np.asarray(next(x.data for x in reader.tensors if x.name == FREQUENCIES), np.float32)
    half = len(divisors)
    frequencies = (1 / values.get("rope_theta", 1e4) ** (np.arange(half) / half)).astype(np.float32)
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor)
        if np.allclose(frequencies / scaled(frequencies, scaling), divisors, rtol=1e-3):
            return {"rope_type": "llama3", **{name: x for name, x in scaling._asdict().items() if name != "kind"}}
    raise FileError(f"{path}: tensor {FREQUENCIES!r} is that of no scaling of rotary frequencies that is supported")


def _tensors(path: Path, config: ModelConfig, reader: "GGUFReader") -> dict[str, Tensor]:
    tensors = {}
    heads = {"attn_q": config.text.num_attention_heads, "attn_k": config.text.num_key_value_heads}
    for tensor in reader.tensors:
        if tensor.name == FREQUENCIES:
            continue
        layer, module, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)\.?(weight|bias|)", tensor.name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        ours = f"{MODULES.get(module, module)}.{kind}"
        ours = ours if layer is None else f"model.layers.{layer}.{ours}"
        shape = tuple(int(size) for size in reversed(tensor.shape))
        permuted = heads.get(module) if config.model_type == "llama" else None
        tensors[ours] = Tensor(tensor.name, path, shape, "F32", _values(tensor, shape, permuted))
    return tensors


def _values(tensor: Any, shape: tuple[int, ...], heads: int | None) -> Callable[[], np.ndarray]:
    """Returns a function that dequantises a tensor. heads: how many heads have their rows in llama.cpp's order; None: none."""

    def values() -> np.ndarray:
        from gguf import dequantize

        weights = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if heads is None:
            return weights
        return weights.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

    return values


def _processor(path: Path, config: ModelConfig, fields: dict[str, Any]) -> Processor | None:
    """The processor with the file's tokenizer, if it has one."""
    own = {x.removeprefix("tokenizer.ggml."): value for x, value in fields.items() if x.startswith("tokenizer.ggml.")}
    if "tokens" not in own:
        return None
    if (kind := own.get("model")) not in ("gpt2", "llama"):
        remedy = "convert the file to a Hugging Face directory"
        raise FileError(
            f"{path}: the tokenizer is of the kind {kind!r}, only 'gpt2' and 'llama' are supported: {remedy}"
        )
    cut = own.get("pre", "default")
    if kind == "gpt2" and cut not in (*CUTS, *OF_GPT2):
        raise FileError(f"{path}: tokenizer.ggml.pre is {cut!r}; supported are {', '.join([*CUTS, *OF_GPT2])}")
    from transformers import PreTrainedTokenizerFast

    try:
        if kind == "llama":
            own = OF_SENTENCEPIECE | own
            tokenizer = _sentencepiece(own)
        else:
            own = {"add_bos_token": cut == "llama-bpe"} | own
            tokenizer = _byte_level(own["tokens"], own.get("merges", []), cut)
        _add_special(tokenizer, own["tokens"], own.get("token_type", []))
        ids = {f"{name}_token": own.get(f"{field}_token_id") for name, field in NAMED.items()}
        named = {name: own["tokens"][number] for name, number in ids.items() if number is not None}
        ends = [name for name in ("bos_token", "eos_token") if own.get(f"add_{name}") and name in named]
        if ends:
            tokenizer.post_processor = _between(ends, named, ids)
        template = fields.get("tokenizer.chat_template")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **named
        )
    except Exception as error:  # of the library, about what the file says
        raise FileError(f"{path}: the tokenizer cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    return Processor(wrapped, family=type(config), vision=config.vision)


def _byte_level(tokens: list[str], merges: list[str], cut: str) -> "Tokenizer":
    """Builds a byte-level BPE tokenizer; ValueError if a token is repeated, or a merge has no such tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    # In Llama 3 a word that is a token is not split, even if no merges produce it.
    tokenizer = Tokenizer(models.BPE(_numbers(tokens), pairs, ignore_merges=cut == "llama-bpe"))
    if cut in CUTS:
        first, regex = pre_tokenizers.Split(Regex(CUTS[cut]), behavior="isolated"), False
    else:
        first, regex = pre_tokenizers.Digits(individual_digits=True) if cut == "smollm" else None, True
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = last if first is None else pre_tokenizers.Sequence([first, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(own: dict[str, Any]) -> "Tokenizer":
    """Builds SentencePiece's BPE tokenizer, which falls back to bytes and puts a space before texts, as llama.cpp does.

    Raises:
        ValueError: the order of merges does not follow from the scores, or texts are normalised.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if own.get(name):
            raise ValueError(f"tokenizer.ggml.{name} is set, and texts are not normalised here")
    tokens, unknown = own["tokens"], own["unknown_token_id"]
    merges = _merges(tokens, own.get("scores", []), own.get("token_type", []))
    model = models.BPE(_numbers(tokens), merges, unk_token=tokens[unknown], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    prefix = own.get("add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Returns the merges of SentencePiece: any two neighbours that together are a token, the token of the highest score first."""
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(f"there are {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    scored = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    if (longest := max(scored, key=len, default="")) and len(longest) > LONGEST:
        raise ValueError(f"a token has {len(longest)} characters, more than {LONGEST}: {longest[:20]}...")
    made: dict[float, list[tuple[str, str]]] = {}  # score -> the splits of the token that has it
    for token, score in scored.items():
        splits = [(token[:at], token[at:]) for at in range(len(token) - 1, 0, -1)]
        splits = [pair for pair in splits if all(part in scored for part in pair)]
        if not splits:
            continue
        if score in made or not math.isfinite(score):
            why = f"is also that of {''.join(made[score][0])!r}" if score in made else "is no number"
            raise ValueError(f"the score {score} of token {token!r} {why}: which is merged first is not known")
        made[score] = splits
    return [pair for score in sorted(made, reverse=True) for pair in made[score]]


def _numbers(tokens: list[str]) -> dict[str, int]:
    """Numbers the tokens; ValueError if one is repeated."""
    numbers = {token: i for i, token in enumerate(tokens)}
    if len(numbers) < len(tokens):
        raise ValueError("a token is there twice")
    return numbers


def _add_special(tokenizer: "Tokenizer", tokens: list[str], types: list[int]) -> None:
    """Declares the tokens that text does not become, and those that are matched as a whole."""
    from tokenizers import AddedToken

    chosen = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (UNKNOWN, CONTROL, USER)]
    tokenizer.add_tokens([AddedToken(token, special=kind != USER, normalized=False) for token, kind in chosen])


def _between(ends: list[str], named: dict[str, str], ids: dict[str, int | None]) -> Any:
    """Makes a post-processor that puts the beginning, the end or both around every text."""
    from tokenizers.processors import TemplateProcessing

    before, after = ([named[name]] if name in ends else [] for name in ("bos_token", "eos_token"))
    around = lambda text: " ".join([*before, text, *after])
    special = {named[name]: ids[name] for name in ends}
    pair = f"{around('$A')} {around('$B')}"
    return TemplateProcessing(single=around("$A"), pair=pair, special_tokens=[*special.items()])
