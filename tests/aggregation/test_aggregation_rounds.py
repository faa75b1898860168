"""Whole rounds with RegMean, from the bytes on the wire to the step of the global model, computed
again in float64."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from aggregation_samples import Oracle, common_step, exact_step, shaped

from fedveil import FedAvg, FedQSN, RegMean
from fedveil.state import read_state
from fedveil.units import find_units
from fedveil.wire import Message, Statistics
from toys import (
    bare,
    bert,
    convnet,
    federation,
    files,
    gpt2,
    metrics,
    mlp,
    same,
    weights,
    withheld,
)  # fmt: skip

REGMEAN = RegMean(bits=None)
MASKS: dict[str, Any] = {"server_mask": 0.25, "client_mask": 0.25, "bits": 4, "units": "neurons"}
SCHEMES = {
    "fedavg": FedAvg(aggregation=REGMEAN),
    "grouped": FedQSN(**MASKS, aggregation=REGMEAN),
    "server mask": FedQSN(**{**MASKS, "client_mask": 0.0}, aggregation=REGMEAN),
    "fresh": FedQSN(**MASKS, policy="fresh", aggregation=REGMEAN),
    "columns": FedQSN(**{**MASKS, "units": "columns"}, unbiased=True, aggregation=REGMEAN),
    "blocks": FedQSN(**MASKS, aggregation=RegMean(bits=None, size=50)),
    # Far enough from singular for the coarser correlations to stay a second moment.
    "8 bits": FedQSN(
        server_mask=0.05, client_mask=0.05, aggregation=RegMean(off_diagonal=0.5, ridge=0.05)
    ),
}
MODELS = {"mlp": mlp, "convnet": convnet, "bert": bert, "gpt2": gpt2}


class Round:
    """One round of a federation, and what was kept of it."""

    def __init__(self, build, scheme, folder):
        self.scheme, self.model, self.before = scheme, build(), weights(build())
        self.federation = federation(self.model, scheme=scheme, out=folder, keep_messages=True)
        result = self.federation.run(1)
        assert not result.rounds[0].failed
        self.after, self.weight = weights(result.global_model), result.rounds[0].examples
        read = lambda kind: {  # noqa: E731
            path.name.split(".")[0]: Message.from_bytes(path.read_bytes())
            for path in folder.rglob(f"*.{kind}.safetensors")
        }
        self.proxies, self.replies = read("proxy"), read("update")
        self.masks = {client: self.mask(proxy) for client, proxy in self.proxies.items()}
        self.modules = dict(self.model.named_modules())

    def mask(self, proxy):
        """True where an element was sent."""
        if self.scheme.name == "fedavg":
            return {n: torch.ones(t.shape, dtype=torch.bool) for n, t in self.before.items()}
        return {n: ~m for n, m in withheld(proxy, self.model, self.scheme.units).items()}

    def update(self, client, name):
        """One client's update at full size, float64."""
        full = torch.zeros(self.before[name].shape, dtype=torch.float64)
        section = self.replies[client].sections.get(name)
        if section is None:
            return None
        part = section.tensor.double() / self.factor(client, name)
        full[self.masks[client][name]] = part.flatten()
        return full

    def factor(self, client, name):
        """What the unbiased scaling multiplied this tensor's released part by."""
        if self.scheme.name == "fedavg":
            return 1.0
        groups = find_units(self.model, self.scheme.units)
        scaled = [g.name for g in groups if any(s.tensor == name and s.scaled for s in g.slices)]
        sections: Mapping[str, Any] = self.proxies[client].sections
        return math.prod(sections[f"units/{g}"].scale for g in scaled)

    def matrix(self, name, tensor):
        transposed = type(self.modules[name.removesuffix(".weight")]).__name__ == "Conv1D"
        return tensor.t() if transposed else tensor.flatten(1)

    def linear(self):
        """Layers that some client sent a Gram for."""
        scalars = {key for reply in self.replies.values() for key in reply.scalars}
        return sorted(key.removeprefix("gram/") for key in scalars if key.startswith("gram/"))

    def moment(self, client, name):
        """A Gram as sent, at full size, zero where inputs were withheld."""
        held = self.matrix(name, self.masks[client][name])
        inputs = held.any(0)
        reply = self.replies[client]
        source = reply.scalars[f"gram/{name}"]
        diagonal = reply.sections[f"gram/{source}/diagonal"].tensor.double()
        pairs: Any = reply.sections[f"gram/{source}/pairs"]
        pairs = pairs.tensor if isinstance(pairs, Statistics) else pairs.dequantize()
        positions = torch.nonzero(inputs).flatten()
        assert len(diagonal) == len(positions)
        # Pairs of one block only, in rows.
        width = len(inputs)
        count = -(-width // self.scheme.aggregation.size)
        block = torch.tensor(
            [sum(i >= round(width * k / count) for k in range(1, count)) for i in range(width)]
        )
        one, other = torch.triu_indices(len(positions), len(positions), 1)
        alike = block[positions[one]] == block[positions[other]]
        one, other = one[alike], other[alike]
        assert pairs.shape == (1, len(one))
        small = torch.diag(diagonal)
        small[one, other] = pairs[0].double() * (diagonal[one] * diagonal[other]).sqrt()
        small[other, one] = small[one, other]
        full = torch.zeros(width, width, dtype=torch.float64)
        full[positions[:, None], positions] = small
        return full, inputs


CASES = [(model, scheme) for model in MODELS for scheme in SCHEMES]


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def round_(request, tmp_path_factory):
    model, scheme = request.param
    return Round(MODELS[model], SCHEMES[scheme], tmp_path_factory.mktemp("round"))


def test_each_linear_layer_takes_the_step_of_its_equations(round_):
    assert len(round_.linear()) >= 3
    shared = round_.scheme.name == "fedavg" or round_.scheme.masking.is_shared
    moved = 0.0
    for name in round_.linear():
        members = []
        for client, reply in sorted(round_.replies.items()):
            if name not in reply.sections:
                continue
            moment, inputs = round_.moment(client, name)
            held = round_.matrix(name, round_.masks[client][name])
            assert torch.equal(held, held.any(1)[:, None] & inputs)
            update = round_.matrix(name, round_.update(client, name))
            gram = shaped(moment, round_.scheme.aggregation, inputs)
            members.append(Oracle(held.any(1), inputs, gram, update, float(round_.weight[client])))
        expected = exact_step(members) if shared else common_step(members)
        found = round_.matrix(name, round_.after[name].double() - round_.before[name].double())
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * scale + 1e-6)
        nobody = ~torch.stack([member.held for member in members]).any(0)
        assert not bool(found[nobody].any())
        moved = max(moved, scale)
    assert moved > 1e-4


