"""Speech: wav2vec 2.0 pre-training steps on waveforms against `transformers`.

Both sides have the same layers, batch, precision and threads; masks and negatives are drawn anew in
every step, each in its own library's way.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import Pair, best_rates, num_parameters, stepper, turn
from selfsup.batch import AudioSpec
from selfsup.methods.contrastive.wav2vec2 import Config, Wav2Vec2
from selfsup.models.transformer import Config as ModelConfig
from selfsup.models.transformer import TransformerEncoder
from selfsup.training.device import pick_dtype
from selfsup.training.optim import adamw

RATE = 16_000  # Hz
BATCH, SECONDS = 8, 2
MODEL = ModelConfig(
    dim=256,
    layers=4,
    heads=4,
    norm="post",
    positions="none",
    embedding_norm=True,
    dropout=0.0,
    conv_channels=256,
    conv_positions=128,
)


def wav2vec2() -> Pair:
    """wav2vec 2.0, seconds of sound per second."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    waveform = torch.randn(BATCH, SECONDS * RATE, generator=generator)
    spec = AudioSpec(rate=RATE, mel=0, hop=320)
    ours = Wav2Vec2(Config(), TransformerEncoder(MODEL, spec), spec).train()
    peer = transformers_model(ours.config).train()
    counts = num_parameters(ours), num_parameters(peer)
    assert abs(counts[0] - counts[1]) < 0.001 * counts[0], counts
    batch = {"waveform": waveform}
    optimizer = adamw(ours, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    rates = best_rates(
        turn(stepper(ours, optimizer, lambda: ours.loss(batch, generator).loss, dtype)),
        turn(
            stepper(
                peer,
                torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True),
                lambda: transformers_loss(peer, ours.config, waveform),
                dtype,
            )
        ),
        BATCH * SECONDS,
    )
    return *rates, f"seconds of sound/s, {str(dtype).removeprefix('torch.')}"


def transformers_model(config: Config, model: ModelConfig = MODEL) -> nn.Module:
    """Wav2Vec2ForPreTraining in the shape of ours."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    dropouts = ("hidden", "attention", "activation", "feat_proj", "feat_quantizer", "final")
    return Wav2Vec2ForPreTraining(
        Wav2Vec2Config(
            hidden_size=model.dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            intermediate_size=model.feedforward_width,
            conv_dim=(model.conv_channels,) * len(model.conv_kernels),
            num_conv_pos_embeddings=model.conv_positions,
            num_codevectors_per_group=config.num_codes,
            num_codevector_groups=config.groups,
            codevector_dim=config.code_dim,
            proj_codevector_dim=config.projection_dim,
            num_negatives=config.num_negatives,
            layerdrop=0.0,
            **{f"{name}_dropout": 0.0 for name in dropouts},
        )
    )


def transformers_loss(model, config: Config, waveform: Tensor) -> Tensor:
    """Masks, negatives and loss as in the pre-training script among transformers' examples."""
    from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs

    shape = len(waveform), int(model._get_feat_extract_output_lengths(waveform.shape[1]))
    rate = config.start_probability * config.span
    hidden = theirs._compute_mask_indices(shape, rate, config.span)
    negatives = theirs._sample_negative_indices(shape, config.num_negatives, hidden)
    output = model(
        waveform,
        mask_time_indices=torch.tensor(hidden, device=waveform.device, dtype=torch.long),
        sampled_negative_indices=torch.tensor(negatives, device=waveform.device).long(),
    )
    return output.loss / hidden.sum()


BENCHMARKS: dict[str, Callable[[], Pair]] = {"wav2vec2-4x256": wav2vec2}
