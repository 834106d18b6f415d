"""Random views of pictures against slow versions, pixel by pixel, and the statistics of draws."""

import colorsys
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from selfsup.methods.views import (
    BYOL_FIRST,
    BYOL_SECOND,
    MOCO_V1,
    MOCO_V2,
    NO_CHANGE,
    ViewConfig,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    augment,
    blur,
    draw_boxes,
    hsv_to_rgb,
    luminance,
    resized_crop,
    rgb_to_hsv,
    shift_hue,
)
from selfsup.randomness import torch_generator

GREY = np.array([0.299, 0.587, 0.114])
ONE_STEP = {
    "crop": replace(NO_CHANGE, crop_scale=(0.1, 0.9)),
    "flip": replace(NO_CHANGE, flip=0.5),
    "jitter": replace(NO_CHANGE, jitter=0.8),
    "grey": replace(NO_CHANGE, grey=0.2),
    "blur": replace(NO_CHANGE, blur=0.3),
    "solarise": replace(NO_CHANGE, solarise=0.6),
}
ALL_STEPS = ViewConfig(solarise=0.5)


def pictures(*shape: int, purpose: str = "pictures") -> Tensor:
    """Random uint8 pictures."""
    generator = torch_generator(0, purpose)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def fractions(*shape: int) -> Tensor:
    """Random float32 pictures in [0, 1]."""
    return pictures(*shape) / 255


def assert_close(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=tolerance)


# ---- crop and flip ------------------------------------------------------------------------------


