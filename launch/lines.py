"""Counts the Python files and lines of each subpackage: python launch/lines.py [COMMIT], by default the last one.

A line of code is one that holds neither a docstring nor a comment alone; blank lines are none.
"""

import ast
import collections
import io
import pathlib
import subprocess
import sys
import tarfile
import tokenize

NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)


def code_lines(source: bytes) -> int:
    """The number of lines with code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings - {source.count(b"\n") + 1})


def main(commit: str) -> None:
    """Prints a row for each subpackage: files, lines, lines of code."""
    command = ["git", "archive", commit, "pixel_jax", "unlearn_jax"]
    archive = subprocess.run(command, capture_output=True, check=True, cwd=pathlib.Path(__file__).parents[1]).stdout
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(".py"):
                source = files.extractfile(member).read()
                folder = "/".join(member.name.split("/")[:-1][:2])
                for part in (folder, "total"):
                    found.update(
                        {(part, "files"): 1, (part, "lines"): source.count(b"\n"), (part, "code"): code_lines(source)}
                    )
    for part in sorted({part for part, _ in found}, key=lambda part: (part == "total", part)):
        print(f"{part:24} {found[part, 'files']:5} {found[part, 'lines']:7} {found[part, 'code']:7}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HEAD")
