"""Scores, intervals and pages: how a trained model is judged and looked at."""
