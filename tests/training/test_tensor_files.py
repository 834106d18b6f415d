"""Files of tensors are those of safetensors to the byte, and nothing they say is believed."""

import json
import random
import resource
import tracemalloc

import pytest
import torch
from safetensors.torch import save
from torch import nn

from selfsup.errors import CheckpointError
from selfsup.files import sha256
from selfsup.training.checkpoint import load_weights
from selfsup.training.tensor_files import DTYPES, load_tensors, save_tensors


def written(path, header: bytes, size: int, length: int | None = None):
    """A file with any header, that says it is `length` bytes long, and `size` bytes of tensors."""
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(size))
    return path


def described(**tensors: tuple[list[int], list[int]]) -> bytes:
    """A header of float32 tensors: name = shape, offsets."""
    return json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            for name, (shape, offsets) in tensors.items()
        }
    ).encode()


def test_a_file_is_that_of_safetensors_to_the_byte(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{name} {i}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw)
        for name in ("søk", 'a\n"b\\', "z")
        for i, size in enumerate((0, 24, 48))
    }
    tensors = {
        f"{name} {label}": (x % 2).bool() if dtype == torch.bool else x.clone().view(dtype)
        for name, x in tensors.items()
        for dtype, label in DTYPES.items()
    }
    tensors |= {"number": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T}
    assert len({x.dtype for x in tensors.values()}) == len(DTYPES)
    digest = save_tensors(tmp_path / "ours", tensors)
    whole = {name: x.contiguous() for name, x in tensors.items()}
    assert (tmp_path / "ours").read_bytes() == save(whole)
    assert digest == sha256(tmp_path / "ours")
    found = load_tensors(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, x in whole.items():
        assert found[name].shape == x.shape
        assert found[name].flatten().view(torch.uint8).equal(x.flatten().view(torch.uint8)), name


def test_no_tensors_at_all(tmp_path):
    save_tensors(tmp_path / "none", {})
    assert (tmp_path / "none").read_bytes() == save({})
    assert load_tensors(tmp_path / "none") == {}


def test_writing_makes_no_second_copy(tmp_path):
    """safetensors makes 16 MB of bytes here."""
    tensors = {str(i): torch.zeros(2**20) for i in range(4)}
    tracemalloc.start()
    try:
        save_tensors(tmp_path / "file", tensors)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


GIB = 2**30
HOSTILE = {
    "nothing": (b"", 0, 0),
    "no header": (b"", 16, 0),
    "a header longer than the file": (b"{}", 0, 2**40),
    "a header of 2^63 bytes": (b"{}", 0, 2**63),
    "a header that is cut": (described(a=([4], [0, 16]))[:-3], 16, None),
    "no JSON": (b"\x80\x04K\x01.", 0, None),
    "a list": (b"[1]", 0, None),
    "nested deeply": (b"[" * 100_000, 0, None),
    "no UTF-8": (b'{"\xff": 1}', 0, None),
    "overlapping tensors": (described(a=([4], [0, 16]), b=([4], [8, 24])), 24, None),
    "the same bytes twice": (described(a=([4], [0, 16]), b=([4], [0, 16])), 16, None),
    "a gap": (described(a=([4], [0, 16]), b=([4], [20, 36])), 36, None),
    "bytes that nobody owns": (described(a=([4], [0, 16])), 32, None),
    "an end before its start": (described(a=([4], [16, 0])), 16, None),
    "beyond the file": (described(a=([4 * GIB], [0, 16 * GIB])), 16, None),
    "a shape of other size": (described(a=([4 * GIB], [0, 16])), 16, None),
    "a shape that overflows": (described(a=([2**62, 8], [0, 16])), 16, None),
    "a negative side": (described(a=([-4], [0, 16])), 16, None),
    "an unknown type": (described(a=([4], [0, 16])).replace(b"F32", b"PYOBJECT"), 16, None),
    "words for numbers": (described(a=([4], ["0", "16"])), 16, None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_without_memory(tmp_path, kind):
    path = written(tmp_path / "file", *HOSTILE[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="file: damaged or not a safetensors file"):
        load_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_header_beyond_the_limit_is_refused_without_memory(tmp_path):
    """The file is as long as the header says: a hole of 4 GiB."""
    path = written(tmp_path / "file", b"{}", 0, 4 * GIB)
    with open(path, "r+b") as file:
        file.truncate(4 * GIB + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_header_never_ends_in_another_error(tmp_path, seed):
    draw = random.Random(seed)
    save_tensors(tmp_path / "whole", {"a": torch.ones(2, 3), "b": torch.arange(4)})
    whole = (tmp_path / "whole").read_bytes()
    end, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(end)] = draw.randrange(256)
        (tmp_path / "file").write_bytes(content)
        try:
            load_tensors(tmp_path / "file")
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_a_name_with_dots_is_a_name_and_no_path(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    save_tensors(folder / "file", {"../out": torch.ones(2), "/tmp/out": torch.ones(2)})
    tensors = load_tensors(folder / "file")
    with pytest.raises(CheckpointError, match=r"unknown \['\.\./out', '/tmp/out'\]"):
        load_weights(nn.Module(), tensors, "here")
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "file"]
