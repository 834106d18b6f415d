"""Frozen features as tensors: checked, and paired with their labels.

Arrays may be NumPy's or torch's; work is done where the tensors are.
"""

import numpy as np
import torch
from torch import Tensor

from selfsup.errors import DataError

Array = np.ndarray | Tensor


def as_features(values: Array) -> Tensor:
    """Features as float32 where they are; an inference tensor becomes an ordinary one.

    Raises:
        DataError: there are none, or some are not finite.
    """
    if isinstance(values, Tensor):
        features = values.detach().to(torch.float32, copy=True)
    else:
        features = torch.from_numpy(np.array(values, dtype=np.float32))
    if len(features) == 0:
        raise DataError("there are no features to look at; give at least one item")
    bad = ~features.isfinite().flatten(1).all(1)
    if bad.any():
        raise DataError(
            f"the features of {int(bad.sum())} of {len(features)} items are not finite, first those"
            f" of item {int(bad.nonzero()[0])}; look for the encoder that diverged"
        )
    return features


def labelled_features(values: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Features, and their labels on the same device.

    Raises:
        DataError: as many labels as items are needed.
    """
    features = as_features(values)
    if len(labels) != len(features):
        raise DataError(f"{len(features)} items and {len(labels)} labels do not pair up")
    given = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    return features, given.to(features.device)
