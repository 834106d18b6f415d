"""The published architectures that our layouts can hold: their keys, their heads, their maps.

BERT (arXiv 1810.04805), RoBERTa (1907.11692), ALBERT (1909.11942), ELECTRA (2003.10555), GPT-2
(Radford et al., 2019), BART (1910.13461), T5 and T5 1.1 (1910.10683) and the Switch Transformer
(2101.03961) are read and written. Small layouts with rotary positions are written as two
architectures that compute the same: GPT-NeoX without its parallel residual (2204.06745), and ESM
(Lin et al., 2022), which is a pre-norm BERT with rotary positions. Keys are those of a
`config.json`, which `configurations.py` reads and writes.

Where a model trains on, some things differ from where it was trained: Switch drops tokens that find
no room and adds no noise (`models/experts.py`), BART's `activation_dropout` is left out.
"""

from selfsup.interop import maps
from selfsup.interop.family import Family, Head
from selfsup.interop.weights import Rule, linear

GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
T5_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu",
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}
BERT_KEYS = {
    "hidden_size": ("dim", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("feedforward_dim", 3072),
    "max_position_embeddings": ("max_length", 512),
    "type_vocab_size": ("segment_types", 2),
    "layer_norm_eps": ("norm_eps", 1e-12),
    "hidden_dropout_prob": ("dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "initializer_range": ("init_std", 0.02),
}
PLAIN = {
    "norm_kind": "layer",
    "share_layers": False,
    "experts": False,
    "bias": True,
    "head_width": False,
    "embedding_dim": False,
    "embedding_std": False,
    "causal": False,
}
POST = {
    **PLAIN,
    "norm": "post",
    "positions": "learned",
    "embedding_norm": True,
    "final_norm": False,
}
PRE = {
    **PLAIN,
    "norm": "pre",
    "embedding_norm": False,
    "final_norm": True,
    "segment_types": 0,
}
ENCODER = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
TAGGER = tuple(linear("head", "classifier"))
READER = tuple(linear("head", "qa_outputs"))


def _tied(weight: str, bias: str, table: str) -> dict[str, str]:
    """A decoder over the vocabulary repeats the table, and its bias stands in a second place."""
    return {f"{weight}.weight": table, f"{weight}.bias": bias}


def writing(architecture: str, method: str) -> dict[str, Head]:
    """A model that writes is the same before and after it is fine-tuned to."""
    return {method: Head(architecture), "generation": Head(architecture)}


BERT = Family(
    name="bert",
    prefix="bert.",
    keys=BERT_KEYS,
    layout=POST,
    required=ENCODER,
    activation=("hidden_act", "gelu", GELUS),
    rules=maps.bert,
    heads={
        "masked_language": Head(
            "BertForMaskedLM",
            tuple(
                maps.vocabulary_head(
                    "cls.predictions.transform.dense",
                    "cls.predictions.transform.LayerNorm",
                    "cls.predictions.bias",
                )
            ),
            tuple(linear("sentence_head", "cls.seq_relationship", flipped=True)),
        ),
        "classification": Head("BertForSequenceClassification", TAGGER),
        "tagging": Head("BertForTokenClassification", TAGGER),
        "span_qa": Head("BertForQuestionAnswering", READER),
    },
    pooler="bert.pooler.dense",
    sentence="nsp",
    tied=_tied(
        "cls.predictions.decoder", "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"
    ),
    dropped=("embeddings.position_ids",),
)

ROBERTA = Family(
    name="roberta",
    prefix="roberta.",
    keys=BERT_KEYS,
    layout=POST,
    required=ENCODER,
    activation=("hidden_act", "gelu", {"gelu": "gelu"}),  # its head knows no other
    rules=maps.bert,
    heads={
        "masked_language": Head(
            "RobertaForMaskedLM",
            tuple(maps.vocabulary_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")),
        ),
        "classification": Head(
            "RobertaForSequenceClassification",
            tuple(linear("head", "classifier.out_proj")),
            pooler="classifier.dense",
        ),
        "tagging": Head("RobertaForTokenClassification", TAGGER),
        "span_qa": Head("RobertaForQuestionAnswering", READER),
    },
    pooler="roberta.pooler.dense",
    tied=_tied("lm_head.decoder", "lm_head.bias", "roberta.embeddings.word_embeddings.weight"),
    dropped=("embeddings.position_ids",),
)

ALBERT = Family(
    name="albert",
    prefix="albert.",
    keys={
        **BERT_KEYS,
        "embedding_size": ("embedding_dim", 128),
        "hidden_size": ("dim", 4096),
        "num_attention_heads": ("heads", 64),
        "intermediate_size": ("feedforward_dim", 16384),
        "hidden_dropout_prob": ("dropout", 0.0),
        "attention_probs_dropout_prob": ("attention_dropout", 0.0),
    },
    layout={**POST, "share_layers": True, "embedding_dim": True},
    required={
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        **ENCODER,
    },
    activation=("hidden_act", "gelu_new", GELUS),
    rules=maps.albert,
    heads={
        "masked_language": Head(
            "AlbertForMaskedLM",
            tuple(
                maps.vocabulary_head(
                    "predictions.dense", "predictions.LayerNorm", "predictions.bias"
                )
            ),
            tuple(linear("sentence_head", "sop_classifier.classifier", flipped=True)),
        ),
        "classification": Head("AlbertForSequenceClassification", TAGGER),
        "tagging": Head("AlbertForTokenClassification", TAGGER),
        "span_qa": Head("AlbertForQuestionAnswering", READER),
    },
    pooler="albert.pooler",
    sentence="sop",
    tied=_tied(
        "predictions.decoder", "predictions.bias", "albert.embeddings.word_embeddings.weight"
    ),
    dropped=("embeddings.position_ids",),
)

ELECTRA = Family(
    name="electra",
    prefix="electra.",
    keys={
        **BERT_KEYS,
        "embedding_size": ("embedding_dim", 128),
        "hidden_size": ("dim", 256),
        "num_attention_heads": ("heads", 4),
        "intermediate_size": ("feedforward_dim", 1024),
    },
    layout={key: value for key, value in POST.items() if key != "embedding_dim"},
    required=ENCODER,
    activation=("hidden_act", "gelu", {"gelu": "gelu"}),  # its heads know no other
    rules=maps.bert,
    heads={
        "replaced_token": Head(
            "ElectraForPreTraining",
            (
                *linear("head.0", "discriminator_predictions.dense"),
                *linear("head.2", "discriminator_predictions.dense_prediction"),
            ),
        ),
        "masked_language": Head(
            "ElectraForMaskedLM",
            tuple(
                maps.vocabulary_head(
                    "generator_predictions.dense",
                    "generator_predictions.LayerNorm",
                    "generator_lm_head.bias",
                )
            ),
        ),
        "tagging": Head("ElectraForTokenClassification", TAGGER),
        "span_qa": Head("ElectraForQuestionAnswering", READER),
    },
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    dropped=("embeddings.position_ids",),
)

GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    keys={
        "n_embd": ("dim", 768),
        "n_layer": ("layers", 12),
        "n_head": ("heads", 12),
        "n_inner": ("feedforward_dim", None),
        "n_positions": ("max_length", 1024),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "resid_pdrop": ("dropout", 0.1),
        "attn_pdrop": ("attention_dropout", 0.1),
        "initializer_range": ("init_std", 0.02),
    },
    layout={**PRE, "causal": True, "positions": "learned"},
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    activation=("activation_function", "gelu_new", GELUS),
    rules=maps.gpt2,
    heads=writing("GPT2LMHeadModel", "causal_language"),
    tied={"lm_head.weight": "transformer.wte.weight"},
    dropped=(".attn.bias", ".attn.masked_bias"),
)

GPT_NEOX = Family(
    name="gpt_neox",
    prefix="gpt_neox.",
    keys={
        "hidden_size": ("dim", 6144),
        "num_hidden_layers": ("layers", 44),
        "num_attention_heads": ("heads", 64),
        "intermediate_size": ("feedforward_dim", 24576),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "hidden_dropout": ("dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0),
        "initializer_range": ("init_std", 0.02),
    },
    layout={
        **{key: value for key, value in PRE.items() if key != "embedding_std"},
        "causal": True,
        "positions": "rotary",
    },
    required={
        "use_parallel_residual": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    activation=("hidden_act", "gelu", GELUS),
    rules=maps.gpt_neox,
    heads=writing("GPTNeoXForCausalLM", "causal_language"),
    imports=False,
)

ESM = Family(
    name="esm",
    prefix="esm.",
    keys={key: value for key, value in BERT_KEYS.items() if key != "type_vocab_size"},
    layout={
        **{key: value for key, value in PRE.items() if key != "embedding_std"},
        "positions": "rotary",
    },
    required={
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": False,
        "tie_word_embeddings": False,
    },
    activation=("hidden_act", "gelu", {"gelu": "gelu"}),
    rules=maps.esm,
    heads={
        "masked_language": Head(
            "EsmForMaskedLM",
            (
                *maps.vocabulary_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
                Rule(f"{maps.EMBEDDING}.tokens.weight", ("lm_head.decoder.weight",)),
            ),
        ),
        "tagging": Head("EsmForTokenClassification", TAGGER),
    },
    imports=False,
)

BART = Family(
    name="bart",
    prefix="model.",
    keys={
        "d_model": ("dim", 1024),
        "encoder_layers": ("layers", 12),
        "decoder_layers": ("decoder_layers", 12),
        "encoder_attention_heads": ("heads", 16),
        "encoder_ffn_dim": ("feedforward_dim", 4096),
        "max_position_embeddings": ("max_length", 1024),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.0),
        "init_std": ("init_std", 0.02),
    },
    also={
        "decoder_attention_heads": "encoder_attention_heads",
        "decoder_ffn_dim": "encoder_ffn_dim",
    },
    layout={**POST, "segment_types": 0, "norm_eps": 1e-5, "tied": True},
    required={"scale_embedding": False, "tie_word_embeddings": True},
    activation=("activation_function", "gelu", GELUS),
    rules=maps.bart,
    heads=writing("BartForConditionalGeneration", "denoising"),
    tied={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    model="encoder_decoder",
)

T5_KEYS = {
    "d_model": ("dim", 512),
    "d_kv": ("head_width", 64),
    "d_ff": ("feedforward_dim", 2048),
    "num_layers": ("layers", 6),
    "num_decoder_layers": ("decoder_layers", None),
    "num_heads": ("heads", 8),
    "relative_attention_num_buckets": ("relative_buckets", 32),
    "relative_attention_max_distance": ("relative_reach", 128),
    "dropout_rate": ("dropout", 0.1),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
}
T5_LAYOUT = {
    "norm": "pre",
    "norm_kind": "rms",
    "positions": "relative",
    "share_layers": False,
    "bias": False,
    "embedding_norm": False,
    "final_norm": True,
    "segment_types": 0,
    "embedding_dim": False,
    "causal": False,
}
T5_TIED = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
T5 = Family(
    name="t5",
    prefix="",
    keys=T5_KEYS,
    layout={**T5_LAYOUT, "experts": False},
    activation=("feed_forward_proj", "relu", T5_ACTIVATIONS),
    rules=maps.t5,
    heads=writing("T5ForConditionalGeneration", "denoising"),
    tied=T5_TIED,
    # of the first checkpoints; never read
    dropped=("layer.1.EncDecAttention.relative_attention_bias.weight",),
    model="encoder_decoder",
)

SWITCH = Family(
    name="switch_transformers",
    prefix="",
    keys={
        **T5_KEYS,
        "d_model": ("dim", 768),
        "num_layers": ("layers", 12),
        "num_heads": ("heads", 12),
        "num_experts": ("experts", 8),
        "router_aux_loss_coef": ("balance_weight", 0.001),
    },
    layout={**T5_LAYOUT, "experts": True},
    required={"router_bias": False, "router_dtype": "float32"},
    activation=(
        "dense_act_fn",
        "relu",
        {k: T5_ACTIVATIONS[k] for k in GELUS if k in T5_ACTIVATIONS},
    ),
    rules=maps.t5,
    heads=writing("SwitchTransformersForConditionalGeneration", "denoising"),
    tied=T5_TIED,
    model="encoder_decoder",
)

# the first that fits is what a model is written as
FAMILIES = (ROBERTA, BERT, ALBERT, ELECTRA, GPT2, BART, T5, SWITCH, GPT_NEOX, ESM)
