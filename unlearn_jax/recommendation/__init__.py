"""A language model as a recommender: what LLMEraser (arXiv:2412.00383) measures, on a model and data that anybody can install.

A study combines one choice of each of these; they do not depend on one another:

    readers/      reads a data set as `Ratings`; a new data set is a file, and a line in `readers/__init__.py`
    forms/        how a row is asked and answered, and how answers are scored; a new form is a file, too
    corruption    how some of the training rows are wrong
    methods       what corrects it: retraining, `erase`, the baselines
    config.model  any directory or GGUF file of a language model without a vision tower

Each combination of an edit, a share, a seed and a method is a cell, a JSON file of its own that is computed once.
"""
