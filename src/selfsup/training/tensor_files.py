"""Files of tensors: written in one pass with little memory, read without trust."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfsup.errors import CheckpointError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""The names of safetensors; a file holds the last ones first, so that all are aligned."""


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes one safetensors file, tensor by tensor; the caller makes it durable.

    The layout is that of `safetensors.torch.save`, which makes a second copy of all tensors in
    memory: 8 bytes with the header's length, the header in JSON, then the tensors without gaps.

    Returns:
        the file's SHA-256.
    """
    rank = {dtype: -place for place, dtype in enumerate(DTYPES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header, end = {}, 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape, offsets = list(tensor.shape), [start, end]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # tensors of the old file may be mapped: it is not written over
    with open(path, "wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            file.write(content)
            digest.update(content)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            values = flat.view(torch.uint8).numpy().data
            file.write(values)
            digest.update(values)
    return digest.hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file. The tensors are mapped: copy what is to outlive the file.

    safetensors itself refuses, before it reserves memory, a header that is longer than 100 MB or
    than the file, and tensors that overlap, leave gaps or end beyond the file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error
