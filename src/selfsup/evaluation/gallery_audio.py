"""Panels about models of sound: spectrograms that are filled in or foretold, players, neighbours.

A corpus of waveforms keeps its samples, so its sounds can be heard. One of log-mel frames keeps
none: there only spectrograms are shown.
"""

import io
import wave

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image

from selfsup.batch import AudioSpec, Batch
from selfsup.data.dataset import Dataset
from selfsup.data.filterbank import LogMel
from selfsup.evaluation.gallery_parts import Cell, Panel, data_uri, held_out_numbers, near, png
from selfsup.model import Model
from selfsup.objective import LooksAhead, Restores
from selfsup.randomness import torch_generator
from selfsup.training.device import to_device

SECONDS = 3  # longer sounds are cut for the page
RESTORED, PLAYERS = 4, 6  # sounds that a panel shows
ROWS, COLUMNS = 3, 4  # of neighbours
MAX_NEIGHBOURS = 500  # held-out sounds among which neighbours are looked for
MEL, FRAME_MS, HOP_MS, LEAST_WINDOW = 64, 25.0, 10.0, 256  # of a waveform's spectrogram
NATS = 12.0  # range of a log-power spectrogram that has colours of its own: 52 dB
COLOURS = 255  # of the colour map; one more is the grey of what is hidden
GREY = (128, 128, 128)


def audio_panels(model: Model, held_out: Dataset, spec: AudioSpec) -> list[Panel]:
    """Every panel that the model's method and the kind of its data can show."""
    panels = [_neighbours(model, held_out, spec)]
    if spec.mel:
        chosen = held_out.batch(held_out_numbers(held_out, RESTORED))
        limit = SECONDS * spec.rate // spec.hop
        batch: Batch = {"frames": chosen["frames"][:, :limit]}
        if "mask" in chosen:
            batch["mask"] = chosen["mask"][:, :limit]
        panels = [_filled(model, batch), _foretold(model, batch, spec), *panels]
    else:
        panels = [_players(held_out, spec), *panels]
    return [panel for panel in panels if panel]


@torch.inference_mode()
def _filled(model: Model, batch: Batch) -> Panel | None:
    """Frames with parts hidden, as in training."""
    if not isinstance(model.objective, Restores):
        return None
    generator = torch_generator(0, "gallery", device=model.device)
    found = model.objective.restore(to_device(batch, model.device), generator)
    hidden, restored = found.hidden.cpu(), found.restored.cpu()
    rows = []
    for row, frames in enumerate(_sounds(batch, "frames")):
        stop = min(len(frames), hidden.shape[1])
        gone, colours = hidden[row, :stop].numpy(), _range(frames)
        whole = frames[:stop]
        filled = np.where(gone, restored[row, :stop].numpy(), whole)
        pictures = (
            spectrogram(whole, colours),
            spectrogram(whole, colours, gone),
            spectrogram(filled, colours),
        )
        rows.append([{"spectrogram": picture} for picture in pictures])
    lead = (
        "Spectrograms of sounds that training never saw: time to the right, low frequencies at the "
        "bottom, bright is loud. Grey: what was hidden from the model, as much as in training."
    )
    columns = ["as it is", "what the model sees", "filled in by the model"]
    return {"title": "Filled in", "lead": lead, "columns": columns, "rows": rows}


@torch.inference_mode()
def _foretold(model: Model, batch: Batch, spec: AudioSpec) -> Panel | None:
    """Each frame as predicted some frames before."""
    if not isinstance(model.objective, LooksAhead):
        return None
    predicted, steps = model.objective.look_ahead(to_device(batch, model.device))
    rows = []
    for row, frames in enumerate(_sounds(batch, "frames")):
        colours, said = _range(frames), predicted[row, : len(frames)].cpu().numpy()
        unsaid = np.broadcast_to(np.arange(len(frames))[:, None] < steps, frames.shape)
        pictures = (spectrogram(frames, colours), spectrogram(said, colours, unsaid))
        rows.append([{"spectrogram": picture} for picture in pictures])
    lead = (
        "Spectrograms of sounds that training never saw: time to the right, low frequencies at the "
        "bottom, bright is loud. Right: every frame as predicted "
        f"{1000 * steps * spec.hop / spec.rate:.0f} ms before; grey: too early to predict."
    )
    return {"title": "Foretold", "lead": lead, "columns": ["as it is", "predicted"], "rows": rows}


