"""Several processes as a user starts them: the same text as one, and one sentence for every mishap."""

import concurrent.futures
import contextlib
import random
import signal
import socket
import subprocess
import sys

import jax
import pytest
from command import CONFIG, ENV, ROOT, process
from test_main import trace_of

import entropix_jax
from entropix_jax import devices, distributed
from entropix_jax.errors import UserError

STORY = "--prompt=Tell me a story about a kite."
SMALL = "--config.engine.max_seq_len=128"  # one window of the cache: less to compile


def free_port():
  """A port below those that the system gives to whoever asks for any."""
  while True:
    with (
      contextlib.suppress(OSError),
      socket.create_server(("", random.randrange(20000, 30000))) as s,
    ):
      return s.getsockname()[1]


# Processes that are lost are given up sooner than a user's.
MAIN = """
import runpy
from entropix_jax import distributed
distributed.SILENCE_S = 8
runpy.run_module("entropix_jax.main", run_name="__main__")
"""
# A run without a model: settings, and lines until there is none.
LINES = """
import sys
from entropix_jax import distributed
with distributed.join(distributed.place(sys.argv[1], 2, int(sys.argv[2]), 60), 60) as peers:
  peers.agree("configs", {})
  while line := peers.share(lambda: sys.stdin.readline()):
    print(line, end="")
"""


def spawn(*command, **env):
  """A process, with pipes."""
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  command = (sys.executable, "-c", *map(str, command))
  return subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=ENV | env)


