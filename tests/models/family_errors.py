"""Measures every family against transformers and writes the table of docs/families.md: `python tests/models/family_errors.py`.

The errors are those that the tests bound by 1e-5: the largest difference in float32, relative to the largest value.
"""

import pathlib

import numpy as np
import test_families as families
import tiny_families
from tiny_qwen import relative

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 (tied)",
    "llama": "Llama (biases, linear scaling)",
    "llama3": "Llama 3 (llama3 scaling, tied), SmolLM2",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_tied": "Qwen3-VL (tied)",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_text": "Qwen3.5, without its tower (tied)",
    "llava": "LLaVA-1.5",
    "llava_full": "LLaVA (Qwen2, two layers of CLIP, class token)",
}


def measured(test, *arguments) -> str:
    """The largest error that a test compares with its bound."""
    errors: list[float] = []

    def record(ours, theirs) -> float:
        errors.append(relative(ours, theirs))
        return errors[-1]

    families.relative = record
    test(*arguments, np.random.default_rng(0))
    families.relative = relative
    return f"{max(errors):.1e}"


def main() -> None:
    rows = [
        "| family | vision tower | logits, padded left | right | with videos | cached steps |",
        "|---|---|---|---|---|---|",
    ]
    for name in tiny_families.VALUES:
        visual, qwen = name in tiny_families.VISUAL, name in families.QWEN
        cells = [
            measured(families.test_tower, name) if visual else "",
            measured(families.test_logits, name, "left"),
            measured(families.test_logits, name, "right"),
            measured(families.test_videos_and_images, name) if qwen else "",
            measured(families.test_cached_steps_equal_the_full_forward, name),
        ]
        rows.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    before, rest = PAGE.read_text().split(BEGIN)
    _, behind = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{behind}")


if __name__ == "__main__":
    main()
