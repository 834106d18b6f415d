"""The encoder-decoder: what each half sees, padding, caches, relative positions."""

import math

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.config import from_mapping, preset_values
from selfsup.errors import ConfigError
from selfsup.models.attention import distance_bucket
from selfsup.models.encoder_decoder import Config, EncoderDecoder
from selfsup.models.view import Cache
from selfsup.randomness import isolated, seed_layers, torch_generator

VOCABULARY = Vocabulary(size=40, pad=0, cls=1, sep=2)
LAYOUTS = {
    "rotary": {},
    "bart": {"norm": "post", "positions": "learned", "embedding_norm": True, "max_length": 30},
    "t5": {"norm_kind": "rms", "positions": "relative", "bias": False, "head_width": 6},
    "switch": {"positions": "relative", "experts": 3, "bias": False, "activation": "relu"},
}


def build(layout: str = "rotary", **more) -> EncoderDecoder:
    config = Config(dim=16, layers=2, heads=4, dropout=0.0, **LAYOUTS[layout], **more)
    with isolated():
        seed_layers(0, "model")
        model = EncoderDecoder(config, VOCABULARY).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def ids(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (rows, time), generator=torch_generator(seed, "ids"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_written_token_knows_the_source_and_its_past_alone(layout: str) -> None:
    model = build(layout)
    source, target = ids(2, 7), ids(2, 5, 1)
    before = model.decode(target, model({"tokens": source})).last
    changed = target.clone()
    changed[:, 3] = 39 - changed[:, 3] % 5
    after = model.decode(changed, model({"tokens": source})).last
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(-1).min() > 1e-3
    other = source.clone()
    other[:, 6] = 39 - other[:, 6] % 5
    moved = model.decode(target, model({"tokens": other})).last
    assert (moved - before).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(layout: str, side: str) -> None:
    model = build(layout)
    source, target = ids(1, 7), ids(1, 5, 1)
    alone = model.decode(target, model({"tokens": source}))
    noise = ids(1, 4, 2)
    real = torch.ones(1, 7, dtype=torch.bool)
    parts = [source, noise] if side == "right" else [noise, source]
    masks = [real, ~real[:, :4]] if side == "right" else [~real[:, :4], real]
    read = model({"tokens": torch.cat(parts, 1), "mask": torch.cat(masks, 1)})
    kept = slice(0, 7) if side == "right" else slice(4, 11)
    torch.testing.assert_close(read.last[:, kept], model({"tokens": source}).last)
    torch.testing.assert_close(model.decode(target, read).last, alone.last)
    longer = torch.cat([target, noise], 1)
    written = torch.cat([real[:, :5], ~real[:, :4]], 1)
    padded = model.decode(longer, read, written)
    torch.testing.assert_close(padded.last[:, :5], alone.last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_goes_on_where_it_stopped(layout: str) -> None:
    model = build(layout)
    target = ids(3, 24, 1)
    read = model({"tokens": ids(3, 7)})
    whole = model.decode(target, read).last
    cache, parts, start = Cache(), [], 0
    with torch.no_grad():
        for length in (5, 1, 1, 9, 8):  # buffers grow between
            piece = target[:, start : start + length]
            parts.append(model.decode(piece, read if start == 0 else None, cache=cache).last)
            start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_selected_rows_go_on_as_if_they_had_been_alone() -> None:
    model = build("t5")
    source, target = ids(3, 7), ids(3, 6, 1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    cache = Cache()
    with torch.no_grad():
        model.decode(target, model({"tokens": source, "mask": mask}), cache=cache)
        rows = torch.tensor([2, 1, 1, 0])
        cache.select(rows)
        new = ids(4, 2, 3)
        got = model.decode(new, None, cache=cache).last
        read = model({"tokens": source[rows], "mask": mask[rows]})
        expected = model.decode(torch.cat([target[rows], new], 1), read).last[:, -2:]
    torch.testing.assert_close(got, expected)


def test_the_output_is_the_table_unless_untied() -> None:
    hidden = torch.randn(2, 3, 16)
    tied, untied = build(), build(tied=False)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.tokens.weight.T)
    assert untied.output is not None
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.output.weight.T)
    assert sum(p.numel() for p in untied.parameters()) == sum(
        p.numel() for p in tied.parameters()
    ) + (40 * 16)


def test_targets_begin_after_the_start_token() -> None:
    assert build(start="cls").shifted(torch.tensor([[7, 8, 9]])).tolist() == [[1, 7, 8]]
    with pytest.raises(ConfigError, match="no such token"):
        EncoderDecoder(Config(dim=8, layers=1, heads=2, start="cls"), Vocabulary(size=9, sep=2))


def test_one_table_and_as_many_layers_as_asked() -> None:
    model = build(decoder_layers=1)
    assert len(model.source.layers) == 2
    assert len(model.target.layers) == 1
    assert sum(p.shape[0] == 40 for p in model.parameters()) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"causal": True}, "causal must be false"),
        ({"embedding_dim": 4}, "embedding_dim must be 0"),
        ({"decoder_layers": -1}, "decoder_layers"),
        ({"relative_buckets": 200}, "relative_buckets"),
    ],
)
def test_bad_shapes_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**values)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20)])
def test_buckets_equal_the_papers_rule(causal: bool, buckets: int, reach: int) -> None:
    distances = torch.arange(-300, 301)
    got = distance_bucket(distances.unsqueeze(0), buckets, reach, causal)[0]
    for distance, bucket in zip(distances.tolist(), got.tolist(), strict=True):
        half = buckets if causal else buckets // 2
        away = max(0, -distance) if causal else abs(distance)
        exact = half // 2
        if away < exact:
            expected = away
        else:
            growth = math.log(away / exact) / math.log(reach / exact)
            expected = min(half - 1, exact + int(growth * (half - exact) + 1e-9))
        assert bucket == expected + (0 if causal or distance <= 0 else half), distance


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        ("t5-small", 32_128, 60.5),
        ("t5-base", 32_128, 223),
        ("t5-large", 32_128, 738),
        ("t5-3b", 32_128, 2_850),
        ("t5-11b", 32_128, 11_300),
        ("bart-base", 50_265, 139),
        ("bart-large", 50_265, 406),
    ],
)
def test_published_layouts_have_the_published_sizes(name: str, vocabulary: int, millions: float):
    config = from_mapping(Config, preset_values("encoder_decoder", name), "model")
    with torch.device("meta"):
        model = EncoderDecoder(config, Vocabulary(size=vocabulary, pad=0, sep=1))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=0.02)
