"""Wrong answers to questions about pictures: LLMEraser's response correction (arXiv:2412.00383) on a vision-language model.

An adapter is trained on questions with options, of which a share has a wrong answer, and an edit is to restore the right ones.

    readers/      reads or makes a data set as `ChoiceQuestion`s; a new one is a file, and a line in `readers/__init__.py`
    answerer      a vision-language model with an adapter, and the examples that it learns
    base          a small model that is trained here, where `config.model` names none
    config.model  any directory of a vision-language model, such as LLaVA-1.5's

Cells, methods, table and page are those of `unlearn_jax.studies`.
"""