def _players(held_out: Dataset, spec: AudioSpec) -> Panel:
    batch = held_out.batch(held_out_numbers(held_out, PLAYERS))
    cells = [_heard(sound, spec.rate) for sound in _sounds(batch, "waveform")]
    lead = (
        f"Sounds that training never saw, at most {SECONDS} seconds of each, and above them their "
        "spectrograms: time to the right, low frequencies at the bottom, bright is loud."
    )
    return {
        "title": "Held-out sounds",
        "lead": lead,
        "rows": [cells[first : first + 2] for first in range(0, len(cells), 2)],
    }


def _neighbours(model: Model, held_out: Dataset, spec: AudioSpec) -> Panel | None:
    shown = near(model, held_out, ROWS, COLUMNS, MAX_NEIGHBOURS, batch_size=16)
    if shown is None:
        return None
    batch = held_out.batch(shown.flatten())
    if spec.mel:
        limit = SECONDS * spec.rate // spec.hop
        sounds = [frames[:limit] for frames in _sounds(batch, "frames")]
        cells: list[Cell] = [{"spectrogram": spectrogram(one, _range(one))} for one in sounds]
        kept = " The corpus keeps frames and no samples, so they can be seen but not heard."
    else:
        cells = [_heard(sound, spec.rate) for sound in _sounds(batch, "waveform")]
        kept = ""
    among = min(MAX_NEIGHBOURS, len(held_out))
    return {
        "title": "Nearest neighbours",
        "lead": f"First: a sound. Then: those of {among:,} held-out sounds whose vectors are "
        f"nearest to its own.{kept}",
        "rows": [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)],
    }


def _sounds(batch: Batch, field: str) -> list[np.ndarray]:
    """The real part of every row."""
    rows = batch[field].numpy()
    if "mask" not in batch:
        return list(rows)
    return [row[:stop] for row, stop in zip(rows, batch["mask"].sum(1).tolist(), strict=True)]


def _heard(sound: Float[np.ndarray, " samples"], rate: int) -> Cell:
    """A player with its spectrogram."""
    sound = sound[: SECONDS * rate]
    frames = log_mel(sound, rate)
    return {"spectrogram": spectrogram(frames, _range(frames)), "wav": wav(sound, rate)}


def wav(sound: Float[np.ndarray, " samples"], rate: int) -> str:
    """A sound in [-1, 1] as a data URI: WAV, 16-bit mono."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())
    return data_uri("audio/wav", buffer.getvalue())


def log_mel(sound: Float[np.ndarray, " samples"], rate: int) -> Float[np.ndarray, "time mel"]:
    """Frames to look at. At low rates they are longer, so that no filter is empty."""
    frame_ms = max(FRAME_MS, 1000 * LEAST_WINDOW / rate + 0.01)  # 0.01: it is rounded down
    filters = LogMel(rate, MEL, frame_ms, max(HOP_MS, frame_ms / 4), low=0.0)
    row = torch.from_numpy(np.ascontiguousarray(sound))
    missing = max(0, filters.framing.window - len(row))
    return filters(F.pad(row, (0, missing)).unsqueeze(0))[0].numpy()


def _range(frames: Float[np.ndarray, "time mel"]) -> tuple[float, float]:
    """The values of the darkest and the brightest colour."""
    low, high = np.quantile(frames, (0.01, 0.995))
    return max(float(low), float(high) - NATS), float(high)


def spectrogram(
    frames: Float[np.ndarray, "time mel"],
    colours: tuple[float, float],
    hidden: Bool[np.ndarray, "time mel"] | None = None,
) -> str:
    """Log-mel frames as a PNG in a data URI: time to the right, low frequencies at the bottom.

    Args:
        frames: on any scale.
        colours: the values of the darkest and the brightest colour.
        hidden: True where the picture is grey.
    """
    low, high = colours
    share = np.clip((frames - low) / max(high - low, 1e-9), 0, 1)
    numbers = (share * (COLOURS - 1)).round().astype(np.uint8)
    if hidden is not None:
        numbers[hidden] = COLOURS
    picture = Image.fromarray(np.ascontiguousarray(numbers.T[::-1]), mode="P")
    picture.putpalette([*colour_map(COLOURS).flatten().tolist(), *GREY])
    return png(picture)


def colour_map(count: int) -> np.ndarray:
    """Colours from dark violet over red to light yellow, (count, 3) uint8.

    Lightness rises evenly, so that equal steps look equal and grey prints stay readable. Computed
    in Oklab (Björn Ottosson, 2020, "A perceptual color space for image processing").
    """
    share = np.linspace(0, 1, count)
    lightness = 0.13 + 0.84 * share
    chroma = 0.03 + 0.145 * np.sin(np.pi * share) ** 0.9
    hue = np.deg2rad(-70 + 175 * share)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ cones**3, 0, 1)
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return (255 * encoded.T).round().astype(np.uint8)
