"""The gallery: what panels show of pictures, sounds and series, and what methods give for it."""

import base64
import io
import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.batch import AudioSpec, ImageSpec, SeriesSpec
from selfsup.data.audio import AudioPreprocessor
from selfsup.data.audio_features import Config as AudioConfig
from selfsup.data.audio_store import Sounds
from selfsup.data.dataset import Dataset
from selfsup.data.series import SeriesPreprocessor
from selfsup.data.series_windows import Windows
from selfsup.evaluation import gallery_audio as audio
from selfsup.evaluation.gallery import gallery
from selfsup.evaluation.gallery_parts import held_out_numbers, near
from selfsup.methods.autoencoding.autoencoder import Autoencoder
from selfsup.methods.autoencoding.autoencoder import Config as AutoencoderConfig
from selfsup.methods.autoencoding.vae import VAE
from selfsup.methods.autoencoding.vae import Config as VAEConfig
from selfsup.methods.autoencoding.vqvae import VQVAE
from selfsup.methods.autoencoding.vqvae import Config as VQVAEConfig
from selfsup.methods.contrastive.simclr import Config as SimCLRConfig
from selfsup.methods.contrastive.simclr import SimCLR
from selfsup.methods.generative.apc import APC
from selfsup.methods.generative.apc import Config as APCConfig
from selfsup.methods.generative.masked_series import Config as MaskedConfig
from selfsup.methods.generative.masked_series import MaskedSeries
from selfsup.methods.generative.mockingjay import Config as MockingjayConfig
from selfsup.methods.generative.mockingjay import Mockingjay
from selfsup.model import Model
from selfsup.models.mlp import Config as MLPConfig
from selfsup.models.mlp import MLPEncoder
from selfsup.models.recurrent import Config as RecurrentConfig
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.resnet import Config as ResNetConfig
from selfsup.models.resnet import ResNetEncoder
from selfsup.models.transformer import Config as TransformerConfig
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Interpolates, LooksAhead, Objective, Restores, Samples
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator

SIZE, MEL, RATE = 8, 6, 8000
PICTURES = ImageSpec(size=SIZE, channels=3, mean=(0.5, 0.4, 0.3), std=(0.3, 0.25, 0.2))
SOUND = AudioSpec(rate=RATE, mel=MEL, hop=80)


class Pictures(Dataset):
    """Random pictures."""

    fields = ("image", "index")

    def __init__(self, count: int):
        shape = (count, 3, SIZE, SIZE)
        self.image = numpy_generator(0, "pictures").integers(0, 256, shape).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, numbers):
        return {"image": torch.from_numpy(self.image[numbers]), "index": torch.as_tensor(numbers)}


class Kind:
    """A preprocessor, as far as a gallery asks it."""

    def __init__(self, spec):
        self.spec = spec


def seeded(build):
    with isolated():
        seed_layers(0, "gallery")
        return build()


def model_of(objective: Objective, preprocessor) -> Model:
    return Model(objective, preprocessor, (), {}, "cpu")


def sounds(field: str, *lengths: int) -> Sounds:
    """Random frames or 16-bit samples of those lengths."""
    draw = numpy_generator(0, field)
    starts = np.cumsum([0, *lengths])
    values = draw.normal(size=(starts[-1], MEL)).astype(np.float32)
    if field == "waveform":
        values = draw.integers(-9000, 9000, starts[-1]).astype(np.int16)
    return Sounds({field: values}, {field: starts})


def transformer(spec, **more) -> TransformerEncoder:
    return TransformerEncoder(
        TransformerConfig(dim=8, layers=1, heads=2, dropout=0.0, **more), spec
    )


def mockingjay(patch: int = 1, **config) -> Mockingjay:
    config = {"mask_rate": 0.4, "span": 3} | config
    return seeded(
        lambda: Mockingjay(MockingjayConfig(**config), transformer(SOUND, patch=patch), SOUND)
    ).eval()


