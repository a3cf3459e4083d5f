"""Studies: tables of methods that undo wrong training examples, each number a cell that is computed once.

A study combines a `Study` (data, model, scores) with the edits, shares, seeds and methods of its configuration:

    study      what all cells share; training, and the comparison of adapters with retraining
    methods    what is compared: retraining, `erase`, the baselines
    cells      which numbers there are, which are finished, and the computation of the others
    table      means over seeds with their intervals
    page       the page of several studies, with what is missing in it
    commands   `unlearn-jax train`, `erase` and `eval` of any study

`recommendation` and `noisy_responses` are its users.
"""
