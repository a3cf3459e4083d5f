"""Forms of a question, by name. A form is a value: how a row is asked and answered, and how answers are scored."""

from collections.abc import Mapping

from unlearn_jax.recommendation.forms.form import PromptForm
from unlearn_jax.recommendation.forms.llara import LLaRA
from unlearn_jax.recommendation.forms.tallrec import TALLRec

FORMS: Mapping[str, PromptForm] = {"tallrec": TALLRec(), "llara": LLaRA()}

__all__ = ["FORMS", "PromptForm"]
