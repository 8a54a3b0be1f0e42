"""Time a decode step: greedy, with `quadrant`, and optionally with other libraries (the peers).

  python benchmarks/decode.py --config=configs/demo.py
  python benchmarks/decode.py --config=configs/llama3_1b.py --random_weights --batch=1 --context=128 --steps=32
  python benchmarks/decode.py --config=configs/llama3_1b.py --random_weights --peer=transformers --out=runs.jsonl
  python benchmarks/decode.py --config=configs/demo.py --prefill=512,1024 --peer=transformers,llama.cpp

Every setting of the config is a flag (--config.engine.dtype=float32, --config.sampler.low_varent=0.1); the
sampler's settings apply to `quadrant`. engine.max_seq_len is set to what the run needs. The last line of
stdout is one JSON object, which --out appends to a file:

  step_ms, decode_tokens_per_s  greedy decoding: the median step time, and batch / step time
  adaptive_*                    the same for `quadrant`; adaptive_over_greedy is the ratio of step times
  ttft_s                        time from one prompt's ids to its first token on the host, without compilation
  roofline_share                bytes_per_step / bandwidth / median greedy step
  peer_ratio                    our greedy tokens/s over transformers'; peer_ratio_of_least uses the fastest turns
  llamacpp_*                    the same for llama.cpp

With --prefill, prompts of each length are fed in place of decode steps, alone and from ids to logits. For each
length: tokens_per_s, peer_tokens_per_s and peer_ratio from medians, and *_best or *_of_least from the fastest turns.

llama.cpp gets our weights in float32 from a temporary GGUF file, one sequence per row, float32 keys and
values, as many threads as the CPU has, with or without flash attention, whichever is faster, and otherwise
its defaults. It gives logits of a prompt's last token and of each new one; NumPy takes their maximum,
inside the timed part.

Why: shared machines drift, so the contestants take turns of one dispatch each, and a ratio is the median of
the turns' ratios. The bandwidth is the best that several plain reads of a large array reach on the same
device, before and after: what a step could reach in practice. A step must read every weight (of an untied
embedding only the rows it looks up) and the live keys and values. Random weights give nearly flat logits,
so `quadrant` always takes an expensive branch; this is its full price. `branches` counts the branches.

The peers need a quiet machine: torch's threads spin while they wait, and with one other busy process on two
cores its step took twice as long. OMP_WAIT_POLICY=passive avoids this (1.0 times) but costs 4% on a quiet
machine, so it is left to the caller and recorded in the result. llama.cpp's threads obey it too.
"""

import dataclasses
import datetime
import functools
import gc
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # if the package is not installed

from entropix_jax import config, sampling, settings
from entropix_jax.checkpoints import checkpoint, hf_config, hub
from entropix_jax.cli import commands, config_file
from entropix_jax.engine import preflight
from entropix_jax.engine.decoder import PlainDecoder
from entropix_jax.engine.engine import Engine
from entropix_jax.engine.record import EMITTED
from entropix_jax.engine.request import Request
from entropix_jax.engine.setup import compute_dtype
from entropix_jax.errors import UserError
from entropix_jax.model import linear, quant, rope, weights

ROOT = pathlib.Path(__file__).resolve().parents[1]
_FLAGS = commands.Flags()
_CONFIG = _FLAGS.config_file("Config file, such as configs/llama3_1b.py.")
_BATCH = _FLAGS.integer("batch", None, "Rows; default: config.engine.batch_size.", 1)
_CONTEXT = _FLAGS.integer("context", 128, "Tokens per prompt.", 1)
_STEPS = _FLAGS.integer("steps", 64, "Timed steps per contestant.", 1)
_PREFILL = _FLAGS.strings(
  "prefill", [], "Tokens of prompts to time in place of steps, as 512,2048."
)
_RANDOM = _FLAGS.bool("random_weights", False, "Use random weights of the config's model shape.")
_PEER = _FLAGS.strings("peer", [], "Also measure these libraries: transformers, llama.cpp.")
_OUT = _FLAGS.string("out", None, "JSONL file to append the last line to.")

WARM = 2  # dispatches before the timed ones
PREFILLS = 5  # timed turns per length, after one that is not
PEERS = {"transformers": "peer_", "llama.cpp": "llamacpp_"}  # and what their results begin with
# Flash attention, llama.cpp's default, rounds keys and values to float16 in each step.
LLAMACPP_KINDS = {"flash attention": -1, "attention in float32": 0}
READ_BYTES = {"cpu": 2**29}  # far beyond any cache; accelerators are faster and read 2**31


