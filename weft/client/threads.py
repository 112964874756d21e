"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from weft.client.connection import CALL_TIMEOUT_S, OPTIONS
from weft.client.progress import Progress, RetryPolicy
from weft.client.requests import Completion, Delta, Prompt, make_request
from weft.rpc.auth import auth_metadata
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub


class Stream:
    """A generation under way: iterate it for deltas. `close`, or leaving it as a context, cancels what is
    left. Raises weft.rpc.errors.StatusError.
    """

    def __init__(self, stub: Any, metadata: Any, progress: Progress) -> None:
        self._stub = stub
        self._metadata = metadata
        self._progress = progress
        self._call: Any = None
        self._is_closed = False
        self._deltas = self._run()

    @property
    def completions(self) -> list[Completion]:
        """The samples so far."""
        return self._progress.completions

    @property
    def started(self) -> pb.Started | None:
        """Request id, seed, model and version, once the request was admitted."""
        return self._progress.started

    def text(self) -> str:
        """Read to the end; the text of the first sample."""
        for _ in self:
            pass
        return self.completions[0].text

    def close(self) -> None:
        """Cancel what is left. May come twice, and from another thread."""
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> Iterator[Delta]:
        progress = self._progress
        while not progress.is_done and not self._is_closed:
            self._call = self._stub.Generate(
                progress.next_request(), metadata=self._metadata, timeout=progress.timeout_s()
            )
            try:
                for response in self._call:
                    if (delta := progress.take(response)) is not None:
                        yield delta
                return
            except grpc.RpcError as error:
                if self._is_closed:
                    return
                wait_s = progress.wait_after(error_from_call(error))
            finally:
                self._call.cancel()
            time.sleep(wait_s)


class Client:
    """A gateway, for threads. `target` is HOST:PORT; `credentials` are for TLS. Safe to share by threads."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._metadata = auth_metadata(api_key)
        self._retry = retry or RetryPolicy()
        self._channel = (
            grpc.insecure_channel(target, options=OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=OPTIONS)
        )
        self.stub = GatewayServiceStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> Stream:
        """Start a generation; `options` as of `make_request`. `timeout_s` is for the whole of it."""
        progress = Progress(make_request(prompt, **options), self._retry, timeout_s)
        return Stream(self.stub, self._metadata, progress)

    def models(self) -> list[pb.Model]:
        """The models that can be used now."""
        return list(self._call("ListModels", pb.ListModelsRequest()).models)

    def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Token ids of a text, with the model's special tokens."""
        return list(self._call("Tokenize", pb.TokenizeRequest(text=text, model=model)).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, model=model)
        return str(self._call("Detokenize", request).text)

    def cancel(self, request_id: str) -> None:
        """End a live request of the same key."""
        self._call("Cancel", pb.CancelRequest(request_id=request_id))

    def create_session(self, *, model: str = "", session_id: str = "") -> pb.Session:
        """Begin a conversation: `generate(..., session_id=...)` then takes only the new turn."""
        request = pb.CreateSessionRequest(model=model, session_id=session_id)
        session: pb.Session = self._call("CreateSession", request).session
        return session

    def get_session(self, session_id: str) -> pb.Session:
        """Describe a session."""
        session: pb.Session = self._call("GetSession", pb.GetSessionRequest(session_id=session_id)).session
        return session

    def delete_session(self, session_id: str) -> None:
        """End a session."""
        self._call("DeleteSession", pb.DeleteSessionRequest(session_id=session_id))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.stub, method)(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_call(error) from error
