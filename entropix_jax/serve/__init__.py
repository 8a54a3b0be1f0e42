"""A server of OpenAI's API: HTTP on one side, the scheduler of an engine on the other.

schema.py       what a client may send, checked
calls.py        from a checked body to what the engine is asked
bodies.py       what is answered, and errors
app.py          the routes; around.py has what surrounds them: keys, errors, clients that go away
exchange.py     what passes between the routes and the engine's thread
service.py      that thread, and its face to the event loop; task.py has its jobs, grammar.py what guides them
metrics.py      counters for Prometheus
build.py        a server from settings; run.py its process, __main__.py its flags
"""
