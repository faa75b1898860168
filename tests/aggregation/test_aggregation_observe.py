"""What a client measures of its data: Grams of what layers see."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from aggregation_samples import EVERYTHING, message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil import ConfigurationError, FedAvg, FedQSN, ProtocolError, RegMean
from fedveil.aggregation import aggregation_of
from fedveil.aggregation.linear import linear_layers
from fedveil.training import LocalRun
from toys import bert, federation, gpt2, mlp, reply_of, same, weights

EXACT = RegMean(bits=None)


def replay_of(*batches):
    """Runs a model on batches: tensors for its only argument, or dicts of its arguments."""

    def replay(model, examples):
        for batch in batches:
            given_ = batch if isinstance(batch, dict) else {"inputs": batch}
            yield given_
            with torch.no_grad():
                model(**given_) if isinstance(batch, dict) else model(batch)

    return replay


def grams(model, *batches, settings_=EXACT, changed=None, selection=EVERYTHING):
    """Dense Grams by layer, as the server reads them, and the observed sections."""
    changed = linear_layers(model) if changed is None else changed
    observed = settings_.observe(model.eval(), replay_of(*batches), changed, selection)
    layers = linear_layers(model)
    shapes = {n: t.shape for n, t in model.named_parameters()}
    _, found = settings_.codec.decode(message(observed), layers, shapes, selection)
    as_sent = {name: replace(gram, rounded=False, received=False) for name, gram in found.items()}
    return {name: gram.dense(1.0, 0.0)[0] for name, gram in as_sent.items()}, observed


def moment(rows):
    """Mean over examples of the mean over positions; rows are a list of [positions, inputs]."""
    return sum(r.double().t() @ r.double() / len(r) for r in rows) / len(rows)


def close(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected.double(), **tolerance)


class Called(nn.Module):
    """A model by a function of its layers and input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), function

    def forward(self, inputs):
        return self.function(self.layers, inputs)


