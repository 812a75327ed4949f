"""Serve the built page: python3 serve.py [--model PACKAGE] [--reference FILE]. Needs nothing but Python.

Adds the two headers that WebAssembly threads need (Cross-Origin-Opener-Policy and -Embedder-Policy).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Files of `directory`; `mounts` puts files and folders from elsewhere under names of their own."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript", ".wasm": "application/wasm", ".webmanifest": "application/manifest+json"}

    def __init__(self, *args, mounts: dict[str, Path], **kwargs):
        self.mounts = mounts
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        if first not in self.mounts:
            return super().translate_path(path)
        root = self.mounts[first]
        parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
        return os.fspath(root.joinpath(*parts))

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Says nothing of browsers that hang up."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def make_server(folder: Path, mounts: dict[str, Path], host: str = "127.0.0.1", port: int = 0) -> Server:
    """A server of `folder` and the mounts {first part of the path: file or folder}; port 0 takes any free one."""
    return Server((host, port), partial(Handler, directory=os.fspath(folder), mounts=mounts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "dist", help="the built page (default: dist)")
    parser.add_argument("--model", type=Path, help="package to serve as /model/")
    parser.add_argument("--reference", type=Path, help="reference file to serve as /reference.json.gz")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from outside (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.folder / "index.html").is_file():
        parser.error(f"{args.folder} holds no built page; run `npm ci && npm run build` first")
    mounts = {"model": args.model, "reference.json.gz": args.reference}
    for path in filter(None, mounts.values()):
        if not path.exists():
            parser.error(f"{path} does not exist")
    server = make_server(args.folder, {name: path for name, path in mounts.items() if path}, args.host, args.port)
    print(f"http://{'localhost' if args.host == '127.0.0.1' else args.host}:{server.server_port}/")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
