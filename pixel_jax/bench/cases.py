"""All cases of `pixel-jax bench`, in the order of the table."""

from pixel_jax.bench import conversation, forms, inference, operations, startup, training

CASES = (*operations.CASES, *inference.CASES, *conversation.CASES, *training.CASES, *forms.CASES, *startup.CASES)