# -- what is measured ------------------------------------------------------------------------------


class Ours:
  """Our engine with all rows prefilled; `turn` runs one dispatch."""

  def __init__(self, cfg, params, sampler: str, shapes: config.EngineConfig, knobs, prompt_BT):
    self.engine = engine = Engine.create(cfg, params, sampling.find(sampler), shapes)
    new = shapes.max_seq_len - prompt_BT.shape[1]
    requests = [
      Request(ids.tolist(), new, stream=row, knobs=knobs) for row, ids in enumerate(prompt_BT)
    ]
    start = time.perf_counter()
    PlainDecoder(engine).compile(requests)
    self.compile_s = time.perf_counter() - start

    self.state, self.length = engine.init(), prompt_BT.shape[1]
    times, firsts = [], []
    for i in range(max(4, len(requests))):
      start = time.perf_counter()
      row = i % len(requests)
      prefix = engine.prefill(requests[row])
      self.state = engine.insert(self.state, prefix, row, requests[row])
      self.state, record = engine.first(self.state, [row])
      record = np.asarray(record)
      times.append(time.perf_counter() - start)
      if i < len(requests):
        firsts.append(record[row : row + 1])
    self.ttft_s = float(np.median(times[1:]))  # the first also compiles the empty cache's program
    first = engine.unpack(np.concatenate(firsts))
    self.first_B, self.first_logprob_B = first["id"], first["logprob"]
    self.tokens: list[np.ndarray] = []
    self.branches = np.zeros(len(engine.setup.sampler.BRANCHES), int)

  def turn(self) -> float:
    """Seconds of one dispatch, until its record is on the host."""
    start = time.perf_counter()
    self.state, record = self.engine.decode(self.state, self.length)
    record = np.asarray(record)
    seconds = time.perf_counter() - start
    values = self.engine.unpack(record)
    assert (values["flags"] == EMITTED).all(), "a row ended while it was being timed"
    self.length += len(record)
    self.tokens.append(values["id"])
    self.branches += np.bincount(values["branch"].ravel(), minlength=len(self.branches))
    return seconds