def slow_crop(image: np.ndarray, box: list[float], flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Bilinear samples of a (channel, height, width) picture, one at a time; edges repeat."""
    top, left, box_height, box_width = box
    out = np.zeros((len(image), *size))
    for row, column in itertools.product(range(size[0]), range(size[1])):
        y = top + (row + 0.5) * box_height / size[0] - 0.5
        x = left + (column + 0.5) * box_width / size[1] - 0.5
        for near_y, near_x in itertools.product((0, 1), (0, 1)):
            at_y, at_x = math.floor(y) + near_y, math.floor(x) + near_x
            weight = (1 - abs(y - at_y)) * (1 - abs(x - at_x))
            at_y = min(max(at_y, 0), image.shape[1] - 1)
            at_x = min(max(at_x, 0), image.shape[2] - 1)
            target = size[1] - 1 - column if flip else column
            out[:, row, target] += weight * image[:, at_y, at_x]
    return out


def test_crop_and_flip_equal_bilinear_samples():
    image = fractions(5, 3, 9, 12)
    box = torch.tensor(
        [
            [0.0, 0.0, 9.0, 12.0],
            [1.3, 2.6, 4.2, 5.1],
            [0.0, 0.0, 1.5, 12.0],
            [5.5, 9.25, 3.5, 2.75],
            [8.0, 11.0, 1.0, 1.0],
        ]
    )
    flip = torch.tensor([False, True, True, False, True])
    found = resized_crop(image, box, flip, (10, 13))
    for one in range(5):
        wanted = slow_crop(
            image[one].double().numpy(), box[one].tolist(), bool(flip[one]), (10, 13)
        )
        assert_close(found[one], wanted)


def test_crop_that_shrinks_equals_pillow():
    image = fractions(3, 1, 40, 30)
    box = torch.tensor([[0.0, 0.0, 40.0, 30.0], [3.5, 2.25, 30.5, 8.5], [10.0, 1.0, 21.0, 29.0]])
    flip = torch.tensor([False, True, False])
    found = resized_crop(image, box, flip, (11, 9))
    for one in range(3):
        top, left, height, width = box[one].tolist()
        wanted = Image.fromarray(image[one, 0].numpy()).resize(
            (9, 11), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        wanted = np.asarray(wanted)
        assert_close(found[one, 0], wanted[:, ::-1] if flip[one] else wanted)


def test_augment_crops_the_drawn_boxes():
    image = pictures(6, 3, 16, 20)
    config = replace(NO_CHANGE, crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0), size=8)
    view = augment(image, config, torch_generator(0, "view"))
    box = draw_boxes(6, 16, 20, config, torch_generator(0, "view"))
    assert torch.equal(
        view, resized_crop(image / 255, box, torch.zeros(6, dtype=torch.bool), (8, 8))
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 64)])
def test_area_is_uniform_and_boxes_lie_inside(height: int, width: int):
    config = ViewConfig(crop_scale=(0.08, 1.0))
    box = draw_boxes(20_000, height, width, config, torch_generator(0, "boxes")).double()
    top, left, box_height, box_width = box.unbind(1)
    share = box_height * box_width / (height * width)
    assert stats.kstest(share.numpy(), stats.uniform(0.08, 0.92).cdf).pvalue > 1e-3
    assert box.min() >= 0
    assert (top + box_height).max() <= height + 1e-4
    assert (left + box_width).max() <= width + 1e-4


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_ratio_is_log_uniform_among_those_that_fit(share: float):
    config = ViewConfig(crop_scale=(share, share))
    box = draw_boxes(20_000, 32, 32, config, torch_generator(0, "boxes")).double()
    low, high = (math.log(ratio) for ratio in (max(0.75, share), min(1.3333, 1 / share)))
    ratio = (box[:, 3] / box[:, 2]).log()
    assert stats.kstest(ratio.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for start, length in ((box[:, 0], box[:, 2]), (box[:, 1], box[:, 3])):
        place = start / (32 - length)
        assert stats.kstest(place.numpy(), stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_ratio_that_cannot_fit_gives_the_nearest_that_does():
    config = ViewConfig(crop_scale=(0.9, 0.9), crop_ratio=(1.0, 1.0))
    box = draw_boxes(4, 10, 40, config, torch_generator(0, "boxes"))
    assert torch.allclose(box[:, 2:], torch.tensor([10.0, 36.0]))


# ---- colour -------------------------------------------------------------------------------------


def slow_colour(image: np.ndarray, name: str, factor: float) -> np.ndarray:
    """One step of the jitter on a (3, height, width) picture, pixel by pixel."""
    pixels = image.reshape(3, -1).T.tolist()
    greys = [red * GREY[0] + green * GREY[1] + blue * GREY[2] for red, green, blue in pixels]
    mean = sum(greys) / len(greys)
    out = []
    for pixel, grey in zip(pixels, greys, strict=True):
        if name == "brightness":
            changed = [factor * value for value in pixel]
        elif name == "contrast":
            changed = [mean + factor * (value - mean) for value in pixel]
        elif name == "saturation":
            changed = [grey + factor * (value - grey) for value in pixel]
        else:
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            changed = list(colorsys.hsv_to_rgb((hue + factor) % 1.0, saturation, value))
        out.append([min(max(value, 0.0), 1.0) for value in changed])
    return np.array(out).T.reshape(image.shape)


COLOUR_STEPS = {
    "brightness": (adjust_brightness, [0.0, 0.3, 1.0, 1.8]),
    "contrast": (adjust_contrast, [0.0, 0.3, 1.0, 1.8]),
    "saturation": (adjust_saturation, [0.0, 0.3, 1.0, 1.8]),
    "hue": (shift_hue, [-0.5, -0.2, 0.0, 0.43]),
}


def colourful(num_pictures: int) -> Tensor:
    """Random pictures whose first pixels are the cases of the colour circle's definition."""
    image = fractions(num_pictures, 3, 6, 5)
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    image.flatten(2)[:, :, : len(corners)] = corners.T
    return image


@pytest.mark.parametrize("name", COLOUR_STEPS)
def test_colour_step_equals_slow_version(name: str):
    step, factors = COLOUR_STEPS[name]
    image = torch.cat((fractions(4, 3, 6, 5), colourful(4)))
    found = step(image, torch.tensor(factors * 2))
    for one, factor in enumerate(factors * 2):
        assert_close(found[one], slow_colour(image[one].double().numpy(), name, factor), 2e-6)


def test_hsv_equals_colorsys():
    image = torch.cat((fractions(8, 3, 6, 5), colourful(1)))
    hsv = rgb_to_hsv(image)
    for pixel, found in zip(
        image.movedim(1, -1).reshape(-1, 3).tolist(),
        hsv.movedim(1, -1).reshape(-1, 3).tolist(),
        strict=True,
    ):
        assert found == pytest.approx(colorsys.rgb_to_hsv(*pixel), abs=1e-6)
    back = hsv_to_rgb(hsv)
    assert_close(back, image.double().numpy())


def test_luminance_equals_weighted_sum():
    image = fractions(4, 3, 6, 5)
    wanted = np.einsum("c,bchw->bhw", GREY, image.double().numpy())
    assert_close(luminance(image)[:, 0], wanted)
    assert torch.equal(luminance(image[:, :1]), image[:, :1])


def test_jitter_applies_its_steps_in_a_random_order():
    config = replace(NO_CHANGE, jitter=1.0)
    image = fractions(2, 3, 4, 4)
    orders = set()
    for seed in range(12):
        view = augment(image, config, torch_generator(seed, "view"))
        generator = torch_generator(seed, "view")
        torch.rand(2, generator=generator)  # which pictures are chosen: all
        draw = torch.rand(4, 2, generator=generator).double().numpy()
        factors = 0.2 + 1.6 * draw
        factors[3] = 0.4 * draw[3] - 0.2
        matching = []
        for order in itertools.permutations(range(4)):
            wanted = image.double().numpy()
            for number in order:
                name = list(COLOUR_STEPS)[number]
                wanted = np.stack(
                    [slow_colour(wanted[one], name, factors[number, one]) for one in range(2)]
                )
            if np.abs(view.double().numpy() - wanted).max() < 1e-5:
                matching.append(order)
        assert matching
        orders.add(matching[0])
    assert len(orders) > 6


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_jitter_factor_is_uniform_and_never_negative(strength: float):
    config = replace(
        NO_CHANGE, jitter=1.0, brightness=strength, contrast=0.0, saturation=0.0, hue=0.0
    )
    image = torch.full((4000, 3, 2, 2), 0.25)
    factor = augment(image, config, torch_generator(0, "view"))[:, 0, 0, 0] / 0.25
    low = max(0.0, 1 - strength)
    uniform = stats.uniform(low, 1 + strength - low)
    assert stats.kstest(factor.double().numpy(), uniform.cdf).pvalue > 1e-3


def test_hue_turns_both_ways():
    config = replace(NO_CHANGE, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.2)
    image = torch.tensor([0.2, 0.8, 0.8]).view(1, 3, 1, 1).repeat(4000, 1, 1, 1)  # hue 0.5
    shift = rgb_to_hsv(augment(image, config, torch_generator(0, "view")))[:, 0].flatten() - 0.5
    assert stats.kstest(shift.double().numpy(), stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3


def test_grey_equals_numpy():
    image = fractions(4, 3, 6, 5)
    view = augment(image, replace(NO_CHANGE, grey=1.0), torch_generator(0, "view"))
    wanted = np.einsum("c,bchw->bhw", GREY, image.double().numpy())
    assert_close(view, np.repeat(wanted[:, None], 3, axis=1))


def test_solarise_equals_numpy():
    image = pictures(4, 3, 6, 5)
    view = augment(image, replace(NO_CHANGE, solarise=1.0), torch_generator(0, "view"))
    wanted = image.double().numpy() / 255
    assert_close(view, np.where(wanted >= 0.5, 1 - wanted, wanted))


# ---- blur ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(8, 6, 1), (32, 32, 1), (45, 40, 2), (224, 230, 11)]
)
def test_blur_equals_explicit_convolution(height: int, width: int, radius: int):
    sigma = [0.1, 0.7, 2.0]
    image = fractions(3, 2, height, width)
    found = blur(image, torch.tensor(sigma))
    padded = np.pad(
        image.double().numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), "reflect"
    )
    for one in range(3):
        wanted, total = np.zeros((2, height, width)), 0.0
        for y, x in itertools.product(range(-radius, radius + 1), repeat=2):
            weight = math.exp(-(y * y + x * x) / (2 * sigma[one] ** 2))
            moved = padded[one, :, radius + y :, radius + x :]
            wanted += weight * moved[:, :height, :width]
            total += weight
        assert_close(found[one], wanted / total, 2e-6)


