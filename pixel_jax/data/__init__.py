"""Datasets in: images, traces, batches."""
