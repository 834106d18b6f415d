"""Self-supervised learning on your own data, and the evidence of what it was worth.

    import selfsup

    selfsup.pretrain("bert-tiny-english", data="texts/", out="runs/mine")
    model = selfsup.load("runs/mine")
    model.embed(["a text", "another"])
    model.fill("The [MASK] was late again.")

The command line, `selfsup --help`, has the same verbs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup.api import (
        align,
        compare,
        distill,
        embed,
        evaluate,
        export,
        finetune,
        import_,
        index_recall,
        load,
        load_many,
        merge,
        pet,
        pretrain,
        probe,
        prompt,
        prune,
        report,
        search,
        self_train,
    )
    from selfsup.model import Model

__all__ = [
    "Model",
    "align",
    "compare",
    "distill",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "import_",
    "index_recall",
    "load",
    "load_many",
    "merge",
    "pet",
    "pretrain",
    "probe",
    "prompt",
    "prune",
    "report",
    "search",
    "self_train",
]


def __getattr__(name: str) -> Any:
    # torch is imported at the first use, so that `selfsup --help` answers at once
    if name == "Model":
        from selfsup.model import Model

        return Model
    if name in __all__:
        from selfsup import api

        return getattr(api, name)
    raise AttributeError(f"module 'selfsup' has no attribute {name!r}")
