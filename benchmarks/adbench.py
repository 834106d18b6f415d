"""Anomalies in tables: our autoencoder beside PCA, kNN, an isolation forest and z-scores.

    python -m benchmarks.adbench FOLDER [--seeds 0 1 2] [--record NAME]

FOLDER holds tables of ADBench (Han et al., 2022, arXiv 2206.09426) as `.npz` with `X` and `y`
(1: anomaly). Of each table a random half of the normal rows trains; the other half and all
anomalies are scored. Nothing is chosen on them. Printed, recorded: mean AUROC over the seeds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import selfsup
from selfsup import environment, results
from selfsup.randomness import numpy_generator


def halves(table: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """CSV files of the training normals, and of what is scored with its `label`."""
    with np.load(table) as arrays:
        rows, strange = arrays["X"].astype(np.float64), arrays["y"].astype(bool)
    normal = numpy_generator(seed, "halves").permutation(np.flatnonzero(~strange))
    train, rest = normal[: len(normal) // 2], normal[len(normal) // 2 :]
    test = np.concatenate([rest, np.flatnonzero(strange)])
    names = ",".join(f"c{i}" for i in range(rows.shape[1]))
    paths = folder / f"train{seed}.csv", folder / f"test{seed}.csv"
    np.savetxt(paths[0], rows[train], delimiter=",", header=names, comments="", fmt="%.9g")
    lines = [
        ",".join([*(f"{value:.9g}" for value in rows[i]), "odd" if strange[i] else "ok"])
        for i in test
    ]
    paths[1].write_text("\n".join([f"{names},label", *lines, ""]))
    return paths


def scores(table: Path, seeds: list[int]) -> dict[str, float]:
    """Mean AUROC over the seeds, by detector."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            train, test = halves(table, Path(name), seed)
            run = Path(name) / "run"
            selfsup.pretrain("autoencoder-table", train, run, {"training.seed": seed})
            told = selfsup.evaluate(run, test, columns={"label": "label"}, normal="ok")
        for detector, values in told.items():
            found.setdefault(detector, []).append(values["auroc"])
    return {detector: float(np.mean(values)) for detector, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adbench", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", metavar="NAME", help="write docs/results/NAME.json")
    options = parser.parse_args()
    started, found = time.monotonic(), {}
    for table in sorted(options.folder.glob("*.npz")):
        found[table.stem] = scores(table, options.seeds)
        print(table.stem, {k: round(v, 3) for k, v in found[table.stem].items()}, flush=True)
    if options.record:
        seeds = map(str, options.seeds)
        words = ("python", "-m", "benchmarks.adbench", str(options.folder), "--seeds", *seeds)
        command = environment.shown(*words)
        results.record(
            options.record,
            command=command,
            seeds=options.seeds,
            seconds=time.monotonic() - started,
            scores=found,
        )


if __name__ == "__main__":
    main()
