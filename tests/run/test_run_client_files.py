"""Which copies of the model a federation keeps, and whose memory they are."""

import pytest
import torch

import fedveil.federation.facade as facade
from fedveil import ConfigurationError, FedAvg, FedQSN, ImageClassification
from fedveil.shards import load_into, save_shards
from fedveil.state import architecture_of, read_state
from fedveil.training import evaluate
from toys import bert, convnet, federation, gpt2, mlp, rows, same, weights

BUILDS = [mlp, convnet, bert, gpt2]


def memory(model):
    """Where a model's tensors are."""
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("scheme", [FedAvg(), FedQSN(), FedQSN(merge="server")], ids=repr)
@pytest.mark.parametrize("build", BUILDS)
def test_without_a_copy_the_result_is_the_same_and_the_model_too(build, scheme):
    kept = federation(build(), scheme=scheme).run(2).global_model
    model = build()
    borrowing = federation(model, scheme=scheme, copy=False)
    result = borrowing.run(2).global_model
    assert same(weights(result), weights(kept))
    assert same(weights(model), weights(build()))
    assert not memory(result) & memory(model)
    assert same(weights(borrowing.run(2).global_model), weights(kept))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_share_no_memory_with_what_goes_on(workers):
    run = federation(mlp(), test=rows(6), workers=workers)
    first = run.run(1).global_model
    before = weights(first)
    second = run.run(1).global_model
    assert not memory(first) & memory(second)
    assert same(weights(first), before)
    assert same(weights(second), before)


def test_a_borrowed_model_that_has_changed_is_refused():
    model = mlp()
    run = federation(model, copy=False)
    run.run(1)
    with torch.no_grad():
        model[1].bias[3] += 1e-6
    with pytest.raises(ConfigurationError, match=r"has changed.*copy=True"):
        run.run(1)
    with torch.no_grad():
        model[1].bias[3] = mlp()[1].bias[3]
    run.run(1)


def test_a_model_that_is_mapped_from_its_files_serves_as_it_is(tmp_path):
    save_shards(read_state(mlp()), tmp_path / "model", shard_bytes=7000)
    model = load_into(architecture_of(mlp(), "meta"), tmp_path / "model")
    result = federation(model, copy=False).run(2).global_model
    assert same(weights(result), weights(federation(mlp()).run(2).global_model))
    assert same(weights(model), weights(mlp()))


@pytest.fixture
def engines(monkeypatch):
    """Every engine that a federation starts."""
    made, start = [], facade.Rounds  # type: ignore[attr-defined]

    def note(**settings):
        made.append(start(**settings))
        return made[-1]

    monkeypatch.setattr(facade, "Rounds", note)
    return made


@pytest.mark.parametrize("build", BUILDS)
def test_without_a_test_set_nothing_is_kept_to_measure(build, engines):
    federation(build()).run(1)
    assert all(tensor.is_meta for tensor in engines[0].model.state_dict().values())


@pytest.mark.parametrize("build", BUILDS)
def test_clients_get_an_architecture_without_weights(build):
    place = federation(build()).workplace()
    assert not any(bool(t.any()) for t in place.architecture.state_dict().values())


def test_the_base_is_measured_as_the_owner_brought_it():
    run, test = federation(mlp(), test=rows(12, seed=5)), rows(12, seed=5)
    result = run.run(2)
    assert result.base == evaluate(mlp(), ImageClassification(), test)
    last = evaluate(result.global_model, ImageClassification(), test)
    assert result.rounds[-1].measures["global"] == last != result.base
