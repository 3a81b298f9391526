"""The page of a running training, served to this machine only."""

from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from ssl_lightning.commands.report.history import History
from ssl_lightning.commands.report.page import page_of
from ssl_lightning.errors import UserError
from ssl_lightning.runs import EVALUATIONS_FOLDER, PICTURES_FOLDER, RESULTS_FILE


def serve(folder: Path, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        folder: The run folder.
        port: Port; 0 picks a free port.

    Raises:
        UserError: The port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(folder))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}; choose another port, or leave out --port for a free port.") from error
    with server:
        print(f"{folder} at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _stamp(folder: Path) -> str:
    """State of the files that the page shows; it changes when any of the files does."""
    patterns = ["*.csv", "*.json", "*.txt", "*.yaml", "*.png"]
    patterns += [f"{PICTURES_FOLDER}/*/*.png", f"{EVALUATIONS_FOLDER}/*/{RESULTS_FILE}"]
    stats = []
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        with suppress(OSError):
            stats.append((file.name, file.stat().st_mtime_ns, file.stat().st_size))
    return f"{hash(tuple(stats)):x}"


def _handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, with its parts that change, or with the stamp."""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # the name of another site that leads here
                self._answer(403, "this page is only for this machine")
            elif self.path == "/stamp":
                self._answer(200, _stamp(folder))
            elif self.path in ("/", "/live"):
                stamp = _stamp(folder)
                try:
                    self._answer(200, page_of(History.of(folder), stamp, whole=self.path == "/"), "text/html")
                except (OSError, ValueError, UserError, yaml.YAMLError) as error:  # a file is being written
                    self._answer(503, f"{error}; trying again ...")
            else:
                self._answer(404, "there is only /")

        def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            if status == 503:
                self.send_header("Refresh", "2")
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 # its name there
            """Print nothing for each request."""

    return Handler
