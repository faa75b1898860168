import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import FedAvg, FedQSN, Training
from fedveil.masking import DRAWS, POLICIES
from toys import CHOICES, MODELS, NO_MASK, convnet, federation, gpt2, mlp, play, rows, same, weights

PLAIN = Training(
    steps=3, batch_size=64, learning_rate=0.05, optimizer="sgd", weight_decay=0.0,
    schedule="constant", max_grad_norm=None,
)  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_fedqsn_without_masks_and_bits_is_fedavg_bit_for_bit(build, choice):
    fedavg = federation(build(), scheme=FedAvg()).run(3)
    fedqsn = federation(build(), scheme=FedQSN(units=choice, **NO_MASK)).run(3)
    assert not same(weights(fedavg.global_model), weights(build()))
    assert same(weights(fedqsn.global_model), weights(fedavg.global_model))
    assert [r.loss_last for r in fedqsn.rounds] == [r.loss_last for r in fedavg.rounds]


def test_so_it_is_for_a_tied_language_model():
    fedavg = federation(gpt2(), scheme=FedAvg()).run(2)
    fedqsn = federation(gpt2(), scheme=FedQSN(units="neurons", **NO_MASK)).run(2)
    assert same(weights(fedqsn.global_model), weights(fedavg.global_model))


@pytest.mark.parametrize("choice", CHOICES)
def test_so_it_is_with_regmean(build, choice):
    fedavg = federation(build(), scheme=FedAvg(aggregation="regmean")).run(2)
    scheme = FedQSN(units=choice, aggregation="regmean", **NO_MASK)
    fedqsn = federation(build(), scheme=scheme).run(2)
    assert not same(weights(fedavg.global_model), weights(build()))
    assert same(weights(fedqsn.global_model), weights(fedavg.global_model))


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(CHOICES),
    st.fixed_dictionaries(
        {
            "policy": st.sampled_from(POLICIES),
            "draw": st.sampled_from(DRAWS),
            "unbiased": st.booleans(),
            "merge": st.sampled_from(["original", "server"]),
            "groups": st.integers(1, 3),
            "update_bits": st.sampled_from([None, 4]),
        }
    ),
)
def test_no_other_setting_matters_then(name, choice, options):
    build = MODELS[name]
    fedqsn = play(FedQSN(units=choice, **NO_MASK, **options), build(), rounds=2)
    if options["update_bits"] is None:
        assert same(fedqsn.final(), play(FedAvg(), build(), rounds=2).final())
    else:
        exact = play(FedAvg(), build(), rounds=2).final()
        for tensor, other in zip(fedqsn.final().values(), exact.values(), strict=True):
            torch.testing.assert_close(tensor, other, atol=0.2, rtol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_mean_over_participants_is_then_the_mean_over_holders(name):
    one, other = (
        play(FedQSN(average=average, **NO_MASK), MODELS[name](), rounds=2).final()
        for average in ("holders", "participants")
    )
    assert same(one, other)


@pytest.mark.parametrize("build", [mlp, convnet])
def test_fedavg_is_the_textbook_average_of_trained_weights(build):
    result = federation(build(), scheme=FedAvg(), training=PLAIN).run(3)
    torch.testing.assert_close(
        weights(result.global_model), weights(textbook(build(), rounds=3)), rtol=1e-4, atol=1e-5
    )


def textbook(model, rounds):
    """W = sum n_k W_k / sum n_k after plain gradient descent, with no code of the library."""
    clients = [rows(6 + 2 * i, seed=i) for i in range(3)]
    total = sum(map(len, clients))
    for _ in range(rounds):
        mean = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
        for data in clients:
            local = copy.deepcopy(model).train()
            images = torch.stack([row["image"] for row in data])
            labels = torch.tensor([row["label"] for row in data])
            for _ in range(3):
                local.zero_grad()
                torch.nn.functional.cross_entropy(local(images), labels).backward()
                with torch.no_grad():
                    for parameter in local.parameters():
                        parameter -= 0.05 * parameter.grad
            for name, tensor in local.state_dict().items():
                if tensor.is_floating_point():
                    mean[name] += len(data) / total * tensor
        model.load_state_dict(mean)
    return model
