"""`weft bench`, the load tool: over gRPC or HTTP, closed or open loop, in one process or several.

settings, flags   what is asked for               records, metrics    what is written down, what it comes to
workloads, files  conversations by number         summary, run        a point, a document
arrivals          when they begin                 table, plot         how it is shown
driver            sends them                      compare             two documents
*_transport       one protocol each               crew, processes     one process, or several
"""

from cli.bench.command import bench

__all__ = ["bench"]
