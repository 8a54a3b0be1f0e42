"""Take the README's picture of the live page: pip install -e ".[serve,viz]" playwright; python scripts/make_pictures.py

It starts a server with the demo model, lets the page write a text, points at an uncertain token, and
keeps what a browser shows, light and dark, as docs/pictures/page.webp and page-dark.webp.
"""

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
PROMPT = "Tell me a story about a kite."
SIZE = {"width": 1280, "height": 920}  # CSS pixels
# The leftmost uncertain token of the last three lines: what is said of it covers neither the text nor the charts.
_OPEN = """() => {
  const all = [...document.querySelectorAll("#turns .tok")], at = all.map((e) => e.getBoundingClientRect());
  const height = at[0].height, from = Math.max(...at.map((box) => box.bottom)) - 4.5 * height;
  const open = [...all.keys()].filter((i) => /e[345]/.test(all[i].className) && at[i].top > from && at[i].height < 1.5 * height);
  return open.sort((i, k) => at[i].left - at[k].left)[0] ?? 0;
}"""


def wait_for(url: str, server: subprocess.Popen) -> None:
  """Return when a server has compiled everything; raises RuntimeError where it ended instead."""
  while server.poll() is None:
    try:
      with urllib.request.urlopen(url) as answer:
        if not json.load(answer)["compiling"]:
          return
      time.sleep(0.5)
    except (urllib.error.URLError, ConnectionError):
      time.sleep(0.5)
  raise RuntimeError("The server ended; its last lines are above.")


def take(page, scheme: str) -> bytes:
  """The page in one of the two colour schemes, as PNG."""
  page.emulate_media(color_scheme=scheme)
  page.mouse.move(0, 0)
  page.wait_for_timeout(500)  # charts are drawn again, at most ten times per second
  page.locator("#turns .tok").nth(page.evaluate(_OPEN)).hover()
  page.wait_for_timeout(500)
  return page.screenshot()


def main(argv: list[str]) -> None:
  """Write both pictures."""
  if argv[1:]:
    sys.exit(f"error: Unexpected argument {argv[1]!r}; this script takes none.")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  command = "-m entropix_jax.serve --config=configs/demo.py --config.engine.batch_size=4".split()
  server = subprocess.Popen([sys.executable, *command, f"--port={port}"], cwd=ROOT)
  try:
    wait_for(f"http://localhost:{port}/ready", server)
    with sync_playwright() as playwright:
      chromium = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
      )
      page = chromium.new_page(viewport=SIZE, device_scale_factor=1.5)
      page.goto(f"http://localhost:{port}/")
      page.get_by_role("button", name=PROMPT).click()
      page.wait_for_selector("#turns .tok")
      page.wait_for_selector("#stop", state="hidden", timeout=120_000)
      for scheme, name in (("light", "page"), ("dark", "page-dark")):
        picture = Image.open(io.BytesIO(take(page, scheme)))
        picture.save(PICTURES / f"{name}.webp", quality=82, method=6)
      chromium.close()
  finally:
    server.terminate()
    server.wait()


if __name__ == "__main__":
  main(sys.argv)
