"""Rotation: a network tells by how many quarter turns a picture was turned.

Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations"
(RotNet, 2018, arXiv 1803.07728). Each picture is shown upright and turned by 90, 180 and 270
degrees, and a linear layer on the encoder's features names the turn among the four. Who can tell
which way up a picture is must know what it shows. Quarter turns move pixels and compute none, so no
trace of resampling gives the answer away.

Axes: batch: pictures; turned: rotations_per_image * batch, all pictures at one turn, then at the
next.

Data in which up and down mean nothing (cells, satellite pictures, textures) have nothing to teach
here.

Deviations from the paper: the linear layer reads the pooled features, where AlexNet has its fully
connected layers and NIN its own blocks. The default views are the random crops and flips of the
authors' code for ImageNet with `random_sized_crop`; for CIFAR it shifts pictures of 32 pixels by up
to 4, about `crop_scale = [0.75, 1.0]` here. AdamW takes the place of SGD.

Reference result: 7 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/rotation-small.json): frozen features tell 5,000 test pictures with kNN 0.364 and
linear 0.433; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.methods.views import ViewConfig, augment
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

NUM_TURNS = 4
CROP_AND_FLIP = ViewConfig(jitter=0.0, grey=0.0, blur=0.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Rotations and views. Defaults are the paper's for ImageNet."""

    rotations_per_image: int = 4
    """4: each picture at all four turns; 1: at one of them, by chance, a quarter of the work."""
    views: ViewConfig = CROP_AND_FLIP
    """What happens to a picture before it is turned."""

    def __post_init__(self) -> None:
        if self.rotations_per_image not in (1, NUM_TURNS):
            raise ValueError(f"rotations_per_image must be 1 or 4, got {self.rotations_per_image}")


def rotate(
    image: Float[Tensor, "batch channel size size"], turns: Int[Tensor, " batch"]
) -> Float[Tensor, "batch channel size size"]:
    """Turns each picture anticlockwise by its number of quarter turns, 0 to 3; pixels only move."""
    every = torch.stack([image.rot90(number, (2, 3)) for number in range(NUM_TURNS)])
    return every[turns, torch.arange(len(image), device=image.device)]


def rotation_loss(
    logits: Float[Tensor, "turned 4"], turns: Int[Tensor, " turned"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross entropy of the turns, and how often the likeliest one is right."""
    accuracy = (logits.detach().argmax(1) == turns).float().mean()
    return F.cross_entropy(logits.float(), turns), accuracy


@final
class Rotation(Objective):
    """Tells how far a picture was turned; see the module's docstring."""

    fields = ("image",)
    chance_loss = math.log(NUM_TURNS)

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = nn.Linear(encoder.dim, NUM_TURNS)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """One view, turned; one forward pass; cross entropy over the four turns."""
        view = augment(batch["image"], self.config.views, generator)
        turns = self._turns(view, generator)
        turned = rotate(view.repeat(self.config.rotations_per_image, 1, 1, 1), turns)
        logits = self.head(self.encoder.pooled({"image": turned}))
        loss, accuracy = rotation_loss(logits, turns)
        return Output(loss, len(view), {"accuracy": accuracy})

    def _turns(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """(turned,) number of quarter turns of each picture, int64."""
        if self.config.rotations_per_image == 1:
            shape = (len(view),)
            return torch.randint(NUM_TURNS, shape, generator=generator, device=view.device)
        return torch.arange(NUM_TURNS, device=view.device).repeat_interleave(len(view))
