"""Which format a run uses, said in its first line, and the settings of a chat template, as flags and as keywords."""

import json

import pytest
from command import BASE, DEMO, MAIN, is_one_sentence, run
from conftest import refusal

from entropix_jax import LLM

HELLO = "--prompt=Hello!"
TEMPLATE = "{{ bos_token }}{% if loud %}LOUD {% endif %}{{ mood }}:{{ messages[-1].content }}"
CONFIG = "--config=configs/demo.py"


@pytest.fixture
def template(tmp_path):
  path = tmp_path / "own.jinja"
  path.write_text(TEMPLATE)
  return path


def prompt_of(tmp_path, *args):
  """(the prompt as text, the first line of stderr, the trace's format) of a run of one token."""
  path = tmp_path / "t.jsonl"
  code, _, err = run(MAIN, CONFIG, HELLO, "--max_new_tokens=1", f"--trace={path}", *args)
  assert code == 0, err
  header = json.loads(path.read_text().splitlines()[0])
  llm = LLM.demo(max_seq_len=128)
  return llm.tokenizer.decode(header["prompts"][0]["ids"]), err.splitlines()[0], header["format"]


def test_the_first_line_says_the_format(tmp_path, template):
  cases = [
    ((), "chat, by the checkpoint's chat template"),
    (("--config.format=plain",), "plain text, as config.format says"),
    ((f"--config.checkpoint={BASE}",), "plain text, which this base model continues"),
    ((f"--config.checkpoint={BASE}", "--config.format=chat"), "chat, by Llama 3's chat format, since the checkpoint has no template"),
    ((f"--config.chat_template={template}",), f"chat, by the chat template {template}"),
  ]  # fmt: skip
  for args, words in cases:
    _, line, kept = prompt_of(tmp_path, *args)
    assert line == f"format: {words}"
    assert kept == words


def test_flags_reach_the_template(tmp_path, template):
  flags = [
    f"--config.chat_template={template}",
    "--config.chat.mood=so so",
    "--config.chat.loud=true",
  ]
  assert prompt_of(tmp_path, *flags)[0] == "LOUD so so:Hello!"
  assert prompt_of(tmp_path, *flags, "--config.chat.loud=false")[0] == "so so:Hello!"


def test_keywords_reach_the_template(template):
  llm = LLM.demo(max_seq_len=128)
  how = {"chat_template": template, "chat": {"mood": 3}}
  session, todo = llm._plan(["Hi"], max_new_tokens=1, **how)
  assert llm.tokenizer.decode(todo[0].ids) == "3:Hi"
  assert session.stop == llm._model.stop
  session, todo = llm._plan([[{"role": "user", "content": "Hi"}]], format="chat", **how)
  assert llm.tokenizer.decode(todo[0].ids) == "3:Hi"


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config.chat_template=none.jinja"], "none.jinja"),
    (["--config.chat_template=AT", "--config.format=plain"], "config.chat_template is for chats"),
    (["--config.chat.mood=x", "--config.format=plain"], "config.chat is for chats"),
    (["--config.chat.mod=x", "--config.chat_template=AT"], "did you mean 'mood'"),
    (["--config.chat.mood=x"], "reads: nothing else"),
  ],
)
def test_mistakes_are_one_sentence(template, args, words):
  args = [arg.replace("AT", str(template)) for arg in args]
  is_one_sentence(run(MAIN, CONFIG, HELLO, *args), words)


def test_a_checkpoint_without_any_chat_format(tmp_path):
  """format=chat needs a template; a plain prompt does not."""
  for path in DEMO.iterdir():
    if path.name not in ("tokenizer.json", "tokenizer_config.json"):
      (tmp_path / path.name).symlink_to(path)
  file = json.loads((DEMO / "tokenizer.json").read_text())
  for token in file["added_tokens"]:
    token["content"] = token["content"].replace("header", "other")
  (tmp_path / "tokenizer.json").write_text(json.dumps(file))
  llm = LLM(tmp_path, max_seq_len=128)
  refusal(["no chat template"], llm._plan, ["Hi"], format="chat")
  refusal(["no chat template"], llm.score, [{"role": "user", "content": "x"}], "y")
  # It ends turns as Llama 3 does, so it is taken for a chat model, unless told otherwise.
  assert llm._plan(["Hi"], format="plain")[0].opening == "format: plain text, as config.format says"


def test_the_stop_ids_hold_the_templates_end_of_turn(tmp_path):
  path = tmp_path / "odd.jinja"
  path.write_text("{% for m in messages %}{{ m.content }}<|python_tag|>{% endfor %}")
  llm = LLM.demo(max_seq_len=128)
  session, todo = llm._plan(["Hi"], chat_template=path)
  tag = llm.tokenizer.special["<|python_tag|>"]
  assert session.end == tag
  assert tag in todo[0].stop
