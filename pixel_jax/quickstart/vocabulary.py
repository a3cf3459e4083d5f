"""The quickstart's tokenizer: its tokens are long phrases, so that a dialog takes a tenth of the usual number of tokens."""

import re

from pixel_jax.data import synthesis
from pixel_jax.dialog import observations, template
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.quickstart.lesson import Lesson
from pixel_jax.quickstart.zoom import ZOOM


def pieces(lesson: Lesson = ZOOM) -> list[str]:
    """The phrases that are one token each: parts of the prompt, of observations and of calls, and coordinates."""
    tools = lesson.tools
    phrases = [
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
    # The order decides the ids, and with them the results of training.
    for kind in [*(kind for kind in kinds if kind.outcome.images), *failures, kinds[-1]]:
        # Numbers are written digit by digit; the text between them is constant.
        stretches = re.split(r"\{(?:\d|list)\}", "user\n" + kind.outcome.text)
        phrases += [stretch for stretch in stretches if len(stretch.encode()) > 1]
    hundredths = [f"{x / 100:.2f}" for x in range(101)]
    phrases += [f"{x}, " for x in hundredths] + hundredths
    return list(dict.fromkeys(phrases))


def build_vocabulary(lesson: Lesson = ZOOM) -> Vocabulary:
    """The vocabulary of a lesson."""
    return Vocabulary.of(build_tokenizer(pieces(lesson)))
