# syntax=docker/dockerfile:1
# An image of the package, for CPUs by default:
#
#   docker build --tag pixel_jax .
#   docker build --build-arg EXTRAS=cuda13 --tag pixel_jax:cuda13 .      also cuda12 (the driver must be at least as new) and tpu
#
# This file has never been built. Its steps, taken by hand in a fresh environment, are run by tests/test_dockerfile.py.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim

# One of the extras of setup.py, or several separated by commas: cpu needs none.
ARG EXTRAS=serve

# A wheel is built from the checkout and installed; no source lies in the image.
WORKDIR /build
COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY pixel_jax pixel_jax
COPY unlearn_jax unlearn_jax
# What is installed is this folder; setup.py bounds the versions of what it needs.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir --disable-pip-version-check ".[${EXTRAS}]" \
    && rm -rf /build

# Nothing runs as root. Runs are written to /runs, where a volume is mounted; compiled programs are kept there, too.
RUN useradd --create-home --uid 1000 pixel \
    && mkdir /runs \
    && chown pixel /runs
USER 1000
WORKDIR /runs
ENV JAX_COMPILATION_CACHE_DIR=/runs/.cache/jax
VOLUME /runs
CMD ["pixel-jax", "check"]
