"""Writes golden_scorer.json: verdicts of Pixel Reasoner's own `rule_reward`, executed as it is, on answers of many kinds.

    python tests/training/make_golden_scorer.py experience_maker.py          (needs math-verify)

The file is curiosity_driven_rl/openrlhf/trainer/ppo_utils/experience_maker.py of TIGER-AI-Lab/Pixel-Reasoner, commit
a3a6c3a557a87d89ffaec825bd8c8d09b719fb97; of it only the functions of the scorer are executed.
"""

import ast
import importlib.metadata
import json
import pathlib
import re
import sys

from math_verify import parse, verify

NAMES = ("do_verify", "normalize_answer", "handle_boxed", "rule_reward")
REFERENCES = (
    *(
        "A",
        "B",
        "3",
        "0",
        "0.5",
        "-4",
        "35%",
        "1, 2",
        "red, blue",
        "lion",
        "Paris",
        "the red car",
        "12 cm",
        "1,000",
        "1/2",
    ),
    *(
        r"\frac{3}{4}",
        "x+1",
        "10:30",
        "3-9",
        "24/12",
        "two",
        "No",
        "2010-2012",
        "rome, paris",
        r"\text{Left}",
        "5 minutes",
    ),
)
ANSWERS = (
    *(
        "A",
        "(A)",
        "a",
        "B",
        "B. blue",
        "A: Lion",
        r"\text{A}",
        "AB",
        "3",
        "three",
        "03",
        "3.0",
        "3 dogs",
        "0",
        "0 to 5",
    ),
    *("12 0", "about 0", "maybe 0 maybe 9", "none", "0.50", r"\frac{1}{2}", "1/2", ".5", "50%", "-4", "4", "35", "35%"),
    *(
        r"35\%",
        "0.35",
        "3.5",
        "1, 2",
        "2, 1",
        "1 and 2",
        "2:1",
        "-1, 2",
        "1, 2, 3",
        "blue and red",
        "red",
        "Lion",
        "a lion",
    ),
    *(
        "paris",
        "Rome, Paris",
        "Paris",
        "the red car",
        "red car",
        "12",
        "12cm",
        "1000",
        "1,000",
        r"\dfrac{3}{4}",
        "0.75",
    ),
    *(
        "1+x",
        "x + 1",
        "10:30",
        "-6",
        "2",
        "-2",
        "3-9",
        "24/12",
        "two",
        "no",
        "2012",
        "left",
        "5",
        "",
        r"\sqrt{9}",
        "2^2-1",
    ),
)
SHAPES = (
    "I see it: \\boxed{%s}.",
    "\\boxed{%s}",
    "\\boxed{cat} no, \\boxed{%s}",
    "<answer>%s</answer>",
    "<answer>%s</answer> or <answer>cat</answer>",
    "<answer>\n%s\n</answer>",
    "The answer is %s",
    "I count %s of them",
    "\\boxed{7}, or rather %s",
    "$%s$",
)


def scorer(path: pathlib.Path) -> dict:
    tree = ast.parse(path.read_text("utf-8"))
    kept = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in NAMES]
    kept += [x for x in tree.body if isinstance(x, ast.Assign) and x.targets[0].id in ("endstr", "ans_indicator")]
    space = {"parse": parse, "verify": verify, "re": re}
    exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return space


if __name__ == "__main__":
    reward = scorer(pathlib.Path(sys.argv[1]))["rule_reward"]
    cases = []
    for i, reference in enumerate(REFERENCES):
        for j, answer in enumerate(ANSWERS):
            if (i + j) % 4:
                continue
            shape = SHAPES[(i + j // 4) % len(SHAPES)]
            response = f"{shape % answer}<|im_end|>"
            found = reward(response, [f"\\boxed{{{reference}}}"], "<|im_end|>", "none", False)[-1]  # as it is called
            cases.append([response, reference, found])
    golden = {"math_verify": importlib.metadata.version("math-verify"), "cases": cases}
    pathlib.Path(__file__).with_name("golden_scorer.json").write_text(json.dumps(golden, separators=(",", ":")))
    print(len(cases), {value: sum(x[2] == value for x in cases) for value in (1.0, 0.0, -1.0)})
