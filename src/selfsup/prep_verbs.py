"""What `selfsup prep clean` and `selfsup prep contamination` do with their options."""

import argparse
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError


def clean(options: argparse.Namespace) -> None:
    """Cleans a corpus; prints what each rule dropped."""
    from selfsup.config import from_mapping, parse_setting
    from selfsup.data.cleaning import clean
    from selfsup.data.cleaning_rules import RULES, Config
    from selfsup.reporting.cleaning import write_cleaning

    settings = dict(parse_setting(text) for text in options.set)
    if options.language:
        settings["language"] = options.language
    out = Path(options.out)
    summary = clean(
        options.data,
        out,
        from_mapping(Config, settings, "clean"),
        text_column=options.text,
        split=options.split,
    )
    write_cleaning(summary, RULES, out / "report.html")
    _print_table(summary)
    if summary["dropped"]["no_line_end"]["characters"] > summary["read"]["characters"] / 2:
        console.say(
            "most of the text stood in lines without an end mark: if its lines are broken at a "
            "width, or are headings and verse, try --set line_ends=false min_line_words=0"
        )
    console.say(f"next: selfsup pretrain RECIPE --data {out / 'documents'} --out RUN")


def _print_table(summary: dict[str, Any]) -> None:
    keys = ("documents", "lines", "characters")
    rows = {"read": summary["read"]}
    rows |= {rule: found for rule, found in summary["dropped"].items() if any(found.values())}
    rows |= {"kept": summary["kept"]}
    width = max(map(len, rows))
    for name, row in rows.items():
        sign = "" if name in ("read", "kept") else "-"
        share = row["characters"] / max(1, summary["read"]["characters"])
        cells = "".join(f"{f'{sign}{row[key]:,}' if row[key] else '':>16}" for key in keys)
        print(f"{name:<{width}}{cells}{share:>9.2%}")


def contamination(options: argparse.Namespace) -> None:
    """Looks for a test set in a corpus; prints the counts and the worst items."""
    from selfsup.data.contamination import contamination
    from selfsup.files import write_json

    out = Path(options.out)
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    found = contamination(
        options.data,
        options.test,
        n=options.n,
        text_column=options.text,
        test_column=options.test_text,
        clean_out=Path(options.drop) if options.drop else None,
    )
    write_json(out, found)
    print(f"contaminated\t{found['contaminated']:,} of {found['items']:,}\t{found['share']:.2%}")
    print(f"wholly found\t{found['wholly_found']:,}")
    if found["short_items"]:
        counts = f"{found['contaminated_short']:,} of {found['short_items']:,}"
        print(f"of those shorter than {found['n']} words\t{counts}")
    for worst in found["worst"]:
        print(f"{worst['share']:.2f}\t{worst['words']} words\t{worst['origin']}\t{worst['text']}")
