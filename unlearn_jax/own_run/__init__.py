"""Edits of the adapter of a run of `pixel-jax sft`, by what the run recorded of itself (`pixel_jax.run_record`).

config: where the run lies, and how an edit is computed
item: a training example as content, and its forms after requests
task: the run as a `RequestTask`: checks, loss, exact replay
identity: whether model, adapter, code and data are those that it recorded
edit: `unlearn-jax erase --run=DIR`
evaluate: `unlearn-jax eval --run=DIR`
"""
