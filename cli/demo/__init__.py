"""`weft demo`: quantize a model, serve it, stream sixteen completions, stop. Runs the services as anyone
would.

It knows their command lines, their logs and the wire; it imports none of them.
"""
