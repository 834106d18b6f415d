"""The page of a cleaned corpus: what was kept, what each rule dropped, and examples of it."""

import shlex
from pathlib import Path
from typing import Any

from selfsup.files import write_text
from selfsup.reporting.markup import code, pairs, rounded, section, text, tiles
from selfsup.reporting.page import html

BAR = '<b><i style="width:{:.1f}%"></i></b>'
WIDE = ' style="grid-template-columns: 11em 1fr 4em"'  # names of rules are longer than words


def write_cleaning(summary: dict[str, Any], about: dict[str, str], out: Path) -> Path:
    """Writes one self-contained HTML page; the same summary gives the same bytes.

    Args:
        summary: what `selfsup.data.cleaning.clean` returned.
        about: what each rule drops, by its name.
        out: the file to write.

    Raises:
        StorageError: `out` cannot be written.
    """
    read, kept = summary["read"], summary["kept"]
    left = kept["characters"] / max(1, read["characters"])
    headline = f"{left:.1%} of the characters are kept"
    first = f"{kept['documents']:,} of {read['documents']:,} documents"
    numbers = {
        "documents kept": rounded(kept["documents"]),
        "lines kept": rounded(kept["lines"]),
        "characters kept": rounded(kept["characters"]),
    }
    active = {rule: found for rule, found in summary["dropped"].items() if any(found.values())}
    body = (
        f'<header><p class="eyebrow">selfsup prep clean</p><h1>{headline}</h1>'
        f'<p class="conclusion">{first}.</p>{tiles(numbers)}</header>'
        f"{_bars(active, read['characters'])}{_table(active, about)}{_examples(active)}"
        f"{section('rules', 'Rules', '', pairs(summary['config']))}{_next(out.parent)}"
    )
    write_text(out, html(f"{out.parent.name} · selfsup", headline, body))
    return out


def _bars(active: dict[str, Any], total: int) -> str:
    rows = ""
    for rule, found in active.items():
        share = found["characters"] / max(1, total)
        name = text(rule.replace("_", " "))
        rows += (
            f"<li{WIDE}><span>{name}</span>{BAR.format(100 * share)}<span>{share:.2%}</span></li>"
        )
    lead = "Each dropped character is counted once, at the rule that dropped it."
    return section("dropped", "Characters dropped", lead, f'<ol class="bars">{rows}</ol>')


def _table(active: dict[str, Any], about: dict[str, str]) -> str:
    keys = ("documents", "lines", "characters")
    rows = ""
    for rule, found in active.items():
        cells = "".join(f"<td>{found[key]:,}</td>" for key in keys)
        rows += f'<tr><th scope="row">{text(about[rule])}</th>{cells}</tr>'
    head = "".join(f"<th>{key}</th>" for key in keys)
    table = (
        '<div class="scroll"><table><thead><tr><th>rule</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return section("counts", "By rule", "", table)


def _examples(active: dict[str, Any]) -> str:
    cards = "".join(
        f"<h3>{text(rule.replace('_', ' '))}</h3>"
        f'<ul class="plain">{"".join(f"<li>{text(e)}</li>" for e in found["examples"])}</ul>'
        for rule, found in active.items()
        if found["examples"]
    )
    return section("examples", "Examples", "The first that each rule met, cut short.", cards)


def _next(folder: Path) -> str:
    data = shlex.quote(str(folder / "documents"))
    return section("next", "Try next", "", code(f"selfsup pretrain RECIPE --data {data} --out RUN"))
