"""Where tensors live and in which precision they are computed."""

import ctypes
import sys

import torch

from selfsup.batch import Batch
from selfsup.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for.

    Raises:
        ConfigError: a GPU is asked for and there is none, or torch knows no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"training.device = {name!r}, but torch sees no GPU; use device='cpu'")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"training.device = {name!r} is no torch device") from error
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= torch.cuda.device_count() > 0:
        raise ConfigError(f"training.device = {name!r}: known are auto, cpu, cuda and cuda:N")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 where it is asked for, or where `auto` finds hardware that computes in it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where glibc allocates it.

    By default large tensors go back to the system and are mapped again, page by page, in the next
    step. A step of wav2vec 2.0 on 8 x 2 s (4 layers x 256, one thread) spent 0.4 of 1.9 s on that,
    and spends 0.02 s with this; the largest size in memory grows by 2 to 8%.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on `device`; copies to a GPU do not wait."""
    if device.type == "cpu":
        return batch
    return {k: v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
