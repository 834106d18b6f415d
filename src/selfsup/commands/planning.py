"""The verb `plan`: what a model would take, before it is trained.

Nothing heavy is imported before it runs.
"""

import argparse
from typing import Any

from selfsup.commands.options import set_option, settings_of, verb


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "plan",
        plan,
        "count parameters, FLOPs, memory and days of a model before training it",
        "  selfsup plan gpt3-175b --devices 1024 --tensor 8 --pipeline 8 --hardware a100\n"
        "  selfsup plan bert-base --hardware rtx4090 --tokens 3e9\n"
        "  selfsup plan bert-mini-english --set model.layers=12 model.dim=768\n"
        "names: elmo bert-base bert-large gpt2-xl megatron-8b t5-11b turing-nlg-17b gpt3-175b\n"
        "       switch-1.6t, or a recipe of text",
    )
    p.add_argument("name", help="a published model, a recipe, or a .toml file")
    p.add_argument(
        "--hardware", default="h100", help="v100 a100 h100 h200 b200 rtx4090 tpu-v3 tpu-v4 (h100)"
    )
    p.add_argument("--tflops", type=float, help="another peak of one device, in 16 bits")
    p.add_argument("--gigabytes", type=float, help="another memory of one device")
    p.add_argument("--devices", type=int, default=1, help="all devices (1)")
    p.add_argument("--tensor", type=int, default=1, help="devices that share every matrix (1)")
    p.add_argument("--pipeline", type=int, default=1, help="devices in a row of layers (1)")
    p.add_argument("--experts", type=int, default=0, help="devices that share experts (all copies)")
    p.add_argument(
        "--sharding",
        default="none",
        choices=("none", "optimizer", "full"),
        help="what copies keep a share of: ZeRO 1 is optimizer, FSDP full (none)",
    )
    p.add_argument("--micro-batch", type=int, default=1, help="rows that a copy reads at once (1)")
    p.add_argument("--checkpointing", action="store_true", help="compute activations again")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of the peak (0.4)")
    p.add_argument("--tokens", type=float, help="tokens of the training (default: as published)")
    p.add_argument(
        "--optimizer",
        choices=("adamw", "adafactor", "lamb", "lars"),
        help="whose moments take memory (the recipe's, adamw)",
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    set_option(p, "model.layers=24")


def plan(options: argparse.Namespace) -> None:
    """Counts what a model costs; prints a table."""
    from dataclasses import replace

    from selfsup import planning

    asked = planning.subject(options.name, settings_of(options))
    if options.tokens:
        asked = replace(asked, tokens=options.tokens)
    if options.optimizer:
        asked = replace(asked, optimizer=options.optimizer)
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
