"""Predicts memory and time of an edit on accelerators that need not be present."""