class Reader:
  """Plain reads of a large array; the fastest gives the device's bandwidth."""

  def __init__(self):
    size = READ_BYTES.get(jax.default_backend(), 2**31) // 4
    self.x_DF = jnp.ones((size // 8192, 8192), jnp.float32)
    x_D, x_F = self.x_DF[:, 0], self.x_DF[0]
    self.kernels = {
      "sum": (jax.jit(jnp.sum), self.x_DF),
      "row sums": (jax.jit(lambda w_DF: w_DF.sum(axis=1)), self.x_DF),
      "x @ W": (jax.jit(jnp.matmul), x_D, self.x_DF),
      "W @ x": (jax.jit(jnp.matmul), self.x_DF, x_F),
    }
    self.best = dict.fromkeys(self.kernels, 0.0)  # bytes per second

  def measure(self) -> None:
    """Time every kind of read five more times."""
    for name, (kernel, *args) in self.kernels.items():
      kernel(*args).block_until_ready()
      for _ in range(5):
        start = time.perf_counter()
        kernel(*args).block_until_ready()
        rate = self.x_DF.nbytes / (time.perf_counter() - start)
        self.best[name] = max(self.best[name], rate)


def peak_memory() -> tuple[int, str]:
  """(peak bytes, which memory was measured)."""
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"], "device memory"
  import resource  # does not exist on Windows

  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident memory of the process"


# -- transformers ------------------------------------------------------------------------------------


def import_peer():
  """(torch, transformers). Raises UserError that says how to install them."""
  try:
    import torch
    import transformers
  except ImportError:
    raise UserError(
      "--peer=transformers needs torch and transformers; install them with `pip install -e .[bench]`."
    ) from None
  backend = jax.default_backend()
  if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
    raise UserError(
      f"This torch cannot compute on the {backend} that JAX uses; install one that can, or set "
      "JAX_PLATFORMS=cpu."
    )
  return torch, transformers


def peer_version() -> str:
  """Names and versions of the libraries."""
  torch, transformers = import_peer()
  return f"transformers {transformers.__version__}, torch {torch.__version__}"


def peer_model(cfg: config.ModelConfig, params: weights.Weights):
  """transformers' LlamaForCausalLM with our weights, in its usual memory layout."""
  torch, _ = import_peer()
  torch.set_num_threads(os.cpu_count())
  state = {}
  for (layer, field), name in weights.sources(cfg).items():
    leaf = getattr(params if layer is None else params.layers[layer], field)
    # JAX makes a transposed array contiguous, which is the layout that torch itself would have.
    state[name] = torch.from_dlpack(jax.block_until_ready(weights.hf_order(field, leaf)))
  return hf_net(cfg, state).requires_grad_(False)


def hf_net(cfg: config.ModelConfig, state: dict[str, Any], **settings: Any):
  """transformers' LlamaForCausalLM over the torch tensors in `state`, which it does not copy."""
  torch, transformers = import_peer()
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  net_config = transformers.LlamaConfig(**hf_config.to_hf(cfg) | settings)
  with torch.device("meta"):
    net = transformers.LlamaForCausalLM(net_config)
  if cfg.tied:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
  net.load_state_dict(state, strict=True, assign=True)
  # The state dictionary does not hold the frequencies, so the module built on the meta device has none.
  net.model.rotary_emb = LlamaRotaryEmbedding(net_config).to(net.device)
  return net.eval()


class Peer:
  """Greedy decoding with transformers' forward pass and one kind of cache; `turn` as in Ours."""

  def __init__(self, net, kind: str, steps: int, room: int, prompt_BT: np.ndarray):
    torch, transformers = import_peer()
    self.net, self.kind, self.steps, self.tokens = net, kind, steps, []
    compiled = "compiled" in kind
    self.mode = torch.no_grad if compiled else torch.inference_mode
    if "static" in kind:
      self.cache = transformers.StaticCache(config=net.config, max_cache_len=room)
    else:
      self.cache = transformers.DynamicCache()
    with self.mode():
      ids_BT = torch.from_numpy(prompt_BT.astype(np.int64)).to(net.device)
      self._logits_BV = self._feed(net, ids_BT)
      self.token_B1 = self._logits_BV.argmax(-1, keepdim=True)
    self.step = torch.compile(net, mode="reduce-overhead") if compiled else net
    self.mark = torch.compiler.cudagraph_mark_step_begin if compiled else lambda: None

  @property
  def first_BV(self) -> np.ndarray:
    """The logits of the first tokens."""
    return self._logits_BV.float().cpu().numpy()

  def _feed(self, net, ids_BT):
    out = net(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]

  def turn(self) -> float:
    """Seconds for as many steps as our dispatch has, until their tokens are on the host."""
    import torch

    start, tokens = time.perf_counter(), []
    with self.mode():
      for _ in range(self.steps):
        self.mark()
        self.token_B1 = self._feed(self.step, self.token_B1).argmax(-1, keepdim=True)
        tokens.append(self.token_B1)
      tokens_NB = torch.cat(tokens, dim=1).T.cpu().numpy()
    seconds = time.perf_counter() - start
    self.tokens.append(tokens_NB)
    return seconds


def find_peer(cfg, params, steps: int, room: int, prompt_BT: np.ndarray) -> Peer:
  """transformers with its fastest kind of cache (dynamic, static, or on a GPU static and compiled), warmed up."""
  net = peer_model(cfg, params)
  ttft_s = peer_ttft(net, room, prompt_BT)
  kinds = ["dynamic cache", "static cache"]
  if net.device.type == "cuda":
    kinds.append("static cache, compiled")
  fastest, least = None, math.inf
  for kind in kinds:
    try:
      peer = Peer(net, kind, steps, room, prompt_BT)
      seconds = [peer.turn() for _ in range(WARM)][-1]
    except RuntimeError as error:
      if "compiled" not in kind:
        raise
      print(f"torch.compile does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
      continue
    if seconds < least:
      fastest, least = peer, seconds
  fastest.ttft_s, fastest.name = ttft_s, f"{peer_version()}, {fastest.kind}"
  return fastest


def peer_ttft(net, room: int, prompt_BT: np.ndarray) -> float:
  """Median seconds from one prompt to its first token on the host."""
  times = []
  for _ in range(4):
    start = time.perf_counter()
    Peer(net, "dynamic cache", 1, room, prompt_BT[:1]).token_B1.item()
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:]))


