"""A corpus written again as files of alike size: `selfsup prep shard`.

    OUT/000000/part-00000.jsonl.zst   a document a line, with all its columns
               part-00001.jsonl.zst
               .manifest.json         settings, counts, size and SHA-256 of every part
        000001/...                    from the next files of the corpus
        .corpus.json                  what is written here, and how

OUT is a corpus for `--data`, with the documents in their order. Each numbered folder is made from
neighbouring files and appears whole, so the work can be spread, stopped and taken up again.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from selfsup import files
from selfsup.data.bad_items import BadItems
from selfsup.data.formats import Split
from selfsup.data.reading import document_records, resolve
from selfsup.data.sharded import bad_items, grouped, make_missing, whole_shard
from selfsup.data.sources import Place, Source, source_fingerprint
from selfsup.errors import ConfigError
from selfsup.workers import Workers

CORPUS = ".corpus.json"
LEVEL = 3  # of zstd


def write_shards(
    source: Source,
    out: Path,
    *,
    text_column: str = "text",
    split: Split = "file",
    megabytes: int = 512,
    workers: Workers | None = None,
) -> dict[str, int]:
    """Writes a corpus as .jsonl.zst files, or what of them is not there yet.

    Args:
        source: see `sources.py`.
        out: the folder.
        text_column: where the text is, in formats that have columns.
        split: what a document is in .txt files.
        megabytes: of lines in a file, before they are packed.
        workers: who works; this process when None.

    Returns:
        documents, bad items, bytes (of lines) and files, and the folders that hold them.

    Raises:
        DataError: more than 2% of the items are bad; the shards are there without them.
        ConfigError: `out` holds another corpus, or this one with other settings.
        SelfsupError: as `Workers.run`.
    """
    if megabytes < 1:
        raise ConfigError(f"shards must have at least 1 megabyte, got {megabytes}")
    limit = megabytes * 1_000_000
    places = resolve(source)
    settings: dict[str, Any] = {"text_column": text_column, "split": split, "megabytes": megabytes}
    settings["fingerprint"] = source_fingerprint(places, settings)
    _claim(out, settings)
    files.sweep(out)
    groups = grouped(places, limit)
    shards = {
        f"shard {number + 1} of {len(groups)} ({group[0]})": (
            *(out / f"{number:06d}", group, text_column, split, limit),
        )
        for number, group in enumerate(groups)
    }
    said = make_missing(write_group, shards, workers or Workers(), "writing shards")
    bad = bad_items(places, said)
    bad.check()
    counts = {key: sum(one[key] for one in said) for key in ("documents", "bytes")}
    counts["bad_items"] = bad.count
    return {**counts, "files": sum(len(one["files"]) for one in said), "folders": len(said)}


def write_group(folder: Path, places: list[Place], column: str, split: Split, limit: int) -> None:
    """Writes the documents of neighbouring files, in parts of at most `limit` bytes of lines.

    A document is never cut, so one that is larger makes a part that is larger.

    Raises:
        DataError: a file cannot be read.
        StorageError: the disk is full or not writable.
    """
    facts: dict[str, Any] = {"sources": [str(place) for place in places]}
    facts |= {"documents": 0, "bytes": 0}
    bad = BadItems(str(places[0]))
    records = document_records(places, text_column=column, split=split, bad=bad)
    with whole_shard(folder, facts) as aside:
        for number, lines in enumerate(_parts((_line(record) for _, record in records), limit)):
            path = aside / f"part-{number:05d}.jsonl.zst"
            packer = zstandard.ZstdCompressor(level=LEVEL)
            with open(path, "wb") as file, packer.stream_writer(file) as packed:
                for line in lines:
                    packed.write(line)
                    facts["documents"] += 1
                    facts["bytes"] += len(line)
        facts |= {"items": bad.total, **bad.facts()}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / CORPUS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; choose another --out") from None
        files.write_json(path, settings)
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); choose another --out") from error
    else:
        if before != settings:
            raise ConfigError(
                f"{out} holds shards of another corpus or with other settings ({path}); "
                "choose another --out"
            )


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return text.encode(errors="replace")


def _parts(lines: Iterable[bytes], limit: int) -> Iterator[Iterator[bytes]]:
    """The lines in runs of at most `limit` bytes, or of one line; each is read before the next."""
    stream = iter(lines)
    held = next(stream, None)

    def run() -> Iterator[bytes]:
        nonlocal held
        size = 0
        while held is not None and (size == 0 or size + len(held) <= limit):
            size += len(held)
            line, held = held, next(stream, None)
            yield line

    while held is not None:
        yield run()
