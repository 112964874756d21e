"""GatewayService over gRPC: messages in, messages out. What a request is and goes through is the Gateway's
matter.
"""

# ruff: noqa: N802 - the names are the wire's

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from services.gateway.client_streams import ClientStreams
from services.gateway.events import plain_delta, responses, started
from services.gateway.gateway import Gateway
from services.gateway.ownership import refuse_fields_that_need_an_owner, refuse_without_one_owner
from services.gateway.permissions import check_model
from services.gateway.resolution import oversize, refuse_unknown_fields, tokenize
from services.gateway.routing.served import Served
from services.gateway.sessions.database import StoredSession
from services.gateway.sessions.sessions import Sessions
from weft.rpc.errors import invalid_argument
from weft.rpc.interceptor import current_caller
from weft.sampling import validate_token_ids
from weft.v1 import gateway_service_pb2 as pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceServicer

# Of one Detokenize; more would hold up the event loop while they are checked.
MAX_TOKEN_IDS = 1 << 20


class GatewayServicer(GatewayServiceServicer):
    """The public face of the gateway."""

    def __init__(self, gateway: Gateway, *, num_processes: int = 1) -> None:
        """`num_processes` share this gateway's port, so that any of them may get the next call."""
        self._gateway = gateway
        self._num_processes = num_processes

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Run one request and stream its text."""
        refuse_unknown_fields(request)
        refuse_fields_that_need_an_owner(request, self._num_processes)
        gateway = self._gateway
        async with gateway.open(
            request, caller=current_caller.get(), budget_s=context.time_remaining()
        ) as reader:
            await reader.admitted()
            resolved = reader.resolved
            # By themselves: a write may be called off, and the library then knows not whether they were sent.
            await context.send_initial_metadata(())
            reader.writing()
            await context.write(started(resolved))
            while (updates := await reader.take_updates()) is not None:
                for update in updates:
                    reader.sending(update)
                    if (data := plain_delta(update)) is not None:
                        await context.write(data)
                        continue
                    for response in responses(resolved, update):
                        await context.write(response)

    async def Multiplex(self, request_iterator: AsyncIterator[pb.MultiplexRequest], context: Any) -> None:
        """Carry many requests on one stream."""
        streams = ClientStreams(
            self._gateway,
            context.write,
            caller=current_caller.get(),
            budget_s=context.time_remaining(),
            num_processes=self._num_processes,
        )
        await streams.run(request_iterator)

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        """End a live request of the same key."""
        refuse_unknown_fields(request)
        refuse_without_one_owner("Cancel", self._num_processes)
        if not request.request_id:
            raise invalid_argument([("request_id", "must be set")])
        self._gateway.cancel(current_caller.get().name, request.request_id)
        return pb.CancelResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Turn text or chat messages into token ids."""
        refuse_unknown_fields(request)
        self._gateway.admission.pass_by(current_caller.get())
        link = self._find(request.model)
        if link.info is None or link.assets is None:
            raise self._gateway.router.unavailable()
        if violations := oversize(request, self._gateway.limits):
            raise invalid_argument(violations)
        return pb.TokenizeResponse(token_ids=await tokenize(request, link.assets, link.info))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        refuse_unknown_fields(request)
        self._gateway.admission.pass_by(current_caller.get())
        link = self._find(request.model)
        if link.info is None or link.assets is None:
            raise self._gateway.router.unavailable()
        if len(request.token_ids) > MAX_TOKEN_IDS:
            raise invalid_argument([("token_ids", f"must have at most {MAX_TOKEN_IDS} entries")])
        violations = validate_token_ids(
            request.token_ids, vocab_size=link.info.vocab_size, field="token_ids", can_be_empty=True
        )
        if violations:
            raise invalid_argument(violations)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await asyncio.to_thread(
            link.assets.vocabulary.decode, request.token_ids, skip_special_tokens=skip
        )
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Name the models that can be used now, of those that the key may use."""
        refuse_unknown_fields(request)
        caller = current_caller.get()
        response = pb.ListModelsResponse()
        for served in self._gateway.router.served():
            if caller.may_use(served.name, served.version):
                response.models.add(
                    name=served.name,
                    version=served.version,
                    artifact_digest=served.info.artifact_digest,
                    max_model_len=served.info.max_model_len,
                    is_deterministic=served.info.is_deterministic,
                    numerics_id=served.info.numerics_id,
                    vocab_size=served.info.vocab_size,
                )
        return response

    def _find(self, model: str) -> Served:
        """The artifact of a model that the caller may use. Raises StatusError."""
        caller = current_caller.get()
        link = self._gateway.router.find(self._gateway.model_for(caller, model))
        if link.info is not None:
            check_model(caller, link.info.model_name, link.info.artifact_version)
        return link

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Any) -> pb.CreateSessionResponse:
        """Begin a conversation whose tokens the gateway keeps."""
        refuse_unknown_fields(request)
        sessions = self._sessions("CreateSession")
        info = self._find(request.model).info
        session = await sessions.create(current_caller.get().name, request.session_id, info)
        return pb.CreateSessionResponse(session=_session(session))

    async def GetSession(self, request: pb.GetSessionRequest, context: Any) -> pb.GetSessionResponse:
        """Describe a session of the caller's key."""
        refuse_unknown_fields(request)
        sessions = self._sessions("GetSession")
        session, token_ids = await sessions.get(
            current_caller.get().name, request.session_id, with_tokens=request.include_token_ids
        )
        response = pb.GetSessionResponse(session=_session(session))
        response.session.token_ids.extend(token_ids)
        return response

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Any) -> pb.DeleteSessionResponse:
        """Forget a session of the caller's key."""
        refuse_unknown_fields(request)
        await self._sessions("DeleteSession").delete(current_caller.get().name, request.session_id)
        return pb.DeleteSessionResponse()

    def _sessions(self, what: str) -> Sessions:
        """Raises StatusError where another process may know the session."""
        refuse_without_one_owner(what, self._num_processes)
        return self._gateway.sessions


def _session(session: StoredSession) -> pb.Session:
    return pb.Session(
        session_id=session.session_id,
        model=session.model,
        version=session.version,
        num_tokens=session.num_tokens,
        num_turns=session.num_turns,
    )
