"""The README's example runs as it stands there."""

import pathlib
import re
import runpy

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme(tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "import unlearn_jax" in block)
    assert len(block.splitlines()) <= 15
    script = tmp_path / "example.py"
    script.write_text(block)
    report = runpy.run_path(str(script))["edited"].report
    assert report.edited == 3 and report.residual_gradient < 1e-3 < report.right_side
    assert report.actual < 0 and abs(report.predicted - report.actual) < 0.1 * abs(report.actual)
    assert len(capsys.readouterr().out.split()) == 3
