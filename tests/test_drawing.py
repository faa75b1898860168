"""Weights that begin at random follow from the secret, and from nothing that can be guessed."""

import math
import warnings

import pytest
import torch
from torch import nn

import toys
from fedveil import Secret
from fedveil.drawing import KeyedDraws
from toys import SECRET, same

OTHER = Secret(bytes(range(1, 33)))


def nets():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(64, 128),
            "convolution": nn.Conv2d(8, 16, 3),
            "recurrent": nn.GRU(16, 32),
            "embedding": nn.Embedding(50, 16),
            "attention": nn.TransformerEncoderLayer(32, 4, 64),
            "norm": nn.BatchNorm1d(16),
        }
    )


def plain_bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=272, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=264, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def initializers():
    """Every way of torch.nn.init that draws."""
    drawn = {}
    for name in (
        "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_",
        "kaiming_uniform_", "kaiming_normal_", "orthogonal_",
    ):  # fmt: skip
        drawn[name] = nn.Parameter(getattr(nn.init, name)(torch.empty(40, 30)))
    drawn |= {
        "rand": nn.Parameter(torch.rand(20)),
        "randn": nn.Parameter(torch.randn(20)),
        "rand_like": nn.Parameter(torch.rand_like(torch.empty(20))),
        "randn_like": nn.Parameter(torch.randn_like(torch.empty(20))),
        "as_half": nn.Parameter(torch.empty(20, dtype=torch.bfloat16).normal_()),
        "as_double": nn.Parameter(torch.empty(20, dtype=torch.float64).uniform_(-1, 1)),
    }
    return nn.ParameterDict(drawn)


MAKERS = {"modules": nets, "bert": plain_bert, "initializers": initializers}


def made(maker, secret, seed=0, purpose="weights"):
    with torch.random.fork_rng(), KeyedDraws(secret, purpose):
        torch.manual_seed(seed)
        return toys.weights(maker())


def random_ones(state):
    return {n: t for n, t in state.items() if t.is_floating_point() and t.unique().numel() > 1}


def alike(one, other):
    """Whether elements agree that are not zero by design, as the embedding of padding is."""
    return bool(((one == other) & (one != 0)).float().mean() > 0.02)


@pytest.mark.parametrize("name", MAKERS)
class TestWhatIsDrawn:
    def test_follows_from_the_secret_alone(self, name):
        maker = MAKERS[name]
        assert same(made(maker, SECRET, seed=0), made(maker, SECRET, seed=1))
        one, other = (random_ones(made(maker, secret)) for secret in (SECRET, OTHER))
        assert one
        assert not any(alike(tensor, other[n]) for n, tensor in one.items())

    def test_is_another_thing_for_another_purpose(self, name):
        maker = MAKERS[name]
        one, other = (random_ones(made(maker, SECRET, purpose=p)) for p in ("a", "b"))
        assert not any(alike(tensor, other[n]) for n, tensor in one.items())

    def test_is_nothing_that_pytorch_draws_from_any_seed(self, name):
        drawn = random_ones(made(MAKERS[name], SECRET))
        for seed in range(20):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain = toys.weights(MAKERS[name]())
            # Of 20 numbers with 8 bits one may agree by chance.
            assert not any(alike(t, plain[n]) for n, t in drawn.items() if "half" not in n)

    def test_leaves_pytorchs_own_generator_as_it_was(self, name):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        with KeyedDraws(SECRET, "weights"):
            MAKERS[name]()
        assert torch.equal(torch.rand(3), expected)


class TestDistributions:
    """Against PyTorch's own, by the test of Kolmogorov and Smirnov at a chance of one in 10^6."""

    COUNT = 20_000

    @pytest.mark.parametrize(
        "fill",
        [
            lambda t: t.uniform_(-2, 5),
            lambda t: t.normal_(1.0, 3.0),
            lambda t: nn.init.trunc_normal_(t, std=0.02),
            lambda t: nn.init.kaiming_uniform_(t.view(100, -1), a=math.sqrt(5)),
            lambda t: nn.init.xavier_normal_(t.view(100, -1)),
        ],
        ids=["uniform", "normal", "truncated", "kaiming", "xavier"],
    )
    def test_are_those_of_pytorch(self, fill):
        torch.manual_seed(0)
        plain = fill(torch.empty(self.COUNT)).flatten()
        with KeyedDraws(SECRET, "weights"):
            keyed = fill(torch.empty(self.COUNT)).flatten()
        both = torch.cat([plain, keyed])
        order = both.argsort()
        step = torch.where(order < self.COUNT, 1.0, -1.0) / self.COUNT
        apart = float(step.cumsum(0).abs().max())
        assert apart < math.sqrt(-math.log(1e-6 / 2) / self.COUNT)
        assert abs(float((keyed[1:] * keyed[:-1]).mean() - keyed.mean() ** 2)) < 0.05 * float(
            keyed.var() + keyed.mean() ** 2
        )

    def test_an_odd_number_of_gaussians_is_all_drawn(self):
        with KeyedDraws(SECRET, "weights"):
            assert torch.randn(7).unique().numel() == 7


def test_trying_seeds_finds_what_pytorch_draws_and_nothing_that_is_keyed():
    torch.manual_seed(1234)
    released, withheld = torch.rand(100), torch.rand(100)
    found = next(seed for seed in range(2000) if torch.equal(_draw(seed, 100), released))
    assert torch.equal(_draw(found, 200)[100:], withheld)
    with KeyedDraws(SECRET, "weights"):
        released = torch.rand(100)
    assert not any(torch.equal(_draw(seed, 100), released) for seed in range(2000))


def _draw(seed, count):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


class TestWhatIsNotKnown:
    @pytest.mark.parametrize(
        "sampler",
        [
            lambda: torch.randperm(9),
            lambda: torch.empty(9).exponential_(),
            lambda: torch.randint(5, (9,)),
        ],
        ids=["randperm", "exponential", "randint"],
    )
    def test_is_warned_of(self, sampler):
        with KeyedDraws(SECRET, "weights"), pytest.warns(UserWarning, match="not drawn from"):
            sampler()

    def test_on_the_meta_device_nothing_is_drawn(self):
        with warnings.catch_warnings(), KeyedDraws(SECRET, "weights"), torch.device("meta"):
            warnings.simplefilter("error")
            assert nn.Linear(3, 4).weight.is_meta
            assert torch.randn(3).is_meta
