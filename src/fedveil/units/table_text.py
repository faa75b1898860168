"""The units of families of transformers that read text or sound, one entry each."""

from __future__ import annotations

from fedveil.units.rule import Pattern, Rule


def block(
    place: str,
    qkv: tuple[str, ...],
    output: str,
    wide: tuple[str, ...],
    narrow: str,
    *,
    units: str = "num_attention_heads",
    fused: int = 1,
    gated: int = 1,
    optional: bool = False,
) -> tuple[Pattern, ...]:
    """The four patterns of a block of attention and MLP.

    Args:
        place: the block.
        qkv: what computes heads.
        output: what reads them.
        wide: what computes neurons.
        narrow: what reads them.
        units: what the configuration calls the number of heads, or of key-value heads.
        fused: into how many parts the layers of ``qkv`` fall, each of all heads.
        gated: likewise those of ``wide``.
        optional: whether some models of the family lack it.
    """
    return (
        Pattern("columns", (output,), block=place, optional=optional),
        Pattern("columns", (narrow,), block=place, optional=optional),
        Pattern("heads", qkv, (output,), place, units=units, fused=fused, optional=optional),
        Pattern("neurons", wide, (narrow,), place, fused=gated, optional=optional),
    )


def attention(path: str, output: str = "out_proj") -> tuple[tuple[str, ...], str]:
    """Query, key and value projections below a path, and what reads them."""
    return tuple(f"{path}.{one}_proj" for one in "qkv"), f"{path}.{output}"


_EMBEDDINGS = ("word_embeddings", "position_embeddings?", "token_type_embeddings?", "LayerNorm")
_SELF = "attention.self"
_BERT_MLP = (("intermediate.dense",), "output.dense")
_KEY_VALUE = "num_key_value_heads"


def _across(place: str, units: str) -> tuple[Pattern, ...]:
    """Attention of a decoder to its encoder."""
    heads, output = attention("encoder_attn")
    return (
        Pattern("columns", (output,), block=place, optional=True),
        Pattern("heads", heads, (output,), place, units=units, name="across", optional=True),
    )


