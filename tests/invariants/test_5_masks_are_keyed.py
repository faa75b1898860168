"""Only the federation's secret decides what is withheld, and the secret shows up nowhere."""

import base64
import logging
import pickle
import random
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch

import fedveil.federation.facade as facade
from fedveil import CheckpointError, FedQSN, FedveilError, Secret
from fedveil.masking import Masking, Masks
from fedveil.units import Slice, UnitGroup
from fedveil.wire import Message
from toys import FAST, federation, files, mlp, rows, withheld

GROUP = UnitGroup("mlp", "neurons", 12, (Slice("w", 0),))
SCHEME = FedQSN(server_mask=0.25, client_mask=0.25, units="neurons", policy="fresh")


def drawn(secret, **settings):
    masks = Masks([GROUP], Masking(server=0.25, client=0.4, **settings), secret)
    clients = [masks.release(c, n)["mlp"].units.tolist() for c in ("a", "b") for n in (1, 2)]
    return [masks.server()["mlp"].tolist(), *clients]


def test_the_masks_of_a_known_secret_are_pinned():
    zero = Secret(bytes(32))
    assert drawn(zero, policy="fresh") == EXACT
    assert drawn(zero, policy="fresh", draw="bernoulli") == BERNOULLI
    assert drawn(zero, policy="grouped")[1] == GROUPED


EXACT = [
    [1, 2, 3, 5, 6, 7, 8, 9, 10],
    [1, 5, 6, 8, 9],
    [1, 6, 8, 9, 10],
    [1, 2, 6, 9, 10],
    [1, 3, 5, 6, 9],
]
BERNOULLI = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    [0, 1, 2, 3, 4, 5, 6, 8, 9, 10],
    [1, 2, 4, 5, 6, 8, 9, 10],
    [0, 1, 2, 6, 9, 10],
    [0, 1, 3, 5, 6, 9],
]
GROUPED = [1, 3, 7, 8, 10]


@pytest.mark.parametrize("policy", ["fresh", "sticky", "grouped"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_another_secret_gives_other_masks(policy, draw):
    options = {"policy": policy, "draw": draw}
    all_masks = [str(drawn(Secret(bytes([i]) * 32), **options)) for i in range(20)]
    assert len(set(all_masks)) == 20


def test_another_process_draws_the_same_masks():
    code = (
        "from fedveil import Secret; from fedveil.masking import Masking, Masks;"
        "from fedveil.units import Slice, UnitGroup;"
        "g = UnitGroup('mlp', 'neurons', 12, (Slice('w', 0),));"
        "m = Masks([g], Masking(server=0.25, client=0.4, policy='fresh'), Secret(bytes(32)));"
        "print([m.release(c, n)['mlp'].units.tolist() for c in 'ab' for n in (1, 2)])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout.strip() == str(drawn(Secret(bytes(32)), policy="fresh")[1:])


def masks_of_a_run(folder, seed, secret):
    federation(mlp(), scheme=SCHEME, seed=seed, secret=secret, out=folder, keep_messages=True).run(
        1
    )
    proxies = [p.read_bytes() for p in sorted(folder.rglob("*.proxy.safetensors"))]
    return [withheld(Message.from_bytes(p), mlp(), "neurons")["3.weight"].tolist() for p in proxies]


def test_no_guessable_seed_has_an_effect(tmp_path):
    secrets = Secret(bytes(32)), Secret(b"\1" * 32)
    found = []
    for number, (seed, secret) in enumerate([(0, 0), (1, 0), (0, 1)]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(masks_of_a_run(tmp_path / str(number), seed, secrets[secret]))
    assert found[0] == found[1] != found[2]


def spellings(value: bytes) -> list[bytes]:
    """The secret and recognisable pieces of it."""
    texts = [value.hex(), value.hex().upper(), base64.b64encode(value).decode()[:40]]
    texts += [base64.urlsafe_b64encode(value).decode()[:40], repr(value)[2:-1], str(list(value))]
    return [value, value[:16], value[16:], value[::-1], *(text.encode() for text in texts)]


def test_the_secret_is_written_shown_and_handed_out_nowhere(tmp_path, monkeypatch, capsys, caplog):
    value = bytes(torch.randint(0, 256, (32,)).tolist())
    secret, shown = Secret(value), []
    crew = facade.workers  # type: ignore[attr-defined]

    def spy(place, workers):
        shown.append(pickle.dumps(place))
        return crew(place, workers)

    monkeypatch.setattr(facade, "workers", spy)
    caplog.set_level(logging.DEBUG)
    bad = [{"image": "no image", "label": 0}]
    run = federation(
        mlp(), scheme=SCHEME, secret=secret, out=tmp_path, keep_messages=True, test=rows(3)
    )
    result = run.run(2)
    shown += files(tmp_path).values()
    shown += [
        repr(thing).encode() for thing in (run, result, secret, vars(run), run.configuration())
    ]
    for wrong in (
        lambda: federation(mlp(), secret=secret, out=tmp_path).run(2),
        lambda: federation(mlp(), secret=secret, out=tmp_path).run(2, resume=True),
        lambda: federation(mlp(), secret=secret, clients={"a": bad}),
        lambda: Secret(value[:31]),
        lambda: Secret(value.hex()),  # type: ignore[arg-type]
        lambda: federation(mlp(), secret=secret, training=FAST, scheme=FedQSN(units="x")),
    ):
        with pytest.raises(FedveilError) as caught:
            wrong()
        shown.append("".join(traceback.format_exception(caught.value)).encode())
        shown.append(repr(caught.value).encode() + pickle.dumps(caught.value))
    printed = capsys.readouterr()
    shown += [printed.out.encode(), printed.err.encode(), caplog.text.encode()]
    assert sum(map(len, shown)) > 100_000
    for spelling in spellings(value):
        assert not any(spelling in text for text in shown)


def test_another_secret_is_refused_on_resuming_without_being_told(tmp_path):
    secrets = [Secret(b"A" * 32), Secret(b"B" * 32)]
    federation(mlp(), secret=secrets[0], out=tmp_path).run(1)
    with pytest.raises(CheckpointError, match="'secret' differs") as caught:
        federation(mlp(), secret=secrets[1], out=tmp_path).run(2, resume=True)
    assert "AAAA" not in str(caught.value)
    assert b"AAAA".hex() not in str(caught.value)
