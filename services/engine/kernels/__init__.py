"""The operations a model is made of. `ops` is the door; nothing here knows a model, a request or a
scheduler.
"""
