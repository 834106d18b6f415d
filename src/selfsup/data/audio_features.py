"""Sound files decoded, and the features of a sound: log-mel frames, waveform, MFCC."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import soundfile
import soxr
import torch

from selfsup.batch import AudioSpec, Batch
from selfsup.data.dataset import pad_mask
from selfsup.data.filterbank import Framing, LogMel, cmvn, deltas, mfcc
from selfsup.errors import ConfigError, DataError

BLOCK = 1 << 18  # samples decoded at once
LOUDEST = 1e6  # sound lies in [-1, 1]; some programs write floats up to 32768
MFCC_MEL = 23  # Kaldi's number of filters for MFCC


@dataclass(frozen=True, kw_only=True)
class Config:
    """How sound files become examples.

    Attributes:
        rate: samples per second; files with another rate are resampled.
        features: "frames": log-mel frames; "waveform": the samples, kept with 16 bits.
        mel: filters of a log-mel frame.
        frame_ms: length of a frame in milliseconds.
        hop_ms: from the start of one frame to the start of the next, in milliseconds.
        cmvn: "utterance": each channel of an example's frames gets mean 0 and variance 1.
        mfcc: also gives `mfcc`, 13 coefficients of each frame with deltas and double deltas.
        join_seconds: 0: an example per file; else neighbours are joined to examples of that length.
        max_seconds: a longer sound is cut into equal examples of at most that.
        min_seconds: a shorter file cannot be used; it counts as bad.
        valid_fraction: share of the files that is held out.
        pattern: regular expression that is searched in the path relative to the source, with named
            groups `label` and `group`, or one of them; only files of one `group` (a speaker, say)
            are joined.
        join_order: "path": neighbours are joined; "random": any of one folder and group. Where
            names begin with the class, neighbours are of one class, and joining would give it away.
    """

    rate: int = 16000
    features: Literal["frames", "waveform"] = "frames"
    mel: int = 80
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    cmvn: Literal["none", "utterance"] = "utterance"
    mfcc: bool = False
    join_seconds: float = 0.0
    max_seconds: float = 20.0
    min_seconds: float = 0.1
    valid_fraction: float = 0.05
    pattern: str = ""
    join_order: Literal["path", "random"] = "path"

    def __post_init__(self) -> None:
        for name in ("rate", "mel", "frame_ms", "hop_ms", "min_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"data.{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.valid_fraction <= 0.5:
            raise ConfigError(
                f"data.valid_fraction must be above 0 and at most 0.5, got {self.valid_fraction}"
            )
        if self.max_seconds < 2 * self.min_seconds:
            raise ConfigError(
                f"data.max_seconds = {self.max_seconds} must be at least twice data.min_seconds = "
                f"{self.min_seconds}, or cut sounds would become too short"
            )
        if not 0 <= self.join_seconds <= self.max_seconds:
            raise ConfigError(
                f"data.join_seconds must be from 0 to data.max_seconds = {self.max_seconds}, "
                f"got {self.join_seconds}"
            )
        if self.min_seconds * 1000 < self.frame_ms:
            raise ConfigError(
                f"data.min_seconds = {self.min_seconds} is less than one frame of "
                f"{self.frame_ms} ms; raise data.min_seconds"
            )
        if self.pattern:
            compiled_pattern(self.pattern, "data.pattern")
        Features(self)  # what cannot be computed is refused here

    @property
    def framing(self) -> Framing:
        """Window and hop in samples."""
        return Framing.of(self.rate, self.frame_ms, self.hop_ms)

    @property
    def spec(self) -> AudioSpec:
        """What a model must know of its input."""
        mel = self.mel if self.features == "frames" else 0
        return AudioSpec(rate=self.rate, mel=mel, hop=self.framing.hop)


@final
class Features:
    """What becomes of one sound: the fields of an example, the one that is masked first.

    Attributes:
        widths: by field, numbers per time step; 0 for a waveform.
    """

    def __init__(self, config: Config):
        self.config, self.framing = config, config.framing
        framing = (config.frame_ms, config.hop_ms)
        self.widths: dict[str, int] = {}
        if config.features == "frames":
            self.log_mel = LogMel(config.rate, config.mel, *framing)
            self.widths["frames"] = config.mel
        else:
            self.widths["waveform"] = 0
        if config.mfcc:
            self.mfcc_mel = LogMel(config.rate, MFCC_MEL, *framing)
            self.widths["mfcc"] = 39

    @torch.inference_mode()
    def __call__(self, sound: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of a sound at the configured rate, (samples,) float32 in [-1, 1]."""
        row = torch.from_numpy(np.ascontiguousarray(sound)).unsqueeze(0)  # (1, samples)
        out: dict[str, np.ndarray] = {}
        if self.config.features == "frames":
            frames = self.log_mel(row)
            out["frames"] = (cmvn(frames) if self.config.cmvn == "utterance" else frames)[0].numpy()
        else:
            out["waveform"] = np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
        if self.config.mfcc:
            base = mfcc(self.mfcc_mel(row))
            slope = deltas(base)
            out["mfcc"] = torch.cat([base, slope, deltas(slope)], -1)[0].numpy()
        return out

    def lengths(self, lengths: np.ndarray, name: str) -> np.ndarray:
        """Time steps in field `name` of examples whose first field has `lengths` steps."""
        if name == "mfcc" and self.config.features == "waveform":
            return self.framing.num_frames(lengths)
        return lengths


