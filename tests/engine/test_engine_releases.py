"""A limit on how many proxies one client may be sent."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import Bounds, ConfigurationError, FedQSN, Observer, RoundRecord
from fedveil.engine import Rounds
from fedveil.engine.crew import Answer, order_of
from fedveil.engine.in_process import InTurn
from toys import SECRET, federation, files, metrics, mlp, rows, same, weights

CLIENTS = {f"c{i}": rows(3, seed=i) for i in range(5)}


def run(rounds, *, resume=False, **changes):
    settings = {"clients": CLIENTS, "clients_per_round": 2, **changes}
    return federation(mlp(), **settings).run(rounds, resume=resume)


def sent(records):
    return Counter(name for record in records for name in record.bytes_down)


class PowerCutError(BaseException):
    """Nobody catches it."""


class TestNobodyIsSentMore:
    @pytest.mark.parametrize(("releases", "rounds"), [(1, 2), (2, 5), (3, 7), (2, 1)])
    def test_than_the_limit(self, releases, rounds):
        counts = sent(run(rounds, releases=releases).rounds)
        assert sum(counts.values()) == 2 * rounds
        assert max(counts.values()) <= releases
        # The burden is shared: nobody is sent twice more than anybody else.
        assert max(counts.values()) - min(counts.get(name, 0) for name in CLIENTS) <= 1

    def test_over_runs_that_are_resumed(self, tmp_path):
        whole = run(5, releases=2).rounds
        for rounds in (1, 2, 5):
            records = run(rounds, releases=2, out=tmp_path, resume=True).rounds
        assert [set(r.bytes_down) for r in records] == [set(r.bytes_down) for r in whole]
        assert set(sent(records).values()) == {2}

    def test_over_a_run_that_died_between_sending_and_saving(self, tmp_path):
        class Killer(Observer):
            def client_finished(self, number, client, failure):
                if number == 2:
                    raise PowerCutError

        settings = {"releases": 1, "out": tmp_path, "keep_messages": True}
        with pytest.raises(PowerCutError):
            run(2, observer=Killer(), **settings)
        before = {n: d for n, d in files(tmp_path).items() if n.endswith(".proxy.safetensors")}
        assert len(before) == 3
        records = run(2, resume=True, **settings).rounds
        after = {n: d for n, d in files(tmp_path).items() if n.endswith(".proxy.safetensors")}
        # Those who were sent a proxy are sent the very same again, and nobody else instead.
        assert before.items() <= after.items()
        assert len(after) == 4
        assert max(sent(records).values()) == 1

    def test_if_a_client_fails_after_it_was_sent_one(self, monkeypatch):
        answers = InTurn.answers

        def spoiled(crew, jobs):
            for answer in answers(crew, jobs):
                yield Answer(answer.client, bytearray(b"?")) if answer.client == "c3" else answer

        monkeypatch.setattr(InTurn, "answers", spoiled)
        records = run(5, releases=2).rounds
        assert sum("c3" in record.failed for record in records) == 2
        assert sent(records) == Counter(dict.fromkeys(CLIENTS, 2))

    def test_if_all_take_part_in_every_round(self):
        assert set(sent(run(2, releases=2, clients_per_round=None).rounds).values()) == {2}
        with pytest.raises(ConfigurationError, match="releases"):
            run(3, releases=2, clients_per_round=None)


class TestTooManyRounds:
    @pytest.mark.parametrize(("releases", "rounds", "most"), [(1, 3, 2), (2, 6, 5), (3, 99, 7)])
    def test_are_refused_before_anything_is_sent(self, releases, rounds, most, tmp_path):
        heard = []

        class Ear(Observer):
            def run_started(self, rounds, finished):
                heard.append("run")

            def round_started(self, number, clients):
                heard.append("round")

        with pytest.raises(ConfigurationError) as caught:
            run(rounds, releases=releases, out=tmp_path, keep_messages=True, observer=Ear())
        assert heard == []
        assert not (tmp_path / "messages").exists()
        assert not (tmp_path / "checkpoints").exists()
        text = str(caught.value)
        assert f"at most {most} rounds of 2 clients" in text
        assert f"{rounds} rounds with releases={releases}" in text
        for advice in ("fewer rounds", "clients_per_round", "raise releases"):
            assert advice in text
        run(most, releases=releases, out=tmp_path)

    def test_are_refused_when_resuming_too_and_what_was_is_kept(self, tmp_path):
        run(2, releases=1, out=tmp_path)
        before, lines = files(tmp_path / "checkpoints"), metrics(tmp_path)
        with pytest.raises(ConfigurationError, match="at most 2 rounds"):
            run(3, releases=1, out=tmp_path, resume=True)
        assert files(tmp_path / "checkpoints") == before
        assert metrics(tmp_path) == lines
        assert len(run(2, releases=1, out=tmp_path, resume=True).rounds) == 2

    def test_are_refused_before_an_earlier_run_is_overwritten(self, tmp_path):
        run(2, releases=1, out=tmp_path)
        before = files(tmp_path)
        with pytest.raises(ConfigurationError, match="at most 2 rounds"):
            federation(mlp(), clients=CLIENTS, clients_per_round=2, releases=1, out=tmp_path).run(
                3, overwrite=True
            )
        assert files(tmp_path) == before

    def test_are_not_too_many_without_a_limit(self):
        assert len(run(6, clients_per_round=4).rounds) == 6


class TestImpossibleLimits:
    @pytest.mark.parametrize("releases", [0, -1, 1.5, True, "2"])
    def test_are_refused(self, releases):
        with pytest.raises(ConfigurationError, match="releases"):
            federation(mlp(), releases=releases)


def sample(seed, number, *, wanted=None, releases=None, records=(), clients=CLIENTS):
    """What an engine with these settings draws."""
    nothing: Any = None  # in the place of what takes no part in it
    engine = Rounds(
        server=nothing, crew=nothing, clients=list(clients), remembers=False, task=nothing,
        test=None, model=nothing, configuration={}, secret=SECRET, seed=seed,
        clients_per_round=wanted, releases=releases, bounds=Bounds(), evaluation=nothing,
        folder=None, keep_messages=False, observer=nothing, manifest=nothing, exposure_limit=None,
        device=None,
    )  # fmt: skip
    return engine._order(number, list(records))[: wanted or len(clients)]


NAMES = [f"c{i}" for i in range(8)]


class TestSampling:
    @given(
        st.integers(0, 99),
        st.integers(1, 8),
        st.lists(st.sets(st.sampled_from(NAMES)), max_size=6),
    )
    def test_under_a_limit_takes_those_first_who_were_sent_least(self, seed, wanted, history):
        records = [RoundRecord(n, bytes_down=dict.fromkeys(h, 1)) for n, h in enumerate(history, 1)]
        counts = sent(records)
        drawn = sample(
            seed, len(records) + 1, wanted=wanted, releases=9, records=records, clients=NAMES
        )
        assert len(set(drawn)) == len(drawn) == wanted
        rest = set(NAMES) - set(drawn)
        assert all(counts[one] <= counts[other] for one in drawn for other in rest)

    def test_among_equals_it_is_drawn_and_repeats_itself(self):
        draws = [tuple(sample(seed, 1, wanted=2, releases=1)) for seed in range(30)]
        assert draws == [tuple(sample(seed, 1, wanted=2, releases=1)) for seed in range(30)]
        assert len(set(draws)) > 8
        assert {name for draw in draws for name in draw} == set(CLIENTS)
        later = [tuple(sample(0, n, wanted=2, releases=9)) for n in range(30)]
        assert len(set(later)) > 8

    @given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 8), st.booleans())
    def test_without_a_limit_depends_on_secret_seed_and_round_alone(
        self, seed, number, wanted, some
    ):
        records = [RoundRecord(1, bytes_down={"c0": 1})] if some else []
        found = sample(seed, number, wanted=wanted, records=records, clients=reversed(NAMES))
        assert found == order_of(SECRET, seed, number, NAMES)[:wanted]

    def test_without_a_limit_is_as_it_was_written_down(self):
        clients = {f"c{i}": rows(2, seed=i) for i in range(8)}
        records = run(3, clients=clients, clients_per_round=3, seed=3).rounds
        assert [list(record.bytes_down) for record in records] == WRITTEN_DOWN

    def test_a_limit_is_part_of_what_a_run_is_resumed_with(self):
        one, other = (federation(mlp(), releases=r).configuration() for r in (None, 2))
        assert (one["releases"], other["releases"]) == (None, 2)


WRITTEN_DOWN = [["c2", "c6", "c7"], ["c0", "c6", "c7"], ["c4", "c0", "c1"]]


def test_one_release_and_one_merge():
    # What the limit is for: every client once, all of its data, and a merge by least squares.
    result = run(1, releases=1, clients_per_round=None, scheme=FedQSN(aggregation="regmean"))
    assert set(result.rounds[0].bytes_up) == set(CLIENTS)
    assert not same(weights(result.global_model), weights(mlp()))
