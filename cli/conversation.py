"""The memory of `weft chat`: kept here and sent whole each turn, or kept by the server in a session."""

from __future__ import annotations

from typing import Protocol

import grpc

from cli.connection import ConnectionOptions
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc


class Conversation(Protocol):
    """What the next turn goes on from."""

    def prepare(self, request: pb.GenerateRequest, line: str) -> None:
        """Put the turn into the request."""

    def answered(self, answer: str | None) -> None:
        """The turn is over; None when there was not one character."""

    def reset(self) -> None:
        """Begin anew."""


class LocalConversation:
    """Every turn since the beginning, sent each time."""

    def __init__(self, opening: list[pb.ChatMessage]) -> None:
        self._opening = opening
        self._history = list(opening)

    def prepare(self, request: pb.GenerateRequest, line: str) -> None:
        """The whole conversation."""
        self._history.append(pb.ChatMessage(role="user", content=line))
        request.chat.CopyFrom(pb.ChatPrompt(messages=self._history))

    def answered(self, answer: str | None) -> None:
        """A turn without an answer is forgotten."""
        if answer is None:
            self._history.pop()
        else:
            self._history.append(pb.ChatMessage(role="assistant", content=answer))

    def reset(self) -> None:
        """Back to the opening."""
        self._history = list(self._opening)


class ServerConversation:
    """A session of the server, made if there is none; only the new turn is sent. Raises grpc.RpcError."""

    def __init__(
        self,
        stub: gateway_grpc.GatewayServiceStub,
        connection: ConnectionOptions,
        session_id: str,
        model: str,
        opening: list[pb.ChatMessage],
    ) -> None:
        self._stub = stub
        self._how = {"timeout": connection.timeout, "metadata": connection.metadata}
        self._session_id, self._model, self._opening = session_id, model, opening
        try:
            self._create()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise

    def prepare(self, request: pb.GenerateRequest, line: str) -> None:
        """The new turn; before the first one the opening."""
        asked = pb.GetSessionRequest(session_id=self._session_id)
        opening = [] if self._stub.GetSession(asked, **self._how).session.num_turns else self._opening
        messages = [*opening, pb.ChatMessage(role="user", content=line)]
        request.session_id = self._session_id
        request.chat.CopyFrom(pb.ChatPrompt(messages=messages))

    def answered(self, answer: str | None) -> None:
        """The server knows."""

    def reset(self) -> None:
        """A new session of the same name."""
        request = pb.DeleteSessionRequest(session_id=self._session_id)
        self._stub.DeleteSession(request, **self._how)
        self._create()

    def _create(self) -> None:
        request = pb.CreateSessionRequest(session_id=self._session_id, model=self._model)
        self._stub.CreateSession(request, **self._how)