def start(number, processes, port, *args, **env):
  """One process of a run."""
  where = (f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={number}")
  return spawn(MAIN, "--config=configs/demo.py", "--distributed", *where, *args, **env)


def ends(runs, timeout=300):
  """(exit code, stdout, stderr) of each; none is left behind."""
  try:
    found = [run.communicate(timeout=timeout) for run in runs]
  finally:
    for run in runs:
      run.kill()
  return [(run.returncode, *texts) for run, texts in zip(runs, found, strict=True)]


def said(err):
  """What a process wrote to stderr, but for process 0's first lines: that it waits, the format, what it compiles."""
  return [
    x for x in err.splitlines() if not x.startswith(("waiting for ", "format: ", "compiling "))
  ]


# -- the same text -----------------------------------------------------------------------------


def test_two_processes_write_what_one_writes(tmp_path):
  """Five prompts through four slots with the quadrant sampler; two devices each, split both ways."""
  file = tmp_path / "prompts.txt"
  file.write_text(
    "".join(f"Tell me a story about a {x}.\n" for x in "kite dog boat tree hat".split())
  )
  one, two, port = tmp_path / "one.jsonl", tmp_path / "two.jsonl", free_port()
  work = (f"--prompt_file={file}", "--prompt_test", "--max_new_tokens=12", "--seed=3", SMALL)
  code, out, err = process("-m", "entropix_jax.main", CONFIG, *work, f"--trace={one}")
  assert code == 0, err
  split = (*work, f"--trace={two}", "--config.mesh.model=2", "--config.mesh.data=2")
  runs = [start(i, 2, port, *split, JAX_NUM_CPU_DEVICES="2") for i in range(2)]
  (code, text, err), other = ends(runs)
  assert code == 0, err
  assert text == out
  assert len(said(err)) == 1  # the summary
  assert other == (0, "", "")
  found = {(token["prompt"], token["position"]): token for token in trace_of(two)[1]}
  expected = trace_of(one)[1]
  assert len(found) == len(expected)
  for want in expected:
    got = found[want["prompt"], want["position"]]
    assert want.keys() == got.keys()
    for key, value in want.items():
      close = isinstance(value, float)
      assert got[key] == (pytest.approx(value, rel=1e-4, abs=1e-4) if close else value), key


# -- one sentence ------------------------------------------------------------------------------


def test_when_one_is_killed_in_a_collective_the_other_says_so_and_ends(tmp_path):
  """In the midst of a text; without a half-written trace."""
  port = free_port()
  args = (STORY, "--max_new_tokens=99", "--config.mesh.model=2", SMALL)
  runs = [start(i, 2, port, *args, f"--trace={tmp_path}/x.jsonl") for i in range(2)]
  assert runs[0].stdout.read(1)
  runs[1].kill()
  [(code, _, err)] = ends(runs[:1], timeout=60)
  ends(runs[1:])
  assert code == distributed.LOST
  assert len(said(err)) == 1, err
  assert "process 1 (" in err
  assert "has gone" in err
  assert not list(tmp_path.iterdir())


def test_a_late_twin_disturbs_nobody_and_a_lost_process_0_ends_all():
  """JAX's service, which lives in process 0, would end the run for a twin; what comes first is our roll call."""
  port = free_port()
  runs = [spawn(LINES, f"localhost:{port}", i) for i in range(2)]
  for line in ("before\n", "after\n"):
    runs[0].stdin.write(line)
    runs[0].stdin.flush()
    assert runs[0].stdout.readline() == line
    with pytest.raises(UserError, match="another run has localhost"):
      distributed._come(distributed.Place(f"localhost:{port}", 2, 1), 5)
  runs[0].kill()
  [(code, out, err)] = ends(runs[1:], timeout=60)
  ends(runs[:1])
  assert (code, out) == (distributed.LOST, "")
  assert len(said(err)) == 1, err
  assert "process 0 (" in err


def test_a_conversation_is_shared_and_an_interrupt_ends_all(interruptible):
  port = free_port()
  args = ("--chat", "--max_new_tokens=8", "--config.mesh.model=2", SMALL)
  runs = [start(i, 2, port, *args) for i in range(2)]
  runs[0].stdin.write("Hello!\n")
  runs[0].stdin.flush()
  assert runs[0].stdout.readline().strip()
  runs[1].send_signal(signal.SIGINT)
  runs[1].wait(
    timeout=120
  )  # `ends` closes the other's stdin, which would end the conversation, too
  (code, _, err), other = ends(runs, timeout=60)
  assert code == 130
  assert "process 1 (" in said(err)[-1]
  assert "was interrupted" in said(err)[-1]
  assert other == (130, "", "stopped.\n")


MISHAPS = {
  "one never comes": ([[STORY, "--wait_s=2"]], "Process 1 did not come to localhost:"),
  "a file is missing at one": ([[STORY], ["--prompt_file=none.txt"]], "none.txt cannot be read"),
  "a file of one name holds another text": (
    [["--prompt_file=/dev/stdin"], ["--prompt_file=/dev/stdin"]],
    "the text of the prompts is ['of 0'] on process 0",
  ),
}


@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_is_one_sentence_everywhere(name):
  args, words = MISHAPS[name]
  port = free_port()
  runs = [start(i, 2, port, *own) for i, own in enumerate(args)]
  for i, run in enumerate(runs):
    run.stdin.write(f"of {i}")
    run.stdin.close()
    run.stdin = None  # or communicate() would flush it
  for code, out, err in ends(runs):
    assert code == 2, err
    assert out == ""
    assert len(said(err)) == 1, err
    assert said(err)[0].startswith("error: ")
    assert words in err


# -- the roll call, in threads -----------------------------------------------------------------


def roll_call(*numbers, wait_s=30, first=3):
  """What each of these processes of 3 learns, or the text of its UserError."""
  port = free_port()

  def one(number):
    at = distributed.Place(f"localhost:{port}", 3 if number else first, number)
    try:
      return (distributed._come if number else distributed._gather)(at, wait_s)
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, numbers))


def test_all_learn_the_names_of_all_hosts():
  host = socket.gethostname()
  assert roll_call(2, 0, 1) == [[host] * 3] * 3


def test_two_of_one_number_are_refused():
  for text in roll_call(0, 1, 1):
    assert "two processes are number 1, on" in text


def test_one_that_never_comes_is_named():
  for text in roll_call(0, 2, wait_s=1):
    assert "Process 1 did not come to localhost:" in text
  [text] = roll_call(1, wait_s=1)
  assert "Process 0 did not answer at localhost:" in text


def test_strangers_are_ignored_and_a_lost_process_is_named():
  port = free_port()
  at = distributed.Place(f"localhost:{port}", 3, 0)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    answer = pool.submit(distributed._gather, at, 30)
    for hello in (b"GET / HTTP/1.1\n", b'{"hello": [1, 3, "a"]}\n'):
      while not answer.done():
        with (
          contextlib.suppress(ConnectionRefusedError),
          socket.create_connection(at.address) as link,
        ):
          link.sendall(hello)
          break
  with pytest.raises(UserError, match=r"process 1 \(a\) has gone before all had come"):
    answer.result()


