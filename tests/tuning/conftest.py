"""What tests of several tunings share."""

import pytest
import torch


@pytest.fixture
def same_alone_and_mixed():
    """Two sets on the two rows of a batch: mixed in it, each gives what it gives alone."""

    def check(task, batch):
        additions, alone = task.encoder.additions, {}
        for name in ("first", "second"):
            additions.switch(name)
            alone[name] = task.encoder(batch).last
        additions.switch(("second", torch.tensor([0])), ("first", torch.tensor([1])))
        mixed = task.encoder(batch).last
        torch.testing.assert_close(mixed[0], alone["second"][0])
        torch.testing.assert_close(mixed[1], alone["first"][1])
        assert not torch.allclose(alone["first"], alone["second"])

    return check
