"""Running a model on a client's own data while someone watches, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedveil.tasks import ImageClassification, TextClassification
from fedveil.training import LocalRun, Trainer, Training
from training_samples import images, perceptron, same, state, texts

TASK = ImageClassification(num_labels=3)


def trainer(count=10, task=TASK):
    return Trainer(task, images(count), Training())


class Watch(nn.Module):
    """Notes what it is called with, and in which mode."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 3)
        self.calls = []

    def forward(self, images):
        self.calls.append((self.training, torch.is_grad_enabled(), images))
        return self.out(images.flatten(1))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 12))
def test_examples_are_spread_evenly_and_none_comes_twice(size, examples, batch_size):
    rows = [{"image": torch.full((1, 4, 4), float(n)), "label": n % 3} for n in range(size)]
    model = Watch()
    batches = list(Trainer(TASK, rows, Training()).replay(model, examples, batch_size=batch_size))
    chosen = [int(image[0, 0, 0]) for batch in batches for image in batch["images"]]
    count = min(size, examples)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    gaps = [after - before for before, after in zip(chosen, [*chosen[1:], size], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert [len(batch["images"]) for batch in batches] == [
        min(batch_size, count - start) for start in range(0, count, batch_size)
    ]
    assert [int(n) for batch in batches for n in batch["labels"]] == [n % 3 for n in chosen]


def test_each_batch_is_handed_out_just_before_the_model_gets_it():
    model = Watch()
    for number, batch in enumerate(trainer().replay(model, 10, batch_size=4)):
        assert len(model.calls) == number
        assert set(batch) == {"images", "labels"}
        last = batch
    assert len(model.calls) == 3
    assert torch.equal(model.calls[-1][2], last["images"])


def test_the_model_runs_in_evaluation_mode_and_without_gradients():
    model = Watch().train()
    for _ in trainer().replay(model, 5):
        # Whoever watches may do so with gradients.
        assert torch.is_grad_enabled()
    assert [(mode, gradients) for mode, gradients, _ in model.calls] == [(False, False)]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"norm": True}])
def test_nothing_of_the_model_changes(options):
    model = perceptron(**options).train()
    model.hidden.eval()
    model.out.bias.requires_grad_(False)
    before, modes = state(model), [module.training for module in model.modules()]
    list(trainer().replay(model, 8))
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "how", ["stopped early", "an error in the model", "an error of the caller"]
)
def test_modes_are_given_back_however_it_ends(how):
    model = perceptron().train()
    run = trainer().replay(model, 8, batch_size=2)
    next(run)
    if how == "stopped early":
        run.close()
    elif how == "an error in the model":
        model.forward = lambda images: 1 / 0
        with pytest.raises(ZeroDivisionError):
            next(run)
    else:
        with pytest.raises(KeyError):
            run.throw(KeyError("x"))
    assert model.training
    assert torch.is_grad_enabled()


def test_the_callers_generator_is_undisturbed():
    model = perceptron(dropout=0.5).train()
    before = torch.get_rng_state()
    list(trainer().replay(model, 8))
    assert torch.equal(torch.get_rng_state(), before)


def blurred(image):
    return image + torch.randn(image.shape)


def test_random_transforms_leave_it_undisturbed_too_and_repeat_themselves():
    random = trainer(task=ImageClassification(num_labels=3, transform=blurred))
    before = torch.get_rng_state()
    first = list(LocalRun(random, 1).replay(perceptron(), 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = list(LocalRun(random, 1).replay(perceptron(), 8))
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(first, again, strict=True))


def test_the_results_are_those_of_a_model_that_is_evaluated():
    model = perceptron(dropout=0.5, norm=True)
    for _ in range(3):
        model.train()(torch.randn(8, 1, 4, 4))
    seen = []
    handle = model.out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batches = list(trainer().replay(model, 10, batch_size=3))
    handle.remove()
    whole = model.eval()(torch.cat([batch["images"] for batch in batches]))
    torch.testing.assert_close(torch.cat(seen), whole.detach())
    assert not any(output.requires_grad for output in seen)


def test_texts_are_padded_batch_by_batch(bert, tokenizer):
    rows = texts(7)
    replay = Trainer(TextClassification(tokenizer), rows, Training()).replay(bert, 7, batch_size=3)
    for batch in replay:
        assert set(batch) >= {"input_ids", "attention_mask", "labels"}
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]


def test_a_local_run_replays_its_trainers_data():
    model, data = Watch(), trainer(6)
    one = list(LocalRun(data, 5).replay(model, 4))
    other = list(data.replay(model, 4))
    assert torch.equal(one[0]["images"], other[0]["images"])
