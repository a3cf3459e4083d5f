"""Talking to a model: conversations as prompts, a rollout whose rows come and go, and the server of `pixel-jax serve`."""
