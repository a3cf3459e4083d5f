"""Edits of the adapter of a run of `pixel-jax sft`, based on the record that the run wrote (`pixel_jax.run_record`).

config: the directory of the run, and how an edit is computed
item: the content of a training example, and its forms after requests
task: the run as a `RequestTask`: checks, loss, exact replay
identity: checks that model, adapter, code and data are those that the run recorded
edit: `unlearn-jax erase --run=DIR`
evaluate: `unlearn-jax eval --run=DIR`
"""
