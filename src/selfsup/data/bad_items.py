"""Items that cannot be used: counted, named, and too many of them stop the run."""

from dataclasses import dataclass, field
from typing import Any

from selfsup import console
from selfsup.errors import DataError

MAX_SHARE = 0.02
NAMED = 5


@dataclass
class BadItems:
    """Counts what is wrong with single items of one source, and keeps the first examples.

    Attributes:
        source: what messages call it.
        count: bad items.
        examples: the first of them, with the reason.
        total: good and bad items, where the reader counts them here.

    >>> bad = BadItems("photos")
    >>> bad.add("photos/7.jpg", "truncated")
    >>> bad.facts()
    {'bad_items': 1, 'bad_item_examples': ['photos/7.jpg: truncated']}
    """

    source: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, item: str, reason: str) -> None:
        """One item, by name and place, and why it cannot be used."""
        self.more(1, [f"{item}: {reason}"])

    def more(self, count: int, examples: list[str]) -> None:
        """Several items, of which at least the first are named: "place: reason"."""
        self.count += count
        self.examples += examples[: NAMED - len(self.examples)]

    def check(self, total: int | None = None) -> None:
        """Warns of every bad item by number and of the first by name.

        Args:
            total: good and bad items together; what was counted here when None.

        Raises:
            DataError: more than 2% of the items are bad, or none is good.
        """
        if not self.count:
            return
        total = self.total if total is None else total
        named = "; ".join(self.examples) + ("; ..." if self.count > NAMED else "")
        count = f"{self.source}: {self.count:,} of {total:,} items cannot be used ({named})"
        if self.count > MAX_SHARE * total:
            raise DataError(f"{count}. More than {MAX_SHARE:.0%}: mend or remove them.")
        console.warn(f"{count}; they are left out")

    def facts(self) -> dict[str, Any]:
        """For `run.toml` and the report."""
        return {"bad_items": self.count, "bad_item_examples": self.examples}