def collate(rows: list[dict[str, np.ndarray]]) -> Batch:
    """Examples as one batch: float32, zeros behind each end, 16-bit samples again in [-1, 1]."""
    batch = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        out = np.zeros((len(rows), max(map(len, parts)), *parts[0].shape[1:]), dtype=np.float32)
        for place, part in zip(out, parts, strict=True):
            place[: len(part)] = part
        batch[name] = torch.from_numpy(out / 32768 if name == "waveform" else out)
    main = next(iter(rows[0]))
    return {**batch, **pad_mask([row[main] for row in rows])}


class Decoded(NamedTuple):
    """A sound: (samples,) float32 at the configured rate, the file's rate, a hash of its samples.

    The hash is taken before resampling, so it does not depend on the resampler's version.
    """

    sound: np.ndarray
    rate: int
    digest: bytes


def decode(content: Path | bytes, config: Config) -> Decoded:
    """Decodes a file, or the content of one; several channels become their mean.

    Raises:
        DataError: it cannot be decoded, is too short, or holds NaN; the message is only the reason.
    """
    digest = hashlib.blake2b(digest_size=8)
    try:
        with soundfile.SoundFile(
            io.BytesIO(content) if isinstance(content, bytes) else content
        ) as f:
            rate = f.samplerate
            digest.update(str(rate).encode())
            sound = resampled(_blocks(f, digest), rate, config)
    except (soundfile.SoundFileError, OSError) as error:
        raise DataError(f"cannot be decoded ({error})") from error
    return Decoded(sound, rate, digest.digest())


def _blocks(file: soundfile.SoundFile, digest: Any) -> Iterator[np.ndarray]:
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        mono = np.ascontiguousarray(block.mean(1, dtype=np.float32))
        digest.update(mono.tobytes())
        yield mono


def resampled(blocks: Iterable[np.ndarray], rate: int, config: Config) -> np.ndarray:
    """The joined blocks at the configured rate, checked."""
    parts, resample = [], None
    if rate != config.rate:
        resample = soxr.ResampleStream(rate, config.rate, 1, dtype="float32").resample_chunk
    for block in blocks:
        if not np.abs(block).max(initial=0) < LOUDEST:  # not "> LOUDEST", which NaN is not either
            raise DataError("holds NaN, infinite or absurdly large samples")
        parts.append(resample(block) if resample else block)
    if not parts:
        raise DataError("holds no sound (0 samples)")
    if resample:
        parts.append(resample(np.zeros(0, dtype=np.float32), last=True))
    sound = np.concatenate(parts)
    if len(sound) < config.min_seconds * config.rate:
        seconds = len(sound) / config.rate
        raise DataError(
            f"{seconds:.3f} s long, shorter than data.min_seconds = {config.min_seconds}"
        )
    return sound


def compiled_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """A regular expression on paths, checked: it names `label` and `group`, or one of them."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what} = {pattern!r} is no regular expression ({error})") from error
    if not compiled.groupindex or set(compiled.groupindex) - {"label", "group"}:
        raise ConfigError(
            f"{what} = {pattern!r} must name the groups (?P<label>...) or (?P<group>...) or both, "
            f"and no other; it names {', '.join(compiled.groupindex) or 'none'}"
        )
    return compiled
