"""Writes the page of studies: python -m unlearn_jax.recommendation PAGE CONFIG [CONFIG ...]."""

from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.report import REPORT
from unlearn_jax.studies.page import main

main("unlearn_jax.recommendation", RecommendationConfig, REPORT)
