"""Writes the page of studies: python -m unlearn_jax.noisy_responses PAGE CONFIG [CONFIG ...]."""

from unlearn_jax.noisy_responses.config import NoisyResponsesConfig
from unlearn_jax.noisy_responses.report import REPORT
from unlearn_jax.studies.page import main

main("unlearn_jax.noisy_responses", NoisyResponsesConfig, REPORT)
