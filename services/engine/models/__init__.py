"""One file per architecture family, over `services.engine.kernels.ops`. Knows no request, scheduler or
transport.
"""
