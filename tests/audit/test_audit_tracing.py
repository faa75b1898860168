"""Whose proxy a file is; studies/tracing.py measures the same on more leaks."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from tracing_samples import ALTERATIONS, NETS, Scene, judge, look, proxy_of, toy_run, train

import toys
from fedveil import Secret
from fedveil.audit import Evidence
from fedveil.audit.tracing import trace
from fedveil.audit.tracing.chance import SURE, Chance
from fedveil.errors import AuditError, ConfigurationError
from fedveil.schemes import FedAvg, FedQSN


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """One federation of 20 clients per policy, made when it is asked for."""
    made = {}

    def scene(policy):
        if policy not in made:
            folder = tmp_path_factory.mktemp(policy)
            made[policy] = Scene(NETS["mlp"], policy, 1, folder)
        return made[policy]

    return scene


@pytest.fixture(params=["sticky", "fresh", "grouped"])
def scene(request, scenes):
    return scenes(request.param)


@pytest.mark.parametrize("holes", ["zeros", "base"])
@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_a_leak_is_traced_through_an_alteration(scene, alteration, holes):
    number = scene.leaks[0]
    fill = scene.base if holes == "base" else None
    state = ALTERATIONS[alteration](scene.proxy(number, holes=fill), scene)
    found = look(scene, state, holes == "base", alteration.startswith("npz"))
    assert judge(found, scene.clients_like(number)) == (True, False)


@pytest.mark.parametrize("holes", ["zeros", "base"])
@pytest.mark.parametrize("policy", ["sticky", "fresh"])
def test_all_members_of_a_blend_are_named(scenes, policy, holes):
    scene, chosen = scenes(policy), scenes(policy).leaks[:3]
    fill = scene.base if holes == "base" else None
    states = [scene.proxy(number, holes=fill) for number in chosen]
    blend = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    found = look(scene, blend, holes == "base")
    assert judge(found, *map(scene.clients_like, chosen)) == (True, False)
    assert all(0.2 < match.share < 0.5 for match in found.suspects)


def test_two_mask_groups_of_a_blend_are_both_named(scenes):
    scene = scenes("grouped")
    one = scene.leaks[0]
    other = next(n for n in range(40) if scene.clients_like(n) != scene.clients_like(one))
    states = [scene.proxy(number, holes=None) for number in (one, other)]
    found = look(scene, {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}, False)
    assert judge(found, scene.clients_like(one), scene.clients_like(other)) == (True, False)


@pytest.mark.parametrize("given", [False, True], ids=["without base", "with base"])
def test_nobody_is_accused_for_a_file_that_comes_from_no_proxy(scene, given):
    files = {
        "base": scene.base,
        "final": {name: scene.final[name] for name in scene.base},
        "unrelated": train(scene.net, None, 20, 5),
        "trained": train(scene.net, scene.base, 50, 6),
        "zeros": {name: torch.zeros_like(tensor) for name, tensor in scene.base.items()},
        "noise": {name: torch.randn(tensor.shape) for name, tensor in scene.base.items()},
        "nan": {name: torch.full_like(tensor, torch.nan) for name, tensor in scene.base.items()},
    }
    for name, state in files.items():
        found = look(scene, state, given)
        assert not found.suspects, name
        assert "nobody is accused" in found.sentence


def test_a_filled_file_without_the_base_is_not_traced_and_says_what_would_help(scenes):
    scene = scenes("sticky")
    found = look(scene, scene.proxy(0, holes=scene.base), False)
    assert not found.suspects
    assert "give that as base" in found.sentence


def test_fresh_masks_tell_client_and_round(scenes):
    scene = scenes("fresh")
    for number in scene.leaks:
        kept = scene.evidence.proxies()[number]
        (match,) = look(scene, scene.proxy(number, holes=None), False).suspects
        assert (match.clients, match.rounds) == ((kept.client,), (kept.round,))


def test_the_newest_values_of_all_rounds_are_traced_to_some_of_them(scenes):
    scene = scenes("fresh")
    number = max(scene.leaks, key=lambda n: len(scene.all_of(n)))
    every = scene.all_of(number)
    (match,) = look(scene, scene.proxy(*every, holes=None), False).suspects
    assert match.clients == (scene.evidence.proxies()[number].client,)
    assert set(match.rounds) <= {scene.evidence.proxies()[one].round for one in every}


def test_a_shared_mask_accuses_all_who_share_it_and_says_so(scenes):
    scene = scenes("grouped")
    found = look(scene, scene.proxy(0, holes=None), False)
    (match,) = found.suspects
    assert set(match.clients) == scene.clients_like(0)
    assert len(match.clients) > 1
    assert "cannot be told" in found.sentence


def test_a_leak_of_another_round_accuses_nobody(scenes):
    scene = scenes("fresh")
    number = next(n for n in scene.leaks if scene.evidence.proxies()[n].round == 1)
    found = trace(scene.evidence, scene.proxy(number, holes=None), rounds=[2, 3])
    assert not found.suspects
    assert {number for match in found.scores for number in match.rounds} <= {2, 3}


def test_withheld_units_may_be_missing_altogether(scenes):
    scene = scenes("sticky")
    number = scene.leaks[0]
    state = scene.proxy(number, holes=None)
    proxy = scene.evidence.open(scene.evidence.proxies()[number])
    shrunk = {name: proxy.selection.gather(name, tensor) for name, tensor in state.items()}
    assert shrunk["3.weight"].shape < state["3.weight"].shape
    found = look(scene, shrunk, False)
    assert judge(found, scene.clients_like(number)) == (True, False)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        (toys.bert, FedQSN(units="neurons", policy="sticky")),
        (toys.bert, FedQSN.paper()),
        (toys.gpt2, FedQSN(units="neurons", policy="fresh", bits=2)),
        (toys.convnet, FedQSN(policy="sticky", units="neurons")),
        (toys.mlp, FedQSN(policy="sticky", units="neurons", bits=None, draw="bernoulli")),
    ],
)
def test_other_networks_units_and_draws(tmp_path, model, scheme):
    evidence, base = toy_run(tmp_path, model(), scheme=scheme)
    for client in evidence.clients:
        found = trace(evidence, proxy_of(evidence, client, 2))
        assert [match.clients for match in found.suspects] == [(client,)]
    assert not trace(evidence, base, base=base).suspects


@pytest.mark.parametrize("policy", ["sticky", "fresh"])
def test_rounds_of_one_client_each_can_be_traced(tmp_path, policy):
    scheme = FedQSN(policy=policy)
    evidence, base = toy_run(tmp_path, toys.bert(), rounds=4, scheme=scheme, clients_per_round=1)
    kept = evidence.proxies()[1]
    found = trace(evidence, proxy_of(evidence, kept.client, kept.round, base), base=base)
    assert [match.clients for match in found.suspects] == [(kept.client,)]


@pytest.mark.parametrize(
    "scheme", [FedAvg(), FedQSN(client_mask=0.0), FedQSN(policy="grouped", groups=1)]
)
def test_a_run_without_fingerprints_cannot_be_traced(tmp_path, scheme):
    evidence, base = toy_run(tmp_path, toys.mlp(), rounds=1, scheme=scheme)
    with pytest.raises(AuditError, match=r"Nothing can be traced.*client_mask") as error:
        trace(evidence, base)
    assert error.value.where == str(tmp_path)


def test_one_release_alone_cannot_be_traced(tmp_path):
    scheme = FedQSN(policy="sticky")
    evidence, base = toy_run(tmp_path, toys.mlp(), rounds=1, scheme=scheme, clients_per_round=1)
    with pytest.raises(AuditError, match="Nothing can be traced"):
        trace(evidence, base)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, True, "0.1", math.nan])
def test_impossible_alphas_are_refused(scenes, alpha):
    with pytest.raises(ConfigurationError, match="alpha"):
        trace(scenes("sticky").evidence, {}, alpha=alpha)


def test_rounds_that_were_not_sent_are_refused(scenes):
    with pytest.raises(AuditError, match="rounds that were asked for"):
        trace(scenes("sticky").evidence, scenes("sticky").base, rounds=[99])


def test_another_architecture_is_refused(scenes):
    with pytest.raises(AuditError, match="The file is of another architecture") as error:
        trace(scenes("sticky").evidence, nn.Linear(20, 8).state_dict())
    assert error.value.expected
    assert error.value.found
    assert error.value.fix
    with pytest.raises(AuditError, match="The base is of another architecture"):
        trace(scenes("sticky").evidence, scenes("sticky").base, base={"weight": torch.ones(3)})


def test_a_message_that_was_altered_is_refused(tmp_path):
    evidence, base = toy_run(tmp_path, toys.mlp(), scheme=FedQSN(policy="sticky"))
    path = evidence.proxies()[0].path
    octets = bytearray(path.read_bytes())
    octets[-1] ^= 1
    path.write_bytes(octets)
    with pytest.raises(AuditError, match="damaged or was altered"):
        trace(Evidence(tmp_path), base)


def test_a_trace_is_plain_values_and_keeps_its_inputs(scenes):
    scene, told = scenes("fresh"), []
    state = scene.proxy(0, holes=None)
    before = toys.snapshot(state)
    found = trace(scene.evidence, state, base=scene.base, tell=told.append)
    assert json.loads(json.dumps(found.to_json()))["suspects"][0]["log10_p"] >= SURE
    assert toys.same(state, before)
    assert any("round 4" in line for line in told)
    assert [m.log10_p for m in found.scores] == sorted(m.log10_p for m in found.scores)


def test_scores_are_all_clients_and_rounds(scenes):
    scene = scenes("sticky")
    found = look(scene, scene.base, True)
    tried = {(match.clients, match.rounds) for match in found.scores}
    assert tried == {((kept.client,), (kept.round,)) for kept in scene.evidence.proxies()}


def test_another_secret_is_another_suspect(tmp_path):
    """The fingerprint is in the mask, not in who trained what."""
    runs = [
        toy_run(
            tmp_path / str(number), toys.mlp(), rounds=1, scheme=FedQSN(policy="sticky"),
            secret=Secret(bytes([number]) * 32),
        )[0]
        for number in range(2)
    ]  # fmt: skip
    leaked = proxy_of(runs[0], "partner-0", 1)
    assert trace(runs[0], leaked).suspects
    assert not trace(runs[1], leaked).suspects


# The bound


def exact(amounts, strata, mask):
    """P-value of the sum over a mask, by all masks with as many units in each stratum."""
    centred = amounts.copy()
    for stratum in set(strata.tolist()):
        centred[strata == stratum] -= centred[strata == stratum].mean()
    choices = []
    for stratum in sorted(set(strata.tolist())):
        places = np.flatnonzero(strata == stratum)
        held = int(mask[places].sum())
        choices.append([centred[list(c)].sum() for c in itertools.combinations(places, held)])
    sums = np.array([sum(combination) for combination in itertools.product(*choices)])
    return float(np.mean(sums >= centred[mask].sum() - 1e-9))


@given(st.data())
def test_the_bound_is_never_below_the_exact_p_value(data):
    count = data.draw(st.integers(1, 9))
    # No differences so small that the exact count takes them for ties.
    values = st.floats(0, 1).map(lambda value: round(value, 6)) | st.sampled_from([0.0, 0.5, 1.0])
    amounts = np.array(data.draw(st.lists(values, min_size=count, max_size=count)))
    strata = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    shares, contrasts, log10_p = Chance(amounts, strata).test(mask[None])
    assert np.isfinite([shares[0], contrasts[0]]).all()
    assert log10_p[0] <= 0
    assert 10 ** log10_p[0] >= exact(amounts, strata, mask) * (1 - 1e-9)


def test_chance_masks_are_rarely_called_unlikely():
    random = np.random.default_rng(0)
    amounts, strata = random.beta(0.3, 0.3, 200), np.repeat([0, 1], 100)
    masks = np.argsort(random.random((20_000, 2, 100))) >= 30
    _, _, log10_p = Chance(amounts, strata).test(masks.reshape(-1, 200))
    for level in (0.1, 0.01, 0.001):
        assert np.mean(log10_p <= math.log10(level)) <= level


def test_the_right_mask_is_told_with_certainty():
    mask = np.arange(2000) % 10 < 7
    shares, _, log10_p = Chance(mask.astype(float), np.zeros(2000, int)).test(mask[None])
    assert shares[0] == pytest.approx(1)
    assert log10_p[0] < SURE


def test_equal_amounts_say_nothing():
    for amount in (0.0, 0.3, 1.0):
        tests = Chance(np.full(10, amount), np.arange(10) % 2).test(np.eye(10, dtype=bool))
        assert all((values == 0).all() or abs(values).max() < 1e-9 for values in tests)
