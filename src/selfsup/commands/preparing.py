"""The verbs `prep clean`, `contamination`, `switch`, `shard`, `tokens`: a corpus before learning.

Nothing heavy is imported before one of them runs.
"""

import argparse
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.commands.options import (
    Parser,
    set_option,
    settings_of,
    sources_of,
    verb,
    workers_of,
    workers_options,
)
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "prep",
        clean,  # each verb below sets its own
        "clean a corpus, look for a test set in it, or make it ready in shards",
        "  selfsup prep clean --data crawl/ --out clean/\n"
        "  selfsup prep contamination --data clean/documents --test test.csv --out found.json\n"
        "  selfsup prep shard --data huge.jsonl --out shards/\n"
        "  selfsup prep tokens bert-base --data shards/ --jobs 8",
    )
    preparing = p.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=Parser)
    p = verb(
        preparing,
        "clean",
        clean,
        "keep what the rules of C4 keep of texts, and each text once",
        "  selfsup prep clean --data crawl/ --out clean/\n"
        "  selfsup prep clean --data 'crawl/*.jsonl.gz' --out clean/ --language en\n"
        "  selfsup prep clean --data chat.csv --text message --out clean/ \\\n"
        "      --set min_sentences=1 min_line_words=3 bad_words=words.txt",
    )
    p.add_argument("--data", required=True, nargs="+", help="files, folders, globs, or hf:NAME")
    p.add_argument("--out", required=True, help="the folder to make")
    p.add_argument("--language", metavar="CODE", help="keep one language: en, zh, ...")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument(
        "--split",
        default="file",
        choices=["file", "line", "blank_line"],
        help="what a document is in .txt files (file)",
    )
    set_option(p, "min_sentences=1 near_duplicates=false")
    p = verb(
        preparing,
        "contamination",
        contamination,
        "count the items of a test set that a corpus holds",
        "  selfsup prep contamination --data texts/ --test test.csv --out found.json\n"
        "  selfsup prep contamination --data texts/ --test dev.tsv --test-text sentence \\\n"
        "      --n 8 --out found.json --drop clean_dev.jsonl",
    )
    p.add_argument("--data", required=True, nargs="+", help="the corpus, as for pretrain")
    p.add_argument("--test", required=True, help="the test set; of .txt each line is an item")
    p.add_argument("--out", required=True, metavar="FILE.json", help="the counts, item by item")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--test-text", metavar="COLUMN", help="the same of the test set, if another")
    p.add_argument("--n", type=int, default=13, help="words of an n-gram (13)")
    p.add_argument("--drop", metavar="OUT.jsonl", help="write the items that are not contaminated")
    p = verb(
        preparing,
        "switch",
        switch,
        "write some words of a corpus in another language, so that an encoder learns both alike",
        "  selfsup prep switch --data english.jsonl --lexicon en_zh.csv --from en --to zh \\\n"
        "      --like chinese.jsonl --out switched.jsonl\n"
        "  selfsup pretrain bert-mini-multilingual --data en=english.jsonl zh=chinese.jsonl \\\n"
        "      switched=switched.jsonl --out runs/two",
    )
    p.add_argument("--data", required=True, nargs="+", help="the corpus, as for pretrain")
    p.add_argument("--lexicon", required=True, nargs="+", help="csv or jsonl, a column a language")
    p.add_argument("--from", required=True, dest="source", metavar="COLUMN", help="words to change")
    p.add_argument("--to", required=True, dest="target", metavar="COLUMN", help="what they become")
    p.add_argument("--like", nargs="+", help="put in only what these texts hold often")
    p.add_argument("--share", type=float, default=0.5, help="of the known words (0.5)")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--seed", type=int, default=0, help="of what is changed (0)")
    p.add_argument("--out", required=True, metavar="FILE.jsonl", help="the file to make")
    p = verb(
        preparing,
        "shard",
        shard,
        "write a corpus again as .jsonl.zst files of alike size",
        "  selfsup prep shard --data huge.jsonl --out shards/\n"
        "  selfsup prep shard --data 's3://bucket/crawl/*.jsonl.gz' --out shards/ --jobs 8\n"
        "  selfsup prep shard --data crawl/ --out /shared/shards --engine ray",
    )
    p.add_argument("--data", required=True, nargs="+", help="files, folders, globs, or addresses")
    p.add_argument("--out", required=True, help="the folder; what is there of it already is kept")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument(
        "--split",
        default="file",
        choices=["file", "line", "blank_line"],
        help="what a document is in .txt files (file)",
    )
    p.add_argument("--megabytes", type=int, default=512, help="of a file, not packed (512)")
    workers_options(p, jobs=0)
    p = verb(
        preparing,
        "tokens",
        tokens,
        "tokenize a corpus for a recipe, as pretrain would, but spread and ahead of it",
        "  selfsup prep tokens bert-base --data shards/ --jobs 8\n"
        "  selfsup prep tokens gpt-small --data 's3://bucket/corpus/*.jsonl.zst' --engine ray\n"
        "  selfsup prep tokens bert-base --data shards/ --check",
    )
    p.add_argument("recipe", help="a recipe (selfsup list recipes) or a TOML file")
    p.add_argument("--data", required=True, nargs="+", help="the corpus, as for pretrain")
    p.add_argument("--check", action="store_true", help="read all that is there: is it unchanged?")
    set_option(p, "data.row_length=512, as for pretrain")
    workers_options(p, jobs=0)


