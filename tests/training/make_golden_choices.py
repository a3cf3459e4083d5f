"""Writes golden_choices.json: which option VLMEvalKit and lmms-eval read in answers as people and models write them.

    python tests/training/make_golden_choices.py matching_util.py mcq_extract.py

The files are vlmeval/utils/matching_util.py of open-compass/VLMEvalKit, commit e8e78f05f3080fe28154f2130321f17951c3be94, and
lmms_eval/tasks/_task_utils/mcq_extract.py of lmms-eval 0.7.3; their functions are executed as they are.
"""

import importlib.util
import json
import pathlib
import sys
import types

OPTIONS = {"A": "red", "B": "blue", "C": "dark green", "D": "a yellow car"}
FORMS = (
    *(
        "{L}",
        "({L})",
        "{L}.",
        "{L})",
        "[{L}]",
        "{{{L}}}",
        "**{L}**",
        "*{L}*",
        "{L}: {t}",
        "{L}. {t}",
        "({L}) {t}",
        "{L}, {t}",
    ),
    *(
        "{L} {t}",
        "{L}) {t}",
        "{L} - {t}",
        "{t}",
        "{T}",
        "{t}.",
        "Option {L}",
        "option ({L})",
        "Option {L}.",
        "Choice {L}",
    ),
    *(
        "Answer: {L}",
        "The answer is {L}",
        "The answer is {L}.",
        "The correct answer is ({L}).",
        "The answer is option {L}",
    ),
    *(
        "The correct answer is **{L}**.",
        "The answer is {L}: {t}",
        "The answer is {t}",
        "Answer: {L}. {t}",
        "{L} is correct",
    ),
    *(
        "So the answer is {L}.",
        "Therefore, the correct option is {L}.",
        "({L}) {t}.",
        "**{L}. {t}**",
        "{L} is the answer",
    ),
    *("The best answer is {L}", "Final answer: {L}", "{L}\n", " {L} ", "({L})."),
)


def module(path: str, **stubs):
    for name, stub in stubs.items():
        sys.modules[name.replace("__", ".")] = stub
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


if __name__ == "__main__":
    log = types.SimpleNamespace(get_logger=lambda name: None)
    kit = module(sys.argv[1], vlmeval=types.ModuleType("v"), vlmeval__smp=types.ModuleType("s"), vlmeval__smp__log=log)
    lmms = module(sys.argv[2])
    cases = []
    for letter, text in OPTIONS.items():
        for form in FORMS:
            answer = form.format(L=letter, t=text, T=text.title())
            read = (
                kit.can_infer(answer, dict(OPTIONS)) or None,
                lmms.extract_mcq_answer(answer, list(OPTIONS)) or None,
            )
            cases.append([answer, letter, *read])
    golden = {"options": OPTIONS, "cases": cases}
    pathlib.Path(__file__).with_name("golden_choices.json").write_text(json.dumps(golden, separators=(",", ":")))
