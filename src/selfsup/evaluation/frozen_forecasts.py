"""Forecasts with the frozen features of a run: `forecasting.py` has the protocol.

The parts to fit, to choose and to score are ranges of rows of one table. What was pre-trained on
rows that are forecast later has seen the answers, so pre-training takes the same ranges:

    selfsup pretrain masked-series-small --data ETTh1.csv --out runs/ett \\
        --set 'data.split_rows=[8640,2880,2880]'
    selfsup probe runs/ett --task forecasting --data ETTh1.csv --horizon 96 --splits ett

Pre-training learns from the first, looks at its loss on the second and never reads the third.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from selfsup import console
from selfsup.config import from_mapping, read_toml
from selfsup.data import series
from selfsup.data.series_files import TABLES, split_ends
from selfsup.data.table_files import files_of, read_table
from selfsup.errors import ConfigError, SelfsupError
from selfsup.evaluation.forecasting import forecast
from selfsup.methods.generative.masked_series import MaskedSeries
from selfsup.model import Model
from selfsup.models.transformer import TransformerEncoder

LONG = 512  # lags of the longer ridge: the longest history of the published comparisons
ETT = (8640, 2880, 2880)  # 12, 4 and 4 months of 30 days of hours


def probe(
    run: str | Path, model: Model, data: str | Path, horizon: int, splits: str = ""
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Forecasts of a `masked_series` run and of the same network untrained, beside the baselines.

    Columns and time stamps are found as `data.columns` and `data.time_column` of the run say. Warns
    where pre-training read rows of the same file that are forecast here.

    Args:
        run: the run folder.
        model: its model.
        data: one table.
        horizon: rows that are forecast; the history is as long as the run's windows.
        splits: see `split_settings`; "": as the run was split.

    Returns:
        `mse` and `mae` on the standardised scale, over all test windows, by name of the forecast;
        and what was measured: rows of each part, test windows, the chosen penalties.

    Raises:
        ConfigError: another kind of run, wrong splits or horizon, or several channels read at once.
        DataError: `data` cannot be read, has missing values, or a part is too short.
    """
    if not isinstance(model.objective, MaskedSeries):
        raise ConfigError(f"{run}: forecasting reads the features of a masked_series run")
    if horizon < 1:
        raise ConfigError(f"horizon must be at least 1 row, got {horizon}")
    stored = {key: value for key, value in model.values["data"].items() if key != "name"}
    config = from_mapping(series.Config, stored, "data")
    chosen = replace(config, fitted="", **split_settings(splits))
    columns, parts = series.splits(chosen, data)
    rows = {name: len(part) for name, part in parts.items()}
    _warn_of_overlap(Path(run), config, Path(data), rows)
    history = model.preprocessor.length
    scores = forecast(
        {
            "pretrained": model.objective.encoder.to(model.device),
            "untrained": cast(TransformerEncoder, model.untrained_encoder().to(model.device)),
        },
        parts,
        columns,
        history,
        horizon,
        lags=[LONG] if rows["train"] > LONG + horizon else [],
        instance_norm=model.objective.config.instance_norm,
    )
    measured = {
        "history": history,
        "horizon": horizon,
        "columns": list(columns),
        "rows": rows,
        "test_size": rows["test"] - horizon + 1,
        "penalties": {name: list(score.alphas) for name, score in scores.items()},
    }
    return {name: {"mse": s.mse, "mae": s.mae} for name, s in scores.items()}, measured


def split_settings(splits: str) -> dict[str, Any]:
    """Settings of the data for a name or for numbers in order of train, valid, test.

    >>> split_settings("ett")
    {'split_rows': (8640, 2880, 2880)}
    >>> split_settings("0.6,0.2,0.2")
    {'splits': (0.6, 0.2, 0.2), 'split_rows': ()}

    Args:
        splits: ett, which is 12, 4 and 4 months of 30 days of hours; three shares; three numbers of
            rows; "": nothing is set.

    Raises:
        ConfigError: it is none of these.
    """
    if not splits:
        return {}
    if splits == "ett":
        return {"split_rows": ETT}
    try:
        numbers = tuple(map(float, splits.split(",")))
    except ValueError:
        raise ConfigError(
            f"splits = {splits!r}: give ett, or shares of train, valid and test such as 0.7,0.1,0.2"
        ) from None
    if max(numbers) > 1:
        return {"split_rows": tuple(map(int, numbers))}
    return {"splits": numbers, "split_rows": ()}


def _warn_of_overlap(run: Path, config: series.Config, data: Path, rows: dict[str, int]) -> None:
    """Says where the run's training rows reach into the test part, as far as its files tell."""
    try:
        source = read_toml(run / "run.toml")["command"]["source"]
        same = [path for path in files_of(source, TABLES) if path.samefile(data)]
    except (OSError, SelfsupError):
        return  # a model folder alone, or its data have moved
    begin = rows["train"] + rows["valid"]
    for path in same:
        end = split_ends(config, len(read_table(path).rows), path)[0]
        if end > begin:
            console.warn(
                f"{path}: pre-training read {end:,} rows and the test part begins behind row "
                f"{begin:,}, so the encoder has seen what it forecasts; pre-train with "
                f"--set data.split_rows=[{','.join(map(str, rows.values()))}]"
            )
