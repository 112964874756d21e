"""QuantizerService. Every call answers UNIMPLEMENTED and says what does the work: jobs are not offered yet.

Knows neither torch nor the batch job.
"""

# ruff: noqa: N802 - the methods are named as in the proto

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from weft.rpc.errors import StatusError
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceServicer

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["QuantizerService"].full_name


class QuantizerServicer(QuantizerServiceServicer):
    """One coroutine per rpc; none reads its request."""

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> NoReturn:
        """Not offered yet."""
        raise _not_offered()

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> NoReturn:
        """Not offered yet."""
        raise _not_offered()

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> NoReturn:
        """Not offered yet."""
        raise _not_offered()

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> NoReturn:
        """Not offered yet."""
        raise _not_offered()

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> NoReturn:
        """Not offered yet."""
        raise _not_offered()


def _not_offered() -> StatusError:
    return StatusError(
        grpc.StatusCode.UNIMPLEMENTED,
        "quantizer jobs are not offered yet; run `python -m services.quantizer run` where the files are",
    )
