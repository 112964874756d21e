"""What only works where one process knows every request, and its refusal where several share the ports.

Knows the fields of requests, not who would own them.
"""

from __future__ import annotations

import grpc

from weft.rpc.errors import StatusError
from weft.v1 import gateway_service_pb2 as gateway_pb

_FIELDS = ("resumable", "resume_token", "resume_offset", "resume_offsets", "session_id")


def refuse_fields_that_need_an_owner(request: gateway_pb.GenerateRequest, num_processes: int) -> None:
    """Raise StatusError when the request could come to another process than the one that knows of it."""
    if num_processes > 1:
        for descriptor, _ in request.ListFields():
            if descriptor.name in _FIELDS:
                raise _needs_one_process(descriptor.name, num_processes)


def refuse_without_one_owner(what: str, num_processes: int) -> None:
    """Raise StatusError when a call names something that another process may know."""
    if num_processes > 1:
        raise _needs_one_process(what, num_processes)


def _needs_one_process(what: str, num_processes: int) -> StatusError:
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"{what}: not with --processes {num_processes}: the next call may come to another process",
        reason="NEEDS_ONE_PROCESS",
    )