# -- llama.cpp ---------------------------------------------------------------------------------------


def import_llamacpp():
  """(gguf, llama_cpp without its log). Raises UserError that says how to install them."""
  try:
    import gguf
    import llama_cpp
  except (ImportError, OSError, RuntimeError):  # or its shared library cannot be loaded
    raise UserError(
      "--peer=llama.cpp needs llama-cpp-python and gguf; install them with "
      "`pip install llama-cpp-python gguf`."
    ) from None
  llama_cpp.llama_log_set(_quiet(llama_cpp), None)
  return gguf, llama_cpp


@functools.cache  # llama.cpp calls it as long as the process lives
def _quiet(llama_cpp):
  return llama_cpp.llama_log_callback(lambda *_: None)


def write_gguf(path: pathlib.Path, cfg: config.ModelConfig, params: weights.Weights) -> None:
  """Write our weights as llama.cpp reads them: float32, without a vocabulary."""
  gguf, _ = import_llamacpp()
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("no_vocab")
  writer.add_vocab_size(cfg.vocab)
  writer.add_block_count(cfg.layers)
  writer.add_context_length(cfg.max_position)
  writer.add_embedding_length(cfg.width)
  writer.add_feed_forward_length(cfg.ffn)
  writer.add_head_count(cfg.heads)
  writer.add_head_count_kv(cfg.kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  writer.add_layer_norm_rms_eps(cfg.norm_eps)
  writer.add_rope_dimension_count(cfg.head_dim)
  writer.add_rope_freq_base(cfg.rope.theta)
  plain_H, scaled_H = (
    rope.inverse_frequencies(each, cfg.head_dim)
    for each in (config.RopeConfig(cfg.rope.theta), cfg.rope)
  )
  if (plain_H != scaled_H).any():
    writer.add_tensor("rope_freqs.weight", plain_H / scaled_H)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.layers)
  for (layer, field), name in weights.sources(cfg).items():
    leaf = getattr(params if layer is None else params.layers[layer], field)
    array = np.asarray(weights.hf_order(field, leaf), np.float32)
    if heads := {"q_proj": cfg.heads, "k_proj": cfg.kv_heads}.get(name.split(".")[-2]):
      # The two channels that rotate together are neighbours there.
      halves = array.reshape(heads, 2, cfg.head_dim // 2, -1)
      array = halves.swapaxes(1, 2).reshape(array.shape)
    writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def load_llamacpp(cfg: config.ModelConfig, params: weights.Weights):
  """llama.cpp's model with our weights. Raises UserError if it does not load it."""
  _, lib = import_llamacpp()
  chosen = lib.llama_model_default_params()
  chosen.n_gpu_layers = 0
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    path = pathlib.Path(folder) / "model.gguf"
    write_gguf(path, cfg, params)
    model = lib.llama_model_load_from_file(str(path).encode(), chosen)
  if not model:
    raise UserError("llama.cpp does not load this model; leave it out of --peer.")
  return model


class LlamaCpp:
  """Greedy decoding with llama.cpp, one sequence per row; `turn` as in Ours.

  Raises:
    UserError: llama.cpp refuses the size, for example for lack of memory.
  """

  def __init__(self, model, kind: str, steps: int, room: int, prompt_BT: np.ndarray):
    _, self.lib = import_llamacpp()
    lib, rows, self.steps, self.tokens = self.lib, len(prompt_BT), steps, []
    self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    self.name = f"llama.cpp of llama-cpp-python {lib.__version__}, {kind}"
    chosen = lib.llama_context_default_params()
    chosen.n_ctx, chosen.n_seq_max, chosen.n_outputs_max = rows * room, rows, rows
    chosen.n_batch = prompt_BT.size
    chosen.n_threads = chosen.n_threads_batch = os.cpu_count()
    chosen.type_k = chosen.type_v = lib.GGML_TYPE_F32
    chosen.flash_attn_type = LLAMACPP_KINDS[kind]
    self.context = lib.llama_init_from_model(model, chosen)
    if not self.context:
      raise UserError(
        "llama.cpp cannot hold this many tokens; lower --batch, --context or --prefill."
      )
    self.batch = lib.llama_batch_init(prompt_BT.size, 0, 1)
    self.first_BV = np.stack(self.start(prompt_BT))

  def start(self, prompt_BT: np.ndarray) -> list[np.ndarray]:
    """Logits after these prompts, of which each row holds the first token; drops what was there."""
    self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
    self.length = 0
    return self._feed(prompt_BT)

  def _feed(self, ids_BT: np.ndarray) -> list[np.ndarray]:
    batch, n, size = self.batch, ids_BT.shape[1], ids_BT.size
    batch.n_tokens = size
    pos_T = range(self.length, self.length + n)
    for i, (id, pos) in enumerate(
      zip(ids_BT.ravel().tolist(), [*pos_T] * len(ids_BT), strict=True)
    ):
      batch.token[i], batch.pos[i], batch.n_seq_id[i] = id, pos, 1
      batch.seq_id[i][0], batch.logits[i] = i // n, (i + 1) % n == 0
    if code := self.lib.llama_decode(self.context, batch):
      raise UserError(f"llama.cpp does not decode (code {code}); leave it out of --peer.")
    self.length += n
    rows = [
      np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,))
      for i in range(n - 1, size, n)
    ]
    self.token_B1 = np.array([[row.argmax()] for row in rows])
    return rows

  def turn(self) -> float:
    """Seconds for as many steps as our dispatch has, until their tokens are on the host."""
    start, tokens = time.perf_counter(), []
    for _ in range(self.steps):
      self._feed(self.token_B1)
      tokens.append(self.token_B1[:, 0])
    seconds = time.perf_counter() - start
    self.tokens.append(np.stack(tokens))
    return seconds


