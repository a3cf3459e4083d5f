"""Releases of transformers that people still have, beside the installed one: `pip install --target` folders in `.cache`.

Called by `test_old_transformers.py`, and run by it as a script under each of them: `old_transformers.py COMMAND ARGUMENTS`,
which prints JSON. torch is the installed one.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

CACHE = pathlib.Path(__file__).parent.parent.parent / ".cache"
OLD = ("4.49.0", "4.57.6")  # of the paper's authors; the last of its kind
HERE = pathlib.Path(__file__).parent


def install(*packages: str) -> pathlib.Path:
    """A folder with these packages."""
    place = CACHE / "-".join(re.sub(r"[^\w.]+", "-", package.lstrip("-")) for package in packages)
    if not (place / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", place, *packages]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (place / "complete").touch()
    return place


def torchvision() -> pathlib.Path:
    """The one of the installed torch; processors of transformers from 4.57 on need it."""
    import torch

    minor = int(torch.__version__.split(".")[1])
    return install("--no-deps", f"torchvision==0.{minor + 15}.0")


def run(release: str | None, *arguments):
    """What a command of this file prints under a release; None: the installed one."""
    folders = [torchvision()] if release is None else [install(f"transformers=={release}"), torchvision()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f"transformers {release}: {' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def declare_operators() -> None:
    """torchvision's wheels for GPUs lack these where there is none, and it does not load without their names."""
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def defaults() -> dict:
    """The configuration of a model about which nothing is said."""
    import transformers

    config = transformers.Qwen2_5_VLConfig()
    own, vision = config.to_dict(), config.vision_config.to_dict()
    text = own["text_config"] if "text_config" in own else own
    return {"release": transformers.__version__, "own": own, "text": text, "vision": vision}


def save(directory: str, arrays: str) -> dict:
    """Makes a model as small as the released tower's defaults let it be, saves it, and answers the arrays of a file."""
    import numpy as np
    import torch
    import transformers

    values = json.loads((HERE / "config_saved_by_4_49.json").read_text())
    small = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "torch_dtype": "float32"}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    tower = {**values["vision_config"], "hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(**{**values, **small, **tokens, "vision_config": tower})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():  # so that attention is not uniform, and no bias or norm is the initial one
            noise = torch.randn(weight.shape)
            weight.copy_(noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight + 0.2 * noise)
        given = {name: torch.tensor(value) for name, value in np.load(arrays).items()}
        logits = model(**given).logits
    model.save_pretrained(directory)
    np.save(pathlib.Path(directory) / "logits.npy", logits.numpy())
    return {"vision": sorted(json.loads((pathlib.Path(directory) / "config.json").read_text())["vision_config"])}


def read(directory: str, text: str) -> dict:
    """What the release makes of a directory's tokenizer, processor and generation settings."""
    import numpy as np
    import transformers
    from PIL import Image

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    image = Image.fromarray(np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3))
    seen = processor(text=["<|image_pad|>" + text], images=[image], return_tensors="pt")
    path = pathlib.Path(directory) / "generation_config.json"
    ids = tokenizer.encode(text)
    return {
        "release": transformers.__version__,
        "tokens": len(tokenizer),
        "ids": ids,
        "text": tokenizer.decode(ids),
        "without special tokens": tokenizer.decode(ids, skip_special_tokens=True),
        "end": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "template": tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False),
        "seen": {"ids": seen["input_ids"].tolist(), "grid": seen["image_grid_thw"].tolist()},
        "stop": transformers.GenerationConfig.from_pretrained(directory).eos_token_id if path.exists() else None,
    }


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    declare_operators()
    print(json.dumps({"defaults": defaults, "save": save, "read": read}[command](*arguments)))
