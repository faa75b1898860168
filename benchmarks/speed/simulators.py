"""The workload of `speed.rounds` in other simulators, beside the same bare loop.

Each runs in a process of its own, on one core.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import nn

from speed.children import main
from speed.plan import Plan
from speed.rounds import BARE, RATE, BareLoop, Local, case_of, examples, net
from speed.rows import Row, measured
from speed.timing import Pairs, clock

__all__ = ["flower", "pfl"]


class Watch:
    """Times rounds from the outside: each round that ends is followed by one of the bare loop."""

    def __init__(self, clients: int) -> None:
        self._bare, self.pairs = BareLoop(Local(clients)), Pairs()
        self._started = time.perf_counter()

    def start(self) -> None:
        """What was until now is no round."""
        self._started = time.perf_counter()

    def lap(self) -> None:
        """A round has ended."""
        seconds = time.perf_counter() - self._started
        self.pairs.operation.append(seconds)
        self.pairs.floor.append(clock(self._bare))
        self.start()

    def measured(self) -> Pairs:
        """All rounds but the first, which warms up."""
        return Pairs(self.pairs.operation[1:], self.pairs.floor[1:])


def pfl(plan: Plan) -> Pairs:
    """pfl-research: its SimulatedBackend, federated averaging, in this process."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def loss(self, images: Any, labels: Any) -> torch.Tensor:
            self.train()
            return nn.functional.cross_entropy(self.layers(images), labels.long())

        def metrics(self, images: Any, labels: Any) -> dict[str, Any]:
            return {}

    watch = Watch(plan.cohort)

    class Laps(TrainingProcessCallback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            watch.start()
            return Metrics()

        def after_central_iteration(self, *arguments: Any, **more: Any) -> tuple[bool, Any]:
            watch.lap()
            return False, Metrics()

    np.random.seed(0)
    data = {
        number: [image[None].numpy(), np.array([label])]
        for number, (image, label) in enumerate(examples(plan.cohort))
    }
    users = get_user_sampler("minimize_reuse", list(data))
    dataset = FederatedDataset.from_slices(data, users)
    module = Net()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=dataset, val_data=dataset),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=plan.repeats(7) + 1,
            evaluation_frequency=10**9,
            train_cohort_size=plan.cohort,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=RATE, local_batch_size=1
        ),
        callbacks=[Laps()],
        send_metrics_to_platform=False,
    )
    return watch.measured()


def flower(plan: Plan) -> Pairs:
    """Flower: its simulation on Ray with one worker, its FedAvg; clients load, train, return."""
    import ray  # noqa: F401  # run_simulation ends the process if it is missing
    from flwr.app import ArrayRecord, Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.disable(logging.WARNING)
    watch, count = Watch(plan.cohort), plan.cohort
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Any, context: Context) -> Any:
        return train_once(message, context, count)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)

        def lap(number: int, arrays: Any) -> None:
            if number == 0:
                watch.start()
            else:
                watch.lap()

        arrays = ArrayRecord(net().state_dict())
        strategy.start(
            grid=grid, initial_arrays=arrays, num_rounds=plan.repeats(7) + 1, evaluate_fn=lap
        )

    one: Any = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}
    run_simulation(server, client, count, backend_config=one)
    return watch.measured()


def train_once(message: Any, context: Any, count: int) -> Any:
    """What a Flower client does with a message."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    model, data = _workplace(count)
    image, label = data[int(context.node_config["partition-id"])]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = nn.functional.cross_entropy(model(image[None]), torch.tensor([label]))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content=content, reply_to=message)


@cache
def _workplace(count: int) -> tuple[nn.Module, list[Any]]:
    """Made once in a worker process, which serves all clients."""
    torch.set_num_threads(1)
    return net().train(), examples(count)


SIMULATORS: Final[dict[str, Callable[[Plan], Pairs]]] = {"pfl": pfl, "flower": flower}


def measure(arguments: Sequence[str], plan: Plan) -> Iterator[Row]:
    """In the child: one simulator's row."""
    name, who = arguments
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    case = {**case_of(plan), "scheme": "FedAvg"}
    yield measured("rounds/simulator", case, SIMULATORS[name](plan), BARE, who=who)


if __name__ == "__main__":
    main(measure)
