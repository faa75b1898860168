"""A scheme around any Flower strategy: nodes get proxies, the strategy gets whole models."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fedveil.aggregation import WHOLE, Average, Observed, Replay, Scales
from fedveil.engine.bounds import Bounded, Bounds, Claim, lower_median
from fedveil.engine.crew import seed_of
from fedveil.engine.patience import Patience
from fedveil.errors import ConfigurationError, FedveilError, ProtocolError
from fedveil.flower.directory import ByNode, Directory
from fedveil.flower.payload import pack, unpack
from fedveil.log import LOG
from fedveil.run import Exposure, Manifest
from fedveil.run.folder import RunFolder
from fedveil.run.ledger import open_ledger
from fedveil.schemes import Facts, Scheme, examples_of, with_aggregation
from fedveil.secret import Secret
from fedveil.selection import Selection
from fedveil.state import StateDict, copy_of, load_state
from fedveil.wire import Limits, Section, reply_limits
from fedveil.wire import Message as Wire

__all__ = ["ModelPrivacy"]

_ARRAYS, _METRICS = "arrays", "metrics"


class ModelPrivacy(Strategy):
    """Runs a Flower strategy without any node ever being sent the model.

    The inner strategy decides who takes part and how replies become the next model. What it would
    send, the global model, stays here: each node is sent its own proxy instead, and its reply is
    made whole again (the global model plus the client's update) before the inner strategy sees it.

    A unit that was withheld from a client is unchanged in its reply: strategies that vote, such as
    FedMedian, and those that measure distances, such as Krum, count it as a vote for no change.
    Metrics that a client adds are passed on if all replies have them.

    Nodes run :func:`~fedveil.flower.client_app`, or a ClientApp of your own behind
    :func:`~fedveil.flower.proxy_mod`.

    Example:
        >>> strategy = ModelPrivacy(
        ...     FedQSN(), model=model, secret=secret, inner=FedMedian(fraction_evaluate=0.0)
        ... )  # doctest: +SKIP
        >>> result = strategy.start(
        ...     grid, ArrayRecord(model.state_dict()), num_rounds=5
        ... )  # doctest: +SKIP

    Args:
        scheme: How proxies are made. Its ``aggregation`` must be "mean": the inner strategy's work.
        model: The owner's model, which is copied. Its weights are those of ``initial_arrays``.
        secret: The federation secret, from which masks are drawn.
        inner: What combines replies; Flower's FedAvg unless told.
        directory: Which node is which client, so that masks of a client stay when its node comes
            back; by default each node's own key, where the SuperLink checks keys.
        patience: Its ``give_up`` is how long to wait for nodes at most; for answers,
            :meth:`start` has a timeout.
        out: Where to write ``run.json`` and ``exposure.jsonl``, the record of everything released;
            one that is there is continued. None writes nothing.
        bounds: How much one client may weigh and change in a round; unless told, as
            :class:`~fedveil.Bounds` says. What was cut is logged. Of the numbers that clients add
            none counts for more than ``bounds.weight`` times the median's size; a strategy that
            cannot take one below zero must look for itself.
        limits: How much one reply may be; unless told, what an honest one can be at most.
        seed: Gives other draws to clients' training under the same secret.

    Does NOT protect what the scheme does not protect, and sends no model to be evaluated: clients
    evaluate nothing. Measure with ``evaluate_fn``, on the server. What you put into
    ``train_config`` reaches every node. Each reply takes the memory of a whole model.

    Raises:
        ConfigurationError: The scheme aggregates otherwise, or the model cannot be cut.
        CheckpointError: What is in ``out`` belongs to another run.
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        model: nn.Module,
        secret: Secret,
        inner: Strategy | None = None,
        directory: Directory | None = None,
        patience: Patience | None = None,
        out: str | Path | None = None,
        bounds: Bounds | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> None:
        self._inner = inner or FlowerFedAvg()
        self._directory, self._secret, self._seed = directory or ByNode(), secret, seed
        self._bounds = bounds or Bounds()
        self._patience = patience or Patience()
        self._replies = _Replies()
        self._server = with_aggregation(scheme, self._replies).server(model, secret)
        self._model = copy_of(model)
        self._own = scheme.tensors(self._model)
        self._weighted_by = getattr(self._inner, "weighted_by_key", "num-examples")
        self._asked: dict[int, str] = {}
        self._limits, self._awaited = limits, dict[str, Limits]()
        self._beside = scheme.beside(self._model)
        self._folder = None if out is None else RunFolder(out)
        self._exposure: Exposure | None = None
        if out is not None:
            configuration = {
                "scheme": {"name": scheme.name, **asdict(scheme)},  # type: ignore[call-overload]
                "seed": seed,
                "secret": secret.fingerprint(),
            }
            with self._folder_held() as folder:
                assert folder is not None
                self._open_exposure(folder, configuration, scheme.facts())

    def start(self, *arguments: Any, **options: Any) -> Result:
        """As of Flower's strategies; nobody else writes to ``out`` meanwhile.

        Raises:
            CheckpointError: Another run is at work in ``out``.
        """
        with self._folder_held():
            return super().start(*arguments, **options)

    def _folder_held(self) -> AbstractContextManager[RunFolder | None]:
        return nullcontext() if self._folder is None else self._folder.held()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """A proxy for each node that the inner strategy chose.

        Raises:
            ConfigurationError: The arrays are those of another model.
        """
        self._take(arrays)
        self._server.begin_round(server_round)
        known: Any = _Known(grid, self._directory, self._patience)
        whole = ArrayRecord(_numbers(self._global()))
        chosen = {
            message.metadata.dst_node_id: message
            for message in self._inner.configure_train(server_round, whole, config, known)
        }
        self._asked = {n: client for n, client in known.find().items() if n in chosen}
        # In the order of names: who comes first decides who shares a mask with whom.
        order = sorted(self._asked, key=self._asked.__getitem__)
        return [self._veiled(chosen[node], server_round) for node in order]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the replies that can be used."""
        start, usable = self._global(), dict[str, _Reply]()
        for message in replies:
            reply = self._read(message)
            if reply is not None:
                usable.setdefault(reply.client, reply)
        usable = _like_most(usable, self._bounds.weight)
        bounded = self._bounds.apply({client: reply.claim for client, reply in usable.items()})
        for client, reply in usable.items():
            self._make_whole(reply, bounded[client], start)
        messages = [reply.message for reply in usable.values()]
        arrays, metrics = self._inner.aggregate_train(server_round, messages)
        if arrays is not None:
            end = arrays.to_torch_state_dict()
            if all(bool(torch.isfinite(end[name]).all()) for name in start):
                self._replies.decide(start, end)
            else:
                LOG.error("Round %d is not applied: no finite model came of it", server_round)
        self._server.end_round()
        return (None if arrays is None else self._arrays()), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nothing: the model would have to be sent."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing."""
        return None

    def summary(self) -> None:
        """Log the scheme and what is inside."""
        LOG.info("Nodes are sent proxies of the scheme %s", type(self._server).__name__)
        self._inner.summary()

    def final(self) -> StateDict:
        """The model to keep, after the scheme's merge, in the dtypes the owner brought."""
        return self._server.final()

    def _open_exposure(
        self, folder: RunFolder, configuration: dict[str, Any], facts: Facts
    ) -> None:
        """Begin the record of what is released, or go on with the one that is there."""
        manifest = Manifest.of(self._own, self._server.groups, configuration, facts=facts)
        folder.prepare()
        self._exposure = open_ledger(manifest, folder, ())
        folder.claim("run.json")
        manifest.write(folder.path)
        state = self._server.state()
        if "clients" in state.values:  # in their order, which decides who shares a mask
            values = {**state.values, "clients": self._exposure.enrolled}
            self._server.restore(replace(state, values=values))

    def _veiled(self, message: Message, number: int) -> Message:
        """A message to a node with its proxy in the place of the model."""
        client = self._asked[message.metadata.dst_node_id]
        proxy = self._server.release(client)
        self._awaited[client] = self._limits or reply_limits(proxy, self._beside)
        if self._exposure is not None:
            self._exposure.record(proxy)
        seed = seed_of(self._secret, self._seed, number, client)
        content = pack(proxy.to_bytes(), {"seed": seed})
        for name, record in message.content.config_records.items():
            content[name] = ConfigRecord(dict(record))
        return Message(
            content=content,
            dst_node_id=message.metadata.dst_node_id,
            message_type=message.metadata.message_type,
            ttl=message.metadata.ttl,
        )

    def _read(self, message: Message) -> _Reply | None:
        """A node's reply, checked; None if it cannot be used."""
        node = message.metadata.src_node_id
        client = self._asked.get(node)
        if client is None or message.has_error():
            LOG.warning("A node gave no answer: %s", client or node)
            return None
        try:
            data, facts = unpack(message.content)
            if data is None:
                raise ProtocolError(
                    "A client gave no update", found=str(facts.get("failure", "nothing"))[:40]
                )
            reply = Wire.from_bytes(data, limits=self._awaited[client])
            claim = Claim(examples_of(reply), self._server.inspect(client, reply))
        except FedveilError as error:
            LOG.warning("%s's answer cannot be used: %s", client, error)
            return None
        told = _metrics_of(message) or {
            name: value for name, value in reply.scalars.items() if type(value) is float
        }
        told.pop(self._weighted_by, None)
        return _Reply(message, reply, claim, told)

    def _make_whole(self, reply: _Reply, bounded: Bounded, start: StateDict) -> None:
        """Let a reply be as the inner strategy expects it, as far as it may count."""
        for cut in bounded.cuts:
            LOG.warning("%s counts for less: %s", reply.client, cut)
        self._server.absorb(reply.client, reply.wire, bounded.weight, bounded.scales)
        update = self._replies.latest
        whole = {name: t + update[name] if name in update else t for name, t in start.items()}
        # Strategies weigh by this number; a claim that was not cut stays a whole one.
        counted = max(1, int(bounded.weight))
        if bounded.weight == float(reply.claim.examples):
            counted = reply.claim.examples
        metrics = MetricRecord({**reply.told, self._weighted_by: counted})
        reply.message.content = RecordDict(
            {_ARRAYS: ArrayRecord(_numbers(whole)), _METRICS: metrics}
        )

    def _take(self, arrays: ArrayRecord) -> None:
        """Let the global model be these arrays."""
        given = arrays.to_torch_state_dict()
        own = self._model.state_dict()
        odd = sorted(
            name for name in {*given, *own}
            if name not in given or name not in own or given[name].shape != own[name].shape
        )  # fmt: skip
        if odd:
            raise ConfigurationError(
                "The arrays are not those of the model",
                expected="ArrayRecord(model.state_dict())",
                where=odd[0],
            )
        state = self._server.state()
        new = {name: given[name].to(t.dtype) for name, t in state.tensors.items()}
        self._server.restore(replace(state, tensors=new))

    def _global(self) -> StateDict:
        """The tensors that are trained, by name, each tied one once."""
        state = self._server.state().tensors
        return {name: t for name, t in state.items() if t.is_floating_point()}

    def _arrays(self) -> ArrayRecord:
        """The global model as Flower has it: every name of the model's state dict."""
        load_state(self._model, self._server.view("global"))
        return ArrayRecord(_numbers(self._model.state_dict()))


class _Replies:
    """The aggregation of a scheme whose replies something else combines.

    It holds one update at a time, whole, and in the end what the others made of all of them.
    """

    name = "flower"

    def __init__(self) -> None:
        self.latest: dict[str, Tensor] = {}
        self.clients = 0
        self._shapes: Mapping[str, torch.Size] = {}
        self._step: dict[str, Tensor] = {}

    def observe(
        self, model: nn.Module, replay: Replay, changed: Collection[str], selection: Selection
    ) -> Observed:
        """Nothing is asked of clients."""
        return Observed()

    def sums(
        self,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        average: Average,
        shared_masks: bool,
    ) -> Callable[[], _Replies]:
        """See :class:`~fedveil.aggregation.base.Aggregation`: itself, emptied."""
        self._shapes = shapes
        return self._emptied

    def beside(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        """Nothing."""
        return {}

    def _emptied(self) -> _Replies:
        self.latest, self._step, self.clients = {}, {}, 0
        return self

    def read(self, reply: Wire, selection: Selection) -> tuple[dict[str, Section], None]:
        """All sections are updates."""
        return dict(reply.sections), None

    def sizes(self, statistics: None) -> dict[str, float]:
        """There are no statistics."""
        return {}

    def add(
        self,
        updates: Mapping[str, Tensor],
        selection: Selection,
        weight: float,
        statistics: None,
        scales: Scales = WHOLE,
    ) -> None:
        """Make one client's updates whole: zero where it held nothing."""
        self.clients += 1
        self.latest = {}
        for name, update in updates.items():
            whole = torch.zeros(self._shapes[name], dtype=update.dtype)
            selection.scatter(name, update if scales is WHOLE else scales.update * update, whole)
            self.latest[name] = whole

    def decide(self, start: StateDict, end: StateDict) -> None:
        """The step of this round leads from one model to the other."""
        self.latest = {}
        self._step = {name: end[name].to(tensor.dtype) - tensor for name, tensor in start.items()}

    def mean(self, name: str) -> Tensor | None:
        """See :class:`~fedveil.aggregation.base.Sums`."""
        return self._step.get(name)


class _Known:
    """A grid on which there are none but clients' nodes, for which nobody waits for ever."""

    def __init__(self, grid: Grid, directory: Directory, patience: Patience) -> None:
        self._grid, self._directory = grid, directory
        self._last = time.monotonic() + patience.give_up
        self._clients: dict[int, str] | None = None

    def get_node_ids(self) -> list[int]:
        """Strategies ask until there are enough."""
        self._clients = None
        clients = self.find()
        if time.monotonic() > self._last:
            raise ProtocolError(
                "Too few clients are connected",
                expected="as many as the strategy needs",
                found=", ".join(sorted(clients.values())) or "none",
            )
        return list(clients)

    def find(self) -> dict[int, str]:
        """Clients by node, as of the last time that somebody asked."""
        if self._clients is None:
            found = self._directory.find(self._grid)
            self._clients = {node: client for client, node in found.items()}
        return self._clients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def _numbers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that NumPy knows, which bfloat16 is not."""
    return {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in state.items()}


def _metrics_of(message: Message) -> dict[str, int | float]:
    records = message.content.metric_records.values()
    return {
        name: value
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float)
    }


@dataclass(frozen=True)
class _Reply:
    """A reply that can be used, and the numbers that its client adds."""

    message: Message
    wire: Wire
    claim: Claim
    told: dict[str, int | float]

    @property
    def client(self) -> str:
        return self.wire.client

    def tells(self, name: str) -> int | float | None:
        """A number that the client adds, in its metrics or in its message; None if it does not."""
        value = self.told.get(name, self.wire.scalars.get(name))
        return value if type(value) in (int, float) else None  # type: ignore[return-value]


def _like_most(replies: Mapping[str, _Reply], most: float | None) -> dict[str, _Reply]:
    """Replies with the numbers that most clients add, none of them far from the others'.

    Strategies may weigh by such a number, and refuse a whole round if one reply lacks it. One that
    few add is left out; a reply without one that most add, or with one that is none, is not used.

    Args:
        replies: By client.
        most: A number counts for at most so many times the median size of all; None for any.
    """
    had = Counter(name for reply in replies.values() for name in reply.told)
    usual = {name for name, count in had.items() if 2 * count > len(replies)}
    kept = {}
    for client, reply in replies.items():
        told = {name: reply.tells(name) for name in usual}
        if not all(value is not None and math.isfinite(value) for value in told.values()):
            LOG.warning("%s's answer cannot be used: its metrics are not the others'", client)
        else:
            kept[client] = replace(reply, told={n: v for n, v in told.items() if v is not None})
    if most is None:
        return kept
    for name in usual:
        bound = most * lower_median(abs(reply.told[name]) for reply in kept.values())
        for client, reply in kept.items():
            if abs(value := reply.told[name]) > bound:
                LOG.warning("%s's %s of %g counts as %g", client, name, value, bound)
                reply.told[name] = math.copysign(bound, value)
    return kept
