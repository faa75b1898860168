"""The exposure ledger against an oracle that looks at every element of every message."""

import json
import os
import resource
import shutil
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from fedveil.audit import Evidence
from fedveil.errors import CheckpointError, ConfigurationError, ExposureError
from fedveil.masking import Policy
from fedveil.run import Exposure, Manifest, Proxy
from fedveil.schemes import FedAvg, FedQSN
from fedveil.state import read_state
from fedveil.wire import Message

NAMES = ("a", "b", "c")
POLICIES: tuple[Policy, ...] = ("fresh", "sticky", "grouped")


def server_of(scheme, model=None):
    model = model or toys.gpt2()
    server = scheme.server(model, toys.SECRET)
    return server, Manifest.of(read_state(model), server.groups, {})


def sent(server, number, client):
    """A message as a client gets it."""
    return Message.from_bytes(server.release(client).to_bytes())


def played(scheme, plan, exposure_of, model=None):
    """Release to the clients of each round; the ledger, and every message."""
    server, manifest = server_of(scheme, model)
    ledger, messages = exposure_of(manifest), []
    for number, clients in enumerate(plan, start=1):
        server.begin_round(number)
        for client in clients:
            messages.append(sent(server, number, client))
            ledger.record(messages[-1])
        server.end_round()
    return ledger, messages, manifest


def elements(messages, manifest):
    """Per tensor, which elements any of the messages shows: bool, full shape."""
    shown = {n: torch.zeros(i.shape, dtype=torch.bool) for n, i in manifest.tensors.items()}
    for message in messages:
        selection = Proxy(message, manifest).selection
        for name, mask in shown.items():
            mask |= selection.released(name, mask.shape).bool()
    return shown


def share_of(messages, manifest):
    shown = elements(messages, manifest)
    floating = [n for n, info in manifest.tensors.items() if info.is_floating_point]
    return sum(int(shown[n].sum()) for n in floating) / manifest.parameters


@settings(max_examples=15, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    plan=st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=4),
    units=st.sampled_from(["mlp", "neurons", "columns"]),
)
def test_a_share_is_that_of_all_elements_ever_sent(policy, plan, units):
    scheme = FedQSN(server_mask=0.2, client_mask=0.4, policy=policy, units=units)
    ledger, messages, manifest = played(scheme, plan, Exposure)
    for clients in (["a"], ["b", "c"], NAMES):
        own = [m for m in messages if m.client in clients]
        assert ledger.share(clients) == pytest.approx(share_of(own, manifest))
    assert ledger.clients == sorted({c for clients in plan for c in clients})


@settings(max_examples=10, deadline=None)
@given(plan=st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=3))
def test_of_tensors_cut_along_two_axes_it_is_never_too_small(plan):
    # Hidden layers of a plain net: columns are the neurons of the layer before.
    scheme = FedQSN(server_mask=0.2, client_mask=0.4, policy="fresh", units="neurons")
    ledger, messages, manifest = played(scheme, plan, Exposure, toys.mlp())
    for clients in (["a"], NAMES):
        own = [m for m in messages if m.client in clients]
        exact = share_of(own, manifest)
        assert exact - 1e-9 <= ledger.share(clients) <= 1
        if len({m.round for m in own}) == len(own) == 1:
            assert ledger.share(clients) == pytest.approx(exact)


def test_what_a_message_would_add_is_what_it_adds():
    server, manifest = server_of(FedQSN(policy="fresh"))
    ledger = Exposure(manifest)
    for number in (1, 2, 3):
        server.begin_round(number)
        for client in NAMES:
            message = sent(server, number, client)
            before = ledger.share([client]), ledger.share(NAMES)
            after, added = ledger.share_after(client, message), ledger.added_by(message, NAMES)
            ledger.record(message)
            assert ledger.share([client]) == after
            assert ledger.share(NAMES) == pytest.approx(before[1] + added)
            assert ledger.added_by(message, [client]) == 0
        server.end_round()


