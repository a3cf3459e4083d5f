"""Counts the Python files and lines of each subpackage: python launch/lines.py [COMMIT ...], by default the last one.

Columns are files, lines, lines of code (neither blank, nor only a docstring or a comment), and the numbers of short and of long
files, of less than 70 and of more than 500 lines. With two commits the first columns are before and the others after.
"""

import ast
import collections
import io
import pathlib
import subprocess
import sys
import tarfile
import tokenize

SHORT, LONG = "<70", ">500"  # lines of a file
COLUMNS = ("files", "lines", "code", SHORT, LONG)
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


def count(commit: str) -> collections.Counter[tuple[str, str]]:
    """The numbers of a commit by (subpackage, column)."""
    command = ["git", "archive", commit, "pixel_jax", "unlearn_jax"]
    archive = subprocess.run(command, capture_output=True, check=True, cwd=pathlib.Path(__file__).parents[1]).stdout
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(".py"):
                source = files.extractfile(member).read()
                lines = source.count(b"\n")
                numbers = {"files": 1, "lines": lines, "code": code_lines(source)}
                numbers |= {SHORT: lines < 70, LONG: lines > 500}
                for part in ("/".join(member.name.split("/")[:-1][:2]), "total"):
                    found.update({(part, column): int(number) for column, number in numbers.items()})
    return found


def main(commits: list[str]) -> None:
    """Prints a row for each subpackage, with the columns of each commit."""
    counts = {commit: count(commit) for commit in commits}
    print(" " * 28 + "".join(f"  {commit[:30]:<33}" for commit in commits))
    print(" " * 28 + "".join(f"{column:>7}" for column in COLUMNS) * len(commits))
    for part in sorted(
        {part for found in counts.values() for part, _ in found}, key=lambda part: (part == "total", part)
    ):
        print(f"{part:28}" + "".join(f"{found[part, column]:7}" for found in counts.values() for column in COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:] or ["HEAD"])
