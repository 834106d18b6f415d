"""The verbs `embed` and `search`: vectors of a corpus, and what is near to a query.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

from selfsup.commands.options import sources_of, verb, workers_of, workers_options
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "embed",
        embed,
        "turn texts, pictures, sounds or rows into vectors, or an index to search in",
        "  selfsup embed runs/mine --data lines.txt --out vectors.npy\n"
        "  selfsup embed runs/mine --data texts/ --out vectors.parquet --dtype float16\n"
        "  selfsup embed runs/photos --data new/ --out index --index hnsw\n"
        "  selfsup embed runs/mine --data crawl/ --out index --jobs 8\n"
        "  selfsup embed runs/mine --data crawl/ --out /shared/index --engine ray\n"
        "The same command after a cut goes on where it was cut.",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument(
        "--data", required=True, nargs="+", help="files of the kind that the run was trained on"
    )
    p.add_argument("--text", metavar="COLUMN", help="column of csv, jsonl, parquet (text, image)")
    p.add_argument(
        "--out",
        required=True,
        help="NAME.npy (items in NAME.items.jsonl), NAME.parquet, or a folder: an index to search",
    )
    p.add_argument("--layer", type=int, help="0: the embedding, -1: the last layer (pooled)")
    p.add_argument("--dtype", default="float32", help="float32 or float16 (float32)")
    p.add_argument("--index", help="exact, or approximate: ivf, hnsw, which need faiss (exact)")
    p.add_argument("--batch-size", type=int, default=64, help="items per forward pass (64)")
    workers_options(p, jobs=1)

    p = verb(
        parsers,
        "search",
        search,
        "find the items of an index that are nearest to a query",
        "  selfsup search index 'a film that made me cry'\n"
        "  selfsup search index new/cat.jpg --k 5 --json\n"
        "  selfsup search index --queries questions.txt > found.tsv\n"
        "  selfsup search index --recall               what an approximate index misses",
    )
    p.add_argument("index", help="a folder that `selfsup embed` wrote")
    p.add_argument("query", nargs="*", help="texts, or paths of pictures or sounds")
    p.add_argument("--queries", nargs="+", metavar="FILE", help="files of queries, one item each")
    p.add_argument("--text", metavar="COLUMN", help="column of csv, jsonl, parquet (text, image)")
    p.add_argument("--k", type=int, default=10, help="items for each query (10)")
    p.add_argument(
        "--effort", type=int, help="clusters (ivf) or candidates (hnsw) that are looked at"
    )
    p.add_argument("--json", action="store_true", help="one JSON object for each query")
    p.add_argument(
        "--recall", action="store_true", help="measure it against an exact search instead"
    )
    p.add_argument(
        "--sample", type=int, default=1000, help="its own vectors that --recall looks up (1000)"
    )
    p.add_argument("--record", metavar="NAME", help="write the recall to docs/results/NAME.json")


def embed(options: argparse.Namespace) -> None:
    """Writes one vector per item."""
    from selfsup import api, console

    done = api.embed(
        options.model,
        sources_of(options),
        options.out,
        text=options.text,
        layer=options.layer,
        dtype=options.dtype,
        index=options.index,
        batch_size=options.batch_size,
        **workers_of(options),
    )
    print(f"{done.path}\t{done.rows} x {done.dim} {done.dtype}")
    if not done.path.suffix:
        console.say(f"next: selfsup search {done.path} QUERY")


def search(options: argparse.Namespace) -> None:
    """Prints the nearest items of each query, or the recall of the index."""
    import json

    from selfsup import api

    if options.recall:
        _recall(options)
        return
    if options.record:
        raise ConfigError("--record is for --recall")
    files = options.queries
    answers = api.search(
        options.index,
        options.query,
        data=files[0] if files and len(files) == 1 else files,
        text=options.text,
        k=options.k,
        effort=options.effort,
    )
    for number, (query, found) in enumerate(answers, 1):
        if options.json:
            results = [{"rank": rank, **f._asdict()} for rank, f in enumerate(found, 1)]
            print(json.dumps({"query": query, "results": results}, ensure_ascii=False))
            continue
        for rank, one in enumerate(found, 1):
            item = " ".join(one.item.split())
            where = [one.place] if one.place != one.item else []
            first = [str(number)] if len(answers) > 1 else []
            print("\t".join([*first, str(rank), f"{one.score:.4f}", item, *where]))


def _recall(options: argparse.Namespace) -> None:
    import time

    from selfsup import api

    if options.query or options.queries:
        raise ConfigError("--recall looks up vectors of the index itself: it takes no query")
    started = time.monotonic()
    found = api.index_recall(
        options.index, k=options.k, queries=options.sample, effort=options.effort
    )
    if options.json:
        import json

        print(json.dumps(found._asdict()))
    else:
        for name, value in found._asdict().items():
            print(f"{name}\t{value:.4f}" if isinstance(value, float) else f"{name}\t{value}")
    if options.record:
        from selfsup import results

        results.record_recall(
            options.record, options.index, found._asdict(), time.monotonic() - started
        )
