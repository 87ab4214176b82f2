"""A page in the browser to draw digits on, which shows live what a network makes of them.

In: trained models, drawings and photographs. Out: a page on this machine, until Ctrl-C; it needs no network. The
answers are those of `python -m mnist.predict`.

  python -m mnist.demo
  python -m mnist.demo --run runs/my-run --port 8000
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from types import ModuleType

from mnist.cli import RunOption, parse_options, run_command
from mnist.errors import UserError

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 - only where it is asked for
GRADIO = "gradio==6.31.0"  # as in requirements-dev.txt


@dataclass(frozen=True)
class Options:
    """Which model reads the digits, and where the page is."""

    run: RunOption = None
    """The model to begin with: a run directory, or folder with an exported model; default: the newest finished run."""
    host: str = LOOPBACK
    """Address to listen on; 0.0.0.0 lets other machines of your network open the page."""
    port: int = 7860
    """Port to listen on; 0 = any free one."""
    share: bool = False
    """Open the page to everybody who has its link, through a server of Gradio's in the internet."""
    no_browser: bool = False
    """Do not open a browser."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: must be 0 to 65535")


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "demo", __doc__)  # before torch is imported: --help answers at once

from mnist.demo.reader import find_models, load
from mnist.runs.console import Console


def main(options: Options) -> int:
    """Shows the page until Ctrl-C."""
    port = _free_port(options.host, options.port)
    models = find_models(options.run)
    page = _import_page()
    load(next(iter(models)))  # now, not when the first stroke is drawn
    blocks = page.build_page(lambda: find_models(options.run))
    with contextlib.redirect_stdout(io.StringIO()):  # it tells at length why there is no link
        _, address, link = blocks.launch(
            server_name=f"[{options.host}]" if ":" in options.host else options.host,
            server_port=port,
            share=options.share,
            quiet=True,
            prevent_thread_lock=True,
            **page.LOOK,
        )
    console = Console()
    console.say(f"model {next(iter(models.values()))}")
    console.say(f"page  {address}  (Ctrl-C ends it)")
    if options.host == EVERYWHERE:
        console.say(f"phone http://{_own_address()}:{port}/  (from your network)")
    if link:
        console.say(f"link  {link}")
    elif options.share:
        console.warn("--share: no link; Gradio's server was not reached, or its program frpc could not be downloaded")
    if not options.no_browser and sys.stdout.isatty() and not _open_browser(link or address):
        tunnel = f"ssh -L {port}:{LOOPBACK}:{port} {socket.gethostname()}"
        console.note(f"no browser here; to open the page on another machine, type there: {tunnel}")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
    return 0


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0, once it is known that one can listen there."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
            return int(listener.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host}: not an address of this machine ({reason})") from error
        raise UserError(f"--port {port}: {reason}; choose another one, or 0 for any that is free") from error


def _own_address() -> str:
    """The address by which other machines reach this one, or its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _import_page() -> ModuleType:
    """mnist.demo.page, with Gradio, which takes seconds and is not always installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when it is imported
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK, "localhost")))
    try:
        return importlib.import_module("mnist.demo.page")
    except ModuleNotFoundError as error:
        raise UserError(f"the page is made with Gradio: pip install {GRADIO} (no module {error.name})") from error


def _open_browser(address: str) -> bool:
    """Opens a browser with windows; one that would run in this terminal is not meant."""
    has_windows = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(has_windows) and webbrowser.open(address)


if __name__ == "__main__":
    run_command(main, OPTIONS)
