"""One message, byte for byte, as `docs/wire-format.md` takes it apart."""

import hashlib
import json

import torch
from wire_samples import same_message

from fedveil.quantization import quantize
from fedveil.wire import Message, UnitIndex

GOLDEN = bytes.fromhex(
    """
    58020000000000007b225f5f6d657461646174615f5f223a7b226665647665696c223a227b5c22636c69656e
    745c223a5c22636c696e69632d325c222c5c226469676573745c223a5c226230363330386565656465363033
    6461383761626232613430333034366239615c222c5c226b696e645c223a5c2270726f78795c222c5c22726f
    756e645c223a372c5c227363616c6172735c223a7b5c226c725c223a302e3030317d2c5c22736368656d655c
    223a5c2266656471736e5c222c5c2273656374696f6e735c223a7b5c226d6c705c223a7b5c227363616c655c
    223a322e352c5c2273697a655c223a31312c5c22747970655c223a5c22756e6974735c227d2c5c22775c223a
    7b5c22617869735c223a302c5c22626974735c223a342c5c22626c6f636b5c223a322c5c22646f75626c655c
    223a747275652c5c2273686170655c223a5b332c335d2c5c22747970655c223a5c227175616e74697a65645c
    227d7d2c5c2276657273696f6e5c223a317d227d2c22753a77223a7b226474797065223a22463332222c2273
    68617065223a5b335d2c22646174615f6f666673657473223a5b302c31325d7d2c22693a6d6c70223a7b2264
    74797065223a225538222c227368617065223a5b325d2c22646174615f6f666673657473223a5b31322c3134
    5d7d2c22713a77223a7b226474797065223a225538222c227368617065223a5b332c325d2c22646174615f6f
    666673657473223a5b31342c32305d7d2c22733a77223a7b226474797065223a225538222c22736861706522
    3a5b332c325d2c22646174615f6f666673657473223a5b32302c32365d7d7d20202020200000803f00000000
    0000404009042f0f7707e00fff400000ff55
    """
)


def golden_message():
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]])
    return Message(
        kind="proxy",
        scheme="fedqsn",
        round=7,
        client="clinic-2",
        sections={
            "mlp": UnitIndex(11, torch.tensor([0, 3, 10]), scale=2.5),
            "w": quantize(weight, bits=4, axis=0, block=2),
        },
        scalars={"lr": 0.001},
    )


def test_these_bytes_are_written():
    assert golden_message().to_bytes() == GOLDEN


def test_these_bytes_are_read():
    assert same_message(Message.from_bytes(GOLDEN), golden_message())


def test_a_reader_needs_nothing_of_fedveil():
    """The steps of the document, on the bytes alone."""
    length = int.from_bytes(GOLDEN[:8], "little")
    header, body = GOLDEN[8 : 8 + length], GOLDEN[8 + length :]
    assert (length, len(body)) == (600, 26)
    unit_scales, bitmap, codes, scales = body[:12], body[12:14], body[14:20], body[20:]
    assert [hex(octet) for octet in bitmap] == ["0x9", "0x4"]
    assert codes.hex(" ", 2) == "2f0f 7707 e00f"
    assert list(scales) == [255, 64, 0, 0, 255, 85]
    assert torch.frombuffer(bytearray(unit_scales), dtype=torch.float32).tolist() == [1.0, 0.0, 3.0]

    text = json.loads(header)["__metadata__"]["fedveil"]
    digest = text.split('"digest":"')[1][:32]
    pieces = [
        text.replace(f'"digest":"{digest}",', "").encode(),
        b'["i:mlp","U8",[2]]',
        bitmap,
        b'["q:w","U8",[3,2]]',
        codes,
        b'["s:w","U8",[3,2]]',
        scales,
        b'["u:w","F32",[3]]',
        unit_scales,
    ]
    framed = b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces)
    assert hashlib.blake2b(framed, digest_size=16).hexdigest() == digest