def clean(options: argparse.Namespace) -> None:
    """Cleans a corpus; prints what each rule dropped."""
    from selfsup.config import from_mapping
    from selfsup.data.cleaning import clean
    from selfsup.data.cleaning_rules import RULES, Config
    from selfsup.reporting.cleaning import write_cleaning

    settings = settings_of(options)
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


def switch(options: argparse.Namespace) -> None:
    """Writes a corpus with words changed; prints how many."""
    from selfsup.data.code_switching import write_switched

    found = write_switched(
        options.data,
        options.lexicon,
        Path(options.out),
        source=options.source,
        target=options.target,
        share=options.share,
        like=options.like,
        text_column=options.text,
        seed=options.seed,
    )
    for key, value in found.items():
        print(f"{key}\t{value:,}")


def shard(options: argparse.Namespace) -> None:
    """Writes a corpus in shards; prints how much it is."""
    from selfsup.data.shard_files import write_shards
    from selfsup.workers import Workers

    found = write_shards(
        options.data,
        Path(options.out),
        text_column=options.text,
        split=options.split,
        megabytes=options.megabytes,
        workers=Workers(**workers_of(options)),
    )
    for key, value in found.items():
        print(f"{key}\t{value:,}")
    console.say(f"next: selfsup prep tokens RECIPE --data {options.out}")


def tokens(options: argparse.Namespace) -> None:
    """Tokenizes a corpus into the cache, where pretrain finds it; prints how much it is."""
    from selfsup import config as configuration

    values = configuration.recipe_values(options.recipe)
    config = configuration.run_config(configuration.overridden(values, settings_of(options)))
    if config.data_name != "text":
        raise ConfigError(f"{options.recipe} learns from {config.data_name}; tokens are of text")
    from selfsup.data import text
    from selfsup.workers import Workers

    workers = Workers(**workers_of(options))
    prepared = text.prepare(config.data, sources_of(options), workers=workers, check=options.check)
    for key in ("documents", "duplicates", "files", "shards", "train_rows", "valid_rows"):
        print(f"{key}\t{prepared.facts.get(key, 1):,}")
    print(f"bad_items\t{prepared.facts.get('bad_items', 0):,}")
    print(f"tokens\t{sum(prepared.facts[side]['tokens'] for side in ('train', 'valid')):,}")
    data = " ".join(options.data)
    console.say(f"next: selfsup pretrain {options.recipe} --data {data} --out RUN")
