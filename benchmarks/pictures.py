"""Pictures: the recipe `simclr-small` against the same training with `lightly`.

Both sides do all that a step needs: read 256 stored pictures, draw two views of each, encode them,
compare, step. Ours is the training loop on a corpus that `data.image` has stored. The peer is the
loop of lightly's documentation: pictures in memory, as torchvision's CIFAR-10 holds them, Pillow
transforms in two worker processes, two forward passes, float32. Network, head, strengths of the
augmentation, loss and batch are the same.
"""

import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.timing import NotMeasuredError, Pair, best_rates, num_parameters, stepper
from selfsup import config as configuration
from selfsup import console
from selfsup.config import RunConfig
from selfsup.data.dataset import Prepared
from selfsup.data.image import prepare
from selfsup.models.resnet import ResNetEncoder
from selfsup.run_start import build_method
from selfsup.training.device import pick_dtype
from selfsup.training.loop import train

NUM_PICTURES = 10_000
STEPS = 8  # of one turn
WORKERS = 2


def simclr() -> Pair:
    """SimCLR, pictures/s: the whole training step."""
    _import_torchvision()
    config = configuration.run_config(configuration.recipe_values("simclr-small"))
    config = replace(config, training=replace(config.training, minutes=None, steps=STEPS))
    pictures = smooth_noise(NUM_PICTURES)
    with tempfile.TemporaryDirectory() as folder, console.quiet():
        prepared = prepare(config.data, write_idx(Path(folder), pictures), Path(folder))
        rates = best_rates(
            ours(config, prepared), peer(config, prepared, pictures), config.training.batch_size
        )
    dtype = pick_dtype("auto", torch.device("cpu"))
    return *rates, f"pictures/s, {str(dtype).removeprefix('torch.')} against float32"


def ours(config: RunConfig, prepared: Prepared) -> Callable[[], float]:
    """A turn of the training loop: seconds per step."""
    objective = build_method(config, prepared.spec)

    def take() -> float:
        started = time.perf_counter()
        train(objective, prepared.train, None, replace(config.training, device="cpu"))
        return (time.perf_counter() - started) / STEPS

    return take


def peer(config: RunConfig, prepared: Prepared, pictures: np.ndarray) -> Callable[[], float]:
    """A turn of lightly's loop: seconds per step."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import ProjectionHead
    from lightly.transforms import SimCLRTransform

    method, views = config.method, config.method.views
    # the network is ours, in the layout in memory that a user of lightly has
    encoder = ResNetEncoder(replace(config.model, channels_last=False), prepared.spec)
    hidden, projected = method.hidden_dim, method.projection_dim
    hidden_layer = (encoder.dim, hidden, nn.BatchNorm1d(hidden), nn.ReLU())
    head = ProjectionHead([hidden_layer, (hidden, projected, None, None)])
    model = _Network(encoder, head).train()
    assert num_parameters(model) == num_parameters(build_method(config, prepared.spec))
    transform = SimCLRTransform(
        input_size=config.data.size,
        cj_strength=1.0,
        cj_bright=views.brightness,
        cj_contrast=views.contrast,
        cj_sat=views.saturation,
        cj_hue=views.hue,
        min_scale=views.crop_scale[0],
        gaussian_blur=views.blur,
        normalize=None,  # the network does it, on both sides
    )
    loader = torch.utils.data.DataLoader(
        _Views(pictures, transform),
        batch_size=config.training.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
    )
    loss = NTXentLoss(temperature=method.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.lr, fused=True)

    def loss_of(batches: Iterator) -> Tensor:
        (first, second), _ = next(batches)
        return loss(model(first), model(second))

    def take() -> float:
        batches = iter(loader)  # its workers start here and end with the turn
        step = stepper(model, optimizer, lambda: loss_of(batches), torch.float32)
        for _ in range(2 * WORKERS):  # till the workers are as far ahead as they go
            step()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - started) / STEPS

    return take


class _Network(nn.Module):
    """Encoder and head in the form that lightly's loop calls."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder({"image": image}).pooled)


class _Views(torch.utils.data.Dataset):
    """Pictures in memory through a transform, in the manner of torchvision's CIFAR-10."""

    def __init__(self, pictures: np.ndarray, transform: Callable):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[list[Tensor], int]:
        return self.transform(Image.fromarray(self.pictures[number])), 0


def smooth_noise(count: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8 pictures without edges."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse, size=32, mode="bilinear")
    return (255 * fine).byte().permute(0, 2, 3, 1).contiguous().numpy()


def write_idx(folder: Path, pictures: np.ndarray) -> Path:
    """The pictures as one file that `data.image` reads."""
    path = folder / "noise-images-idx4-ubyte"
    path.write_bytes(struct.pack(">5I", 0x0804, *pictures.shape) + pictures.tobytes())
    return path


def _import_torchvision() -> None:
    """Imports torchvision and lightly, also where torch and torchvision are of unlike builds.

    The torchvision of the package index is built for a GPU's torch. Beside the CPU's its compiled
    part does not load, and its import ends at two operators on detection boxes that nothing here
    calls: to be declared is all they need.
    """
    try:
        import lightly

        try:
            import torchvision
        except RuntimeError:
            operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                operators.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _declared.append(operators)  # they are gone when it is
            import torchvision  # noqa: F401
        import lightly.loss
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        missing = error.name or "lightly"
        raise NotMeasuredError(f"{missing} is not installed; see benchmarks/README.md") from error


_declared: list[torch.library.Library] = []

BENCHMARKS: dict[str, Callable[[], Pair]] = {"simclr-32px": simclr}
