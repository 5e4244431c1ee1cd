"""From a request that names a model to the worker that answers it, on one event loop.

The same Runtime serves one cold command, the daemon and HTTP. Must not know who asks.
"""
