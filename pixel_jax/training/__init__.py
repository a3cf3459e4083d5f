"""From trajectories to better weights: rewards, advantages, replay, losses, the two steps and their loops."""
