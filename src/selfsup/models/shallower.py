"""A shallower transformer that begins with some of another one's layers.

So DistilBERT begins (Sanh, Debut, Chaumond and Wolf 2019, arXiv 1910.01108, section 3): "taking one
layer out of two" of its teacher, and the embedding. Which ones is read from the authors' code: of
12 layers the numbers 0, 2, 4, 7, 9 and 11.
"""

from dataclasses import fields

from torch import Tensor

from selfsup.errors import ConfigError
from selfsup.models.encoder import Encoder
from selfsup.models.transformer import TransformerEncoder

FREE = ("layers", "dropout", "attention_dropout")
"""What a shallower transformer may have otherwise than the one whose layers it takes."""


def layers_kept(count: int, wanted: int) -> tuple[int, ...]:
    """Which of `count` layers `wanted` ones are taken from: evenly spaced, first and last included.

    >>> layers_kept(12, 6), layers_kept(4, 2), layers_kept(12, 1)
    ((0, 2, 4, 7, 9, 11), (0, 3), (0,))
    """
    if wanted == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (wanted - 1)) for i in range(wanted))


def take_layers(encoder: TransformerEncoder, deeper: Encoder) -> tuple[int, ...]:
    """Gives an encoder the embedding, the norms and some of the layers of a deeper one.

    Returns:
        the numbers of the layers that were taken, from 0.

    Raises:
        ConfigError: the other one is no transformer, has fewer layers, or another shape.
    """
    if not isinstance(deeper, TransformerEncoder):
        raise ConfigError(
            f"layers are taken from a plain transformer, not from a {type(deeper).__name__}"
        )
    if encoder.num_layers > deeper.num_layers:
        raise ConfigError(
            f"{encoder.num_layers} layers cannot be taken from a model of {deeper.num_layers}: ask "
            "for fewer layers, or begin with fresh weights"
        )
    _check_shape(encoder, deeper)
    kept = layers_kept(deeper.num_layers, encoder.num_layers)
    given = deeper.state_dict()
    taken = {name: given[name] for name in given if not name.startswith("layers.")}
    for place in range(len(encoder.layers)):  # one, where layers are shared
        taken |= _of_layer(given, kept[place], place)
    own = encoder.state_dict()
    differing = sorted(own.keys() ^ taken.keys())
    if differing:
        raise ConfigError(
            f"the model whose layers are taken has other weights: {', '.join(differing[:3])}; "
            "merge what a tuning added to it first, or begin with fresh weights"
        )
    encoder.load_state_dict(taken)
    return kept


def _of_layer(given: dict[str, Tensor], number: int, place: int) -> dict[str, Tensor]:
    """The weights of one layer under the names that they have at another place."""
    prefix = f"layers.{number}."
    return {
        f"layers.{place}.{name.removeprefix(prefix)}": tensor
        for name, tensor in given.items()
        if name.startswith(prefix)
    }


def _check_shape(encoder: TransformerEncoder, deeper: TransformerEncoder) -> None:
    for field in fields(deeper.config):
        own, other = getattr(encoder.config, field.name), getattr(deeper.config, field.name)
        if field.name not in FREE and own != other:
            raise ConfigError(
                f"model.{field.name} is {own!r}, but {other!r} in the model whose layers are "
                "taken: use the same, or begin with fresh weights"
            )
    own, other = encoder.spec, deeper.spec
    if type(own) is not type(other) or getattr(own, "size", 0) != getattr(other, "size", 0):
        raise ConfigError("the model whose layers are taken was made for other data")
