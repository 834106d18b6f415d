"""Log-mel frames, MFCC, deltas and normalisation, number for number as Kaldi computes them.

Axes: batch; samples at the sound's rate; time in frames; mel, cepstrum, channel: within a frame.

A frame reads only samples that exist (Kaldi's `snip-edges`), so zeros behind the end of a sound add
frames and change none. There is no dither: the same sound always gives the same frames.

Sources: Kaldi, `feat/feature-window.cc`, `feat/mel-computations.cc`, `feat/feature-mfcc.cc`;
deltas: Young et al., The HTK Book, equation 5.16.
"""

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.errors import ConfigError

PRE_EMPHASIS = 0.97
FULL_SCALE = 32768.0  # Kaldi's samples are 16-bit integers
FLOOR = torch.finfo(torch.float32).eps  # of an energy, before its logarithm
DELTA_REACH = 2  # frames on either side
SMALLEST_STD = 1e-5
Count = TypeVar("Count", int, np.ndarray, Tensor)


class Framing(NamedTuple):
    """How a sound is cut into frames.

    >>> framing = Framing.of(rate=16000, frame_ms=25.0, hop_ms=10.0)
    >>> framing, framing.num_frames(16000), framing.num_samples(98)
    (Framing(window=400, hop=160), 98, 15920)

    Attributes:
        window: samples in a frame.
        hop: samples from the start of one frame to the start of the next.
    """

    window: int
    hop: int

    @staticmethod
    def of(rate: int, frame_ms: float, hop_ms: float) -> "Framing":
        """From milliseconds; a fraction of a sample is left out, as in Kaldi."""
        return Framing(int(rate * 0.001 * frame_ms), int(rate * 0.001 * hop_ms))

    def num_frames(self, samples: Count) -> Count:
        """How many frames so many samples give: whole ones only."""
        count = (samples - self.window) // self.hop + 1
        return count * (count > 0)

    def num_samples(self, frames: int) -> int:
        """The smallest number of samples that gives so many frames."""
        return (frames - 1) * self.hop + self.window


class LogMel(nn.Module):
    """Kaldi's log-mel filterbank.

    Per frame: the mean is taken off, pre-emphasis, Povey's window, power spectrum, triangular
    filters on the mel scale, natural logarithm.

    >>> LogMel(rate=16000, mel=40)(torch.zeros(2, 16000)).shape
    torch.Size([2, 98, 40])

    Args:
        rate: samples per second.
        mel: number of filters.
        frame_ms: length of a frame in milliseconds.
        hop_ms: from the start of one frame to the start of the next, in milliseconds.
        low: lowest frequency in Hz.
        high: highest frequency in Hz; 0 or below counts from half the rate downwards.

    Attributes:
        framing: window and hop in samples.

    Raises:
        ConfigError: frames of less than two samples, no frequency between `low` and `high`, or so
            many filters that some hold no frequency.
    """

    def __init__(
        self,
        rate: int,
        mel: int = 80,
        frame_ms: float = 25.0,
        hop_ms: float = 10.0,
        low: float = 20.0,
        high: float = 0.0,
    ):
        super().__init__()
        self.rate, self.mel = rate, mel
        self.framing = Framing.of(rate, frame_ms, hop_ms)
        window, hop = self.framing
        if window < 2 or hop < 1:
            raise ConfigError(
                f"frame_ms = {frame_ms} and hop_ms = {hop_ms} are {window} and {hop} samples at "
                f"{rate} samples per second; a frame needs at least 2, a hop 1"
            )
        top = high if high > 0 else rate / 2 + high
        if not 0 <= low < top <= rate / 2:
            raise ConfigError(
                f"no frequency lies between low = {low} and high = {top} Hz; "
                f"allowed is 0 <= low < high <= {rate / 2}"
            )
        self.fft_size = 1 << (window - 1).bit_length()
        filters = mel_filters(rate, mel, self.fft_size, low, top)
        num_empty = int((filters.sum(0) == 0).sum())
        if num_empty:
            raise ConfigError(
                f"mel = {mel} is too many at {rate} samples per second and frames of {frame_ms} ms:"
                f" {num_empty} filters hold no frequency; lower mel or raise frame_ms"
            )
        hann = torch.hann_window(window, periodic=False, dtype=torch.float64)
        self.register_buffer("window", hann.pow(0.85).float(), persistent=False)
        self.register_buffer("filters", filters.float(), persistent=False)
        self.window: Tensor
        self.filters: Tensor

    def num_frames(self, samples: Count) -> Count:
        """How many frames so many samples give; what lies behind them in a batch is padding."""
        return self.framing.num_frames(samples)

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch time mel"]:
        """Log-mel frames of sound in [-1, 1] and at least a frame long; float32 under autocast."""
        with torch.autocast(waveform.device.type, enabled=False):
            frames = (waveform.float() * FULL_SCALE).unfold(-1, *self.framing)
            frames = frames - frames.mean(-1, keepdim=True)  # (batch, time, window)
            before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            frames = (frames - PRE_EMPHASIS * before) * self.window
            spectrum = torch.fft.rfft(frames, n=self.fft_size)[..., :-1]  # Kaldi leaves Nyquist out
            power = spectrum.real.square() + spectrum.imag.square()
            return (power @ self.filters).clamp(min=FLOOR).log()