TEXT_RULES = (
    Rule(
        ("deberta",),
        (
            Pattern("columns", _EMBEDDINGS, block="embeddings"),
            # Each head has its query, key and value side by side.
            *block(
                "encoder.layer.*",
                (f"{_SELF}.in_proj", f"{_SELF}.q_bias", f"{_SELF}.v_bias", f"{_SELF}.pos_proj?",
                 f"{_SELF}.pos_q_proj?"),
                "attention.output.dense", *_BERT_MLP,
            ),
        ),
    ),
    Rule(
        ("deberta-v2",),
        (
            Pattern("columns", _EMBEDDINGS, block="embeddings"),
            *block(
                "encoder.layer.*",
                (f"{_SELF}.query_proj", f"{_SELF}.key_proj", f"{_SELF}.value_proj",
                 f"{_SELF}.pos_key_proj?", f"{_SELF}.pos_query_proj?"),
                "attention.output.dense", *_BERT_MLP,
            ),
        ),
    ),
    Rule(
        ("longformer",),
        (
            Pattern("columns", _EMBEDDINGS, block="embeddings"),
            *block(
                "encoder.layer.*",
                tuple(f"{_SELF}.{one}{where}" for where in ("", "_global")
                      for one in ("query", "key", "value")),
                "attention.output.dense", *_BERT_MLP,
            ),
        ),
    ),
    Rule(
        ("mpnet",),
        (
            Pattern("columns", _EMBEDDINGS, block="embeddings"),
            *block(
                "encoder.layer.*", tuple(f"attention.attn.{one}" for one in "qkv"),
                "attention.attn.o", *_BERT_MLP,
            ),
        ),
        shared=("relative_attention_bias",),
    ),
    Rule(
        ("albert",),
        (
            Pattern("columns", _EMBEDDINGS, block="embeddings"),
            *block(
                "albert_layers.*",
                tuple(f"attention.{one}" for one in ("query", "key", "value")),
                "attention.dense", ("ffn",), "ffn_output",
            ),
        ),
    ),
    Rule(
        ("modernbert",),
        (
            Pattern("columns", ("tok_embeddings", "norm"), block="embeddings"),
            *block(
                "layers.*", ("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo", fused=3, gated=2
            ),
        ),
    ),
    Rule(
        ("bart", "mbart", "pegasus", "whisper"),
        (
            Pattern("columns", ("shared",), optional=True),
            *block("encoder.layers.*", *attention("self_attn"), ("fc1",), "fc2",
                   units="encoder_attention_heads", optional=True),
            *block("decoder.layers.*", *attention("self_attn"), ("fc1",), "fc2",
                   units="decoder_attention_heads", optional=True),
            *_across("decoder.layers.*", "decoder_attention_heads"),
        ),
    ),
    Rule(
        ("opt",),
        (
            Pattern("columns", ("embed_tokens",)),
            *block("decoder.layers.*", *attention("self_attn"), ("fc1",), "fc2"),
        ),
    ),
    Rule(
        ("gpt_neox",),
        (
            Pattern("columns", ("embed_in",)),
            *block("layers.*", ("attention.query_key_value",), "attention.dense",
                   ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        ),
    ),
    Rule(
        ("bloom",),
        (
            Pattern("columns", ("word_embeddings",)),
            *block("h.*", ("self_attention.query_key_value",), "self_attention.dense",
                   ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        ),
    ),
    Rule(
        ("gptj",),
        (
            Pattern("columns", ("wte",)),
            *block("h.*", *attention("attn"), ("mlp.fc_in",), "mlp.fc_out"),
        ),
    ),
    Rule(
        ("phi",),
        (
            Pattern("columns", ("embed_tokens",)),
            *block("layers.*", *attention("self_attn", "dense"), ("mlp.fc1",), "mlp.fc2",
                   units=_KEY_VALUE),
        ),
    ),
    Rule(
        ("starcoder2",),
        (
            Pattern("columns", ("embed_tokens",)),
            *block("layers.*", *attention("self_attn", "o_proj"), ("mlp.c_fc",), "mlp.c_proj",
                   units=_KEY_VALUE),
        ),
    ),
    Rule(
        ("phi3",),
        (
            Pattern("columns", ("embed_tokens",)),
            Pattern("columns", ("self_attn.o_proj",), block="layers.*"),
            Pattern("columns", ("mlp.down_proj",), block="layers.*"),
            Pattern(
                "heads", ("self_attn.qkv_proj",), ("self_attn.o_proj",), "layers.*",
                units=_KEY_VALUE, fused=("num_attention_heads", _KEY_VALUE, _KEY_VALUE),
            ),
            Pattern("neurons", ("mlp.gate_up_proj",), ("mlp.down_proj",), "layers.*", fused=2),
        ),
    ),
    Rule(
        # Its norms of queries and keys are over all heads together: no head is apart from others.
        ("olmo2",),
        (
            Pattern("columns", ("embed_tokens",)),
            Pattern("columns", ("self_attn.o_proj",), block="layers.*"),
            Pattern("columns", ("mlp.down_proj",), block="layers.*"),
            Pattern("neurons", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",), "layers.*"),
        ),
    ),
    Rule(
        # A unit is the neuron of that number in all experts of a layer.
        ("mixtral", "qwen2_moe", "qwen3_moe"),
        (
            Pattern("columns", ("embed_tokens",)),
            Pattern("columns", ("self_attn.o_proj",), block="layers.*"),
            Pattern("heads", attention("self_attn")[0], ("self_attn.o_proj",), "layers.*",
                    units=_KEY_VALUE),
            Pattern("neurons", ("mlp.experts.gate_up_proj@1",), ("mlp.experts.down_proj@2",),
                    "layers.*", fused=2, name="experts", optional=True),
            Pattern("neurons", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                    ("mlp.shared_expert.down_proj",), "layers.*", name="shared", optional=True),
            Pattern("neurons", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",), "layers.*",
                    optional=True),
        ),
    ),
    Rule(
        ("wav2vec2", "hubert"),
        block("encoder.layers.*", *attention("attention"), ("feed_forward.intermediate_dense",),
              "feed_forward.output_dense"),
    ),
)  # fmt: skip