def test_another_number_of_processes_is_named():
  for text in roll_call(0, 1, first=2):
    assert "--processes is 2 on process 0" in text
    assert "but 3 on process 1" in text


def test_a_port_in_use_is_named():
  with socket.create_server(("", 0)) as server:
    at = distributed.Place(f"localhost:{server.getsockname()[1]}", 2, 0)
    with pytest.raises(UserError, match="of this host cannot be used"):
      distributed._gather(at, 1)


# -- the pieces --------------------------------------------------------------------------------


def test_slurm_says_where_to_meet(monkeypatch):
  for name, value in {
    "JOB_ID": "70", "STEP_NODELIST": "node[007-009]", "NTASKS": "3", "PROCID": "2", "LOCALID": "0",
  }.items():  # fmt: skip
    monkeypatch.setenv(f"SLURM_{name}", value)
  at = distributed.place(None, None, None, 5)
  assert at == distributed.Place("node007:61510", 3, 2, [0])
  assert at.address == ("node007", 61510)
  assert distributed.Place("[::1]:65535", 2, 0).address == ("::1", 65535)


def test_a_place_that_cannot_be_is_refused():
  with pytest.raises(UserError, match="neither a TPU pod nor Slurm"):
    distributed.place(None, None, None, 5)
  with pytest.raises(UserError, match="--process is missing"):
    distributed.place("a:1", 2, None, 5)
  with pytest.raises(UserError, match="not HOST:PORT"):
    distributed.place("a", 2, 1, 5)
  with pytest.raises(UserError, match="number them 0 to 1"):
    distributed.place("a:1", 2, 2, 5)


def test_facts_name_what_differs(tmp_path):
  (tmp_path / ".cache").mkdir()
  (tmp_path / ".cache" / "x").write_text("a")
  (tmp_path / "config.json").write_text("{}")
  mine = distributed.facts(str(tmp_path), {"config": {"engine": {"batch_size": 4}}})
  theirs = distributed.facts(str(tmp_path), {"config": {"engine": {"batch_size": 8}}})
  assert distributed._difference(mine, mine) is None
  assert distributed._difference(mine, theirs) == ("config.engine.batch_size", "4", "8")
  (tmp_path / ".cache" / "x").write_text("ab")
  assert distributed.facts(str(tmp_path), {"config": {"engine": {"batch_size": 4}}}) == mine
  (tmp_path / "config.json").write_text("{ }")
  name, a, b = distributed._difference(mine, distributed.facts(str(tmp_path), {}))
  assert name == "config.engine.batch_size"
  assert (a, b) == ("4", "unset")
  assert f"what lies in {tmp_path}" in mine
  assert "x" * 41 not in distributed._short("x" * 100)


def test_facts_hold_the_code_the_versions_and_the_environment(tmp_path, monkeypatch):
  (tmp_path / "model.py").write_text("x = 3")
  mine = distributed.facts(str(tmp_path), {})
  for target, name, value, fact in (
    (entropix_jax, "__file__", str(tmp_path / "__init__.py"), "the code of entropix_jax"),
    (distributed.importlib.metadata, "version", lambda name: "0", "the jax version"),
    (distributed.platform, "python_version", lambda: "3", "the Python version"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(target, name, value)
      assert distributed._difference(mine, distributed.facts(str(tmp_path), {}))[0] == fact
  monkeypatch.setenv("XLA_FLAGS", "--xla_of_another_host")
  assert distributed._difference(mine, distributed.facts(str(tmp_path), {}))[0] == "XLA_FLAGS"


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("ABORTED: The TPU is already in use by process with pid 4321. Not attempting", "kill 4321"),
    ("The TPU is already in use by another process probably owned by another user.", "another"),
    ("Internal error when accessing libtpu multi-process lockfile libtpu_lockfile.", "crashed"),
    ("Unable to initialize backend 'cuda': no\n  driver.", "backend 'cuda': no driver)."),
  ],
)
def test_devices_that_cannot_be_had_make_a_sentence(text, words):
  sentence = devices._refusal(text)
  assert words in sentence
  assert "\n" not in sentence


def test_devices_of_several_processes_must_all_be_used(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=f"config.mesh takes 1 of the {jax.device_count()} devices"):
    devices.check_mesh(None)