def test_blur_draws_sigma_within_its_range():
    image = torch.zeros(2000, 1, 8, 8)
    image[:, :, 4, 4] = 1.0
    config = replace(NO_CHANGE, blur=1.0, blur_sigma=(0.5, 1.0))
    view = augment(image, config, torch_generator(0, "view"))[:, 0].double()
    sigma = (-0.5 / (view[:, 4, 3] / view[:, 4, 4]).log()).sqrt()
    assert stats.kstest(sigma.numpy(), stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarise"])
def test_step_applies_with_its_probability(name: str):
    config, num_pictures = ONE_STEP[name], 5000
    image = fractions(num_pictures, 3, 4, 4)
    view = augment(image, config, torch_generator(0, "view"))
    changed = (view != image).flatten(1).any(1)
    probability = getattr(config, name)
    sigma = math.sqrt(probability * (1 - probability) / num_pictures)
    assert abs(changed.double().mean().item() - probability) < 4 * sigma
    if name == "flip":
        assert torch.equal(view[changed], image[changed].flip(-1))


def test_crop_and_flip_flips_with_its_probability():
    config = ViewConfig(jitter=0.0, grey=0.0, blur=0.0)
    ramp = torch.arange(8.0).div(8).expand(5000, 1, 8, 8).contiguous()
    view = augment(ramp, config, torch_generator(0, "view"))
    flipped = view[:, 0, 0, 0] > view[:, 0, 0, -1]
    assert abs(flipped.double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / 5000)


@pytest.mark.parametrize("name", ["crop", "jitter", "blur"])
def test_each_picture_has_its_own_draw(name: str):
    image = pictures(1, 3, 16, 16).repeat(8, 1, 1, 1)
    config = replace(ONE_STEP[name], jitter=float(name == "jitter"), blur=float(name == "blur"))
    view = augment(image, config, torch_generator(0, "view")).flatten(1)
    distance = torch.cdist(view, view)
    assert distance[~torch.eye(8, dtype=torch.bool)].min() > 1e-3


def test_steps_choose_their_pictures_independently():
    config = replace(NO_CHANGE, flip=0.5, solarise=0.5)
    image = torch.tensor([0.0, 0.2, 0.9]).expand(4000, 1, 1, 3).contiguous()
    view = augment(image, config, torch_generator(0, "view"))[:, 0, 0]
    solarised = view.amax(1) < 0.5  # 0.9 became 0.1
    flipped = view[:, 2] == 0
    correlation = torch.corrcoef(torch.stack((solarised, flipped)).double())[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(4000)


def test_seed_decides():
    image = pictures(4, 3, 16, 16)
    one, same, other = (
        augment(image, ALL_STEPS, torch_generator(seed, "view")) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_second_view_from_one_generator_differs():
    image, generator = pictures(4, 3, 16, 16), torch_generator(0, "view")
    first, second = (augment(image, ALL_STEPS, generator) for _ in range(2))
    assert (first != second).flatten(1).any(1).all()


def test_draws_do_not_depend_on_the_pictures():
    states = []
    for image in (pictures(4, 3, 16, 16), torch.zeros(4, 1, 30, 20)):
        generator = torch_generator(0, "view")
        augment(image, ALL_STEPS, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    augment(pictures(4, 3, 16, 16), ALL_STEPS, torch_generator(0, "view"))
    assert torch.equal(torch.get_rng_state(), before)


# ---- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 1, 9, 14)])
def test_no_change_is_the_identity_and_draws_nothing(shape: tuple[int, ...]):
    image, generator = pictures(*shape), torch_generator(0, "view")
    before = generator.get_state()
    assert torch.equal(augment(image, NO_CHANGE, generator), image / 255)
    assert torch.equal(generator.get_state(), before)


def test_no_change_to_another_size_shows_the_whole_picture():
    image = fractions(1, 1, 6, 8)
    view = augment(image, replace(NO_CHANGE, size=4), torch_generator(0, "view"))
    wanted = Image.fromarray(image[0, 0].numpy()).resize((4, 4), Image.Resampling.BILINEAR)
    assert_close(view[0, 0], np.asarray(wanted))


@pytest.mark.parametrize(
    "config",
    [
        ViewConfig(),
        BYOL_FIRST,
        BYOL_SECOND,
        MOCO_V1,
        MOCO_V2,
        ViewConfig(brightness=3.0, contrast=3.0, saturation=3.0, hue=0.5, solarise=0.5),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_lie_between_0_and_1(config: ViewConfig, channels: int):
    image = pictures(48, channels, 32, 32)
    image[:16], image[16:32] = 0, 255
    for size in (0, 20, 40):
        view = augment(image, replace(config, size=size), torch_generator(0, "view"))
        assert view.shape == (48, channels, size or 32, size or 32)
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1  # false for NaN, too


def test_uint8_and_float_pictures_agree():
    image = pictures(8, 3, 16, 16)
    from_bytes = augment(image, ALL_STEPS, torch_generator(0, "view"))
    from_floats = augment(image / 255, ALL_STEPS, torch_generator(0, "view"))
    assert torch.equal(from_bytes, from_floats)


@pytest.mark.parametrize("name", ONE_STEP)
def test_input_is_left_alone(name: str):
    image = fractions(8, 3, 16, 16)
    before = image.clone()
    augment(image, ONE_STEP[name], torch_generator(0, "view"))
    assert torch.equal(image, before)


def test_grey_pictures_have_brightness_and_contrast_only():
    image = fractions(8, 1, 16, 16)
    config = replace(NO_CHANGE, jitter=1.0, brightness=0.0, contrast=0.0, grey=1.0)
    assert torch.equal(augment(image, config, torch_generator(0, "view")), image)
    config = replace(config, contrast=0.5)
    view = augment(image, config, torch_generator(0, "view"))
    spread = view.std((1, 2, 3)) / image.std((1, 2, 3))
    assert spread.min() < 0.9
    assert (spread - 1).abs().max() < 0.5


def test_mixed_precision_does_not_reach_the_pictures():
    image = pictures(8, 3, 32, 32)
    wanted = augment(image, ALL_STEPS, torch_generator(0, "view"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = augment(image, ALL_STEPS, torch_generator(0, "view"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flip", -0.1),
        ("jitter", 1.5),
        ("grey", 2.0),
        ("blur", math.nan),
        ("solarise", -1.0),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_scale", (0.5,)),
        ("crop_ratio", (-1.0, 1.0)),
        ("crop_ratio", (1.0, math.inf)),
        ("blur_sigma", (0.0, 2.0)),
        ("brightness", -0.1),
        ("contrast", math.inf),
        ("saturation", math.nan),
        ("hue", 0.6),
        ("hue", -0.1),
        ("size", -1),
    ],
)
def test_impossible_values_are_refused(key: str, value: object):
    with pytest.raises(ValueError, match=key):
        ViewConfig(**{key: value})
