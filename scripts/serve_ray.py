"""Replicas of the server behind one address, by Ray Serve.

  pip install -e ".[serve,ray]"
  python scripts/serve_ray.py --config=configs/demo.py --replicas=2 --port=8000

Each replica is a process with a model of its own, on whatever machine of the Ray cluster has room; without a cluster
they run here. Ray sends each request to the replica with the fewest. docs/ray.md says more.
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from entropix_jax.cli import commands, config_file
from entropix_jax.cli.commands import say
from entropix_jax.errors import UserError

_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/demo.py.")
_REPLICAS = _FLAGS.integer("replicas", 2, "How many.", 1)
_CPUS = _FLAGS.float("cpus", 1, "CPU cores that Ray reserves for a replica.", 0)
_GPUS = _FLAGS.float("gpus", 0, "GPUs that a replica has.", 0)
_HOST = _FLAGS.string("host", "127.0.0.1", "Address to listen at.")
_PORT = _FLAGS.integer("port", 8000, "Port to listen at.", 1, 65535)
_SAMPLERS = _FLAGS.strings("samplers", None, "As of entropix_jax.serve.")
_ADDRESS = _FLAGS.string("address", None, "Of a Ray cluster; a local one is started when unset.")


def application(chosen, options):
  """The ASGI application of a replica, once it is ready; called in the replica's process."""
  from entropix_jax.serve import build

  web, service = build.server(chosen, options)
  service.start()
  service.wait()
  return web


def run(argv: list[str]) -> None:
  commands.parse(argv, _FLAGS, __doc__)
  chosen = config_file.resolve(_CONFIG.value, ways=True)
  try:
    import ray
    from ray import serve

    from entropix_jax.serve import build
  except ModuleNotFoundError as error:
    raise UserError(
      f'This needs the package {error.name}; install it with pip install -e ".[serve,ray]".'
    ) from None
  options = build.Options(samplers=_SAMPLERS.value)
  web, _ = build.server(chosen, options)  # whatever is wrong with the settings is said here
  del web
  ray.init(address=_ADDRESS.value, log_to_driver=False, configure_logging=False)
  serve.start(http_options={"host": _HOST.value, "port": _PORT.value})

  def make():  # Ray calls functions, and takes other callables for applications
    return application(chosen, options)

  replica = serve.ingress(make)()
  deployment = serve.deployment(
    replica,
    name="entropix_jax",
    num_replicas=_REPLICAS.value,
    max_ongoing_requests=options.limits.queued_requests,
    ray_actor_options={"num_cpus": _CPUS.value, "num_gpus": _GPUS.value},
    graceful_shutdown_timeout_s=30,
  )
  say(f"Starting {_REPLICAS.value} replicas, which read the model and compile ...")
  serve.run(deployment.bind(), name="entropix_jax", route_prefix="/")
  say(f"Ready: http://{_HOST.value}:{_PORT.value}/v1. Ctrl-C ends all replicas.")
  try:
    import signal

    signal.pause()
  finally:
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