def test_policies_differ_in_what_later_rounds_add():
    shares: dict[str, list[float]] = {}
    for policy in POLICIES:
        ledger, _, _ = played(FedQSN(policy=policy), [["a"], ["a"], ["a"]], Exposure)
        shares[policy] = [ledger.share(["a"])]
        shares[policy].insert(0, played(FedQSN(policy=policy), [["a"]], Exposure)[0].share(["a"]))
    assert shares["fresh"][1] > shares["fresh"][0]
    assert shares["sticky"][1] == shares["sticky"][0]
    assert shares["grouped"][1] == shares["grouped"][0]


def test_no_coalition_ever_holds_what_is_under_the_server_mask():
    scheme = FedQSN(server_mask=0.3, client_mask=0.3, policy="fresh", units="neurons")
    ledger, _, manifest = played(scheme, [NAMES] * 6, Exposure)
    cut = {part.tensor for group in manifest.groups for part in group.slices}
    whole = sum(i.numel for n, i in manifest.tensors.items() if n not in cut)
    hidden = 1 - whole / manifest.parameters
    assert ledger.share(NAMES) <= 1 - 0.25 * hidden


def test_counts_and_bits():
    scheme = FedQSN(policy="fresh", client_mask=0.5, bits=4)
    ledger, messages, manifest = played(scheme, [["a"], ["a", "b"]], Exposure)
    counts = ledger.counts("a")
    for group in manifest.groups:
        expected = np.zeros(group.size, int)
        for message in messages:
            if message.client == "a":
                expected[message.sections[f"units/{group.name}"].released.numpy()] += 1
        assert (counts[group.name] == expected).all()
    assert 4 * ledger.share(["a"]) < ledger.mean_bits(["a"]) < 32 * ledger.share(["a"])
    assert ledger.counts("nobody") == {
        g.name: pytest.approx(np.zeros(g.size)) for g in manifest.groups
    }


def test_fedavg_shows_everything_at_once():
    ledger, _, _ = played(FedAvg(), [["a"]], Exposure)
    assert ledger.share(["a"]) == 1
    assert ledger.mean_bits(["a"]) == 32
    assert ledger.share(["b"]) == ledger.mean_bits(["b"]) == 0


