"""A scheme in front of a Flower ClientApp that knows nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

from fedveil.aggregation import Mean
from fedveil.errors import ConfigurationError, ProtocolError, TrainingError, WireError
from fedveil.flower.client import answer
from fedveil.flower.payload import pack, unpack
from fedveil.schemes import Scheme, with_aggregation
from fedveil.schemes.client import ProxyClient
from fedveil.wire import Message as Wire

__all__ = ["proxy_mod"]


def proxy_mod(
    scheme: Scheme,
    architecture: Callable[[], nn.Module],
    *,
    arrays: str = "arrays",
    examples: str = "num-examples",
) -> Mod:
    """Lets a ClientApp of your own train proxies: ``ClientApp(mods=[proxy_mod(FedQSN(), Net)])``.

    Its train function gets whole arrays, zero where something is withheld, and returns whole arrays
    as ever; what changed where nothing was released is dropped. Of what it raises the server is
    told the kind alone.

    Args:
        scheme: The server's, at least in what its ``client_fields`` name.
        architecture: Makes a model of the owner's architecture; its weights do not matter.
        arrays: The app's name for the arrays that it gets and returns.
        examples: Its metric that says how many examples it trained on.

    Does NOT keep withheld units at zero while the app trains, nor make the network smaller, nor
    protect the client's data: :func:`~fedveil.flower.client_app` does the first two.

    Raises:
        ConfigurationError: The scheme needs more of clients than an update, or that they keep
            something.
    """
    side = with_aggregation(scheme, Mean()).client()
    if isinstance(side, ProxyClient):
        side = replace(side, shrink=False)
    if side.remembers:
        raise ConfigurationError(
            "The scheme wants clients to keep something between rounds, and an app keeps nothing",
            expected='no error_feedback, and backbone="always"',
            found=repr(scheme),
        )

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)

        def train() -> RecordDict:
            data, _ = unpack(message.content)
            if data is None:
                raise WireError("A message has no proxy", expected="a proxy")
            run = _AppTrainer(message, context, call_next, arrays, examples)
            content = pack(side.fit(Wire.from_bytes(data), _made(architecture), run).to_bytes())
            content.update(run.metrics)
            return content

        return Message(content=answer(train), reply_to=message)

    return mod


@lru_cache(maxsize=1)
def _made(architecture: Callable[[], nn.Module]) -> nn.Module:
    """One model for all messages to this process."""
    return architecture()


@dataclass
class _Record:
    examples: int
    steps: int = 1
    loss_first: float = 0.0
    loss_last: float = 0.0


class _AppTrainer:
    """Trains a model by handing its arrays to an app: a :class:`fedveil.schemes.LocalTrainer`."""

    def __init__(
        self, message: Message, context: Context, app: ClientAppCallable, arrays: str, examples: str
    ) -> None:
        self._message, self._context, self._app = message, context, app
        self._arrays, self._examples = arrays, examples
        self.metrics: dict[str, MetricRecord] = {}

    def __call__(self, model: nn.Module) -> _Record:
        asked = copy.copy(self._message)
        settings = self._message.content.config_records
        asked.content = RecordDict({self._arrays: ArrayRecord(model.state_dict()), **settings})
        reply = self._app(asked, self._context)
        if reply.has_error():
            raise TrainingError("The app returned an error")
        records = reply.content.array_records
        self.metrics = dict(reply.content.metric_records)
        if self._arrays not in records:
            raise TrainingError("The app returned no arrays", expected=repr(self._arrays))
        model.load_state_dict(records[self._arrays].to_torch_state_dict())
        told = [record[self._examples] for record in self.metrics.values()
                if self._examples in record]  # fmt: skip
        if not told or not isinstance(told[0], int):
            raise ProtocolError(
                "The app does not say how many examples it trained on",
                expected=f"a whole number as the metric {self._examples!r}",
            )
        return _Record(told[0])

    def replay(self, model: nn.Module, examples: int) -> Iterator[Mapping[str, Tensor]]:
        """Nobody asks for it: see :func:`with_aggregation`."""
        yield from ()
