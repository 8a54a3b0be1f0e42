"""A server of OpenAI's API: HTTP on one side, the scheduler of an engine on the other.

schema.py    what a client may send, checked
calls.py     what the engine is asked for it
bodies.py    what the client is answered, and errors
app.py       the routes
metrics.py   counters for Prometheus
service.py   between the event loop and the thread that drives the engine
__main__.py  flags, start and end
"""
