"""What the page of studies of wrong answers says: `python -m unlearn_jax.noisy_responses`."""

from unlearn_jax.noisy_responses.config import NoisyResponsesConfig
from unlearn_jax.studies.page import INTERVALS_EXPLAINED, METHODS_EXPLAINED, StudyReport
from unlearn_jax.studies.table import FORGETTING, Reported

INTRODUCTION = f"""# Correcting wrong answers of a vision-language model

Written by `python -m unlearn_jax.noisy_responses` from the results of `unlearn-jax eval` (docs/unlearning.md says how to go on).
An adapter has learned questions with four options, of which a share had a wrong answer; an edit is to restore the right ones.

{METHODS_EXPLAINED}\
- *accuracy*: of the likeliest option, on questions about pictures of which none was trained on; in the data made here, about
  photographs of which none was. *Mean over types*, *worst type*: over the types of cue; in the data made here, where the tint of
  the picture agrees with the answer, and where it misleads.
- *forgotten*: the corrected questions with the wrong answers that were trained on; *corrected*: with the right ones; *kept*:
  other questions. *Membership AUC*: an attack by the loss, forgotten questions against held-out ones with wrong answers; .5 is
  chance, 1 means that the wrong answers look as if they had been learned.
{INTERVALS_EXPLAINED}"""
PAPER = """## What the paper reports

LLMEraser's numbers (arXiv:2412.00383) are of LLaVA-1.5-7B on MM-SpuBench and R-Bench, with 40 % of the answers wrong. They are of
other data and of another model, so that only differences between methods can be compared with those above. They are quoted from
its reviews, to two digits (the accuracy after retraining, .83 to .84, as its middle). The sizes of its test sets are not known to
us, and it reports no intervals.
"""
SCORES = {
    "accuracy": "accuracy",
    "accuracy_of_categories": "mean over types",
    "worst_category": "worst type",
    "f1": "F1",
}
REPORTED = (
    Reported("answers, MM-SpuBench, 40 % wrong", "accuracy, mean over types", "retrain", 0.835, None, None),
    Reported("answers, MM-SpuBench, 40 % wrong", "accuracy, mean over types", "LLMEraser", 0.81, None, None),
    Reported("answers, R-Bench, 40 % wrong", "F1", "retrain", 0.66, None, None),
    Reported("answers, R-Bench, 40 % wrong", "F1", "LLMEraser", 0.63, None, None),
    Reported("answers, R-Bench, 40 % wrong", "accuracy", "corrupted", 0.54, None, None),
    Reported("answers, R-Bench, 40 % wrong", "accuracy", "LLMEraser", 0.56, None, None),
)


def arrangement(config: NoisyResponsesConfig) -> str:
    """The data, the training and the adapter, in a sentence."""
    data, adapter, training = config.data, config.adapter, config.training
    made = f", with a cue that agrees with {data.agreement:.0%} of the answers" if data.reader == "photographs" else ""
    return (
        f"{data.examples} questions ({data.reader.replace('_', ' ')}{made}), {data.tests} held out; {training.epochs} epochs of "
        f"AdamW (learning rate {training.learning_rate:g}, batches of {training.batch}); a LoRA of rank {adapter.rank}, alpha "
        f"{adapter.alpha:g}."
    )


REPORT = StudyReport(
    INTRODUCTION, {**SCORES, **FORGETTING}, {"accuracy": SCORES["accuracy"]}, PAPER, REPORTED, arrangement
)