def find_llamacpp(cfg, params, *args, race: Callable[[LlamaCpp], float]) -> LlamaCpp:
  """llama.cpp with the kind of attention for which `race` gives fewer seconds; `args` as of LlamaCpp."""
  model = load_llamacpp(cfg, params)
  peers = [LlamaCpp(model, kind, *args) for kind in LLAMACPP_KINDS]
  times = [race(peer) for peer in peers]
  fastest = peers[int(np.argmin(times))]
  for peer in peers:
    if peer is not fastest:
      peer.lib.llama_free(peer.context)
  return fastest


# -- any peer ----------------------------------------------------------------------------------------


def seconds(feed: Callable) -> float:
  """Seconds that one call takes."""
  start = time.perf_counter()
  feed()
  return time.perf_counter() - start


def make_peer(name: str, cfg, params, steps: int, room: int, prompt_BT: np.ndarray):
  """A peer after WARM turns."""
  if name == "transformers":
    return find_peer(cfg, params, steps, room, prompt_BT)

  def race(peer: LlamaCpp) -> float:
    times = [seconds(lambda: peer.start(prompt_BT[:1])) for _ in range(4)]
    peer.ttft_s = float(np.median(times[1:]))
    peer.start(prompt_BT)
    return min(peer.turn() for _ in range(WARM))

  return find_llamacpp(cfg, params, steps, room, prompt_BT, race=race)


def prompt_feeder(name: str, cfg, params, longest: int) -> tuple[str, Callable]:
  """(name and version, a function that feeds a peer one prompt's ids and waits for its next token)."""
  if name == "transformers":
    net = peer_model(cfg, params)
    return peer_version(), lambda ids: Peer(net, "dynamic cache", 1, 0, ids[None]).token_B1.item()
  ids_BT = np.zeros((1, longest), int)

  def race(peer: LlamaCpp) -> float:
    return seconds(lambda: peer.start(ids_BT))

  peer = find_llamacpp(cfg, params, 1, longest, ids_BT, race=race)
  return peer.name, lambda ids: peer.start(ids[None])


def disagreement(ours: Ours, peer: Peer | LlamaCpp) -> float:
  """The largest difference in nats between the two log-probabilities of our first tokens.

  Raises:
    UserError: the difference is too large for the same computation.
  """
  theirs_BV = np.asarray(jax.nn.log_softmax(peer.first_BV))
  theirs_B = np.take_along_axis(theirs_BV, ours.first_B[:, None], axis=1)[:, 0]
  worst = float(np.abs(theirs_B - ours.first_logprob_B).max())
  rounded = 0.03 if "flash" in peer.name else 1e-3
  if not worst < (rounded if ours.engine.setup.dtype == jnp.float32 else 0.3):
    raise UserError(
      f"The first log-probability of {peer.name} is {worst:.2g} nats off; compare no further."
    )
  return worst


# -- the run -------------------------------------------------------------------------------------------


