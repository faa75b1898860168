"""Under a clip, replacing one example moves a Gram by no more than the bound that noise is made
for, whatever a model does with the axes of its batches; or nothing is measured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil import ConfigurationError, RegMean
from fedveil.aggregation.linear import linear_layers
from fedveil.aggregation.observe import GramHooks
from fedveil.tasks import Prepared
from fedveil.training import Trainer, Training

WIDTH, CLIP = 4, 0.5


class By(nn.Module):
    """A model by a function of its layers and its input [examples, time, WIDTH]."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), function

    def forward(self, x):
        return self.function(self.layers, x)


def a(**more):
    return {"a": nn.Linear(WIDTH, WIDTH), **more}


NETS = {
    "example first": lambda: By(lambda m, x: m["a"](x), **a()),
    "time first": lambda: By(lambda m, x: m["a"](x.transpose(0, 1)), **a()),
    "folded": lambda: By(lambda m, x: m["a"](x.reshape(-1, WIDTH)), **a()),
    "folded, time first": lambda: By(
        lambda m, x: m["a"](x.transpose(0, 1).reshape(-1, WIDTH)), **a()
    ),
    "permuted": lambda: By(lambda m, x: m["a"](x[:, :, None].permute(1, 2, 0, 3)), **a()),
    "examples as inputs": lambda: By(lambda m, x: m["a"](x.permute(2, 1, 0)), a=nn.LazyLinear(3)),
    "views": lambda: By(lambda m, x: m["a"](torch.cat([x, x.flip(1), 3 * x])), **a()),
    "repeated": lambda: By(lambda m, x: m["a"](x.repeat_interleave(3, dim=0)), **a()),
    "several calls": lambda: By(lambda m, x: m["a"](m["a"](m["a"](x))) + m["a"](x[:, 0])[:, None],
                                **a()),
    "step by step": lambda: By(lambda m, x: [m["a"](x[:, t]) for t in range(x.shape[1])], **a()),
    "one by one": lambda: By(lambda m, x: [m["a"](one) for one in x], **a()),
    "lstm": lambda: By(lambda m, x: m["a"](m["lstm"](m["b"](x.transpose(0, 1)))[0]),
                       **a(b=nn.Linear(WIDTH, WIDTH), lstm=nn.LSTM(WIDTH, WIDTH))),
    "transformer": lambda: By(
        lambda m, x: m["t"](x.transpose(0, 1)),
        t=nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0)),
    "batch norm": lambda: By(lambda m, x: m["a"](m["n"](x.flatten(1))),
                             a=nn.LazyLinear(3), n=nn.LazyBatchNorm1d()),
    "batch norm of the batch": lambda: By(
        lambda m, x: m["a"](m["n"](x.flatten(1))),
        a=nn.LazyLinear(3), n=nn.LazyBatchNorm1d(track_running_stats=False)),
    "batch norm of time": lambda: By(lambda m, x: m["a"](m["n"](x.transpose(1, 2)).transpose(1, 2)),
                                     **a(n=nn.BatchNorm1d(WIDTH, track_running_stats=False))),
    "centred over the batch": lambda: By(lambda m, x: m["a"](x - x.mean(0)), **a()),
    "the largest wins": lambda: By(lambda m, x: m["a"](x / x.abs().max()), **a()),
    "attention over examples": lambda: By(
        lambda m, x: m["a"](torch.softmax(x[:, 0] @ x[:, 0].t(), -1) @ x[:, 0]), **a()),
    "expert": lambda: By(lambda m, x: m["a"](x[x[..., 0] > 0]), **a()),
    "convolution": lambda: By(lambda m, x: m["c"](x.transpose(1, 2)), c=nn.Conv1d(WIDTH, 3, 1)),
    "shuffled": lambda: By(lambda m, x: m["a"](x[x[:, 0, 0].argsort()]), **a()),
}  # fmt: skip
MAY_BE_REFUSED = {"batch norm of the batch", "expert", "examples as inputs"}
# So large that an example that was counted twice, or twenty times, shows.
SPIKES = st.sampled_from([0.0, 1.0, 1e3, 1e8])


def built(name, x, training):
    torch.manual_seed(0)
    model = NETS[name]()
    with torch.no_grad():
        model.eval()(x)
    return model.train(training)


def grams(model, batches, clip=CLIP):
    hooks = GramHooks(model, linear_layers(model), "blocks", 2048, clip)
    with hooks.watching(), torch.no_grad():
        for batch in batches:
            hooks.begin_batch(None)
            model(batch)
    return {
        n: (m._blocks[0] / hooks.examples[n], hooks.examples[n]) for n, m in hooks.moments.items()
    }


