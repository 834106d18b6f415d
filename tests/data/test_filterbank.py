import math

import kaldi_native_fbank as kaldi
import numpy as np
import pytest
import torch

from selfsup.data.filterbank import Framing, LogMel, cmvn, deltas, mel_filters, mfcc
from selfsup.errors import ConfigError


def sound(samples, seed=0, rate=16000):
    """Two tones that fade, a little noise and an offset, in [-1, 1]."""
    draw = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    tones = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 1234 * time)
    out = tones * np.exp(-time) + 0.01 * draw.standard_normal(samples) + 0.02
    return torch.from_numpy(out.astype(np.float32))


def by_kaldi(waveform, extractor, options, **settings):
    options.frame_opts.dither = 0.0
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(options, section), key, value)
    online = extractor(options)
    rate = options.frame_opts.samp_freq
    online.accept_waveform(rate, (waveform * 32768).tolist())
    online.input_finished()
    return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])


CASES = [(16000, 80, 25.0, 10.0), (16000, 23, 25.0, 10.0), (8000, 40, 25.0, 10.0)]
CASES += [(22050, 64, 32.0, 12.5), (11025, 20, 20.0, 5.0)]


@pytest.mark.parametrize(("rate", "mel", "frame_ms", "hop_ms"), CASES)
def test_log_mel_is_kaldis(rate, mel, frame_ms, hop_ms):
    waveform = sound(rate + 77, rate=rate)
    ours = LogMel(rate, mel, frame_ms, hop_ms)(waveform[None])[0].numpy()
    theirs = by_kaldi(
        waveform,
        kaldi.OnlineFbank,
        kaldi.FbankOptions(),
        frame_opts__samp_freq=rate,
        frame_opts__frame_length_ms=frame_ms,
        frame_opts__frame_shift_ms=hop_ms,
        mel_opts__num_bins=mel,
    )
    assert ours.shape == theirs.shape
    # Both round in float32: in a filter that holds almost nothing they lie up to 3e-4 apart.
    np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=0)
    assert np.median(np.abs(ours - theirs)) < 1e-5


def test_log_mel_between_other_frequencies_and_of_silence_is_kaldis():
    waveform = sound(8000)
    waveform[3000:] = 0.0
    theirs = by_kaldi(
        waveform,
        kaldi.OnlineFbank,
        kaldi.FbankOptions(),
        mel_opts__num_bins=30,
        mel_opts__low_freq=100.0,
        mel_opts__high_freq=-400.0,
    )
    ours = LogMel(16000, 30, low=100.0, high=-400.0)(waveform[None])[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=0)
    assert ours[-1] == pytest.approx(math.log(np.finfo(np.float32).eps))


@pytest.mark.parametrize(("mel", "num", "lifter"), [(23, 13, 22.0), (40, 20, 0.0)])
def test_mfcc_is_kaldis(mel, num, lifter):
    waveform = sound(16000)
    options = kaldi.MfccOptions()
    options.use_energy, options.num_ceps, options.cepstral_lifter = False, num, lifter
    theirs = by_kaldi(waveform, kaldi.OnlineMfcc, options, mel_opts__num_bins=mel)
    ours = mfcc(LogMel(16000, mel)(waveform[None]), num, lifter)[0].numpy()
    assert ours.shape == theirs.shape == (98, num)
    np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=0)


def test_a_log_mel_frame_against_float64_by_hand():
    waveform = sound(400)
    frame = waveform.double().numpy() * 32768
    frame = frame - frame.mean()
    frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
    ramp = np.arange(400) / 399
    frame = frame * (0.5 - 0.5 * np.cos(2 * np.pi * ramp)) ** 0.85
    bins = np.arange(256)[:, None]
    padded = np.concatenate([frame, np.zeros(112)])
    power = np.abs((padded * np.exp(-2j * np.pi * bins * np.arange(512) / 512)).sum(1)) ** 2
    expected = np.log(power @ mel_filters(16000, 80, 512, 20.0, 8000.0).numpy())
    np.testing.assert_allclose(LogMel(16000)(waveform[None])[0, 0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 561, 16000])
def test_the_number_of_frames(samples):
    module = LogMel(16000, 23)
    assert module.num_frames(samples) == module(torch.zeros(1, samples)).shape[1]
    assert module.num_frames(torch.tensor([samples])).tolist() == [module.num_frames(samples)]
    assert module.framing.num_samples(module.num_frames(samples)) <= samples


