"""The units of families of transformers' models that see, one entry each."""

from __future__ import annotations

from fedveil.units.rule import Pattern, Rule
from fedveil.units.table_text import attention, block

_TABLE = "attention.relative_position_bias.relative_position_bias_table"
_OWN_TABLE = "relative_position_bias.relative_position_bias_table?"
_HEADS, _OUTPUT = attention("attention", "o_proj")


def _channels(number: int) -> Pattern:
    """From one convolution of a block, with its batch norm, to the next, if there is one."""
    outputs = (f"layer.{number}.convolution", f"layer.{number}.normalization")
    reader = (f"layer.{number + 1}.convolution?",)
    return Pattern("channels", outputs, reader, "layers.*", name=f"layer.{number}", optional=True)


def _last(number: int) -> Pattern:
    outputs = (f"layer.{number}.convolution", f"layer.{number}.normalization")
    return Pattern("columns", outputs, block="layers.*", optional=True)


VISION_RULES = (
    Rule(
        ("deit",),
        (
            Pattern(
                "columns",
                ("patch_embeddings.projection", "cls_token", "distillation_token?",
                 "position_embeddings"),
                block="embeddings",
            ),
            *block("layers.*", _HEADS, _OUTPUT, ("mlp.fc1",), "mlp.fc2"),
        ),
    ),
    Rule(
        ("beit",),
        # A bias of positions has one number per head, and each layer its own, or all share one.
        block("layers.*", (*_HEADS, _OWN_TABLE), _OUTPUT, ("mlp.fc1",), "mlp.fc2"),
        shared=("shared_position_bias",),
    ),
    Rule(
        ("dinov2",),
        (
            Pattern("columns", (_OUTPUT, "layer_scale1.lambda1"), block="encoder.layer.*"),
            Pattern("columns", ("mlp.fc2", "layer_scale2.lambda1"), block="encoder.layer.*",
                    optional=True),
            Pattern("heads", _HEADS, (_OUTPUT,), "encoder.layer.*", units="num_attention_heads"),
            Pattern("neurons", ("mlp.fc1",), ("mlp.fc2",), "encoder.layer.*", optional=True),
            Pattern("columns", ("mlp.down_proj", "layer_scale2.lambda1"), block="encoder.layer.*",
                    optional=True),
            Pattern("neurons", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
                    "encoder.layer.*", optional=True),
        ),
    ),
    Rule(
        # Each stage has a number of heads of its own: that of its bias of positions.
        ("swin",),
        (
            Pattern("columns", (_OUTPUT,), block="blocks.*"),
            Pattern("columns", ("mlp.fc2",), block="blocks.*"),
            Pattern("heads", (_TABLE, *_HEADS), (_OUTPUT,), "blocks.*"),
            Pattern("neurons", ("mlp.fc1",), ("mlp.fc2",), "blocks.*"),
        ),
    ),
    Rule(
        ("segformer",),
        (
            Pattern("columns", (_OUTPUT,), block="blocks.*"),
            Pattern("columns", ("mlp.fc2",), block="blocks.*"),
            Pattern("neurons", ("mlp.fc1", "mlp.dwconv.dwconv"), ("mlp.fc2",), "blocks.*"),
        ),
    ),
    Rule(
        ("convnext",),
        (
            Pattern("columns", ("pwconv2", "layer_scale_parameter?"), block="layers.*"),
            Pattern("neurons", ("pwconv1",), ("pwconv2",), "layers.*"),
        ),
    ),
    Rule(("resnet",), (_channels(0), _channels(1), _last(1), _last(2))),
    Rule(
        ("clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"),
        block("layers.*", *attention("self_attn"), ("mlp.fc1",), "mlp.fc2"),
    ),
)  # fmt: skip
