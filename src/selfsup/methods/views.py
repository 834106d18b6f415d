"""Random views of pictures, for a whole batch at once and on its device.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations" (SimCLR, 2020, arXiv 2002.05709, appendix A): a random crop is resized, flipped,
its colours are distorted, and it is blurred; two views of one picture should then look alike to
an encoder. Every image has its own draws, all from the given generator; call `augment` once per
view.

Steps, in order: crop and flip, colour jitter, grey, blur, solarise.

Axes: batch, channel, height, width; out_height and out_width after the crop.

Deviations from the paper and from other implementations:
- Crops have real-valued edges. Resampling is bilinear (SimCLR's code: bicubic), and where a crop
  shrinks its filter widens, as Pillow's does, so that nothing aliases. Rows and columns are
  resampled by two matrix products; on a CPU they take as long as `grid_sample`, which aliases,
  at 32 pixels a side, and 1.5 times as long at 224.
- The aspect ratio is drawn among those that fit into the picture, where others draw again until
  a box fits; the share of the area stays exactly uniform.
- The four parts of the colour jitter come in one random order per call, not per image. It is
  drawn on the generator's device: on a GPU that is the one place that waits for the device.
- Contrast works on the mean grey, as in torchvision (SimCLR's code: on each channel's mean).
- Saturation, hue and grey are left out where pictures do not have three channels.
- The blur reflects the picture at its edges (SimCLR's code pads with zeros).

Speed: 5,000 to 9,000 pictures of 32 by 32 pixels per second on one core of a 2.5 GHz Xeon that had
other work too, with SimCLR's setting for CIFAR (appendix B.9): `ViewConfig(brightness=0.4,
contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a view differs from its picture. Defaults are SimCLR's for ImageNet."""

    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Smallest and largest share of the picture's area that a crop keeps."""
    crop_ratio: tuple[float, ...] = (0.75, 1.3333)
    """Smallest and largest width / height of a crop; log-uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: float = 0.8
    """Colours are multiplied by a factor within 1 - brightness to 1 + brightness, at least 0."""
    contrast: float = 0.8
    """As brightness: the factor of the difference to the picture's mean grey."""
    saturation: float = 0.8
    """As brightness: the factor of the difference to the pixel's grey."""
    hue: float = 0.2
    """Largest shift of the hue either way; 1 is a whole turn of the colour circle."""
    grey: float = 0.2
    """Probability of dropping all colour."""
    blur: float = 0.5
    """Probability of Gaussian blur, whose kernel spans a tenth of the picture."""
    blur_sigma: tuple[float, ...] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    solarise: float = 0.0
    """Probability of inverting what is at least half bright (BYOL)."""
    size: int = 0
    """Height and width of a view in pixels; 0: those of the picture."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or math.isinf(pair[1]):
                limit = "" if math.isinf(most) else f" <= {most:g}"
                raise ValueError(f"{name} must be two numbers 0 < low <= high{limit}, got {pair}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie between 0 and 0.5 (half a turn), got {self.hue}")
        if self.size < 0:
            raise ValueError(f"size must be 0 (the picture's own) or more, got {self.size}")


NO_CHANGE = ViewConfig(
    crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0
)
"""The picture itself on the scale 0 to 1."""

BYOL_FIRST = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
"""First view of BYOL (Grill et al. 2020, arXiv 2006.07733, table 6, column T)."""

BYOL_SECOND = ViewConfig(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarise=0.2
)
"""Second view of BYOL (table 6, column T')."""

MOCO_V1 = ViewConfig(
    crop_scale=(0.2, 1.0),
    jitter=1.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.4,
    blur=0.0,
)
"""MoCo (He et al. 2019, arXiv 1911.05722; numbers of its `main_moco.py`, which drops the colour
before the jitter instead of after it)."""

MOCO_V2 = ViewConfig(crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
"""MoCo v2 (Chen et al. 2020, arXiv 2003.04297; `main_moco.py --aug-plus`)."""


def augment(
    image: Float[Tensor, "batch channel height width"]
    | UInt8[Tensor, "batch channel height width"],
    config: ViewConfig,
    generator: torch.Generator,
) -> Float[Tensor, "batch channel out_height out_width"]:
    """One random view of each picture, float32 in [0, 1].

    What has probability 0 draws nothing; all else draws for every image, applied or not, so the
    generator's state afterwards depends on the configuration and the batch size alone.

    Args:
        image: uint8, or floating point in [0, 1].
        config: what may happen to a picture.
        generator: source of randomness, on the device of `image`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> image = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    >>> augment(image, ViewConfig(size=16), generator).shape
    torch.Size([4, 3, 16, 16])
    >>> torch.equal(augment(image, NO_CHANGE, generator), image / 255)
    True
    """
    with torch.autocast(image.device.type, enabled=False):  # half precision would show as noise
        view = image / 255 if image.dtype == torch.uint8 else image.float()
        view = _crop_and_flip(view, config, generator)
        if config.jitter:
            chosen = _chosen(config.jitter, view, generator)
            view = torch.where(chosen, _jitter(view, config, generator), view)
        if config.grey:
            chosen = _chosen(config.grey, view, generator)
            if view.shape[1] == 3:
                view = torch.where(chosen, luminance(view).clamp_(0, 1), view)
        if config.blur:
            chosen = _chosen(config.blur, view, generator)
            low, high = config.blur_sigma
            draw = torch.rand(len(view), generator=generator, device=view.device)
            view = torch.where(chosen, blur(view, low + (high - low) * draw), view)
        if config.solarise:
            chosen = _chosen(config.solarise, view, generator)
            view = torch.where(chosen & (view >= 0.5), 1 - view, view)
    return view


def view_pair(
    image: Float[Tensor, "batch channel height width"]
    | UInt8[Tensor, "batch channel height width"],
    first: ViewConfig,
    second: ViewConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Two views of each picture, the first one drawn first; see `augment`."""
    return augment(image, first, generator), augment(image, second, generator)


def draw_boxes(
    num_boxes: int, height: int, width: int, config: ViewConfig, generator: torch.Generator
) -> Float[Tensor, "batch 4"]:
    """Crop boxes (top, left, height, width) in pixels that lie inside a picture of that size.

    The share of the area is uniform; the aspect ratio is log-uniform among those of `crop_ratio`
    that fit, or the nearest that fits; the place is uniform.
    """
    area, shape, down, right = torch.rand(
        4, num_boxes, generator=generator, device=generator.device
    )
    low, high = config.crop_scale
    share = low + (high - low) * area
    # a box of this share fits if its log ratio lies between these two: full height, full width
    narrowest, widest = (share * width / height).log(), (width / height / share).log()
    first = narrowest.clamp(min=math.log(config.crop_ratio[0])).minimum(widest)
    last = widest.clamp(max=math.log(config.crop_ratio[1])).maximum(narrowest)
    stretch = ((first + (last - first) * shape) / 2).exp()  # square root of the ratio
    side = (share * height * width).sqrt()
    box_height, box_width = (side / stretch).clamp(max=height), (side * stretch).clamp(max=width)
    top, left = down * (height - box_height), right * (width - box_width)
    return torch.stack((top, left, box_height, box_width), 1)


def resized_crop(
    image: Float[Tensor, "batch channel height width"],
    box: Float[Tensor, "batch 4"],
    flip: Bool[Tensor, " batch"],
    size: tuple[int, int],
) -> Float[Tensor, "batch channel out_height out_width"]:
    """Cuts a box out of each picture, resizes it bilinearly and flips it left to right.

    Args:
        image: pictures in [0, 1].
        box: top, left, height and width in pixels; pixel p covers p to p + 1.
        flip: which of the crops to flip.
        size: height and width of the result.
    """
    (out_height, out_width), (height, width) = size, image.shape[-2:]
    rows = _interpolation(box[:, 0], box[:, 2], out_height, height, torch.zeros_like(flip))
    columns = _interpolation(box[:, 1], box[:, 3], out_width, width, flip)
    wide = image.flatten(1, 2) @ columns.mT  # (batch, channel * height, out_width)
    wide = wide.unflatten(1, image.shape[1:3])  # (batch, channel, height, out_width)
    return (rows.unsqueeze(1) @ wide).clamp_(0, 1)


def luminance(
    image: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch 1 height width"]:
    """The grey of colour pictures (ITU-R BT.601); the mean of other numbers of channels."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    red, green, blue = image.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(
    image: Float[Tensor, "batch channel height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channel height width"]:
    """Multiplies each picture by its factor."""
    return (image * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(
    image: Float[Tensor, "batch channel height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channel height width"]:
    """Multiplies each picture's difference to its mean grey by its factor."""
    mean = luminance(image).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, image, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(
    image: Float[Tensor, "batch 3 height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """Multiplies each pixel's difference to its grey by the picture's factor."""
    return torch.lerp(luminance(image), image, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def shift_hue(
    image: Float[Tensor, "batch 3 height width"], shift: Float[Tensor, " batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """Turns each picture's colours round the colour circle by its shift; 1 is a whole turn."""
    hue, saturation, value = rgb_to_hsv(image).unbind(1)  # (batch, height, width)
    hue = hue + shift.view(-1, 1, 1)
    hue -= hue.floor()
    return hsv_to_rgb(torch.stack((hue, saturation, value), 1)).clamp_(0, 1)


def rgb_to_hsv(
    image: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Hue in [0, 1), saturation and value of every pixel, as `colorsys.rgb_to_hsv` has them."""
    red, green, blue = image.unbind(1)  # (batch, height, width)
    value = image.amax(1)
    chroma = value - image.amin(1)
    divisor = chroma.masked_fill(chroma == 0, 1.0)  # greys have hue 0
    sixths = torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(red == value, (green - blue) / divisor, sixths)  # -1 to 5
    hue = sixths / 6
    hue -= hue.floor()
    saturation = chroma / value.masked_fill(value == 0, 1.0)
    return torch.stack((hue, saturation, value), 1)


def hsv_to_rgb(
    image: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """The inverse of `rgb_to_hsv`, for hues in [0, 1]."""
    hue, saturation, value = image.unbind(1)  # (batch, height, width)
    sixths = 6 * hue
    # how much of each primary a pure colour has: 1 for a third of the circle, ramps on both sides
    red, green, blue = (sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()
    pure = torch.stack((red, green, blue), 1).clamp_(0, 1)
    chroma = value * saturation
    return torch.addcmul((value - chroma).unsqueeze(1), chroma.unsqueeze(1), pure)


def blur(
    image: Float[Tensor, "batch channel height width"], sigma: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channel height width"]:
    """Gaussian blur, reflected at the edges; the kernel spans a tenth of the shorter side.

    Args:
        image: pictures in [0, 1], at least 2 pixels high and wide.
        sigma: each picture's standard deviation in pixels.
    """
    height, width = image.shape[-2:]
    radius = max(1, min(height, width) // 10 // 2)  # as SimCLR's code, but never without effect
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = (-0.5 * (offset / sigma.unsqueeze(1)) ** 2).softmax(1)  # (batch, offset)
    kernel = kernel.masked_fill(kernel < 1e-12, 0.0)  # subnormal numbers are slow
    kernel = kernel.repeat_interleave(image.shape[1], dim=0).unsqueeze(1)
    # every channel of every picture becomes a channel of one picture, with its own kernel
    folded = F.pad(image.flatten(0, 1).unsqueeze(0), (radius,) * 4, mode="reflect")
    folded = F.conv2d(folded, kernel.unsqueeze(-1), groups=len(kernel))
    folded = F.conv2d(folded, kernel.unsqueeze(-2), groups=len(kernel))
    return folded.view_as(image).clamp_(0, 1)


def _chosen(probability: float, image: Tensor, generator: torch.Generator) -> Tensor:
    """Which pictures a step applies to: (batch, 1, 1, 1) bool."""
    shape = (len(image), 1, 1, 1)
    return torch.rand(shape, generator=generator, device=image.device) < probability


def _crop_and_flip(image: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """The first step; without a crop or a new size every pixel stays exactly what it was."""
    height, width = image.shape[-2:]
    size = (config.size, config.size) if config.size else (height, width)
    flip = torch.zeros(len(image), 1, 1, 1, dtype=torch.bool, device=image.device)
    if config.flip:
        flip = _chosen(config.flip, image, generator)
    if config.crop_scale != (1.0, 1.0) or size != (height, width):
        box = draw_boxes(len(image), height, width, config, generator)
        return resized_crop(image, box, flip.flatten(), size)
    return torch.where(flip, image.flip(-1), image) if config.flip else image


def _interpolation(
    start: Tensor, length: Tensor, num_out: int, num_in: int, flip: Tensor
) -> Tensor:
    """Matrices (batch, out, in) that resample `length` pixels from `start` on to `num_out`."""
    place = torch.arange(num_out, device=start.device) + 0.5
    place = torch.where(flip.unsqueeze(1), num_out - place, place)  # (batch, out)
    scale = (length / num_out).unsqueeze(1)
    centre = (start.unsqueeze(1) + scale * place).unsqueeze(2)
    distance = (torch.arange(num_in, device=start.device) + 0.5 - centre).abs_()
    weight = (1 - distance / scale.clamp(min=1).unsqueeze(2)).clamp_(min=0)  # (batch, out, in)
    return weight / weight.sum(2, keepdim=True)  # an edge's missing neighbours: border repeats


def _jitter(image: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each by a factor per picture."""
    device = image.device
    draw = torch.rand(4, len(image), generator=generator, device=device)
    order = torch.randperm(4, generator=generator, device=device).tolist()
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue)
    strengths = (config.brightness, config.contrast, config.saturation)
    ranges = [(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    ranges.append((-config.hue, config.hue))
    num_steps = 4 if image.shape[1] == 3 else 2  # other pictures have no saturation and no hue
    for number in order:
        low, high = ranges[number]
        if number < num_steps and low < high:
            image = steps[number](image, low + (high - low) * draw[number])
    return image
