"""The live page: one HTML document and its assets, which need no key and no other server."""

import hashlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from entropix_jax.report import page

# Only files of this server run, and only this server is called; texts cannot become scripts or styles.
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
ROUTE = "/page/{name:path}"


def _read(name: str) -> bytes:
  """A file of the page. Raises KeyError for any other name."""
  if name == "page.css":
    return page.styles("page.css").encode()
  names = [path.relative_to(page.ASSETS).as_posix() for path in page.ASSETS.rglob("*.js")]
  if name not in (*names, "page.html"):
    raise KeyError(name)
  return (page.ASSETS / name).read_bytes()


async def serve(request: Request) -> Response:
  """The document at /, and its files by name."""
  name = request.path_params.get("name", "page.html")
  try:
    content = _read(name)
  except KeyError:
    raise HTTPException(404) from None
  kind = _KINDS[name.rpartition(".")[2]]
  tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
  headers = {
    "content-type": f"{kind}; charset=utf-8",
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a browser asks whether its copy is the newest
    "etag": tag,
  }
  if request.headers.get("if-none-match") == tag:
    return Response(status_code=304, headers=headers)
  return Response(content, headers=headers)