class TestAGram:
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6))
    def test_is_the_mean_square_of_what_the_layer_sees(self, sizes, width):
        batches = [torch.randn(size, width) for size in sizes]
        found, _ = grams(nn.Sequential(nn.Linear(width, 2)), *batches)
        close(found["0.weight"], moment([r[None] for b in batches for r in b]))

    def test_counts_examples_and_not_positions(self):
        short, long = torch.randn(1, 2, 3), torch.randn(1, 50, 3)
        found, _ = grams(nn.Sequential(nn.Linear(3, 2)), short, long)
        close(found["0.weight"], moment([short[0], long[0]]))

    def test_of_a_convolution_is_that_of_its_patches(self):
        images = torch.randn(3, 2, 5, 5)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2))
        found, _ = grams(model, images[:2], images[2:])
        patches = nn.functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2)
        close(found["0.weight"], moment(list(patches)))

    def test_is_of_what_the_layer_sees_in_the_trained_model(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        inputs = torch.randn(6, 3)
        found, _ = grams(model, inputs)
        close(found["2.weight"], moment([r[None] for r in model[:2](inputs).detach()]))

    def test_of_a_layer_that_is_called_twice_is_the_mean_of_both(self):
        model = Called(lambda m, x: m["a"](m["a"](x)), a=nn.Linear(3, 3))
        inputs = torch.randn(6, 3)
        found, _ = grams(model, inputs)
        both = torch.cat([inputs, model.layers["a"](inputs).detach()])
        close(found["layers.a.weight"], moment([r[None] for r in both]))

    def test_is_taken_of_changed_layers_only(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        changed = {"2.weight", "0.bias"}
        found, observed = grams(model, torch.randn(6, 3), changed=changed)
        assert set(found) == {"2.weight"}
        assert set(observed.sections) == {"gram/2.weight/diagonal", "gram/2.weight/pairs"}

    def test_of_a_layer_that_never_fires_is_not_sent(self):
        model = Called(lambda m, x: m["a"](x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
        assert set(grams(model, torch.randn(2, 3))[0]) == {"layers.a.weight"}

    def test_is_taken_where_a_fused_kernel_would_skip_the_layers(self):
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True, dropout=0.0)
        found, _ = grams(nn.Sequential(layer), torch.randn(2, 5, 8))
        assert {"0.linear1.weight", "0.linear2.weight"} <= set(found)

    def test_holds_no_row_of_a_withheld_input(self):
        scheme = FedQSN(server_mask=0.25, client_mask=0.25, units="neurons", aggregation=EXACT)
        federation_ = federation(mlp(), scheme=scheme)
        server = scheme.server(mlp(), federation_._secret)
        server.begin_round(1)
        proxy = server.release("partner-0")
        run = LocalRun(federation_._trainers["partner-0"], 1)
        reply = reply_of(scheme, proxy, mlp(), run)
        released = {name: len(proxy.sections[f"units/{name}"].released) for name in ("1", "3")}
        assert released["1"] < 96
        assert released["3"] < 64
        for layer, inputs in (("1", 16), ("3", released["1"]), ("5", released["3"])):
            parts = [
                reply.sections[f"gram/{layer}.weight/{p}"].tensor for p in ("diagonal", "pairs")
            ]
            assert [p.numel() for p in parts] == [inputs, inputs * (inputs - 1) // 2]

    def test_leaves_the_model_without_hooks(self):
        model = mlp()
        before = weights(model)
        grams(model, torch.randn(2, 1, 4, 4))
        assert same(weights(model), before)
        assert not any(m._forward_hooks for m in model.modules())

    def test_leaves_the_model_without_hooks_after_an_error(self):
        model = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(RuntimeError, match="shapes"):
            grams(model, torch.randn(2, 4))
        assert not any(m._forward_hooks for m in model.modules())


class TestLayersThatSeeTheSame:
    def test_share_one_gram(self):
        model = Called(
            lambda m, x: m["q"](x) + m["k"](x) + m["v"](x),
            **{name: nn.Linear(3, 2) for name in "qkv"},
        )
        inputs = torch.randn(5, 3)
        found, observed = grams(model, inputs[:2], inputs[2:])
        assert len(observed.sections) == 2
        assert set(observed.scalars.values()) == {"layers.q.weight"}
        assert len(observed.scalars) == 3
        for gram in found.values():
            close(gram, moment([r[None] for r in inputs]))

    def test_do_so_in_bert(self):
        _, observed = grams(bert(), {"input_ids": torch.randint(3, 99, (2, 6))})
        named = {k.removeprefix("gram/"): v for k, v in observed.scalars.items()}
        query = "bert.encoder.layer.0.attention.self.query.weight"
        assert [n for n, gram in named.items() if gram == query] == [
            query, query.replace("query", "key"), query.replace("query", "value")
        ]  # fmt: skip
        assert len(observed.sections) == 2 * len(set(named.values())) == 12

    @pytest.mark.parametrize(
        "other",
        [
            {"kernel_size": 1}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "dilation": 2},
            {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding_mode": "circular"},
        ],
        ids=str,
    )  # fmt: skip
    def test_do_not_if_they_read_it_in_other_ways(self, other):
        first: dict[str, Any] = (
            {"kernel_size": 3, "padding": 1} if "padding_mode" in other else {"kernel_size": 3}
        )
        one, two = nn.Conv2d(2, 3, **first), nn.Conv2d(2, 3, **{**first, **other})
        model = Called(lambda m, x: (m["a"](x), m["b"](x)), a=one, b=two)
        images = torch.randn(3, 2, 6, 6)
        found, _ = grams(model, images)
        for name, module in (("a", one), ("b", two)):
            alone, _ = grams(nn.Sequential(module), images)
            close(found[f"layers.{name}.weight"], alone["0.weight"])

    def test_do_not_if_it_changed_in_place_in_between(self):
        def function(m, x):
            hidden = x * 1
            return m["a"](hidden), m["b"](hidden.relu_())

        model = Called(function, a=nn.Linear(3, 2), b=nn.Linear(3, 2))
        inputs = torch.randn(5, 3)
        found, _ = grams(model, inputs)
        close(found["layers.a.weight"], moment([r[None] for r in inputs]))
        close(found["layers.b.weight"], moment([r[None] for r in inputs.relu()]))

    def test_share_one_gram_in_inference_mode_too(self):
        model = Called(lambda m, x: m["q"](x) + m["k"](x), q=nn.Linear(3, 2), k=nn.Linear(3, 2))
        with torch.inference_mode():
            found, observed = grams(model, inputs := torch.randn(5, 3))
        assert len(observed.sections) == 2
        close(found["layers.k.weight"], moment([r[None] for r in inputs]))

    def test_do_not_only_because_an_address_was_used_again(self):
        # The first tensor is gone when the second one is made, often in its place.
        def function(m, x):
            m["a"](x * 1)
            return m["b"](x * 2)

        model = Called(function, a=nn.Linear(3, 2), b=nn.Linear(3, 2))
        inputs = torch.randn(5, 3)
        for _ in range(20):
            found, _ = grams(model, inputs)
            close(found["layers.b.weight"], 4 * moment([r[None] for r in inputs]))


class Flat(nn.Module):
    """Layers that get [examples, tokens, ...], [examples * tokens, ...] and [examples, ...]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        self.deep, self.flat, self.pooled = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.deep(self.embed(input_ids))
        hidden = self.flat(hidden.flatten(0, 1)).view(hidden.shape)
        return self.pooled(hidden[:, 0])


class TestPadding:
    @staticmethod
    def batches(lengths):
        """The same texts one by one, and as one batch with rubbish for padding."""
        texts = [torch.randint(3, 50, (1, length)) for length in lengths]
        alone = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in texts]
        longest = max(lengths)
        padded = torch.full((len(texts), longest), 7)
        mask = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            padded[row, : text.shape[1]] = text
            mask[row, : text.shape[1]] = 1
        return alone, {"input_ids": padded, "attention_mask": mask}

    @pytest.mark.parametrize("build", [bert, Flat], ids=["bert", "flat"])
    @pytest.mark.parametrize("lengths", [[4], [1, 1], [2, 5], [6, 1, 3, 6]], ids=str)
    def test_is_left_out(self, build, lengths):
        torch.manual_seed(0)
        model = build()
        alone, together = self.batches(lengths)
        one, other = grams(model, *alone)[0], grams(model, together)[0]
        assert len(one) == len(linear_layers(model))
        for name in one:
            close(other[name], one[name], rtol=1e-3, atol=1e-4)

    def test_that_is_all_there_is_counts_as_nothing(self):
        model = Flat().eval()
        batch = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()}
        found, _ = grams(model, batch)
        assert not bool(found["deep.weight"].double().fill_diagonal_(0).any())


class TestThroughAClient:
    def reply(self, model, settings_, client="partner-2", **changes):
        federation_ = federation(model, scheme=FedAvg(aggregation=settings_), **changes)
        server = federation_.scheme.server(model, federation_._secret)
        server.begin_round(1)
        run = LocalRun(federation_._trainers[client], 1)
        reply = reply_of(federation_.scheme, server.release(client), model, run)
        return reply, federation_._trainers[client]

    def test_it_looks_at_no_more_examples_than_it_may(self):
        data = torch.stack(
            [row["image"].flatten() for row in federation(mlp())._trainers["partner-2"]._data.rows]
        )
        for examples, chosen in ((1, [0]), (3, [0, 3, 6]), (10, range(10)), (99, range(10))):
            reply, _ = self.reply(mlp(), RegMean(bits=None, examples=examples))
            diagonal = reply.sections["gram/1.weight/diagonal"].tensor
            close(diagonal, data[list(chosen)].square().mean(0))

    @pytest.mark.parametrize("build", [mlp, bert, gpt2], ids=lambda b: b.__name__)
    def test_every_layer_that_changed_has_a_gram(self, build):
        reply, _ = self.reply(build(), EXACT)
        changed = linear_layers(build()).keys() & reply.sections.keys()
        assert len(changed) >= 3
        assert {k for k in reply.scalars if k.startswith("gram/")} == {f"gram/{n}" for n in changed}

    def test_a_mean_asks_for_nothing(self):
        reply, _ = self.reply(mlp(), "mean")
        assert not any(n.startswith("gram/") for n in (*reply.sections, *reply.scalars))


class TestExcludedLayers:
    def test_are_not_measured_and_take_the_mean(self):
        finals = []
        settings_ = RegMean(bits=None, exclude=("1.*", "5.weight"))
        for aggregation in ("mean", settings_, EXACT):
            federation_ = federation(mlp(), scheme=FedAvg(aggregation=aggregation))
            finals.append(weights(federation_.run(1).global_model))
        mean, some, all_ = finals
        assert {n for n in mean if not torch.equal(mean[n], some[n])} == {"3.weight"}
        assert torch.equal(some["3.weight"], all_["3.weight"])

    def test_leave_nothing_in_the_message(self):
        model = mlp()
        _, observed = grams(
            model,
            torch.randn(3, 1, 4, 4),
            settings_=RegMean(exclude=("1.*",)),
            changed=linear_layers(model),
        )
        assert not any("/1." in name for name in (*observed.sections, *observed.scalars))
        assert set(observed.scalars) == {"gram/3.weight", "gram/5.weight"}

    def test_a_gram_of_one_is_refused(self):
        scheme = FedAvg(aggregation=RegMean(exclude=("1.*",)))
        federation_ = federation(mlp(), scheme=FedAvg(aggregation=RegMean()))
        server = scheme.server(mlp(), federation_._secret)
        server.begin_round(1)
        run = LocalRun(federation_._trainers["partner-0"], 1)
        reply = reply_of(federation_.scheme, server.release("partner-0"), mlp(), run)
        with pytest.raises(ProtocolError, match=r"1\.weight"):
            server.absorb("partner-0", reply, 1.0)

    def test_must_exist(self):
        with pytest.raises(ConfigurationError, match="exclude"):
            federation(mlp(), scheme=FedAvg(aggregation=RegMean(exclude=("7.*",))))


class TestClip:
    @settings(max_examples=50)
    @given(st.floats(1e-3, 1e3), st.integers(1, 8), st.integers(0, 99))
    def test_bounds_what_one_example_gives(self, clip, positions, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, positions, 5, generator=generator) * 10 ** (seed % 5 - 2)
        found, _ = grams(
            nn.Sequential(nn.Linear(5, 2)), rows, settings_=RegMean(bits=None, clip=clip)
        )
        whole = moment([rows[0]])
        factor = min(1.0, clip * 5 / float(whole.trace()))
        assert float(found["0.weight"].trace()) <= clip * 5 * (1 + 1e-4)
        expected = factor * whole
        close(found["0.weight"], expected, rtol=1e-3, atol=1e-6 * (1 + float(expected.trace())))

    def test_bounds_each_example_by_itself(self):
        rows = torch.stack([torch.full((4,), 100.0), torch.full((4,), 0.1)])
        found, _ = grams(
            nn.Sequential(nn.Linear(4, 2)), rows, settings_=RegMean(bits=None, clip=1.0)
        )
        close(found["0.weight"], torch.full((4, 4), (1.0 + 0.01) / 2))

    def test_without_a_bound_nothing_is_scaled(self):
        rows = torch.full((1, 4), 100.0)
        found, _ = grams(nn.Sequential(nn.Linear(4, 2)), rows)
        close(found["0.weight"], torch.full((4, 4), 1e4))


def noise_of(model, inputs, name, *, clip, noise, calls=3):
    """Entries on and above the diagonal of noisy Grams minus the exact one."""
    exact, _ = grams(model, inputs, settings_=RegMean(bits=None, clip=clip))
    upper = torch.ones_like(exact[name], dtype=torch.bool).triu()
    settings_ = RegMean(bits=None, clip=clip, noise=noise)
    return [
        (grams(model, inputs, settings_=settings_)[0][name] - exact[name])[upper]
        for _ in range(calls)
    ]


ONCE = {"once": lambda m, x: m["a"](x)}
OFTEN = {
    "twice": lambda m, x: m["a"](x) + m["a"](x * 1),
    "by token": lambda m, x: m["a"](x.repeat_interleave(4, dim=0)),
}


class TestNoise:
    @pytest.mark.parametrize("noise", [0.001, 0.01])
    @pytest.mark.parametrize("count", [40, 400])
    def test_has_the_stated_deviation(self, noise, count):
        width, clip = 100, 0.5
        model = Called(ONCE["once"], a=nn.Linear(width, 2))
        inputs = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
        found = torch.cat(
            noise_of(model, inputs, "layers.a.weight", clip=clip, noise=noise, calls=4)
        )
        stated = noise * math.sqrt(2) * clip * width / count
        assert float(found.square().mean().sqrt()) == pytest.approx(stated, rel=0.05)
        assert abs(float(found.mean())) < 0.05 * stated

    @pytest.mark.parametrize("how", [*ONCE, *OFTEN])
    def test_covers_what_replacing_one_example_can_do(self, how):
        width, clip, noise = 60, 1.0, 0.01
        model = Called({**ONCE, **OFTEN}[how], a=nn.Linear(width, 2))
        inputs = 3 * torch.randn(40, width, generator=torch.Generator().manual_seed(1))
        other = inputs.clone()
        # As far as two examples can be apart: along different inputs, both beyond the clip.
        inputs[0], other[0] = 0.0, 0.0
        inputs[0, 0] = other[0, 1] = 1e3
        name, settings_ = "layers.a.weight", RegMean(bits=None, clip=clip)
        moved = (
            grams(model, inputs, settings_=settings_)[0][name]
            - grams(model, other, settings_=settings_)[0][name]
        ).norm()
        found = torch.cat(noise_of(model, inputs, name, clip=clip, noise=noise))
        # Correlations cannot pass 1, so noise on weak inputs is cut: look at the middle of it.
        deviation = float(found.abs().quantile(0.5)) / 0.6745
        assert deviation >= 0.85 * noise * float(moved)

    def test_leaves_no_negative_square_in_what_is_solved(self):
        model, settings_ = nn.Sequential(nn.Linear(30, 2)), RegMean(bits=None, clip=1.0, noise=0.05)
        observed = settings_.observe(model, replay_of(torch.randn(5, 30)), ["0.weight"], EVERYTHING)
        shapes = {"0.weight": torch.Size([2, 30])}
        layers = linear_layers(model)
        _, found = settings_.codec.decode(message(observed), layers, shapes, EVERYTHING)
        sent = replace(found["0.weight"], rounded=False, received=False).dense(1.0, 0.0)[0]
        solved = found["0.weight"].dense(1.0, 0.0)[0]
        assert float(torch.linalg.eigvalsh(sent.double()).min()) < -0.1
        assert float(torch.linalg.eigvalsh(solved.double()).min()) > -1e-5
        assert torch.equal(solved.diagonal(), sent.diagonal())

    def test_is_new_in_every_call_whatever_the_seed(self):
        model = Called(ONCE["once"], a=nn.Linear(5, 2))
        inputs, found = torch.randn(4, 5), []
        for _ in range(3):
            torch.manual_seed(0)
            found += noise_of(model, inputs, "layers.a.weight", clip=1.0, noise=0.1, calls=1)
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])

    def test_of_two_layers_differs(self):
        model = Called(lambda m, x: m["a"](x) + m["b"](x * 1), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
        inputs = torch.randn(4, 4)
        found, _ = grams(model, inputs, settings_=RegMean(bits=None, clip=9.0, noise=0.01))
        assert not torch.equal(found["layers.a.weight"], found["layers.b.weight"])

    def test_leaves_the_callers_generator_alone(self):
        model = nn.Sequential(nn.Linear(4, 2))
        before = torch.get_rng_state()
        grams(model, torch.ones(2, 4), settings_=RegMean(clip=1.0, noise=1.0))
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_on_the_whole_gram_before_rows_are_left_out(self):
        model = nn.Sequential(nn.Linear(4, 2))
        found, _ = grams(
            model, torch.ones(1, 4), settings_=RegMean(bits=None, clip=1.0, noise=1e-3)
        )
        assert bool((found["0.weight"] != 1.0).all())
        assert bool(((found["0.weight"] - 1).abs() < 0.1).all())


IMPOSSIBLE = [
    {"off_diagonal": -0.1}, {"off_diagonal": 1.1}, {"off_diagonal": float("nan")},
    {"off_diagonal": True}, {"off_diagonal": "0.5"}, {"off_diagonal": None},
    {"ridge": -1e-9}, {"ridge": float("inf")}, {"ridge": float("nan")}, {"ridge": 1e30},
    {"examples": 0}, {"examples": 1.5}, {"examples": True}, {"examples": None},
    {"size": 0}, {"size": -4}, {"size": 2.0}, {"form": "sparse"}, {"form": None},
    {"bits": 5}, {"bits": 16}, {"bits": True}, {"bits": 8.0},
    {"clip": 0.0}, {"clip": -1.0}, {"clip": float("nan")}, {"clip": float("inf")}, {"clip": "1"},
    {"noise": 1.0}, {"noise": -1.0, "clip": 1.0}, {"noise": float("nan"), "clip": 1.0},
    {"noise": float("inf"), "clip": 1.0}, {"noise": 1.0, "clip": 1.0, "form": "low-rank"},
    {"exclude": "*.weight"}, {"exclude": None},
]  # fmt: skip


class TestSettings:
    @pytest.mark.parametrize("setting", IMPOSSIBLE, ids=str)
    def test_impossible_ones_are_refused_by_name(self, setting):
        with pytest.raises(ConfigurationError, match=next(iter(setting))):
            RegMean(**setting)

    def test_extreme_ones_that_are_possible_are_taken(self):
        RegMean(off_diagonal=0, ridge=0, examples=1, size=1, bits=2, clip=1e-12)
        RegMean(off_diagonal=1, ridge=1e3, form="low-rank", bits=None)
        RegMean(clip=1, noise=50)

    def test_an_aggregation_goes_by_name_or_with_its_settings(self):
        assert aggregation_of("regmean") == RegMean()
        assert aggregation_of(RegMean(ridge=0.5)) == RegMean(ridge=0.5)
        assert FedQSN(aggregation="regmean") == FedQSN(aggregation=RegMean())

    @pytest.mark.parametrize("wrong", ["median", "", None, 3, RegMean])
    def test_an_unknown_aggregation_is_refused(self, wrong):
        for scheme in (FedAvg, FedQSN):
            with pytest.raises(ConfigurationError, match="mean or regmean"):
                scheme(aggregation=wrong)
