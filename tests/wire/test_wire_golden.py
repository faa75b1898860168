"""One message, byte for byte, as `docs/wire-format.md` takes it apart."""

import json

import safetensors.torch
import torch
import xxhash
from wire_samples import same_message

from fedveil.quantization import quantize
from fedveil.wire import Message, UnitIndex

GOLDEN = bytes.fromhex(
    """
    58020000000000007b225f5f6d657461646174615f5f223a7b226665647665696c223a227b5c22636c69
    656e745c223a5c22636c696e69632d325c222c5c226469676573745c223a5c2239653135346131336233
    306363643861626561646664656339386665393332635c222c5c226b696e645c223a5c2270726f78795c
    222c5c22726f756e645c223a372c5c227363616c6172735c223a7b5c226c725c223a302e3030317d2c5c
    22736368656d655c223a5c2266656471736e5c222c5c2273656374696f6e735c223a7b5c226d6c705c22
    3a7b5c227363616c655c223a322e352c5c2273697a655c223a31312c5c22747970655c223a5c22756e69
    74735c227d2c5c22775c223a7b5c22617869735c223a302c5c22626974735c223a342c5c22626c6f636b
    5c223a322c5c22646f75626c655c223a747275652c5c2273686170655c223a5b332c335d2c5c22747970
    655c223a5c227175616e74697a65645c227d7d2c5c2276657273696f6e5c223a327d227d2c22753a7722
    3a7b226474797065223a22463332222c227368617065223a5b335d2c22646174615f6f66667365747322
    3a5b302c31325d7d2c22693a6d6c70223a7b226474797065223a225538222c227368617065223a5b325d
    2c22646174615f6f666673657473223a5b31322c31345d7d2c22713a77223a7b226474797065223a2255
    38222c227368617065223a5b332c325d2c22646174615f6f666673657473223a5b31342c32305d7d2c22
    733a77223a7b226474797065223a225538222c227368617065223a5b332c325d2c22646174615f6f6666
    73657473223a5b32302c32365d7d7d20202020200000803f000000000000404009042f0f7707e00fff40
    0000ff55
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
    place = GOLDEN.index(b'\\"digest\\":\\"') + len(b'\\"digest\\":\\"')
    assert GOLDEN[place : place + 32].decode() == digest
    start = 8 + length
    blank = GOLDEN[:place] + b"0" * 32 + GOLDEN[place + 32 : start]
    tensors = b"".join(xxhash.xxh3_128(t).digest() for t in (unit_scales, bitmap, codes, scales))
    assert xxhash.xxh3_128(blank + tensors).hexdigest() == digest


def test_it_is_what_the_safetensors_library_writes():
    tensors = safetensors.torch.load(GOLDEN)
    length = int.from_bytes(GOLDEN[:8], "little")
    assert (
        safetensors.torch.save(tensors, json.loads(GOLDEN[8 : 8 + length])["__metadata__"])
        == GOLDEN
    )