def free_bytes() -> float:
  """Free memory of the device (for a CPU, of the machine); infinite if unknown."""
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  try:
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
  except (OSError, StopIteration):
    return math.inf


def random_weights(
  cfg: config.ModelConfig, dtype, copies: int = 1, finish: Callable | None = None
) -> weights.Weights:
  """Random weights, as `weights.random`. Raises UserError if `copies` of them exceed the free memory."""
  need, free = copies * weights.count(cfg) * jnp.dtype(dtype).itemsize, free_bytes()
  if need > free:
    raise UserError(
      f"Weights of this model take {need / 1e9:.1f} GB and {free / 1e9:.1f} are free; take a smaller one."
    )
  return weights.random(cfg, dtype, finish=finish)


def load(resolved: settings.Settings) -> tuple[config.ModelConfig, weights.Weights]:
  """The model of the config: its checkpoint, or its shape with random weights."""
  dtype = compute_dtype(resolved.engine.dtype)
  int8 = settings.stored(resolved).engine.weights == "int8"
  finish = None if int8 else linear.transposer(dtype, resolved.mesh.model)
  if not _RANDOM.value:
    path = hub.find(resolved.checkpoint)
    cfg = checkpoint.load_config(path)
    return cfg, checkpoint.load_weights(path, cfg, dtype, quantised=int8, finish=finish)
  if not resolved.model:
    raise UserError(
      "--random_weights needs a config that names its shape; "
      f"set --config.model to one of: {', '.join(config.PRESETS)}."
    )
  cfg = config.PRESETS[resolved.model]
  params = random_weights(cfg, dtype, finish=finish)
  return cfg, quant.weights(cfg, params) if int8 else params


def check(resolved: settings.Settings) -> None:
  """Raises UserError for settings that this benchmark does not measure."""
  int8 = "int8" in (resolved.engine.weights, resolved.engine.cache)
  if unknown := sorted(set(_PEER.value) - set(PEERS)):
    raise UserError(f"--peer={unknown[0]} is not known; use {' or '.join(PEERS)}.")
  if resolved.sampler != "quadrant" or resolved.actions:
    raise UserError(
      "This benchmark compares greedy with quadrant; leave config.sampler.name and config.actions alone."
    )
  if resolved.mesh.data * resolved.mesh.model > 1:
    raise UserError("This benchmark measures one device; set config.mesh.data and .model to 1.")
  if _PEER.value and int8:
    raise UserError(
      "The peer has no int8; leave config.engine.weights and .cache alone with --peer."
    )
  if "transformers" in _PEER.value:
    import_peer()
  if "llama.cpp" in _PEER.value:
    dtype = compute_dtype(resolved.engine.dtype)
    if jax.default_backend() != "cpu" or dtype != jnp.float32:
      raise UserError(
        "--peer=llama.cpp compares float32 on a CPU; set JAX_PLATFORMS=cpu and "
        "config.engine.dtype=float32."
      )
    import_llamacpp()


def about(
  resolved: settings.Settings, cfg: config.ModelConfig, params: weights.Weights
) -> dict[str, Any]:
  """What was measured."""
  return {
    "model": resolved.model if _RANDOM.value else pathlib.Path(resolved.checkpoint).name,
    "parameters": weights.count(cfg),
    "random_weights": _RANDOM.value,
    "dtype": params.norm_D.dtype.name,
    "weights": resolved.engine.weights,
    "cache": resolved.engine.cache,
    "attn_stats": resolved.engine.attn_stats,
  }


