"""Items that cannot be used: counted, named, and too many of them stop the run."""

from dataclasses import dataclass, field
from typing import Any

from selfsup import console
from selfsup.errors import DataError

MAX_SHARE = 0.02
NAMED = 5


@dataclass
class BadItems:
    """Collects what is wrong with single items of one source.

    >>> bad = BadItems("photos")
    >>> bad.add("photos/7.jpg", "truncated")
    >>> bad.facts()
    {'bad_items': 1, 'bad_item_examples': ['photos/7.jpg: truncated']}
    """

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, item: str, reason: str) -> None:
        """One item, by name and place, and why it cannot be used."""
        self.found.append(f"{item}: {reason}")

    def check(self, total: int) -> None:
        """Warns of every bad item by number and of the first by name.

        Args:
            total: good and bad items together.

        Raises:
            DataError: more than 2% of the items are bad, or none is good.
        """
        if not self.found:
            return
        named = "; ".join(self.found[:NAMED]) + ("; ..." if len(self.found) > NAMED else "")
        count = f"{self.source}: {len(self.found):,} of {total:,} items cannot be used ({named})"
        if len(self.found) > MAX_SHARE * total:
            raise DataError(f"{count}. More than {MAX_SHARE:.0%}: mend or remove them.")
        console.warn(f"{count}; they are left out")

    def facts(self) -> dict[str, Any]:
        """For `run.toml` and the report."""
        return {"bad_items": len(self.found), "bad_item_examples": self.found[:NAMED]}
