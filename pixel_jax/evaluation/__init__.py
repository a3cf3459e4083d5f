"""Evaluation of trained models: answers, scores with intervals, transcripts and report pages."""
