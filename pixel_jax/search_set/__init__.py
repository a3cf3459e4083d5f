"""A visual search set: questions about small things in large photographs, made from a seed, and its baselines."""
