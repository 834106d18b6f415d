"""The verb `distill`: a smaller run that answers as a fine-tuned one does.

Nothing heavy is imported before it runs.
"""

import argparse

from selfsup import console


def distill(options: argparse.Namespace) -> None:
    """Trains a student; prints the run folder."""
    from selfsup.config import parse_setting
    from selfsup.distilling import distill

    columns = {"text": options.text, "text_b": options.text_b, "label": options.label}
    run = distill(
        options.model,
        options.data,
        options.out,
        student=options.student,
        layers=options.layers,
        fresh=options.fresh,
        unlabelled=options.unlabelled,
        valid=options.valid,
        settings=dict(map(parse_setting, options.set)),
        columns={name: column for name, column in columns.items() if column is not None},
        max_length=options.max_length,
        resume=options.resume,
    )
    print(run)
    console.say(f"next: selfsup evaluate {run} --data TEST   or   selfsup predict {run} 'a text'")
