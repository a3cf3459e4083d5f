"""Writes HTML pages, self-contained files of numbers, curves and transcripts. Foreign text is escaped."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources

from pixel_jax.evaluation.curves import COLORS
from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript
from pixel_jax.files import write_file

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
VERDICTS = {True: '<b class="right">right</b>', False: '<b class="wrong">wrong</b>'}


def text(value) -> str:
    """Writes a value as escaped HTML text."""
    return html.escape(str(value), quote=True)


def figure(picture: Picture, *, width: int) -> str:
    """Draws a picture, `width` CSS pixels wide, with its boxes."""
    boxes = []
    wide, high = int(picture.width), int(picture.height)
    line = max(wide, high) / 150
    for number, x1, y1, x2, y2 in (map(int, box) for box in picture.boxes):
        color = COLORS[(number - 1) % len(COLORS)]
        boxes.append(
            f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" fill="none" stroke="{color}" '
            f'stroke-width="{line:.1f}"/><text x="{x1 + line:.1f}" y="{max(y1 - line, 12 * line):.1f}" fill="{color}" '
            f'font-size="{12 * line:.0f}" stroke="white" stroke-width="{line / 2:.1f}" paint-order="stroke">{number}</text>'
        )
    return (
        f'<figure style="width:{width}px"><svg viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="{text(picture.caption)}"><image href="{text(picture.uri)}" '
        f'width="{wide}" height="{high}"/>{"".join(boxes)}</svg>'
        f"<figcaption>{text(picture.caption)}, {wide}×{high}</figcaption></figure>"
    )


def turn(item: ShownTurn, number: int) -> str:
    """Draws a turn; `number` is that of the last call made."""
    color = COLORS[(number - 1) % len(COLORS)] if number else "#555"  # of calls 1, 2, ...
    name = "model" if item.role == "assistant" else f"operation {number}"
    pictures = "".join(figure(picture, width=140) for picture in item.pictures)
    style = "assistant" if item.role == "assistant" else "tool failed" if item.failed else "tool"
    return (
        f'<div class="turn {style}"><span class="who" style="color:{color}">{name}</span>'
        f"<pre>{text(item.text)}</pre>{pictures}</div>"
    )


def terms(item: Transcript) -> str:
    """The terms of a reward that are not 0."""
    parts = [f"{name} {value:+.3g}" for name, value in item.terms.items() if value]
    return f" ({text(', '.join(parts))})" if parts else ""


def transcript(item: Transcript) -> str:
    """Draws a conversation: the images with every box, the model's first view of them, then each turn."""
    known = [
        text(item.question) if item.title else "",
        "" if item.answer is None else f"answer {text(item.answer)}",
        "" if item.reference is None else f"reference {text(item.reference)}",
        "" if item.correct is None else VERDICTS[bool(item.correct)],
        "" if item.reward is None else f"reward {text(f'{item.reward:.3g}')}{terms(item)}",
        "" if item.advantage is None else f"advantage {text(f'{item.advantage:+.3g}')}",
        f"ended: {text(item.stop)}",
    ]
    wide = 280 if len(item.pictures) == 1 else 130
    pictures = "".join(figure(picture, width=wide) for picture in item.pictures)
    overview = "".join(figure(picture, width=112 if len(item.overview) == 1 else 60) for picture in item.overview)
    turns, number = [], 0
    for part in item.turns:
        number += part.role != "assistant"
        turns.append(turn(part, number))
    return (
        f'<article class="trace"><h3>{text(item.title or item.question)}</h3>'
        f'<p class="meta">{" · ".join(filter(None, known))}</p>'
        f'<div class="columns"><div class="images">{pictures}{overview}</div>'
        f'<div class="turns">{"".join(turns)}</div></div></article>'
    )


def traces_page(traces: Sequence[Transcript], title: str = "Traces") -> str:
    """Makes a page of transcripts."""
    return page(title, [("", "".join(transcript(item) for item in traces))])


def table(head: Sequence[str], rows: Sequence[Sequence], *, style: str = "") -> str:
    """Makes a table with escaped cells. The `style` "facts" is for words; other tables hold numbers."""

    def cells(row: Sequence, tag: str) -> str:
        return "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    kind = f' class="{text(style)}"' if style else ""
    return f"<table{kind}><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def folded(head: str, content: str, *, unfolded: bool = False) -> str:
    """Folds HTML content, which a click on `head` unfolds."""
    return f"<details{' open' if unfolded else ''}><summary>{text(head)}</summary>{content}</details>"


def paragraph(words: str) -> str:
    """Makes a paragraph of escaped text."""
    return f"<p>{text(words)}</p>"


def page(title: str, sections: Sequence[tuple[str, str]], data: Mapping | None = None) -> str:
    """Makes a whole page from (heading, HTML) sections, with `data` embedded as JSON for other programs."""
    css = resources.files("pixel_jax.evaluation").joinpath("report.css").read_text("utf-8")
    body = "".join((f"<h2>{text(head)}</h2>" if head else "") + content for head, content in sections)
    numbers = ""
    if data is not None:
        # "<" is the only character that could end the script element early.
        safe = json.dumps(data).replace("<", "\\u003c")
        numbers = f'<script type="application/json" id="metrics">{safe}</script>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{text(title)}</title><style>{css}</style></head><body><h1>{text(title)}</h1>{body}{numbers}</body></html>"
    )


def write(path: str | os.PathLike, content: str) -> None:
    """Writes a page whole or not at all."""
    write_file(path, content)
