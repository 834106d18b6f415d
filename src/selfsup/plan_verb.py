"""The verb `plan`: what a model costs, as a table.

Nothing heavy is imported before it runs.
"""

import argparse
from typing import Any


def plan(options: argparse.Namespace) -> None:
    """Counts what a model costs; prints a table."""
    from dataclasses import replace

    from selfsup import planning
    from selfsup.config import parse_setting

    asked = planning.subject(options.name, dict(map(parse_setting, options.set)))
    if options.tokens:
        asked = replace(asked, tokens=options.tokens)
    device = planning.hardware(options.hardware)
    device = replace(
        device,
        tflops=options.tflops or device.tflops,
        gigabytes=options.gigabytes or device.gigabytes,
    )
    layout = planning.Layout(
        devices=options.devices,
        tensor=options.tensor,
        pipeline=options.pipeline,
        experts=options.experts,
        sharding=options.sharding,
        micro_batch=options.micro_batch,
        checkpointing=options.checkpointing,
        utilisation=options.utilisation,
    )
    counts = planning.count(asked)
    found = planning.plan(counts, layout, device)
    if options.json:
        import json

        print(json.dumps(planning.as_mapping(found), indent=1))
        return
    _print_plan(counts, found, layout, device)


def _print_plan(counts: Any, found: Any, layout: Any, device: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from selfsup import planning

    def size(count: float) -> str:
        for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if count >= limit:
                return f"{count / limit:.4g} {unit}"
        return f"{count:.4g}"

    def gigabytes(count: float) -> str:
        return f"{count / 1e9:,.1f} GB"

    table = Table("what", "how much", title=found.name)
    share = f", {found.parameters / found.published - 1:+.1%} of the published" * (
        found.published > 0
    )
    table.add_row("parameters", f"{size(found.parameters)} ({found.parameters:,}{share})")
    if found.expert_parameters:
        table.add_row("parameters that a token meets", size(found.active_parameters))
    table.add_row("FLOPs per token, training", size(found.flops_per_token))
    table.add_row("weights and gradients per device", gigabytes(found.weight_bytes))
    table.add_row("optimizer state per device", gigabytes(found.optimizer_bytes))
    rows = f"{layout.micro_batch} row(s) of {counts.asked.row_length} tokens"
    table.add_row(f"activations, {rows}", gigabytes(found.activation_bytes))
    verdict = "fits" if found.fits else "does NOT fit"
    table.add_row("all of a device", f"{gigabytes(found.bytes_per_device)}: {verdict}")
    if found.tokens:
        table.add_row(
            f"days for {size(found.tokens)} tokens at {layout.utilisation:.0%} of the peak",
            f"{found.days:,.3g}",
        )
    Console().print(table)
    what = device.summary or "devices"
    print(
        f"{layout.devices} x {what}: {layout.copies} copies, tensor {layout.tensor}, "
        f"pipeline {layout.pipeline}, sharding {layout.sharding}"
    )
    if counts.asked.source:
        print(f"source: {counts.asked.source}")
    if not found.fits:
        better = planning.smallest_that_fits(counts, layout, device)
        if better is None:
            print("no layout of so many devices holds it: give more --devices")
        else:
            print(
                f"try: --devices {better.devices} --tensor {better.tensor} "
                f"--pipeline {better.pipeline} --sharding {better.sharding} --checkpointing"
            )
