"""A SuperNode's Runtime API, of whose Flower says nothing in public: all of it that fedveil needs.

A SuperNode that is started with `--isolation process` keeps messages and apps, and starts nothing:
another program fetches them from it over HTTPS on the same machine. That is what Flower's own
`flower-superexec` and `flwr-clientapp` do, which then install and import the app. This module
speaks to the SuperNode as they do, and hands out the app as bytes.

Written for flwr 1.41 and 1.42 (pyproject.toml allows no other): everything that is imported from
`flwr` here outside `flwr.app` may move with the next version. tests/deploy run it against a real
SuperNode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

import httpx
from flwr.app import Context, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

__all__ = ["Assignment", "LostError", "Runtime", "failed", "refused"]

_BEAT = 15.0
"""Seconds between two signs of life; after 60 without one a SuperNode gives a message up."""
_PATIENCE = 60.0
"""Seconds for which a SuperNode that does not answer is asked again."""
_PAUSES = (0.2, 1.0, 5.0)

Answer = TypeVar("Answer")


class LostError(Exception):
    """The SuperNode cannot be reached, or knows nothing of this program or its task any more."""


class Runtime:
    """A connection to the SuperNode on this machine.

    Args:
        address: Its "host:port".
        secret: What it was given as ``--superexec-auth-secret-file``: without it a SuperNode hands
            out no message, whoever else is on this machine.
        authority: The certificate (PEM) of whoever signed the SuperNode's own: somebody who listens
            in its place is sent nothing.

    Does NOT protect from the machine's administrator, or from whoever may read both files.
    """

    def __init__(self, address: str, secret: bytes, authority: bytes) -> None:
        self._address, self._authority = address, authority
        asked = "/flwr.proto.Runtime/AcquireTask"
        signer = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[asked])
        self._client = self._connect(signer)

    def take(self) -> Assignment | None:
        """The oldest message that waits for a program, or None.

        Apps of agents, which fedveil has none of, are taken too: whoever sent one is answered.

        Raises:
            LostError: The SuperNode cannot be reached, or is another than this program is for.
        """
        kinds = [TaskType.CLIENT_APP, TaskType.AGENT_APP]
        request = AcquireTaskRequest(supported_task_types=kinds)
        found = _said(lambda: self._client.AcquireTask(request))
        if not found.HasField("task") or not found.token:
            return None
        is_client = found.task.type == TaskType.CLIENT_APP
        client = self._connect(RuntimeTokenHttpInterceptor(found.token))
        return Assignment(client, found.task.run_id, is_client)

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def _connect(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=False,
            root_certificates=self._authority,
            interceptors=[version, interceptor],
        )


class Assignment:
    """One message to be answered. While it is open, the SuperNode is told that somebody is at it.

    Attributes:
        run: The number of the run that the message is of.
        is_client: Whether it is for a client's program, rather than for an agent's.
    """

    def __init__(self, client: RuntimeHttpClient, run: int, is_client: bool) -> None:
        self.run, self.is_client = run, is_client
        self._client, self._node = client, Node()
        self._tree: ObjectTree | None = None
        self._done = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Assignment:
        self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._pulse.join()
        self._client.close()

    def open(self) -> tuple[Message, Context, bytes]:
        """The message without its content, what the SuperNode says of itself, and the app's bytes.

        Raises:
            LostError: The SuperNode is gone, or has no such message any more.
        """
        given = _said(lambda: self._client.PullTaskInput(PullTaskInputRequest()))
        last = time.monotonic() + _PATIENCE
        while True:
            # A SuperNode notes that there is something to do before it has the message.
            found = _said(lambda: self._client.PullMessages(PullAppMessagesRequest()))
            if found.messages_list and found.message_object_trees:
                break
            if time.monotonic() > last:
                raise LostError("the message did not come")
            time.sleep(_PAUSES[0])
        self._tree = found.message_object_trees[0]
        context = context_from_proto(given.context)
        self._node = Node(node_id=context.node_id)
        message = message_from_proto(found.messages_list[0])
        return message, context, given.fab.content

    def content(self) -> Message:
        """The message whole: waits until the SuperNode has all of it, and lets it forget that.

        Raises:
            LostError: The SuperNode is gone.
        """
        assert self._tree is not None
        tree = self._tree
        message: Message = _said(
            lambda: pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, self._node, self.run),
                make_confirm_message_received_fn_protobuf(
                    self._client.ConfirmMessageReceived, self._node, self.run
                ),
                return_type=Message,
            )
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # the content does not have it
        return message

    def answer(self, reply: Message, patience: float = _PATIENCE) -> None:
        """Hand in the reply; with it the message is done.

        Args:
            reply: To the message.
            patience: Seconds for which it is tried again.

        Raises:
            LostError: The SuperNode is gone, or did not wait for it.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree, head = get_object_tree(reply), remove_content_from_message(reply)
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(head)], message_object_trees=[tree]
            )
            told = _said(lambda: self._client.PushMessages(request), patience)
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, run_id=self.run, session_id=told.session_id
            )
            wanted = set(told.objects_to_push)
            _said(
                lambda: push_objects(
                    get_all_nested_objects(reply), push, object_ids_to_push=wanted
                ),
                patience,
            )
        # "failed" would let the SuperNode answer an agent's message a second time.
        end = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
        _said(lambda: self._client.PushTaskOutput(end), patience)

    def _beat(self) -> None:
        while True:
            with suppress(httpx.HTTPError, ValueError):  # the reply will find out
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            if self._done.wait(_BEAT):
                return


def refused(message: Message) -> Message:
    """The reply to a message of an app that is not run: that, and no more."""
    return Message(Error(code=ErrorCode.INVALID_FAB, reason="refused"), reply_to=message)


def failed(message: Message, kind: str) -> Message:
    """The reply to a message whose program failed: the kind of the failure, and no more."""
    return Message(Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=kind), reply_to=message)


def _said(ask: Callable[[], Answer], patience: float = 0.0) -> Answer:
    """What a SuperNode says, asked again for a while if it does not answer.

    Raises:
        LostError: It does not answer, or refuses.
    """
    last, tries = time.monotonic() + patience, 0
    while True:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                raise LostError(f"the SuperNode says {error.response.status_code}") from error
            problem: Exception = error
        except httpx.TransportError as error:
            problem = error
        if time.monotonic() > last:
            raise LostError(f"{type(problem).__name__}: {problem}") from problem
        time.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
        tries += 1
