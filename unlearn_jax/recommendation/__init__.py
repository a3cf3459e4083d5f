"""A language model as a recommender: what LLMEraser (arXiv:2412.00383) measures, on a model and data that anybody can install.

A study combines one choice of each of these; they do not depend on one another:

    readers/      reads a data set as `Ratings`; a new data set is a file, and a line in `readers/__init__.py`
    forms/        how a row is asked and answered, and how answers are scored; a new form is a file, too
    corruption    how some of the training rows are wrong
    config.model  any directory or GGUF file of a language model without a vision tower

Cells, methods, table and page are those of `unlearn_jax.studies`.
"""