def prefill(resolved: settings.Settings) -> dict[str, Any]:
  """The measured contents of the last line with --prefill."""
  lengths = [int(n) for n in _PREFILL.value if n.isdecimal() and int(n)]
  if len(lengths) < len(_PREFILL.value):
    raise UserError(f"--prefill={','.join(_PREFILL.value)} is not a list of numbers as 512,2048.")
  check(resolved)
  cfg, params = load(resolved)
  chosen = {"batch_size": 1, "max_seq_len": max(2, *lengths) + 1}
  shapes = dataclasses.replace(resolved.engine, **chosen)
  engine = Engine.create(cfg, params, sampling.find("plain"), shapes)
  result: dict[str, Any] = {"prefill": {}, "prefill_chunk": shapes.prefill_chunk}
  peers = {}
  for name in _PEER.value:
    prefix = PEERS[name]
    result[prefix[:-1]], peers[prefix] = prompt_feeder(name, cfg, params, max(lengths))

  for n in lengths:
    ids = np.random.default_rng(0).integers(cfg.vocab, size=n)
    request = Request(ids.tolist(), 1)
    ways = {"": lambda request=request: jax.block_until_ready(engine.prefill(request))}
    ways |= {prefix: functools.partial(feed, ids) for prefix, feed in peers.items()}
    turns = [{name: seconds(feed) for name, feed in ways.items()} for _ in range(PREFILLS + 1)][1:]
    figures = result["prefill"][str(n)] = {}
    for name in ways:
      figures[f"{name}tokens_per_s"] = n / float(np.median([turn[name] for turn in turns]))
      figures[f"{name}tokens_per_s_best"] = n / min(turn[name] for turn in turns)
    for name in peers:
      figures[f"{name}ratio"] = float(np.median([turn[name] / turn[""] for turn in turns]))
      best = figures["tokens_per_s_best"], figures[f"{name}tokens_per_s_best"]
      figures[f"{name}ratio_of_least"] = best[0] / best[1]
    print(f"{n} tokens:", ", ".join(f"{key} {x:.4g}" for key, x in figures.items()), flush=True)
  if peers:
    result["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
  return result | about(resolved, cfg, params)


def measure(resolved: settings.Settings) -> dict[str, Any]:
  """The measured contents of the last line."""
  check(resolved)
  context, steps = _CONTEXT.value, _STEPS.value
  batch = _BATCH.value or resolved.engine.batch_size
  per_turn = max(n for n in range(1, resolved.engine.steps_per_dispatch + 1) if steps % n == 0)
  warm = WARM * per_turn
  # One more than needed, so that no row reaches its limit in the last timed step.
  room = context + 1 + warm + steps + 1

  cfg, params = load(resolved)
  if room > cfg.max_position:
    raise UserError(
      f"--context={context} and --steps={steps} need {room} positions and the model has "
      f"{cfg.max_position}; lower one of them."
    )
  chosen = {"batch_size": batch, "max_seq_len": room, "steps_per_dispatch": per_turn}
  shapes = dataclasses.replace(resolved.engine, **chosen)
  prompt_BT = np.random.default_rng(0).integers(cfg.vocab, size=(batch, context))

  greedy = Ours(cfg, params, "plain", shapes, {"temperature": 0.0}, prompt_BT)
  adaptive = Ours(cfg, params, "quadrant", shapes, resolved.knobs, prompt_BT)
  contestants: dict[str, Any] = {"greedy": greedy, "quadrant": adaptive}
  for one in contestants.values():
    for _ in range(WARM):
      one.turn()
    one.branches[:] = 0
  peak_bytes, peak_of = peak_memory()
  reader = Reader()
  reader.measure()
  off = {}
  for name in _PEER.value:
    peer = contestants[name] = make_peer(name, cfg, params, per_turn, room, prompt_BT)
    off[name] = disagreement(greedy, peer)
  gc.collect()
  gc.disable()
  turns = [
    {name: one.turn() for name, one in contestants.items()} for _ in range(steps // per_turn)
  ]
  gc.enable()
  reader.measure()

  def median(per_round) -> float:
    return float(np.median([per_round(turn) for turn in turns]))

  def speed(name: str, prefix: str) -> dict[str, float]:
    ms = median(lambda turn: turn[name]) / per_turn * 1e3
    return {
      f"{prefix or 'decode_'}tokens_per_s": batch / ms * 1e3,
      f"{prefix or 'decode_'}tokens_per_s_per_row": 1e3 / ms,
      f"{prefix}step_ms": ms,
      f"{prefix}step_ms_min": min(turn[name] for turn in turns) / per_turn * 1e3,
    }

  bandwidth = max(reader.best.values())
  needed = preflight.step_bytes(greedy.engine, context + warm + (steps + 1) / 2)
  floor_ms = needed / bandwidth * 1e3
  result = speed("greedy", "") | speed("quadrant", "adaptive_")
  result |= {
    "roofline_share": floor_ms / result["step_ms"],
    "adaptive_roofline_share": floor_ms / result["adaptive_step_ms"],
    "ttft_s": greedy.ttft_s,
    "adaptive_ttft_s": adaptive.ttft_s,
    "adaptive_over_greedy": median(lambda turn: turn["quadrant"] / turn["greedy"]),
    "compile_s": greedy.compile_s,
    "adaptive_compile_s": adaptive.compile_s,
    "bandwidth_gb_s": bandwidth / 1e9,
    "bandwidth_of": max(reader.best, key=reader.best.get),
    "bytes_per_step": round(needed),
    "peak_bytes": peak_bytes,
    "peak_of": peak_of,
    "branches": {
      name: int(n)
      for name, n in zip(adaptive.engine.setup.sampler.BRANCHES, adaptive.branches, strict=True)
      if n
    },
  }
  for name in off:
    prefix, peer = PEERS[name], contestants[name]
    same = np.concatenate(greedy.tokens) == np.concatenate(peer.tokens)
    result |= speed(name, prefix)
    result |= {
      prefix[:-1]: peer.name,
      f"{prefix}ttft_s": peer.ttft_s,
      f"{prefix}logprob_off": off[name],
      f"{prefix}roofline_share": floor_ms / result[f"{prefix}step_ms"],
      f"{prefix}same_tokens": float(same.mean()),
      f"{prefix}ratio": median(lambda turn, name=name: turn[name] / turn["greedy"]),
      f"{prefix}ratio_of_least": result[f"{prefix}step_ms_min"] / result["step_ms_min"],
      "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
  return (
    result
    | about(resolved, cfg, params)
    | {
      "batch": batch,
      "context": context,
      "steps": steps,
      "steps_per_dispatch": per_turn,
    }
  )


def machine() -> dict[str, Any]:
  """Device, versions, commit and date of the measurement."""
  device = jax.devices()[0].device_kind
  git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
  try:
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    commit = "unknown"
  return {
    "device": f"cpu {platform.machine()}" if device == "cpu" else device,
    "threads": os.cpu_count(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": commit,
    "date": datetime.date.today().isoformat(),
  }


def table(result: dict[str, Any]) -> str:
  """The figures as readable text."""
  columns = {"greedy": "", "quadrant": "adaptive_"}
  peers = {name: prefix for name, prefix in PEERS.items() if prefix[:-1] in result}
  columns |= peers
  rows = (
    ("ms a step, median", "step_ms", ".3f"),
    ("ms a step, least", "step_ms_min", ".3f"),
    ("tokens/s a row", "tokens_per_s_per_row", ".2f"),
    ("tokens/s in total", "tokens_per_s", ".2f"),
    ("share of roofline", "roofline_share", ".1%"),
    ("first token, s", "ttft_s", ".4f"),
    ("compile, s", "compile_s", ".2f"),
  )
  lines = [
    "{model}, {dtype}, batch {batch}, context {context}, {steps} steps on {device}".format(
      **result
    ),
    f"{'':20}" + "".join(f"{name:>14}" for name in columns),
  ]
  for title, key, form in rows:
    cells = [result.get(p + key, result.get(f"decode_{key}")) for p in columns.values()]
    lines.append(
      f"{title:20}" + "".join(f"{'-' if x is None else format(x, form):>14}" for x in cells)
    )
  lines += [
    f"quadrant's step takes {result['adaptive_over_greedy']:.3f} of greedy's; "
    f"its branches: {result['branches']}",
    f"bandwidth {result['bandwidth_gb_s']:.1f} GB/s ({result['bandwidth_of']}); "
    f"a step reads {result['bytes_per_step'] / 1e9:.3f} GB; "
    f"peak {result['peak_bytes'] / 1e9:.2f} GB of {result['peak_of']}",
  ]
  lines += [
    f"{result[f'{x}ratio']:.2f} times the tokens/s of {result[x[:-1]]}; first log-probability "
    f"{result[f'{x}logprob_off']:.1e} nats apart, {result[f'{x}same_tokens']:.0%} of tokens the same"
    for x in peers.values()
  ]
  return "\n".join(lines)


def run(argv: list[str]) -> None:
  """Measure what the flags ask for and print it."""
  commands.parse(argv, _FLAGS, __doc__)
  out = commands.ready(_OUT)
  resolved = config_file.resolve(_CONFIG.value)
  if _PREFILL.value:
    result = {"benchmark": "prefill"} | prefill(resolved) | machine()
  else:
    result = {"benchmark": "decode"} | measure(resolved) | machine()
    print(table(result))
  print(commands.keep(out, result), flush=True)


if __name__ == "__main__":
  sys.exit(commands.entry(run, sys.argv))
