"""The page of a request: what it shows, what it keeps to itself, and that a browser draws it."""

import dataclasses
import subprocess

import numpy as np
import pytest
from linear_task import answer, remove

from tests.evaluation.test_report import HOSTILE, Reader
from unlearn_jax.requests.page import draw_page
from unlearn_jax.requests.task import Description

SECRET = "the forgotten text"
EDIT = {
    "verdict": "edited",
    "reason": "the objective fell",
    "edited": 1,
    "examples": 24,
    "predicted": -0.1,
    "actual": -0.09,
    "delta_norm": 0.5,
    "adapter_norm": 2.0,
    "epochs": 3.25,
    "memory": 2**31,
    "limits": [{"kind": "finish", "text": f"L-BFGS stopped {HOSTILE}"}],
    "steps": [{"residuals": [1.0, 0.5, 0.05]}],
}
LOSSES = {name: {"before": 0.25, "after": 1.75} for name in ("removed", "new form", "neighbours", "kept")}
REPORT = {"outcome": "edited", "why": HOSTILE, "losses": LOSSES, "edit": EDIT, "replay": None}
REPORT |= {"example_gradients": 78.0, "seconds": 4.0}
SHOWN = {"p3": (Description({"question": SECRET + HOSTILE}, [np.zeros((8, 8, 3), np.uint8)]), None)}


def test_what_a_page_shows():
    texts = "\n".join(Reader(draw_page("0001", remove("p3"), REPORT)).texts)
    for shown in (
        "Request 0001",
        "p3",
        "A. Person",
        "0.25",
        "1.75",
        "+1.5",
        "removed",
        "neighbours",
        "kept",
        "2.00 GiB",
    ):
        assert shown in texts
    assert "residual of the solver" in texts and texts.count("loss of the forgotten") == 2
    escalated = {**REPORT, "outcome": "escalated", "replay": {"since": "step 40", "example_gradients": 100.0}}
    assert "step 40" in draw_page("0001", remove("p3"), escalated)
    nothing = {**REPORT, "outcome": "nothing to do", "edit": None, "losses": {"kept": LOSSES["kept"]}}
    assert "Nothing is forgotten" in draw_page("0001", remove("p3"), nothing)


def test_content_is_shown_when_asked_for_only():
    masked = dataclasses.replace(answer("p3", SECRET), kind="mask")
    for request in (remove("p3"), answer("p3", SECRET), masked):
        page = draw_page("0001", request, REPORT)
        assert SECRET not in page and "data:image" not in page
    page = draw_page("0001", remove("p3"), REPORT, SHOWN)
    assert SECRET in page and "data:image/png;base64," in page and "not among the training examples" in page


def test_everything_from_outside_is_escaped():
    request = remove(HOSTILE, reason=HOSTILE, who=HOSTILE)
    shown = {HOSTILE: (Description({HOSTILE: HOSTILE}, []), Description({HOSTILE: HOSTILE}, []))}
    seen = Reader(draw_page(HOSTILE, request, REPORT, shown))
    assert seen.runs == 0 and "img" not in seen.tags and "script" not in seen.tags and "onerror" not in seen.attributes
    assert sum(HOSTILE in text for text in seen.texts) >= 8


@pytest.mark.chromium
def test_a_browser_draws_it(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(draw_page("0001", remove("p3"), REPORT, SHOWN))
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1600"]
    line += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", page.as_uri()]
    subprocess.run(line, capture_output=True, timeout=120, check=True)
    from PIL import Image

    seen = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert seen.shape == (1600, 1000, 3) and len(np.unique(seen.reshape(-1, 3), axis=0)) > 50  # not a blank page
