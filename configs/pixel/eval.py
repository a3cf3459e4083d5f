"""The four benchmarks of Pixel Reasoner and four others, with the settings of its released evaluation; name the data you have.

    pixel-jax eval --config=configs/pixel/eval.py --config.model=DIR --config.out=runs/eval \
        --config.benchmarks.vstar.data=vstar_bench --config.benchmarks.infovqa.data=infographicsVQA_val_v1.0_withQT.json

Data are the files that the benchmarks' authors release (`pixel_jax/evaluation/benchmarks.py` describes them), or with
`--config.benchmarks.vstar.format=prepared` the Parquet files that Pixel Reasoner's authors prepared. A benchmark without
data is left out. `own` is a folder of your own (`pixel_jax/data/own.py`), `search` one of the visual search set
(`docs/visual-search.md`).

Every question is asked three times: with operations, without, and with operations that show grey. The report has what
operations gain and harm.

    --config.modes="('operations',)"                                        once only
    --config.rollout.group_size=32 --config.rollout.temperature=1.0         Avg@32
    --config.benchmarks.own.scorer.rules="('box', 'choice')"                "A. Lion" answers A
"""

from ml_collections import ConfigDict, config_dict

PICTURE = ((1, 1024, 1024, 2304), (1, 2304, 2304, 6144), (1, 4096, 4096, 6144))
TALL = ((1, 1024, 1024, 2304), (1, 2304, 2304, 6144), (1, 8192, 2304, 6144), (1, 4096, 4096, 6144))
VIDEO = ((16, 512, 768, 5120), (16, 768, 1408, 5120), (16, 1088, 1920, 5120))


def benchmark(format: str, buckets: tuple | None, rules: tuple[str, ...] = ("box",), **more) -> ConfigDict:
    config = ConfigDict({"format": format, "buckets": buckets, "scorer": {"rules": rules}, **more})
    config.data, config.images = config_dict.placeholder(str), config_dict.placeholder(str)
    config.split, config.sample = config_dict.placeholder(str), config_dict.placeholder(int)
    return config


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = config_dict.placeholder(str)
    config.out = config_dict.placeholder(str)
    config.benchmarks = {
        # "B. blue" answers B, as in VLMEvalKit and lmms-eval; the column `accuracy` has the released scorer's verdict, too.
        "vstar": benchmark("vstar", PICTURE, ("box", "choice")),
        "tallyqa": benchmark("tallyqa", PICTURE),
        # Infographics are up to seven times as tall as wide.
        "infovqa": benchmark("infovqa", TALL, ("anls",), max_side=5600),
        "mvbench": benchmark("mvbench", VIDEO, ("box", "choice")),
        "hrbench": benchmark("hrbench", None, ("box", "choice")),
        "visualprobe": benchmark("visualprobe", None),
        "videomme": benchmark("videomme", VIDEO, ("box", "choice")),
        "search": benchmark("jsonl", None, ("box", "choice")),
        "own": benchmark("jsonl", None),
    }
    config.modes = ("operations", "none", "blank")
    config.batch = 64
    config.traces = 16
    config.seed = 0
    # Axis sizes; -1 takes the devices that are left. An empty mesh runs on one device.
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    # The released evaluation's settings, of which any can be set (`pixel_jax/evaluation/config.py`).
    config.rollout = ConfigDict()
    config.host_tools = ConfigDict()  # of tools that run on the host (`pixel_jax.tools.host.HostToolsConfig`)
    return config
