"""A tiny LLaVA-1.5 that talks in tool calls, and the texts that its dialogs are made of."""

import functools

from pixel_jax.dialog import observations, template
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models import config_from_hf
from pixel_jax.tools import RELEASED
from tests.rollouts import scripted_model

SIDE = 28  # of an image in pixels: four patches, so four tokens
# That of llava-hf/llava-1.5-7b-hf.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
START = "ASSISTANT:"
CHAIN = {START if text == scripted_model.START else text: after for text, after in scripted_model.CHAIN.items()}
CHAIN |= {START: {scripted_model.CROP: 0.4, "I see nothing.": 0.05, "\\boxed{7}": 0.3, "\\boxed{3}": 0.25}}
CHAIN |= {x: {'], "target_image": ': 1.0} for x in ("0.82", "1.0")}


def tokenizer_of(pieces):
    """A tokenizer as the file of LLaVA-1.5 has it, with `pieces` as tokens, and bytes for everything else."""
    import re

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    spelled = sorted({piece.replace(" ", "▁") for piece in pieces} | {"▁"}, key=lambda x: (-len(x), x))
    tokens = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *spelled]
    numbers = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # A "<" stands alone, so that no text spells a special token or the token of a byte.
    pattern = "|".join([*(re.sub(r"([^\w\s])", r"\\\1", x) for x in spelled), "<"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    strip = decoders.Strip(content=" ", left=1, right=0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE, **named)


@functools.cache
def vocabulary() -> Vocabulary:
    pieces = {text for text in CHAIN if len(text) > 1} | {
        template.system_prompt(),
        template.GUIDELINES["vcot"],
        "USER:",
    }
    for kind in observations.kinds_of(RELEASED):
        pieces |= {text for text in scripted_model.stretches(kind.outcome.text) if len(text) > 1}
    return Vocabulary.of(tokenizer_of({piece for piece in pieces if "<|im_" not in piece}))


def config(words, size, hidden):
    text = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
    }
    return config_from_hf(
        {"model_type": "llava", "image_token_index": words.image_pad, "text_config": text, "vision_config": tower}
    )


@functools.cache
def model():
    return scripted_model.network(vocabulary(), CHAIN, make_config=config)
