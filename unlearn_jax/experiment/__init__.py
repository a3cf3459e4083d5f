"""Compares methods with retraining at the same cost, on a language model that is retrained in seconds.

An adapter learns facts about invented people to convergence, and a share of the facts is removed. Every method may spend as many
example-gradients as `erase` did. Each result is compared with a warm and a cold retrain on the remaining facts, which converge in
float64 until the gradient is a millionth of that of a fresh adapter. The learning rate of each method and share is the best of a
grid on a further seed, whose results do not count.

    python -m unlearn_jax.experiment results.json
"""