def content(uri: str, kind: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(text)


def pixels(uri: str) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.array(Image.open(io.BytesIO(content(uri, "image/png"))).convert("RGB"))


def titles(panels) -> list[str]:
    return [panel["title"] for panel in panels]


# Pictures


def vae() -> VAE:
    encoder = MLPEncoder(MLPConfig(dims=(16,), dim=8), PICTURES)
    return VAE(VAEConfig(latent_dim=4, width=8), encoder, PICTURES)


def vqvae() -> VQVAE:
    config = ResNetConfig(stem="cifar", widths=(4, 8), blocks=(1, 1))
    encoder = ResNetEncoder(config, PICTURES)
    return VQVAE(VQVAEConfig(num_codes=16, code_dim=4, width=8), encoder, PICTURES)


def simclr() -> SimCLR:
    return SimCLR(SimCLRConfig(), MLPEncoder(MLPConfig(dims=(16,), dim=8), PICTURES), PICTURES)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (vae, ["Rebuilt", "Samples", "From one picture to another", "Nearest neighbours"]),
        (vqvae, ["Rebuilt", "From one picture to another", "Nearest neighbours"]),
        (simclr, ["Views", "Nearest neighbours"]),
    ],
)
def test_a_method_of_pictures_shows_what_it_can(build, expected):
    objective, data = seeded(build), Pictures(12)
    panels = gallery(model_of(objective, Kind(PICTURES)), data)
    assert titles(panels) == expected
    assert [isinstance(objective, p) for p in (Samples, Interpolates)] == [
        title in expected for title in ("Samples", "From one picture to another")
    ]
    for panel in panels:
        assert panel["lead"]
        assert {len(row) for row in panel["rows"]} == {2 if panel["title"] == "Rebuilt" else 8}
        for row in panel["rows"]:
            assert all(pixels(cell["png"]).shape == (SIZE, SIZE, 3) for cell in row)


def test_rebuilt_pictures_stand_beside_their_own():
    objective, data = seeded(vae).eval(), Pictures(12)
    rows = gallery(model_of(objective, Kind(PICTURES)), data)[0]["rows"]
    known = [picture.transpose(1, 2, 0).tobytes() for picture in data.image]
    numbers = [known.index(pixels(row[0]["png"]).tobytes()) for row in rows]
    assert len(set(numbers)) == 6
    rebuilt = objective.reconstruct(data.batch(numbers)).permute(0, 2, 3, 1).double().numpy()
    wanted = np.clip(rebuilt * PICTURES.std + PICTURES.mean, 0, 1) * 255
    shown = np.stack([pixels(row[1]["png"]) for row in rows])
    assert np.abs(shown - wanted).max() < 0.51  # rounded to a level, no more


def test_a_way_leads_from_one_held_out_picture_to_another():
    data = Pictures(12)
    panels = gallery(model_of(seeded(vqvae), Kind(PICTURES)), data)
    rebuilt, between = panels[0]["rows"], panels[1]["rows"]
    assert len(between) == 3
    for number, row in enumerate(between):
        assert row[0] == rebuilt[number][0]
        assert row[-1] == rebuilt[3 + number][0]
        assert row[1] == rebuilt[number][1]
        assert row[-2] == rebuilt[3 + number][1]


def test_few_pictures_have_no_neighbours():
    panels = gallery(model_of(seeded(vae), Kind(PICTURES)), Pictures(1))
    assert titles(panels) == ["Rebuilt", "Samples"]


def test_vqvae_interpolates_between_two_rebuilt_pictures():
    method, batch = seeded(vqvae).eval(), Pictures(2).batch(np.array([0, 1]))
    first, second = ({"image": image[None]} for image in batch["image"])
    way = method.interpolate(first, second, 5)
    assert way.shape == (1, 5, 3, SIZE, SIZE)
    torch.testing.assert_close(way[:, 0], method.reconstruct(first))
    torch.testing.assert_close(way[:, -1], method.reconstruct(second))
    assert not torch.equal(way[:, 0], way[:, -1])
    still = method.interpolate(first, first, 3)
    torch.testing.assert_close(still[:, 1], method.reconstruct(first))


def test_neighbours_are_nearest_and_never_the_picture_itself():
    data = Pictures(20)
    data.image[11] = data.image[4]  # a twin
    model = model_of(seeded(vae), Kind(PICTURES))
    shown = near(model, data, rows=20, columns=3, among=100, batch_size=7)
    assert sorted(shown[:, 0]) == list(range(20))
    assert all(len(set(row)) == 3 for row in shown.tolist())
    by_number = {row[0]: row[1] for row in shown.tolist()}
    assert (by_number[4], by_number[11]) == (11, 4)


# Sound


def test_low_frequencies_are_at_the_bottom_and_time_goes_to_the_right():
    frames = np.zeros((5, 3), np.float32)
    frames[4, 0] = 2.0  # late and low
    frames[0, 2] = 1.0  # early and high
    hidden = np.zeros((5, 3), bool)
    hidden[2, 1] = True
    shown = pixels(audio.spectrogram(frames, (0.0, 2.0), hidden))
    colours = audio.colour_map(audio.COLOURS)
    assert shown.shape == (3, 5, 3)
    assert shown[2, 4].tolist() == colours[-1].tolist()
    assert shown[0, 0].tolist() == colours[127].tolist()
    assert shown[1, 2].tolist() == list(audio.GREY)
    assert shown[0, 4].tolist() == colours[0].tolist()


