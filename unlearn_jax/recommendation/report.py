"""What the page of recommendation studies says: `python -m unlearn_jax.recommendation`."""

from unlearn_jax.recommendation.config import RatingsConfig, RecommendationConfig
from unlearn_jax.studies.page import INTERVALS_EXPLAINED, METHODS_EXPLAINED, StudyReport
from unlearn_jax.studies.table import FORGETTING, Reported

INTRODUCTION = f"""# Unlearning recommendations

Written by `python -m unlearn_jax.recommendation` from the results of `unlearn-jax eval` (docs/unlearning.md says how to go on).
What is changed after training are rows that an adapter has learned: removed, asked differently, answered differently.

{METHODS_EXPLAINED}\
- *forgotten*: the rows as they were trained on and should not have been; *corrected*: their right form; *kept*: other rows.
  *Membership AUC*: an attack by the loss, forgotten rows against test rows; .5 is chance, 1 means that they look like members.
{INTERVALS_EXPLAINED}"""
PAPER = """## What the paper reports

LLMEraser's numbers (arXiv:2412.00383) are of LLaMA2-7B on other data, so that only differences between methods can be
compared with those above. MovieLens' test set has 95 users. The standard error is binomial, of the valid answers that the numbers
are shares of; for BookCrossing the number of test rows is not known.
"""
SCORES = {
    "auc": "AUC",
    "auc_tallrec": "AUC as TALLRec",
    "hit_ratio": "hit ratio of valid",
    "hit_ratio_of_all": "hit ratio of all",
    "valid_ratio": "valid ratio",
}
REPORTED = (
    Reported("instances removed, BookCrossing", "AUC", "retrain", 0.6357, None, None),
    Reported("instances removed, BookCrossing", "AUC", "LLMEraser", 0.6319, None, None),
    Reported("queries, MovieLens, 10 % removal", "hit ratio of valid", "retrain", 0.4565, 42, 92),
    Reported("queries, MovieLens, 10 % removal", "hit ratio of valid", "LLMEraser", 0.4456, 41, 92),
    Reported("queries, MovieLens, 10 % removal", "hit ratio of valid", "SISA", 0.4130, 38, 92),
    Reported("queries, MovieLens, 10 % removal", "hit ratio of valid", "RecEraser", 0.2717, 25, 92),
    Reported("queries, MovieLens, 5 % replacement", "hit ratio of valid", "LLMEraser", 0.4516, 42, 93),
)


def arrangement(config: RecommendationConfig) -> str:
    """The data, the training and the adapter, in a sentence."""
    data, adapter, training = config.data, config.adapter, config.training
    return (
        f"{data.examples} rows of as many users at most, {training.epochs} epochs of AdamW (learning rate "
        f"{training.learning_rate:g}, batches of {training.batch}); a LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on "
        f"the top {adapter.layers} layers. {_tested(data)}"
    )


def _tested(data: RatingsConfig) -> str:
    """Sentences about the test rows and the films."""
    rows = "One row" if data.test_rows is None else f"{data.test_rows} rows"
    whose = "of each test user" if data.test_rows is None else "of the test users"
    films = "" if data.title is None else f" Films whose titles have more than {data.title} tokens are left out."
    verb = "is" if data.test_rows is None else "are"
    return f"{rows} {whose} ({data.test_share:.0%} of the users) {verb} tested.{films}"


REPORT = StudyReport(
    INTRODUCTION,
    {**SCORES, **FORGETTING},
    {name: SCORES[name] for name in ("auc", "hit_ratio")},
    PAPER,
    REPORTED,
    arrangement,
)
