"""Tiny models with random weights of all families of the table, and of some that have no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

_TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False}
_SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip
_SEEN = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_BOTH = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "vocab_size": 40,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12}  # fmt: skip


def _made(name: str, head: str, **settings: object) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, name + head)(config).eval()

    return build


def _text(name: str, head: str = "Model", **changes: object) -> Callable[[], Any]:
    return _made(name, head, **{**_TEXT, **changes})


def _grouped(name: str, head: str = "ForCausalLM", **changes: object) -> Callable[[], Any]:
    return _made(name, head, **{**_GROUPED, **changes})


def _clip(name: str = "CLIP") -> Callable[[], Any]:
    return _made(
        name, "Model", text_config={**_TEXT, "projection_dim": 8}, vision_config=_SEEN,
        projection_dim=8,
    )  # fmt: skip


def _clip_vision() -> Any:
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_SEEN)).eval()


def _gemma3() -> Any:
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GROUPED)).eval()


BOTH, MLP = "heads and neurons", "neurons"
KNOWN: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma": (BOTH, _grouped("Gemma")),
    "gemma2": (BOTH, _grouped("Gemma2")),
    "gemma3_text": (BOTH, _gemma3),
    "cohere": (BOTH, _grouped("Cohere")),
    "granite": (BOTH, _grouped("Granite")),
    "olmo": (BOTH, _grouped("Olmo")),
    "olmo2": (MLP, _grouped("Olmo2")),
    "phi": (BOTH, _grouped("Phi")),
    "phi3": (BOTH, _grouped("Phi3")),
    "starcoder2": (BOTH, _grouped("Starcoder2")),
    "mixtral": (BOTH, _grouped("Mixtral", **_EXPERTS)),
    "qwen2_moe": (BOTH, _grouped("Qwen2Moe", **_EXPERTS)),
    "qwen3_moe": (BOTH, _grouped("Qwen3Moe", **_EXPERTS)),
    "gpt_neox": (BOTH, _text("GPTNeoX", "ForCausalLM", tie_word_embeddings=False)),
    "bloom": (BOTH, _made("Bloom", "Model", hidden_size=16, n_layer=2, n_head=4, vocab_size=40)),
    "gptj": (BOTH, _made("GPTJ", "Model", n_embd=16, n_layer=2, n_head=4, n_inner=24, vocab_size=40,
                         n_positions=32, rotary_dim=4)),
    "opt": (BOTH, _text("OPT", "ForCausalLM", ffn_dim=24, word_embed_proj_dim=16)),
    "modernbert": (BOTH, _text("ModernBert", "ForSequenceClassification", cls_token_id=1,
                               sep_token_id=2)),
    "deberta": (BOTH, _text("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "deberta-plain": (BOTH, _text("Deberta")),
    "deberta-v2": (BOTH, _text("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "deberta-v3": (BOTH, _text("DebertaV2", "ForSequenceClassification", relative_attention=True,
                               pos_att_type=["c2p", "p2c"], share_att_key=True,
                               position_buckets=8, norm_rel_ebd="layer_norm")),
    "longformer": (BOTH, _text("Longformer", attention_window=8)),
    "mpnet": (BOTH, _text("MPNet")),
    "albert": (BOTH, _text("Albert", embedding_size=8)),
    "bart": (BOTH, _made("Bart", "ForConditionalGeneration", **_BOTH)),
    "bart-classifier": (BOTH, _made("Bart", "ForSequenceClassification", **_BOTH)),
    "mbart": (BOTH, _made("MBart", "ForConditionalGeneration", **_BOTH)),
    "pegasus": (BOTH, _made("Pegasus", "ForConditionalGeneration", **_BOTH)),
    "whisper": (BOTH, _made("Whisper", "ForConditionalGeneration", **_BOTH, num_mel_bins=8,
                            max_source_positions=10, max_target_positions=20)),
    "mt5": (BOTH, _made("MT5", "ForConditionalGeneration", d_model=16, d_kv=4, d_ff=24,
                        num_layers=1, num_heads=4, vocab_size=40, decoder_start_token_id=0)),
    "longt5": (BOTH, _made("LongT5", "ForConditionalGeneration", d_model=16, d_kv=4, d_ff=24,
                           num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0,
                           local_radius=4)),
    "wav2vec2": (BOTH, _text("Wav2Vec2", **_SPEECH)),
    "hubert": (BOTH, _text("Hubert", **_SPEECH)),
    "deit": (BOTH, _made("DeiT", "ForImageClassification", **_SEEN)),
    "beit": (BOTH, _made("Beit", "Model", **_SEEN, use_relative_position_bias=True)),
    "beit-shared": (BOTH, _made("Beit", "Model", **{**_SEEN, "num_hidden_layers": 1},
                                use_shared_relative_position_bias=True)),
    "dinov2": (BOTH, _made("Dinov2", "Model", **_SEEN)),
    "dinov2-gated": (BOTH, _made("Dinov2", "Model", **_SEEN, use_swiglu_ffn=True)),
    "swin": (BOTH, _made("Swin", "ForImageClassification", image_size=16, patch_size=2, embed_dim=8,
                         depths=[2, 1], num_heads=[2, 4], window_size=2)),
    "segformer": (MLP, _made("Segformer", "ForImageClassification", hidden_sizes=[8, 16],
                             depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2],
                             sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2],
                             mlp_ratios=[2, 2], decoder_hidden_size=8)),
    "convnext": (MLP, _made("ConvNext", "ForImageClassification", hidden_sizes=[8, 16],
                            depths=[1, 1], num_stages=2, image_size=16)),
    "resnet": ("channels", _made("ResNet", "ForImageClassification", embedding_size=8,
                                 hidden_sizes=[16, 32], depths=[1, 1])),
    "resnet-basic": ("channels", _made("ResNet", "ForImageClassification", embedding_size=8,
                                       hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "clip": (BOTH, _clip()),
    "siglip": (BOTH, _clip("Siglip")),
    "clip_vision_model": (BOTH, _clip_vision),
}  # fmt: skip
"""By name: which kinds of units the family has under "neurons", and a model."""
