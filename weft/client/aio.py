"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from weft.client.connection import CALL_TIMEOUT_S, OPTIONS
from weft.client.progress import Progress, RetryPolicy
from weft.client.requests import Completion, Delta, Prompt, make_request
from weft.rpc.auth import auth_metadata
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub


class AsyncStream:
    """As `Stream`, for asyncio."""

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

    async def text(self) -> str:
        """Read to the end; the text of the first sample."""
        async for _ in self:
            pass
        return self.completions[0].text

    async def aclose(self) -> None:
        """Cancel what is left. May come twice."""
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _run(self) -> AsyncIterator[Delta]:
        progress = self._progress
        while not progress.is_done and not self._is_closed:
            self._call = self._stub.Generate(
                progress.next_request(), metadata=self._metadata, timeout=progress.timeout_s()
            )
            try:
                async for response in self._call:
                    if (delta := progress.take(response)) is not None:
                        yield delta
                return
            except grpc.aio.AioRpcError as error:
                if self._is_closed:
                    return
                wait_s = progress.wait_after(error_from_call(error))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._is_closed and not (task and task.cancelling()):  # the call's own cancel
                    return
                raise
            finally:
                self._call.cancel()
            await asyncio.sleep(wait_s)


class AsyncClient:
    """As `Client`, for asyncio. Belongs to the event loop it was made on."""

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
            grpc.aio.insecure_channel(target, options=OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=OPTIONS)
        )
        self.stub = GatewayServiceStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> AsyncStream:
        """Start a generation; `options` as of `make_request`. `timeout_s` is for the whole of it."""
        progress = Progress(make_request(prompt, **options), self._retry, timeout_s)
        return AsyncStream(self.stub, self._metadata, progress)

    async def models(self) -> list[pb.Model]:
        """The models that can be used now."""
        return list((await self._call("ListModels", pb.ListModelsRequest())).models)

    async def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Token ids of a text, with the model's special tokens."""
        return list((await self._call("Tokenize", pb.TokenizeRequest(text=text, model=model))).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, model=model)
        return str((await self._call("Detokenize", request)).text)

    async def cancel(self, request_id: str) -> None:
        """End a live request of the same key."""
        await self._call("Cancel", pb.CancelRequest(request_id=request_id))

    async def create_session(self, *, model: str = "", session_id: str = "") -> pb.Session:
        """Begin a conversation: `generate(..., session_id=...)` then takes only the new turn."""
        request = pb.CreateSessionRequest(model=model, session_id=session_id)
        session: pb.Session = (await self._call("CreateSession", request)).session
        return session

    async def get_session(self, session_id: str) -> pb.Session:
        """Describe a session."""
        request = pb.GetSessionRequest(session_id=session_id)
        session: pb.Session = (await self._call("GetSession", request)).session
        return session

    async def delete_session(self, session_id: str) -> None:
        """End a session."""
        await self._call("DeleteSession", pb.DeleteSessionRequest(session_id=session_id))

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self.stub, method)(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from error