class TestOnDisk:
    def test_a_ledger_that_is_opened_again_knows_the_same(self, tmp_path):
        plan = [["a", "b"], ["a"], ["b", "c"]]
        one, _, manifest = played(
            FedQSN(policy="fresh"), plan, lambda m: Exposure(m, tmp_path / "run")
        )
        other = Exposure(manifest, tmp_path / "run")
        assert [s.to_json() for *_, s in other.releases()] == [
            s.to_json() for *_, s in one.releases()
        ]
        for clients in (["a"], ["c"], NAMES):
            assert other.share(clients) == one.share(clients)
            assert other.mean_bits(clients) == one.mean_bits(clients)
        assert [(n, c) for n, c, _ in other.releases()] == [
            (1, "a"), (1, "b"), (2, "a"), (3, "b"), (3, "c"),
        ]  # fmt: skip

    def test_equal_masks_are_written_once(self, tmp_path):
        played(FedQSN(), [NAMES] * 3, lambda m: Exposure(m, tmp_path))
        lines = [
            json.loads(line) for line in (tmp_path / "exposure.jsonl").read_text().splitlines()
        ]
        assert sum("units" in line for line in lines) == 2
        assert sum("client" in line for line in lines) == 9

    def test_a_line_that_a_crash_cut_short_is_forgotten(self, tmp_path):
        heads = []

        def opened(manifest):
            ledger = Exposure(manifest, tmp_path)
            record = ledger.record

            def remembering(message):
                heads.append((tmp_path / "exposure.head").read_bytes() if heads else b"")
                record(message)

            ledger.record = remembering  # type: ignore[method-assign]
            return ledger

        plan = [["a"], ["b"]]
        _, messages, manifest = played(FedAvg(), plan, opened)
        path = tmp_path / "exposure.jsonl"
        complete = path.read_bytes()
        first = b"".join(complete.splitlines(keepends=True)[:-1])
        torn = first + b'{"round": 2, "cli'
        path.write_bytes(torn)
        (tmp_path / "exposure.head").write_bytes(heads[1])  # as it was before the second release
        other = Exposure(manifest, tmp_path)
        assert other.clients == ["a"]
        assert path.read_bytes() == torn, "whoever only reads changes nothing"
        other.record(messages[1])
        assert path.read_bytes() == complete

    @pytest.mark.parametrize(
        "line",
        [
            "rubbish",
            "[]",
            '{"round": 1, "client": "a", "shown": "nothing"}',
            '{"shown": "x"}',
            '{"shown": "x", "units": {"no group": "AA=="}, "bits": {}}',
        ],
    )
    def test_a_damaged_ledger_is_refused(self, tmp_path, line):
        _, _, manifest = played(FedQSN(), [["a"]], lambda m: Exposure(m, tmp_path))
        with (tmp_path / "exposure.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(CheckpointError, match=r"damaged.*line 3"):
            Exposure(manifest, tmp_path)

    def test_what_cannot_be_written_down_is_not_counted(self, tmp_path):
        server, manifest = server_of(FedAvg())
        server.begin_round(1)
        one, other = sent(server, 1, "a"), sent(server, 1, "b")
        ledger = Exposure(manifest, tmp_path)
        ledger.record(one)
        before = toys.files(tmp_path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Real, not pretended: half of the line, or the line and not the head, are too much.
        for room in (len(before["exposure.jsonl"]) + 40, 0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                with pytest.raises(CheckpointError, match="was not made"):
                    ledger.record(other)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert ledger.clients == ["a"]
            assert toys.files(tmp_path) == before
        ledger.record(other)
        assert Exposure(manifest, tmp_path).clients == ["a", "b"]

    def test_only_its_owner_may_read_it(self, tmp_path):
        before = os.umask(0)
        try:
            played(FedAvg(), [["a"]], lambda m: Exposure(m, tmp_path / "run"))
        finally:
            os.umask(before)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").iterdir()}
        assert modes == {"exposure.jsonl": 0o600, "exposure.head": 0o600}
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """A ledger of some lines: its manifest, its folder, and what is in it."""
    folder = tmp_path_factory.mktemp("ledger")
    scheme = FedQSN(policy="fresh", units="neurons", client_mask=0.4)
    _, _, manifest = played(
        scheme, [["a", "b"], ["b", "c"]], lambda m: Exposure(m, folder), toys.mlp()
    )
    return manifest, folder, (folder / "exposure.jsonl").read_bytes()


def copy_with(ledger, data, folder):
    """The same folder with another ledger in it; None leaves it out."""
    shutil.copytree(ledger[1], folder, dirs_exist_ok=True)
    path = folder / "exposure.jsonl"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    return folder


class TestWhatWasLostOrAltered:
    """Is an error. What can be read of it would be less than what was shown."""

    def test_at_whatever_byte_it_was_cut_off(self, ledger, tmp_path):
        manifest, _, data = ledger
        assert len(data) > 1000
        path = copy_with(ledger, data, tmp_path) / "exposure.jsonl"
        for size in reversed(range(len(data))):
            os.truncate(path, size)
            with pytest.raises(CheckpointError, match=r"lost or was altered.*restore"):
                Exposure(manifest, tmp_path)
        path.write_bytes(data)
        assert Exposure(manifest, tmp_path).clients == ["a", "b", "c"]

    def test_as_a_whole(self, ledger, tmp_path):
        copy_with(ledger, None, tmp_path)
        with pytest.raises(CheckpointError, match="found no file"):
            Exposure(ledger[0], tmp_path)

    @pytest.mark.parametrize(
        "head",
        [
            None,
            b"",
            b"{}",
            b"[]",
            b'{"format": 9}',
            b"\xff",
            b'{"format": 1, "lines": "9", "size": 1, "last": ""}',
        ],
    )
    def test_or_its_head(self, ledger, tmp_path, head):
        copy_with(ledger, ledger[2], tmp_path)
        (tmp_path / "exposure.head").unlink()
        if head is not None:
            (tmp_path / "exposure.head").write_bytes(head)
        with pytest.raises(CheckpointError, match=r"exposure\.head"):
            Exposure(ledger[0], tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_line_by_line(self, ledger, tmp_path_factory, data):
        lines = ledger[2].splitlines(keepends=True)
        some = st.integers(0, len(lines) - 1)
        how = data.draw(st.sampled_from(["remove", "repeat", "swap", "move", "alter", "insert"]))
        one, other = data.draw(some), data.draw(some)
        changed = list(lines)
        if how == "remove":
            del changed[one]
        elif how == "repeat":
            changed.insert(other, lines[one])
        elif how == "swap":
            changed[one], changed[other] = changed[other], changed[one]
        elif how == "move":
            changed.insert(other, changed.pop(one))
        elif how == "insert":
            changed.insert(one, b'{"round": 1, "client": "z", "shown": "x"}\n')
        else:
            place = data.draw(st.integers(0, len(lines[one]) - 1))
            byte = data.draw(st.integers(0, 255))
            changed[one] = lines[one][:place] + bytes([byte]) + lines[one][place + 1 :]
        folder = copy_with(ledger, b"".join(changed), tmp_path_factory.mktemp("changed"))
        if changed == lines:
            assert Exposure(ledger[0], folder).clients == ["a", "b", "c"]
        else:
            with pytest.raises(CheckpointError, match=r"lost or was altered|damaged"):
                Exposure(ledger[0], folder)

    def test_also_if_its_links_are_made_anew(self, ledger, tmp_path):
        # As an earlier version would have written it, without the last release.
        lines = [json.loads(line) for line in ledger[2].splitlines()[:-1]]
        plain = [{key: v for key, v in line.items() if key != "after"} for line in lines]
        copy_with(ledger, "".join(json.dumps(p) + "\n" for p in plain).encode(), tmp_path)
        with pytest.raises(CheckpointError, match="lost or was altered"):
            Exposure(ledger[0], tmp_path)


class TestACrash:
    """May come at any moment: what was written down counts, and what was not never left."""

    def test_between_a_line_and_the_head_counts_too_much_at_most(self, tmp_path):
        server, manifest = server_of(FedQSN(policy="fresh", units="neurons"), toys.mlp())
        server.begin_round(1)
        first, second = sent(server, 1, "a"), sent(server, 1, "b")
        ledger = Exposure(manifest, tmp_path / "run")
        ledger.record(first)
        head, before = (tmp_path / "run" / name for name in ("exposure.head", "exposure.jsonl"))
        old, size = head.read_bytes(), before.stat().st_size
        ledger.record(second)
        whole = before.read_bytes()
        for cut in {*range(size, len(whole), 9), len(whole) - 1, len(whole)}:
            folder = tmp_path / "cut"
            folder.mkdir(exist_ok=True)
            (folder / "exposure.jsonl").write_bytes(whole[:cut])
            (folder / "exposure.head").write_bytes(old)
            again = Exposure(manifest, folder)
            assert again.clients == (["a", "b"] if cut == len(whole) else ["a"])
            again.record(second)
            assert (folder / "exposure.jsonl").read_bytes() == whole
            assert Exposure(manifest, folder).share(["b"]) == ledger.share(["b"])

    def test_before_the_first_line_leaves_an_empty_ledger(self, tmp_path):
        server, manifest = server_of(FedAvg())
        Exposure(manifest, tmp_path).begin()
        assert Exposure(manifest, tmp_path).clients == []
        (tmp_path / "exposure.jsonl").unlink()
        server.begin_round(1)
        ledger = Exposure(manifest, tmp_path)
        ledger.record(sent(server, 1, "a"))
        assert Exposure(manifest, tmp_path).clients == ["a"]


def test_two_who_write_to_one_ledger_are_told_of_it(tmp_path):
    server, manifest = server_of(FedAvg())
    server.begin_round(1)
    one, other = Exposure(manifest, tmp_path), Exposure(manifest, tmp_path)
    one.record(sent(server, 1, "a"))
    before = toys.files(tmp_path)
    with pytest.raises(CheckpointError, match=r"Somebody else.*no release was made"):
        other.record(sent(server, 1, "b"))
    assert toys.files(tmp_path) == before
    assert Exposure(manifest, tmp_path).clients == ["a"]


class TestAnEarlierVersionsLedger:
    @pytest.fixture
    def old(self, ledger, tmp_path):
        """The same lines without links, and no head."""
        lines = [json.loads(line) for line in ledger[2].splitlines()]
        plain = [{key: v for key, v in line.items() if key != "after"} for line in lines]
        (tmp_path / "exposure.jsonl").write_text("".join(json.dumps(p) + "\n" for p in plain))
        return ledger[0], tmp_path

    def next_release(self, manifest, folder):
        scheme = FedQSN(policy="fresh", units="neurons", client_mask=0.4)
        server, _ = server_of(scheme, toys.mlp())
        server.begin_round(1)
        message = sent(server, 1, "new")
        Exposure(manifest, folder).record(message)

    def test_is_read(self, old, ledger):
        shares = [Exposure(ledger[0], folder).share(["a"]) for folder in (old[1], ledger[1])]
        assert shares[0] == shares[1]
        assert not (old[1] / "exposure.head").exists(), "whoever only reads changes nothing"

    @pytest.mark.parametrize("torn", [b"", b'{"round": 2'])
    def test_is_sealed_by_the_next_release_and_safe_from_then_on(self, old, tmp_path_factory, torn):
        manifest, folder = old
        path = folder / "exposure.jsonl"
        before = path.read_bytes()
        path.write_bytes(before + torn)
        self.next_release(manifest, folder)
        data = path.read_bytes()
        assert data.startswith(before)
        assert json.loads(data[len(before) :].splitlines()[0])["sealed"] == before.count(b"\n")
        assert Exposure(manifest, folder).clients == ["a", "b", "c", "new"]
        for size in range(0, len(data), 7):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError, match="lost or was altered"):
                Exposure(manifest, folder)
        path.write_bytes(before.replace(b'"a"', b'"b"', 1) + data[len(before) :])
        with pytest.raises(CheckpointError, match=r"damaged|lost or was altered"):
            Exposure(manifest, folder)

    def test_is_whole_again_after_a_crash_under_the_seal(self, old, monkeypatch):
        manifest, folder = old
        lines = (folder / "exposure.jsonl").read_bytes().count(b"\n")

        def power_cut(handle):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("fedveil.run.exposure.os.fsync", power_cut)
            with pytest.raises(KeyboardInterrupt):
                self.next_release(manifest, folder)
        assert (folder / "exposure.jsonl").read_bytes().count(b"\n") == lines
        self.next_release(manifest, folder)
        assert "new" in Exposure(manifest, folder).clients


class TestInARun:
    SCHEME = FedQSN(policy="fresh", units="neurons", client_mask=0.4)

    def run(self, rounds, out, **changes):
        settings = {"scheme": self.SCHEME, "out": out, "keep_messages": True, **changes}
        return toys.federation(toys.mlp(), **settings).run(rounds)

    def test_the_ledger_is_that_of_the_kept_messages(self, tmp_path):
        self.run(3, tmp_path)
        evidence = Evidence(tmp_path)
        kept = Exposure(evidence.manifest, tmp_path)
        again = Exposure(evidence.manifest)
        for one in evidence.proxies():
            again.record(one.read())
        assert kept.clients == again.clients == evidence.clients
        for client in kept.clients:
            assert kept.share([client]) == again.share([client])
        releases = [(number, client) for number, client, _ in kept.releases()]
        assert releases == [(one.round, one.client) for one in evidence.proxies()]

    def test_a_resumed_run_counts_on(self, tmp_path):
        whole = self.run(4, tmp_path / "whole")
        self.run(2, tmp_path / "parts")
        federation = toys.federation(toys.mlp(), scheme=self.SCHEME, out=tmp_path / "parts",
                                     keep_messages=True)  # fmt: skip
        assert [r.bytes_down for r in federation.run(4, resume=True).rounds] == [
            r.bytes_down for r in whole.rounds
        ]
        texts = [(tmp_path / name / "exposure.jsonl").read_text() for name in ("whole", "parts")]
        assert texts[0] == texts[1]

    def test_overwriting_begins_a_new_ledger(self, tmp_path):
        self.run(1, tmp_path)
        before = (tmp_path / "exposure.jsonl").read_text()
        toys.federation(toys.mlp(), scheme=self.SCHEME, out=tmp_path).run(1, overwrite=True)
        assert (tmp_path / "exposure.jsonl").read_text() == before

    @pytest.mark.parametrize("out", [True, False])
    def test_nobody_is_shown_more_than_the_limit(self, tmp_path, out):
        clients = {f"c{i}": toys.rows(4, seed=i) for i in range(6)}
        result = toys.federation(
            toys.mlp(), clients=clients, scheme=self.SCHEME, clients_per_round=2, seed=1,
            exposure_limit=0.62, out=tmp_path if out else None,
        ).run(4)  # fmt: skip
        assert all(len(record.bytes_down) == 2 for record in result.rounds)
        refused = {c: reason for record in result.rounds for c, reason in record.refused.items()}
        assert refused
        assert all("62.0% are allowed" in reason for reason in refused.values())
        if out:
            ledger = Exposure(Manifest.read(tmp_path), tmp_path)
            assert all(ledger.share([client]) <= 0.62 for client in ledger.clients)

    def test_masks_that_stay_never_reach_a_limit_again(self, tmp_path):
        scheme = FedQSN(policy="sticky", units="neurons", client_mask=0.4)
        result = toys.federation(toys.mlp(), scheme=scheme, exposure_limit=0.62).run(5)
        assert not any(record.refused for record in result.rounds)

    def test_a_limit_that_nobody_is_under_ends_the_run_and_keeps_it(self, tmp_path):
        with pytest.raises(ExposureError, match="No client may be released") as caught:
            self.run(9, tmp_path, exposure_limit=0.62)
        assert "62.0% are allowed" in str(caught.value)
        records = toys.metrics(tmp_path)
        assert 1 <= len(records) < 9
        assert (
            toys.federation(
                toys.mlp(),
                scheme=self.SCHEME,
                out=tmp_path,
                keep_messages=True,
                exposure_limit=0.62,
            )
            .run(len(records), resume=True)
            .rounds
        )

    @pytest.mark.parametrize("limit", [0, -0.5, 1.5, "0.6", True, float("nan")])
    def test_impossible_limits_are_refused(self, limit):
        with pytest.raises(ConfigurationError, match="exposure_limit"):
            toys.federation(toys.mlp(), exposure_limit=limit)

    def test_a_limit_does_not_change_who_is_asked_first(self):
        def asked(**changes):
            run = toys.federation(
                toys.mlp(), clients={f"c{i}": toys.rows(4, seed=i) for i in range(6)},
                clients_per_round=2, **changes,
            ).run(3)  # fmt: skip
            return [list(record.bytes_down) for record in run.rounds]

        assert asked() == asked(exposure_limit=1.0)
