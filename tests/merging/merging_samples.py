"""Small models, their data, and merging as the papers have it, in float64."""

from typing import Any

import torch
from torch import nn

from fedveil import ImageClassification, RegMean
from fedveil.merging import merge, statistics_of
from fedveil.state import read_state
from fedveil.tasks import TextClassification
from toys import NumberTokenizer, rows, texts

EXACT = RegMean(off_diagonal=1.0, ridge=0.0, bits=None, examples=10_000)
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
METHODS = ("regmean", "fisher", "mean")


def task_of(model):
    text = hasattr(model, "config")
    return TextClassification(NumberTokenizer()) if text else ImageClassification()


def data_of(model, count=12, seed=0):
    return texts(count, seed) if hasattr(model, "config") else rows(count, seed)


def measured(models, method, settings=RegMean(), counts=(12, 20, 7)):  # noqa: B008
    """Statistics of each model on data of its own; None for the mean."""
    if method == "mean":
        return None
    return [
        statistics_of(
            model,
            data_of(model, count, seed),
            task=task_of(model),
            method=method,
            settings=settings,
        )
        for seed, (model, count) in enumerate(zip(models, counts, strict=False))
    ]


def merged(models, method, settings=RegMean(), **options):  # noqa: B008
    """Merge models by statistics on data of their own."""
    given = measured(models, method, settings)
    return merge(models, method=method, statistics=given, settings=settings, **options)


def linear(inputs=16, outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=False))


def doubles(model):
    return {name: tensor.double() for name, tensor in read_state(model).items()}


def images_of(data):
    return torch.stack([row["image"] for row in data]).double().flatten(1)


def regmean_oracle(grams, weights, matrices, a, ridge):
    """``(sum c G~)^-1 sum c G~ W^T`` of the paper, plus the ridge; matrices [outputs, inputs]."""
    left = right = 0.0
    for gram, weight, matrix in zip(grams, weights, matrices, strict=True):
        diagonal = gram.diagonal().diag()
        shrunk = a * gram + (1 - a) * diagonal
        shrunk += (ridge * diagonal.diagonal().mean() + 1e-10) * torch.eye(len(gram))
        left = left + weight * shrunk
        right = right + weight * shrunk @ matrix.t()
    return torch.linalg.solve(left, right).t()


def fisher_oracle(model, images):
    """Mean over examples of ``sum_y p_y (d log p_y)^2`` by Jacobians of the logits, in float64."""
    model = model.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def logits(values, image):
        return torch.func.functional_call(model, values, (image[None],))[0]

    for image in images:
        probability = logits(parameters, image).softmax(0)
        for name, rows_ in torch.func.jacrev(logits)(parameters, image).items():
            p = probability.view(-1, *[1] * (rows_.dim() - 1))
            total[name] += (p * (rows_ - (p * rows_).sum(0)).square()).sum(0) / len(images)
    model.float()
    return total