def mel_filters(
    rate: int, mel: int, fft_size: int, low: float, high: float
) -> Float[Tensor, "bin mel"]:
    """Triangles of height 1 that are evenly spaced on the mel scale, 1127 ln(1 + Hz / 700).

    Args:
        rate: samples per second.
        mel: number of filters.
        fft_size: samples in the Fourier transform; it has `fft_size / 2` bins below Nyquist.
        low, high: where the first filter begins and the last one ends, in Hz.
    """
    first, last = (1127.0 * math.log1p(end / 700.0) for end in (low, high))
    knots = torch.linspace(first, last, mel + 2, dtype=torch.float64)
    hertz = torch.arange(fft_size // 2, dtype=torch.float64) * rate / fft_size
    place = 1127.0 * torch.log1p(hertz / 700.0).unsqueeze(1)  # (bin, 1)
    left, centre, right = knots[:-2], knots[1:-1], knots[2:]
    rising, falling = (place - left) / (centre - left), (right - place) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)  # (bin, mel)


def mfcc(
    log_mel: Float[Tensor, "batch time mel"], num: int = 13, lifter: float = 22.0
) -> Float[Tensor, "batch time cepstrum"]:
    """Mel-frequency cepstral coefficients: an orthonormal DCT-II of each frame, liftered.

    Kaldi's `compute-mfcc-feats --use-energy=false`: coefficient 0 is the DCT's own.

    Args:
        log_mel: from a `LogMel`; 23 filters are usual for this.
        num: how many coefficients, from 0 on; at most the number of filters.
        lifter: coefficient k is scaled by 1 + lifter / 2 * sin(pi k / lifter); 0: not scaled.
    """
    mel = log_mel.shape[-1]
    order = torch.arange(num, dtype=torch.float64)
    place = torch.arange(mel, dtype=torch.float64).unsqueeze(1) + 0.5  # (mel, 1)
    cosines = torch.cos(math.pi / mel * place * order) * math.sqrt(2.0 / mel)
    cosines[:, 0] = math.sqrt(1.0 / mel)
    if lifter:
        cosines = cosines * (1.0 + 0.5 * lifter * torch.sin(math.pi * order / lifter))
    with torch.autocast(log_mel.device.type, enabled=False):
        return log_mel.float() @ cosines.to(log_mel.device, torch.float32)


def deltas(
    frames: Float[Tensor, "batch time channel"], mask: Bool[Tensor, "batch time"] | None = None
) -> Float[Tensor, "batch time channel"]:
    """The slope of each channel over five frames by regression; beyond the ends the ends repeat.

    d(t) = sum over n = 1, 2 of n (c(t + n) - c(t - n)), divided by 10. For second derivatives call
    it twice.

    Args:
        frames: what is differentiated.
        mask: True where real, padding behind; the result is 0 on padding.
    """
    batch, time, channels = frames.shape
    places = torch.arange(time, device=frames.device).expand(batch, time)
    last = places[:, -1:] if mask is None else mask.sum(1, keepdim=True) - 1  # (batch, 1)

    def at(place: Tensor) -> Tensor:
        inside = torch.minimum(place, last).clamp(min=0)
        return frames.gather(1, inside.unsqueeze(-1).expand(batch, time, channels))

    slope = torch.zeros_like(frames)
    for n in range(1, DELTA_REACH + 1):
        slope = slope + n * (at(places + n) - at(places - n))
    slope = slope / (2 * sum(n * n for n in range(1, DELTA_REACH + 1)))
    return slope if mask is None else slope.masked_fill(~mask.unsqueeze(-1), 0.0)


def cmvn(
    frames: Float[Tensor, "batch time channel"],
    mask: Bool[Tensor, "batch time"] | None = None,
    variance: bool = True,
) -> Float[Tensor, "batch time channel"]:
    """Cepstral mean and variance normalisation: each channel over the real frames of its row.

    Args:
        frames: what is normalised.
        mask: True where real, padding behind; the result is 0 on padding.
        variance: also divides by the standard deviation; a channel that is constant becomes 0.
    """
    if mask is None:
        mask = frames.new_ones(frames.shape[:2], dtype=torch.bool)
    real = mask.unsqueeze(-1)
    count = real.sum(1, keepdim=True).clamp(min=1)
    # From the first frame on: a constant channel is then exactly 0, not rounding noise to be scaled
    shifted = (frames - frames[:, :1]).float().masked_fill(~real, 0.0)
    centred = (shifted - shifted.sum(1, keepdim=True) / count).masked_fill(~real, 0.0)
    if not variance:
        return centred
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / std.clamp(min=SMALLEST_STD)