def test_everything_else_takes_the_mean_of_its_holders(round_):
    for name, before in round_.before.items():
        if name in round_.linear() or not before.is_floating_point():
            continue
        total = torch.zeros(before.shape, dtype=torch.float64)
        weight = torch.zeros_like(total)
        for client in round_.replies:
            update = round_.update(client, name)
            total += 0.0 if update is None else round_.weight[client] * update
            weight += round_.weight[client] * round_.masks[client][name]
        expected = torch.where(weight > 0, total / weight, 0.0)
        found = round_.after[name].double() - before.double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_each_gram_is_that_of_the_trained_proxy_on_the_clients_data(round_):
    side, model = round_.scheme.client(), bare(round_.model)
    modules = dict(model.named_modules())
    tolerance = 1e-3 if round_.scheme.aggregation.bits is None else 3e-2
    for client, reply in round_.replies.items():
        side.load(round_.proxies[client], model)
        for name, tensor in read_state(model).items():
            if (update := reply.sections.get(name)) is not None:
                tensor[round_.masks[client][name]] += update.tensor.flatten()
        seen = {name: [] for name in round_.linear() if name in reply.sections}
        hooks = [
            modules[name.removesuffix(".weight")].register_forward_pre_hook(
                lambda module, inputs, rows=seen[name]: rows.append(inputs[0].detach())
            )
            for name in seen
        ]
        trainer = round_.federation._trainers[client]
        batch = trainer.task.collate(trainer._data.select(range(trainer.examples)))
        with torch.no_grad():
            trainer.task.loss(model.eval(), batch)
        for hook in hooks:
            hook.remove()
        for name, (inputs,) in seen.items():
            if inputs.dim() == 4:
                inputs = torch.nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2)
            rows = inputs.reshape(trainer.examples, -1, inputs.shape[-1]).double()
            exact = torch.einsum("epi,epj->ij", rows, rows) / (rows.shape[1] * len(rows))
            found, held = round_.moment(client, name)
            exact = exact * (held[:, None] & held)
            if round_.scheme.aggregation.size < len(exact):
                exact = torch.where(found != 0, exact, 0.0)
            error = float((found - exact).norm()) / max(1e-9, float(exact.norm()))
            assert error < tolerance, (client, name)


def test_kept_messages_hold_nothing_of_withheld_inputs(round_):
    for client, reply in round_.replies.items():
        grams = {n for n in reply.sections if n.startswith("gram/")}
        sources = {v for k, v in reply.scalars.items() if k.startswith("gram/")}
        assert grams == {f"gram/{n}/{part}" for n in sources for part in ("diagonal", "pairs")}
        for name in sources:
            released = int(round_.matrix(name, round_.masks[client][name]).any(0).sum())
            assert reply.sections[f"gram/{name}/diagonal"].tensor.shape == (released,)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_rounds_repeat_themselves_and_follow_one_another(model, tmp_path):
    scheme = FedQSN(aggregation="regmean", units="neurons", policy="fresh")
    folders = [tmp_path / "one", tmp_path / "other"]
    runs = [
        federation(MODELS[model](), scheme=scheme, out=folder, keep_messages=True).run(2)
        for folder in folders
    ]
    assert [len(record.bytes_up) for record in runs[0].rounds] == [3, 3]
    assert same(*(weights(run.global_model) for run in runs))
    assert files(folders[0] / "messages") == files(folders[1] / "messages")
    assert metrics(folders[0]) == metrics(folders[1])
    for tensor in weights(runs[0].global_model).values():
        assert bool(torch.isfinite(tensor).all())


def test_it_is_not_the_mean():
    finals = [
        federation(mlp(), scheme=FedAvg(aggregation=name)).run(1).global_model
        for name in ("mean", "regmean")
    ]
    one, other = (weights(model) for model in finals)
    assert {n for n in one if not torch.equal(one[n], other[n])} == {
        "1.weight", "3.weight", "5.weight"
    }  # fmt: skip
