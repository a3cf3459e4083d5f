"""A tokenizer whose tokens are long pieces of the dialog: every text is what a 7B model would write, in a tenth of the tokens."""

import re

from pixel_jax.data import synthesis
from pixel_jax.dialog import observations, template
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.quickstart.lesson import Lesson
from pixel_jax.quickstart.zoom import ZOOM


def pieces(lesson: Lesson = ZOOM) -> list[str]:
    """Prompt and observations in as few tokens as numbers allow; a coordinate is one token."""
    tools = lesson.tools
    found = [
        "system\n" + template.system_prompt(tools),
        "assistant\n",
        "user\n",
        *(template.user_text(question) for question in lesson.questions),
        *lesson.pieces,
        synthesis.SENTENCES.answer,
        ", ",
    ]
    kinds = observations.kinds_of(tools)
    failures = [kind for tool in reversed(tools) for kind in kinds if kind.tool == tool and not kind.outcome.images]
    # In this order: ids follow from it, and what a network learns from its ids.
    for kind in [*(kind for kind in kinds if kind.outcome.images), *failures, kinds[-1]]:
        # Numbers are written digit by digit; what lies between them is constant.
        stretches = re.split(r"\{(?:\d|list)\}", "user\n" + kind.outcome.text)
        found += [stretch for stretch in stretches if len(stretch.encode()) > 1]
    hundredths = [f"{x / 100:.2f}" for x in range(101)]
    found += [f"{x}, " for x in hundredths] + hundredths
    return list(dict.fromkeys(found))


def build_vocabulary(lesson: Lesson = ZOOM) -> Vocabulary:
    return Vocabulary.of(build_tokenizer(pieces(lesson)))
