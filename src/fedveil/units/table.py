"""The units of the transformer families, one entry each (names as in transformers 5).

"heads" and "neurons" patterns say what computes a unit (outputs) and what reads it (inputs).
"columns" patterns are the places of the FedQSN paper (arXiv 2508.18911): the embedding, the
attention's output projection and the MLP's output projection. All three write into the residual
stream, so a hidden column is a zero added to the stream; layer norms further on act on the stream
and belong to no unit. Embedding columns of a tied embedding are skipped by `fedveil.units.match`.
"""

from __future__ import annotations

from fedveil.units.rule import Pattern, Rule
from fedveil.units.table_text import TEXT_RULES
from fedveil.units.table_vision import VISION_RULES

_BERT = Rule(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    patterns=(
        # The paper masks after the embedding's LayerNorm. Its entries j are all that still carries
        # column j behind it; the embeddings' columns j go too, so that they need not be sent.
        Pattern(
            "columns",
            ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"),
            block="embeddings",
        ),
        Pattern("columns", ("attention.output.dense",), block="encoder.layer.*"),
        Pattern("columns", ("output.dense",), block="encoder.layer.*"),
        Pattern(
            "heads",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
            block="encoder.layer.*",
            units="num_attention_heads",
        ),
        Pattern("neurons", ("intermediate.dense",), ("output.dense",), block="encoder.layer.*"),
    ),
)

_DISTILBERT = Rule(
    model_types=("distilbert",),
    patterns=(
        Pattern(
            "columns",
            ("word_embeddings", "position_embeddings", "LayerNorm"),
            block="embeddings",
        ),
        Pattern("columns", ("attention.out_lin",), block="transformer.layer.*"),
        Pattern("columns", ("ffn.lin2",), block="transformer.layer.*"),
        Pattern(
            "heads",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            ("attention.out_lin",),
            block="transformer.layer.*",
            units="num_attention_heads",
        ),
        Pattern("neurons", ("ffn.lin1",), ("ffn.lin2",), block="transformer.layer.*"),
    ),
)

_GPT2 = Rule(
    model_types=("gpt2",),
    patterns=(
        # As in the paper's code, the position embedding stays: it is added behind the mask.
        Pattern("columns", ("wte",)),
        Pattern("columns", ("attn.c_proj",), block="h.*"),
        Pattern("columns", ("mlp.c_proj",), block="h.*"),
        Pattern(
            "heads",
            ("attn.c_attn",),
            ("attn.c_proj",),
            block="h.*",
            units="num_attention_heads",
            fused=3,
        ),
        Pattern("neurons", ("mlp.c_fc",), ("mlp.c_proj",), block="h.*"),
    ),
)

_LLAMA = Rule(
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "cohere",
        "granite",
        "olmo",
    ),
    patterns=(
        Pattern("columns", ("embed_tokens",)),
        Pattern("columns", ("self_attn.o_proj",), block="layers.*"),
        Pattern("columns", ("mlp.down_proj",), block="layers.*"),
        # Grouped-query attention: a unit is a key-value head with all queries that read it.
        # The q_norm and k_norm of qwen3 are shared by all heads, so they belong to no unit.
        Pattern(
            "heads",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            block="layers.*",
            units="num_key_value_heads",
        ),
        Pattern("neurons", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",), block="layers.*"),
    ),
)

_T5 = Rule(
    model_types=("t5", "mt5", "longt5"),
    patterns=(
        Pattern("columns", ("shared",)),
        Pattern("columns", ("SelfAttention.o",), block="block.*.layer.*"),
        Pattern("columns", ("LocalSelfAttention.o",), block="block.*.layer.*", optional=True),
        Pattern("columns", ("EncDecAttention.o",), block="block.*.layer.*", optional=True),
        Pattern("columns", ("DenseReluDense.wo",), block="block.*.layer.*"),
        # relative_attention_bias sits in block 0 but serves head h of every block: not cut.
        Pattern(
            "heads",
            ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
            ("SelfAttention.o",),
            block="block.*.layer.*",
            units="num_attention_heads",
        ),
        Pattern(
            "heads",
            ("LocalSelfAttention.q", "LocalSelfAttention.k", "LocalSelfAttention.v"),
            ("LocalSelfAttention.o",),
            block="block.*.layer.*",
            units="num_attention_heads",
            optional=True,
        ),
        Pattern(
            "heads",
            ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"),
            ("EncDecAttention.o",),
            block="block.*.layer.*",
            units="num_attention_heads",
            optional=True,
        ),
        Pattern(
            "neurons",
            ("DenseReluDense.wi",),
            ("DenseReluDense.wo",),
            block="block.*.layer.*",
            optional=True,
        ),
        Pattern(
            "neurons",
            ("DenseReluDense.wi_0", "DenseReluDense.wi_1"),
            ("DenseReluDense.wo",),
            block="block.*.layer.*",
            optional=True,
        ),
    ),
    shared=("relative_attention_bias",),
)

_VIT = Rule(
    model_types=("vit",),
    patterns=(
        Pattern(
            "columns",
            ("patch_embeddings.projection", "cls_token", "position_embeddings"),
            block="embeddings",
        ),
        Pattern("columns", ("attention.o_proj",), block="layers.*"),
        Pattern("columns", ("mlp.fc2",), block="layers.*"),
        Pattern(
            "heads",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            ("attention.o_proj",),
            block="layers.*",
            units="num_attention_heads",
        ),
        Pattern("neurons", ("mlp.fc1",), ("mlp.fc2",), block="layers.*"),
    ),
)

RULES = (_BERT, _DISTILBERT, _GPT2, _LLAMA, _T5, _VIT, *TEXT_RULES, *VISION_RULES)
