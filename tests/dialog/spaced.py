"""Small tokenizers of the kind of LLaMA-2's: BPE that falls back to bytes, a space before words as a character of its own."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.dialog.published_templates import LLAMA2

SPACE = "\u2581"
WORDS = (
    "The cat sat on the mat; a cat answers. [INST] [/INST] <<SYS>> <</SYS>> USER: ASSISTANT: Here is the cropped image, "
    "the frames and the tools: name, arguments. You are a helpful assistant. 0 1 2 3 4 5 6 7 8 9 { } \" 'it is' é - ( ) \\boxed"
)
KINDS = ("normalizer", "first", "always", "never")


@functools.cache
def spaced(kind, template=LLAMA2, extra=()):
    """A tokenizer that puts spaces before texts as Llama 2's first files did ("normalizer"), or by a scheme of Metaspace."""
    known = ["<unk>", "<s>", "</s>"]
    size = 3 + 256
    trainer = trainers.BpeTrainer(
        vocab_size=size + 300,
        special_tokens=[*known, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in (*known, *extra)])
    if kind == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=kind, split=False)
    strip = [] if kind == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **named
    )
