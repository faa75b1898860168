"""Tiny transformers with random weights, and what their units are, told without any rule.

Each family names layers by attribute access from a block, so that the tests do not repeat the
mistakes of the rules' own names and axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

WIDTH, HEADS, HIDDEN, VOCABULARY = 8, 4, 6, 11

Layers = tuple[list[Any], Any]


@dataclass(frozen=True)
class Family:
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    blocks: Callable[[Any], list[Any]]
    heads: Callable[[Any], list[Layers]]  # of one block: (query, key, value), output
    mlp: Callable[[Any], list[Layers]]
    embedding: Callable[[Any], Any] | None  # what puts out the embedding columns
    units: int = HEADS


def randomise(model: Any, seed: int = 0) -> Any:
    """Fill every parameter and running statistic, so that nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.empty_like(tensor).normal_(0.0, 0.5, generator=generator))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model.eval()


def _config(**changes: object) -> dict[str, object]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 12,
        "num_labels": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def _t5_tokens() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"].flip(1)}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))}


def _bert(name: str, prefix: str) -> Family:
    config, model = getattr(transformers, f"{name}Config"), f"{name}ForSequenceClassification"
    extra = {"embedding_size": 4} if name == "Electra" else {}
    return Family(
        lambda: getattr(transformers, model)(config(**_config(**extra))),
        _tokens,
        lambda m: list(getattr(m, prefix).encoder.layer),
        lambda b: [
            (
                [b.attention.self.query, b.attention.self.key, b.attention.self.value],
                b.attention.output.dense,
            )
        ],
        lambda b: [([b.intermediate.dense], b.output.dense)],
        lambda m: getattr(m, prefix).embeddings,
    )


def _distilbert() -> Family:
    config = transformers.DistilBertConfig(
        dim=WIDTH, hidden_dim=HIDDEN, n_layers=2, n_heads=HEADS, vocab_size=VOCABULARY
    )
    return Family(
        lambda: transformers.DistilBertForSequenceClassification(config),
        _tokens,
        lambda m: list(m.distilbert.transformer.layer),
        lambda b: [
            ([b.attention.q_lin, b.attention.k_lin, b.attention.v_lin], b.attention.out_lin)
        ],
        lambda b: [([b.ffn.lin1], b.ffn.lin2)],
        lambda m: m.distilbert.embeddings,
    )


def _gpt2(model: str, *, tied: bool) -> Family:
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_positions=12,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return Family(
        lambda: getattr(transformers, model)(config),
        _tokens,
        lambda m: list(m.transformer.h),
        lambda b: [([b.attn.c_attn], b.attn.c_proj)],
        lambda b: [([b.mlp.c_fc], b.mlp.c_proj)],
        None if tied else lambda m: m.transformer.wte,
    )


def _llama(name: str, *, tied: bool = False, **changes: object) -> Family:
    config = getattr(transformers, f"{name}Config")
    settings = _config(num_key_value_heads=2, tie_word_embeddings=tied, **changes)
    return Family(
        lambda: getattr(transformers, f"{name}ForCausalLM")(config(**settings)),
        _tokens,
        lambda m: list(m.model.layers),
        lambda b: [
            ([b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj], b.self_attn.o_proj)
        ],
        lambda b: [([b.mlp.gate_proj, b.mlp.up_proj], b.mlp.down_proj)],
        None if tied else lambda m: m.model.embed_tokens,
        units=2,
    )


def _t5(feed_forward: str) -> Family:
    config = transformers.T5Config(
        d_model=WIDTH,
        d_kv=3,
        d_ff=HIDDEN,
        num_layers=2,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )

    def attention(block: Any) -> list[Layers]:
        found = [getattr(x, "SelfAttention", None) for x in block.layer]
        found += [getattr(x, "EncDecAttention", None) for x in block.layer]
        return [([a.q, a.k, a.v], a.o) for a in found if a is not None]

    def mlp(block: Any) -> list[Layers]:
        dense = block.layer[-1].DenseReluDense
        return [([dense.wi_0, dense.wi_1] if hasattr(dense, "wi_0") else [dense.wi], dense.wo)]

    return Family(
        lambda: transformers.T5ForConditionalGeneration(config),
        _t5_tokens,
        lambda m: [*m.encoder.block, *m.decoder.block],
        attention,
        mlp,
        None,
    )


def _vit() -> Family:
    settings = _config(image_size=4, patch_size=2)
    del settings["vocab_size"], settings["max_position_embeddings"]
    return Family(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**settings)),
        _pixels,
        lambda m: list(m.vit.layers),
        lambda b: [
            ([b.attention.q_proj, b.attention.k_proj, b.attention.v_proj], b.attention.o_proj)
        ],
        lambda b: [([b.mlp.fc1], b.mlp.fc2)],
        lambda m: m.vit.embeddings,
    )


FAMILIES: dict[str, Family] = {
    "bert": _bert("Bert", "bert"),
    "roberta": _bert("Roberta", "roberta"),
    "xlm-roberta": _bert("XLMRoberta", "roberta"),
    "camembert": _bert("Camembert", "roberta"),
    "electra": _bert("Electra", "electra"),
    "distilbert": _distilbert(),
    "gpt2-lm": _gpt2("GPT2LMHeadModel", tied=True),
    "gpt2-untied": _gpt2("GPT2LMHeadModel", tied=False),
    "llama": _llama("Llama", attention_bias=True, mlp_bias=True),
    "llama-tied": _llama("Llama", tied=True),
    "mistral": _llama("Mistral", head_dim=4),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3", head_dim=4),
    "smollm3": _llama("SmolLM3"),
    "t5": _t5("relu"),
    "t5-gated": _t5("gated-gelu"),
    "vit": _vit(),
}