def test_colours_become_evenly_lighter():
    encoded = audio.colour_map(255) / 255
    linear = np.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    lightness = np.cbrt(linear @ [0.2126, 0.7152, 0.0722])  # that of CIELAB, shifted and scaled
    steps = np.diff(lightness[::6])
    assert steps.min() > 0.3 * steps.mean()
    assert steps.max() < 2 * steps.mean()
    assert lightness[-1] - lightness[0] > 0.8


@pytest.mark.parametrize("rate", [500, 8000, 10_239, 10_240, 16_000, 44_100, 96_000])
def test_a_waveform_has_a_spectrogram_at_any_rate(rate):
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 0.125 * rate * time).astype(np.float32)
    frames = audio.log_mel(tone, rate)
    assert frames.shape[1] == audio.MEL
    assert np.isfinite(frames).all()
    upper = audio.log_mel(np.sin(2 * np.pi * 0.375 * rate * time).astype(np.float32), rate)
    assert frames.mean(0).argmax() < upper.mean(0).argmax()
    assert len(audio.log_mel(tone[: rate // 10], rate)) >= 1


def test_a_wav_file_holds_the_sound():
    sound = numpy_generator(0, "sound").uniform(-1, 1, 500).astype(np.float32)
    with wave.open(io.BytesIO(content(audio.wav(sound, 8000), "audio/wav"))) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 500)
        samples = np.frombuffer(file.readframes(500), "<i2")
    assert np.abs(samples / 32767 - sound).max() <= 0.51 / 32767


def test_hidden_frames_are_filled_and_others_stay():
    method, data = mockingjay(patch=2), sounds("frames", 40, 31, 400, 22, 35)
    panels = gallery(model_of(method, AudioPreprocessor(AudioConfig(rate=RATE, mel=MEL))), data)
    assert titles(panels) == ["Filled in", "Nearest neighbours"]
    assert "not heard" in panels[1]["lead"]
    filled = panels[0]
    assert len(filled["columns"]) == 3
    lengths = []
    for row in filled["rows"]:
        true, seen, said = (pixels(cell["spectrogram"]) for cell in row)
        hidden = (seen == audio.GREY).all(-1)
        lengths.append(true.shape[1])
        assert hidden.all(0).mean() == pytest.approx(0.4, abs=0.2)
        assert np.array_equal(true[~hidden], seen[~hidden])
        assert np.array_equal(true[~hidden], said[~hidden])
        assert (true[hidden] != said[hidden]).any(-1).mean() > 0.8
    assert len(lengths) == 4
    assert set(lengths) <= {40, 31, 300, 22, 35}  # without padding, at most three seconds
    assert sum(len(row) for row in panels[1]["rows"]) == 12


def test_mockingjay_does_not_see_what_it_restores():
    method, batch = mockingjay(channel_mask=2), sounds("frames", 40, 25).batch(np.arange(2))
    hidden, restored = method.restore(batch, torch_generator(0, "hide"))
    assert hidden.shape == restored.shape == batch["frames"].shape
    assert hidden.any(2).all(1).tolist() == [True, False]  # a band through all of the longer one
    assert not hidden[~batch["mask"]].any()
    assert hidden.all(2).sum(1).float().tolist() == pytest.approx([16, 10], abs=3)
    other = {**batch, "frames": torch.where(hidden, 5.0, batch["frames"])}
    assert torch.equal(method.restore(other, torch_generator(0, "hide")).restored, restored)
    assert isinstance(method, Restores)


def test_apc_predicts_from_what_came_before():
    encoder = seeded(lambda: RecurrentEncoder(RecurrentConfig(dim=8, layers=1), SOUND))
    method = seeded(lambda: APC(APCConfig(shift=3), encoder, SOUND)).eval()
    data = sounds("frames", 20, 20)
    batch = data.batch(np.arange(2))
    predicted, steps = method.look_ahead(batch)
    assert steps == 3
    assert torch.equal(predicted[:, :3], batch["frames"][:, :3])
    expected = method.head(method.encoder(batch).last)[:, :-3]
    assert torch.equal(predicted[:, 3:], expected)
    changed = {**batch, "frames": batch["frames"].clone()}
    changed["frames"][:, 10:] += 1.0
    assert torch.equal(method.look_ahead(changed)[0][:, :13], predicted[:, :13])
    assert isinstance(method, LooksAhead)
    panels = gallery(model_of(method, AudioPreprocessor(AudioConfig(rate=RATE, mel=MEL))), data)
    assert titles(panels) == ["Foretold"]
    assert "30 ms" in panels[0]["lead"]
    grey = (pixels(panels[0]["rows"][0][1]["spectrogram"]) == audio.GREY).all(-1)
    assert grey.all(0).tolist() == [True] * 3 + [False] * 17


def test_waveforms_can_be_heard():
    spec = AudioSpec(rate=RATE, mel=0, hop=80)
    objective = Objective()
    objective.encoder = seeded(lambda: transformer(spec, conv_channels=8))
    data = sounds("waveform", *[4000] * 7, 5 * RATE)
    config = AudioConfig(rate=RATE, features="waveform")
    heard, neighbours = gallery(model_of(objective, AudioPreprocessor(config)), data)
    assert (heard["title"], neighbours["title"]) == ("Held-out sounds", "Nearest neighbours")
    assert "not heard" not in neighbours["lead"]
    cells = [cell for row in heard["rows"] for cell in row]
    assert len(cells) == 6
    lengths = set()
    for cell in cells + [cell for row in neighbours["rows"] for cell in row]:
        assert pixels(cell["spectrogram"]).shape[0] == audio.MEL
        with wave.open(io.BytesIO(content(cell["wav"], "audio/wav"))) as file:
            lengths.add(file.getnframes())
            assert file.getframerate() == RATE
    assert lengths == {4000, 3 * RATE}
    assert [len(row) for row in neighbours["rows"]] == [4, 4, 4]


# Series


def masked_series(instance_norm: bool, channels: int = 2) -> MaskedSeries:
    spec = SeriesSpec(channels=channels, length=32)
    config = MaskedConfig(instance_norm=instance_norm)
    return seeded(lambda: MaskedSeries(config, transformer(spec, patch=4), spec)).eval()


def windows() -> Windows:
    return Windows([numpy_generator(0, "windows").normal(size=(90, 2)).astype(np.float32)], 34, 8)


def test_masked_series_does_not_see_what_it_restores():
    method, batch = masked_series(instance_norm=False), windows().batch(np.arange(3))
    hidden, restored = method.restore(batch, torch_generator(0, "hide"))
    assert hidden.shape == restored.shape == (3, 32, 2)  # two steps fill no patch
    assert torch.equal(hidden.sum(1), torch.full((3, 2), 12))  # 3 of 8 patches
    series = batch["series"].clone()
    series[:, :32][hidden] = 5.0
    other = method.restore({"series": series}, torch_generator(0, "hide"))
    assert torch.equal(other.restored, restored)
    assert isinstance(method, Restores)


def test_restored_series_are_on_the_scale_of_the_batch():
    method, batch = masked_series(instance_norm=True), windows().batch(np.arange(3))
    _, restored = method.restore(batch, torch_generator(0, "hide"))
    larger = {"series": 10 * batch["series"] + 100}
    _, scaled = method.restore(larger, torch_generator(0, "hide"))
    torch.testing.assert_close(scaled, 10 * restored + 100, rtol=0, atol=1e-2)


def test_series_are_shown_channel_by_channel_with_their_gaps():
    data = windows()
    data.series[0][40, 0] = np.nan
    preprocessor = SeriesPreprocessor(("load", "heat"), (0.0, 0.0), (1.0, 1.0), length=32)
    (panel,) = gallery(model_of(masked_series(instance_norm=True), preprocessor), data)
    assert panel["title"] == "Filled in"
    json.dumps(panel, allow_nan=False)
    (row,) = panel["rows"]
    cells = [cell["series"] for cell in row]
    assert [cell["name"] for cell in cells] == ["load", "heat"] * 3
    series = data.batch(held_out_numbers(data, 6))["series"]
    for place, cell in enumerate(cells):
        true = np.array(cell["true"], dtype=np.float64)  # None becomes NaN
        np.testing.assert_allclose(true, series[place, :, place % 2], rtol=0, atol=1e-4)
        inside = [any(a <= step < b for a, b in cell["hidden"]) for step in range(32)]
        assert [value is not None for value in cell["model"]] == inside
        assert sum(inside) == 12
    assert any(None in cell["true"] for cell in cells)


def test_rebuilt_series_are_shown_whole():
    spec = SeriesSpec(channels=1, length=34)
    encoder = seeded(lambda: transformer(spec, patch=2))
    method = seeded(lambda: Autoencoder(AutoencoderConfig(width=8), encoder, spec))
    preprocessor = SeriesPreprocessor(("a", "b"), (0.0, 0.0), (1.0, 1.0), 34, independent=True)
    data = Windows([windows().series[0][:, :1]], 34, 8)
    (panel,) = gallery(model_of(method, preprocessor), data)
    assert panel["title"] == "Rebuilt"
    for cell in panel["rows"][0]:
        assert (cell["series"]["name"], cell["series"]["hidden"]) == ("", [])
        assert len(cell["series"]["model"]) == len(cell["series"]["true"]) == 34
        assert None not in cell["series"]["model"]


def test_other_kinds_of_data_have_no_gallery():
    assert gallery(model_of(simple_objective(), Kind(None)), Pictures(3)) == []


def simple_objective() -> Objective:
    objective = Objective()
    objective.encoder = seeded(lambda: MLPEncoder(MLPConfig(dims=(), dim=2), PICTURES))
    return objective