@pytest.mark.parametrize("training", [True, False], ids=["training mode", "evaluation mode"])
@pytest.mark.parametrize("name", NETS)
@settings(max_examples=6)
@given(
    count=st.integers(2, 9),
    time=st.integers(2, 7),
    place=st.integers(0, 8),
    spikes=st.tuples(SPIKES, SPIKES),
    axes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_one_example_moves_a_gram_by_no_more_than_the_bound(
    name, training, count, time, place, spikes, axes
):
    x = torch.randn(count, time, WIDTH, generator=torch.Generator().manual_seed(count)) * 0.3
    x[place % count] = 0.1
    x[place % count, :, axes[0]] = spikes[0] + 0.1
    y = x.clone()
    y[place % count] = 0.1
    y[place % count, :, axes[1]] = spikes[1] + 0.1
    try:
        one, other = (grams(built(name, x, training), [z]) for z in (x, y))
    except ConfigurationError:
        assert name in MAY_BE_REFUSED, "this can be bounded"
        return
    if name in MAY_BE_REFUSED and one.keys() != other.keys():
        return
    assert one
    for layer, (gram, examples) in one.items():
        bound = math.sqrt(2) * CLIP * len(gram) / min(count, examples)
        assert float((gram - other[layer][0]).norm()) <= bound


@pytest.mark.parametrize("name", sorted(NETS.keys() - MAY_BE_REFUSED))
def test_a_bound_that_nothing_reaches_changes_nothing_but_where_examples_meet(name):
    meet = {"centred over the batch", "the largest wins", "attention over examples",
            "batch norm of time"}  # fmt: skip
    x = torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    model = built(name, x, training=False)
    clipped, free = grams(model, [x], clip=1e9), grams(model, [x], clip=None)
    assert clipped.keys() == free.keys()
    for layer, (gram, _) in clipped.items():
        same = torch.allclose(gram, free[layer][0], rtol=1e-3, atol=1e-5)
        assert same or name in meet, (gram, free[layer][0])


class Keeps(nn.Module):
    """What it was given once shows in all that comes."""

    seen: torch.Tensor

    def __init__(self, kind):
        super().__init__()
        self.a, self.kind = nn.Linear(WIDTH, 2), kind
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.other = None

    def forward(self, x):
        if self.kind == "buffer":
            self.seen.lerp_(x.mean((0, 1)), 0.5)
        elif self.kind == "another buffer":
            self.seen = self.seen + x.mean((0, 1))
        else:
            self.other = [x.mean((0, 1)) if self.other is None else self.other[0] + x.mean()]
        return self.a(x + (self.seen if self.other is None else self.other[0]))


@pytest.mark.parametrize("kind", ["buffer", "another buffer", "attribute"])
def test_a_model_that_keeps_what_it_was_given_is_refused(kind):
    with pytest.raises(ConfigurationError, match="keeps something"):
        grams(Keeps(kind), [torch.randn(3, 2, WIDTH)])
    assert grams(Keeps(kind), [torch.randn(3, 2, WIDTH)], clip=None)


def test_running_statistics_that_move_between_batches_are_refused():
    x = torch.randn(4, 3, WIDTH)
    with pytest.raises(ConfigurationError, match="evaluation mode"):
        grams(built("batch norm", x, training=True), [x, x])
    assert grams(built("batch norm", x, training=False), [x, x])


def test_an_expert_that_some_examples_do_not_reach_is_refused():
    x = torch.ones(3, 2, WIDTH)
    x[1, :, 0] = -1.0
    with pytest.raises(ConfigurationError, match=r"reach.*layers\.a\.weight.*exclude"):
        grams(built("expert", x.abs(), training=False), [x])


class TimeFirst:
    """A task whose model gets time first, and that calls it with what is not in the batch."""

    name = "time-first"

    def collate(self, rows):
        return {"x": torch.stack(rows), "labels": torch.zeros(len(rows)).long()}

    def prepare(self, data):
        return data

    def loss(self, model, batch):
        return model(batch["x"].transpose(0, 1)).sum()


def foreign(rows):
    """A replay that cannot be asked for one example at a time."""

    def replay(model, examples):
        batch = TimeFirst().collate(rows)
        yield batch
        TimeFirst().loss(model, batch)

    return replay


@pytest.mark.parametrize("time", [5, 8])
def test_a_trainer_hands_out_one_example_at_a_time_whatever_its_task_does(time):
    """With as many examples as steps of time, too, when shapes tell nothing."""
    rows = [torch.randn(time, WIDTH) for _ in range(8)]
    model = built("example first", torch.stack(rows), training=False)
    trainer = Trainer(TimeFirst(), Prepared(rows), Training())  # type: ignore[arg-type]
    hooks, ran = RegMean(clip=CLIP)._measured(model, trainer.replay, linear_layers(model))
    assert ran == 8
    assert hooks.examples == {"layers.a.weight": 8}
    found = hooks.moments["layers.a.weight"]._blocks[0] / 8
    parts = [row.t() @ row / time for row in rows]
    parts = [part * min(1.0, CLIP * WIDTH / float(part.trace())) for part in parts]
    torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("time", [5, 8])
def test_a_replay_of_batches_that_are_not_what_the_model_gets_is_refused(time):
    rows = [torch.randn(time, WIDTH) for _ in range(8)]
    model = built("example first", torch.stack(rows), training=False)
    with pytest.raises(ConfigurationError, match=r"batch_size=1"):
        RegMean(clip=CLIP)._measured(model, foreign(rows), linear_layers(model))


def test_an_example_without_any_finite_number_is_refused():
    from fedveil import TrainingError

    x = torch.full((2, 3, WIDTH), float("inf"))
    with pytest.raises(TrainingError, match="not finite"):
        grams(built("example first", torch.zeros_like(x), training=False), [x])


def test_a_compiled_model_is_measured_as_it_is():
    x = torch.randn(3, 2, WIDTH)
    model = built("time first", x, training=False)
    (own,) = grams(model, [x]).values()
    (found,) = grams(torch.compile(model, backend="eager"), [x]).values()
    assert torch.equal(own[0], found[0])
