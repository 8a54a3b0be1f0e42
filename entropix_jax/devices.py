"""The devices of this process: taken once, with one sentence where they cannot be had."""

import collections
import contextlib
import os
import re
import socket
from typing import Any

from entropix_jax.config import MeshConfig
from entropix_jax.errors import UserError

_FORCED = "xla_force_host_platform_device_count"


def cores(mesh: MeshConfig) -> None:
  """Let a CPU be a device for each part of the mesh, unless it is said elsewhere; before JAX runs [n24].

  Where only rows are split, at most as many devices as cores. A model that is split into more parts than there are
  cores needs other devices.
  """
  import jax

  most, parts = os.cpu_count() or 1, mesh.data * mesh.model
  count = min(parts, most) if mesh.model == 1 or parts <= most else 1
  if (
    count > 1
    and jax.config.jax_num_cpu_devices < 1
    and _FORCED not in os.environ.get("XLA_FLAGS", "")
  ):
    with contextlib.suppress(RuntimeError):  # JAX is running and keeps what it has
      jax.config.update("jax_num_cpu_devices", count)


def claim() -> None:
  """Take this host's devices now. Raises UserError, in one sentence, when that is not possible."""
  import jax

  try:
    local = jax.local_device_count()
  except RuntimeError as error:
    raise UserError(_refusal(str(error))) from None
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    few, many = min(counts.values()), max(counts.values())
    raise UserError(
      f"Some processes have {few} devices and others {many} (this one {local}); each needs as many."
    )


def _refusal(text: str) -> str:
  brief = " ".join(text.split())
  if held := re.search(r"in use by process with pid (\d+)", brief):
    return (
      f"The TPU of {socket.gethostname()} is in use by process {held[1]} there; end it (kill "
      f"{held[1]}) or wait for it, then start again."
    )
  if "already in use" in brief or "libtpu_lockfile" in brief:
    return (
      f"The TPU of {socket.gethostname()} is in use by another process, or a crashed one left its "
      f"lock; end that process or remove the lock, as libtpu says: {brief[:300]}"
    )
  return f"JAX cannot use the devices of {socket.gethostname()} ({brief[:300].rstrip('.')})."


def check_mesh(mesh: Any) -> None:
  """Raises UserError when a mesh (None: one device) leaves devices of a run of several processes."""
  import jax

  size = 1 if mesh is None else mesh.size
  if jax.process_count() > 1 and size != jax.device_count():
    raise UserError(
      f"config.mesh takes {size} of the {jax.device_count()} devices of {jax.process_count()} "
      "processes; they must all be used, so raise config.mesh.model or config.mesh.data."
    )
