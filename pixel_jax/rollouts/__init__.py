"""Rollouts: prompts, the decode loop, calls of tools and their results, and the records of all of them."""
