"""A language model as a recommender: what LLMEraser (arXiv:2412.00383) measures, on a model and data that anybody can install.

A study is a value in each of these places, and none of the others knows which one it is given:

    readers/      ratings of a data set -> `Ratings`; a further data set is a file, and a line in `readers/__init__.py`
    forms/        how a row is asked and answered, and how answers are scored; likewise a file
    corruption    what was wrong with some of the training rows
    methods       what is done about it: retraining, `erase`, the baselines
    config.model  any directory or GGUF file of a language model without a vision tower

Each combination of an edit, a share, a seed and a method is a cell, a JSON file of its own that is computed once.
"""