def test_too_short_a_sound_has_no_frame():
    framing = Framing(window=400, hop=160)
    assert [framing.num_frames(n) for n in (0, 1, 240, 399, 400)] == [0, 0, 0, 0, 1]
    assert framing.num_frames(torch.tensor([0, 399, 400])).tolist() == [0, 0, 1]


def test_padding_changes_no_real_frame():
    module = LogMel(16000, 40)
    waveform = sound(5000)
    padded = torch.zeros(2, 9000)
    padded[0, :5000], padded[1] = waveform, sound(9000, seed=1)
    real = module.num_frames(5000)
    torch.testing.assert_close(
        module(padded)[0, :real], module(waveform[None])[0], atol=1e-5, rtol=0
    )


def test_log_mel_stays_in_float32_under_autocast():
    module, waveform = LogMel(16000, 40), sound(4000)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, coefficients = module(waveform), mfcc(module(waveform))
    torch.testing.assert_close(low, module(waveform))
    torch.testing.assert_close(coefficients, mfcc(module(waveform)))


def test_nothing_of_the_filterbank_is_saved_with_a_model():
    assert LogMel(16000).state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mel": 200}, "mel = 200 is too many at 16000"),
        ({"frame_ms": 0.1}, "frame_ms = 0.1"),
        ({"hop_ms": 0.01}, "hop_ms = 0.01"),
        ({"low": 9000.0}, "no frequency lies between"),
        ({"high": 9000.0}, "no frequency lies between"),
    ],
)
def test_filterbanks_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        LogMel(16000, **settings)


def slow_deltas(frames):
    """One row, with loops, in float64."""
    time, channels = frames.shape
    out = np.zeros((time, channels))
    for t in range(time):
        for c in range(channels):
            for n in (1, 2):
                ahead, behind = frames[min(t + n, time - 1), c], frames[max(t - n, 0), c]
                out[t, c] += n * (float(ahead) - float(behind)) / 10
    return out


def rows(lengths, channels=3, padding=99.0):
    """Rows of noise behind which stands `padding`, and their mask."""
    frames = torch.full((len(lengths), max(lengths), channels), padding)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(frames, lengths, strict=True):
        row[:length] = torch.randn(length, channels, generator=generator)
    return frames, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_deltas_against_loops_whatever_the_padding():
    lengths = [9, 1, 2, 4]
    frames, mask = rows(lengths)
    found = deltas(frames, mask).numpy()
    for number, length in enumerate(lengths):
        expected = slow_deltas(frames[number, :length].numpy())
        np.testing.assert_allclose(found[number, :length], expected, atol=1e-6)
        assert (found[number, length:] == 0).all()
    torch.testing.assert_close(deltas(frames[:1]), deltas(frames, mask)[:1], atol=0, rtol=0)


def test_the_delta_of_a_ramp_is_its_slope():
    ramp = 3.0 * torch.arange(10.0).view(1, 10, 1)
    assert deltas(ramp)[0, 2:-2, 0].tolist() == pytest.approx([3.0] * 6)


@pytest.mark.parametrize("variance", [True, False])
def test_cmvn_against_numpy_whatever_the_padding(variance):
    lengths = [9, 1, 5]
    frames, mask = rows(lengths, padding=math.nan)
    found = cmvn(frames * 4 - 15, mask, variance).numpy()
    for number, length in enumerate(lengths):
        real = frames[number, :length].double().numpy() * 4 - 15
        expected = real - real.mean(0)
        if variance and length > 1:
            expected = expected / real.std(0)
        np.testing.assert_allclose(found[number, :length], expected, atol=1e-5)
        assert (found[number, length:] == 0).all()
    first = (frames * 4 - 15)[:1]
    torch.testing.assert_close(cmvn(first, None, variance)[0], torch.from_numpy(found[0]))


def test_a_constant_channel_becomes_zero():
    frames, mask = rows([50, 30])
    frames[..., 1] = -15.942385  # log of the floor; its mean is not exact in float32
    found = cmvn(frames, mask)
    assert (found[..., 1] == 0).all()
    assert found.isfinite().all()
    assert found[0, :, 0].std(unbiased=False) == pytest.approx(1.0, abs=1e-5)
