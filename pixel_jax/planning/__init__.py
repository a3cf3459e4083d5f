"""Predicts the cost of a recipe on a machine that is not present: its real steps are compiled ahead of time and counted."""
