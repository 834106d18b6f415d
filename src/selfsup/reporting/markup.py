"""Pieces of HTML: escaped text, numbers for people, sections, lists of keys, tables of records."""

from html import escape
from typing import Any

from selfsup.reporting.runs import Row


def text(value: Any) -> str:
    """Text from a file, safe in HTML and in XML: escaped, without control characters."""
    clean = "".join(
        c if c in "\n\t" or (c >= " " and c not in "\x7f\ufffe\uffff") else "\ufffd"
        for c in str(value)
    )
    return escape(clean.encode("utf-8", "replace").decode())


def compact(value: float) -> str:
    """A number in the fewest characters that a tick needs.

    >>> compact(20000), compact(1500), compact(0.25), compact(2e-5), compact(3.0)
    ('20k', '1,500', '0.25', '2e-5', '3')
    """
    for least, unit, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g}{name}"
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """One section with its heading and one sentence on how to read it."""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{text(anchor)}"><h2>{text(title)}</h2>{lead}{body}</section>'


def number(value: Any) -> str:
    """A value of a file as text: long integers grouped, short floats.

    >>> number(1234567), number(0.00031), number(True), number([1, 2])
    ('1,234,567', '0.00031', 'true', '1, 2')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if len(value) > 1 and isinstance(value[0], str) and set(value) == {value[0]}:
            return f"{value[0]} ×{len(value)}"
        return ", ".join(number(item) for item in value)
    return str(value)


def rounded(value: float) -> str:
    """A large count in three digits; up to five digits in full.

    >>> rounded(20412), rounded(1834221)
    ('20,412', '1.83M')
    """
    return f"{value:,.0f}" if abs(value) < 1e5 else compact(float(f"{value:.3g}"))


def flattened(values: Row, prefix: str = "") -> dict[str, str]:
    """Nested tables as dotted keys.

    >>> flattened({"a": 1, "b": {"c": 2.5, "d": {"e": "x"}}})
    {'a': '1', 'b.c': '2.5', 'b.d.e': 'x'}
    """
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flattened(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = number(value)
    return out


def pairs(values: Row) -> str:
    """Keys and values as a definition list."""
    rows = "".join(
        f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>"
        for key, value in flattened(values).items()
    )
    return f'<dl class="pairs">{rows}</dl>'


def tiles(values: dict[str, str]) -> str:
    """A row of large numbers with small names."""
    items = "".join(
        f"<div><dd>{text(value)}</dd><dt>{text(name)}</dt></div>" for name, value in values.items()
    )
    return f'<dl class="tiles">{items}</dl>'


def records(rows: list[Row]) -> str:
    """Rows with the same keys as a table that scrolls in its own box."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{text(key)}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(number(row.get(key, '')))}</td>" for key in keys) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="records"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def code(command: str) -> str:
    """A command in a block that one click selects."""
    return f'<pre tabindex="0"><code>{text(command)}</code></pre>'
