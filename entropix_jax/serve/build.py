"""A server from settings: the model, the service and the application."""

import dataclasses
import os
from collections.abc import Sequence

from starlette.applications import Starlette

from entropix_jax import decoding, distributed, sampling
from entropix_jax.errors import UserError
from entropix_jax.serve import app, grammar, metrics
from entropix_jax.serve.exchange import Limits
from entropix_jax.serve.schema import TOP
from entropix_jax.serve.service import Service
from entropix_jax.session import Model, Session
from entropix_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Options:
  """What a server is told besides the settings; the flags of entropix_jax.serve explain each."""

  name: str | None = None
  samplers: Sequence[str] | None = None
  piece: int = 128
  budget: int = 512
  store: float = 0.5
  limits: Limits = Limits()  # noqa: RUF009 (frozen)
  keys: tuple[str, ...] = ()
  origins: tuple[str, ...] = ()
  implicit_bos: bool = False


def server(
  chosen: Settings, options: Options, peers: distributed.Peers | None = None
) -> tuple[Starlette, Service]:
  """(the application, its service, which is not started).

  Raises:
    UserError: settings or a folder that cannot be used; no weight is read.
  """
  if chosen.method != decoding.PLAIN:
    raise UserError("The server decodes plainly; leave config.decoding out.")
  engine = dataclasses.replace(chosen.engine, prefill_chunk=options.piece, top_logprobs=TOP)
  chosen = dataclasses.replace(chosen, engine=engine)
  others = sampling.names() if options.samplers is None else options.samplers
  model, samplers = Model(chosen, peers), (chosen.sampler, *others)
  session = Session(
    model, chosen, samplers=samplers, masks=grammar.installed() and model.peers.alone
  )
  name = options.name or os.path.basename(os.path.realpath(session.model.folder))
  counted = metrics.Metrics(name)
  service = Service(session, options.limits, options.store, options.budget, counted, staged=True)
  web = app.app(
    service, session, name, options.keys, options.origins, counted, options.implicit_bos
  )
  return web, service
