"""The server adds; it replaces nothing and quantizes nothing in place. Means are recomputed here
from the kept bytes with safetensors and json alone."""

import json

import pytest
import torch
from safetensors.torch import load

from fedveil import FedAvg, FedQSN
from fedveil.state import read_state
from fedveil.units import find_units
from toys import CHOICES, SECRET, Nudge, bare, federation, mlp, reply_of, same, snapshot, weights

SCHEMES = [
    FedAvg(),
    FedQSN(bits=2),
    FedQSN(bits=4, units="neurons", policy="fresh", draw="bernoulli"),
    FedQSN.paper(bits=3),
    FedQSN(units="columns", unbiased=True, bits=None),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_round_in_which_nobody_learns_changes_no_bit(build, scheme):
    model = build()
    server = scheme.server(model, SECRET)
    for number in (1, 2):
        server.begin_round(number)
        for client in "abc":
            reply = reply_of(scheme, server.release(client), bare(model), Nudge(size=0.0))
            assert reply.sections == {}
            server.absorb(client, reply, 4.0)
        server.end_round()
    assert same(server.final(), weights(model))


def test_a_round_without_any_answer_changes_no_bit(build):
    server = FedQSN(bits=2).server(build(), SECRET)
    server.begin_round(1)
    server.release("a")
    assert server.end_round() == {"clients": 0, "update_norm": 0.0}
    assert same(server.final(), weights(build()))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("average", ["holders", "participants"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_global_model_moves_by_the_mean_of_the_updates(
    build, choice, average, unbiased, tmp_path
):
    scheme = FedQSN(
        server_mask=0.25, client_mask=0.4, bits=3, units=choice, policy="fresh",
        average=average, unbiased=unbiased,
    )  # fmt: skip
    model = build()
    result = federation(model, scheme=scheme, out=tmp_path, keep_messages=True).run(1)
    mean = recomputed(model, tmp_path / "messages" / "round-000001", choice, average)
    before, after = weights(model), weights(result.global_model)
    for name, step in mean.items():
        expected = (before[name].double() + step).float()
        torch.testing.assert_close(after[name], expected, rtol=2e-6, atol=2e-7)
    assert not same(before, after)


def recomputed(model, folder, choice, average):
    """Mean update per tensor, float64, zero where nobody held an element."""
    shapes = {n: t.shape for n, t in read_state(model).items() if t.is_floating_point()}
    sums = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    held = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    total = 0.0
    for path in sorted(folder.glob("*.update.safetensors")):
        proxy_header, proxy = opened(path.with_name(path.name.replace("update", "proxy")))
        header, update = opened(path)
        weight = header["scalars"]["examples"]
        total += weight
        masks, factors = cut(model, choice, proxy_header, proxy, shapes)
        for name, shape in shapes.items():
            if average == "holders":
                held[name] += weight * masks[name]
            if f"t:{name}" in update:
                placed = torch.zeros(shape, dtype=torch.float64)
                placed[masks[name]] = update[f"t:{name}"].double().flatten()
                sums[name] += weight * placed / factors[name]
    if average == "participants":
        held = {n: torch.full(s, total, dtype=torch.float64) for n, s in shapes.items()}
    return {n: torch.where(held[n] > 0, sums[n] / held[n].clamp(min=1), 0.0) for n in shapes}


def opened(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["fedveil"]), load(data)


def cut(model, choice, header, tensors, shapes):
    """Which elements the client held, and by what their updates are to be divided."""
    masks = {n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()}
    factors = {n: torch.ones(s, dtype=torch.float64) for n, s in shapes.items()}
    for group in find_units(model, choice):
        bitmap = tensors[f"i:units/{group.name}"].tolist()
        scale = header["sections"][f"units/{group.name}"]["scale"]
        for part in (part for part in group.slices if part.tensor in shapes):
            for unit in range(group.size):
                at = (part.axis, part.offset + unit * part.width, part.width)
                if not bitmap[unit // 8] >> unit % 8 & 1:
                    masks[part.tensor].narrow(*at).fill_(False)
                elif part.scaled:
                    factors[part.tensor].narrow(*at).mul_(scale)
    return masks, factors


def test_what_came_back_replaces_nothing():
    # At 2 bits a proxy is far from the model: 1e-3 of training must not bring that distance in.
    scheme, model = FedQSN(bits=2, server_mask=0.0, client_mask=0.0), mlp()
    server = scheme.server(model, SECRET)
    server.begin_round(1)
    proxy = server.release("a")
    before = snapshot(server.state().tensors)
    loss_of_bits = (proxy.sections["3.weight"].dequantize() - before["3.weight"]).abs().max()
    server.absorb("a", reply_of(scheme, proxy, bare(model), Nudge(size=1e-3)), 1.0)
    server.end_round()
    moved = (server.state().tensors["3.weight"] - before["3.weight"]).abs().max()
    assert 0 < moved < 0.01 < 0.1 < loss_of_bits
