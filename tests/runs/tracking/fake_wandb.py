"""A W&B server on loopback that answers well up to a stage of a run, and wrongly from there on.

Stages, in the order in which a run comes to them: "start" (the first question), "run" (the run is made), "points" (the
first upload of points), "model" (an artifact is logged), "end" (the last upload of points).
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STAGES = ("start", "run", "points", "model", "end")
FAULTS = ("403", "500", "html", "silence", "drip", "hang up")
KEY = "0" * 40


class FakeServer(ThreadingHTTPServer):
    """Notes what it receives.

    Attributes:
        points: history rows, as uploaded.
        artifacts: type and aliases of each artifact.
        exit_code: of the finished run; None before.
        requests: a line for each.
    """

    daemon_threads = True

    def __init__(self, fault: str | None, stage: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault = fault
        self.fault_stage = STAGES.index(stage)
        self.stage = -1
        self.points: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.requests: list[str] = []
        self.is_closed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a training must find to use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "NO_PROXY": "127.0.0.1"}

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no news."""

    def is_wrong_from(self, stage: str) -> bool:
        """Notes that the run has come to `stage`; says whether answers are wrong by now."""
        self.stage = max(self.stage, STAGES.index(stage))
        return self.fault is not None and self.stage >= self.fault_stage


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if self.path == "/graphql":
            self._answer_query(json.loads(content))
        elif self.path.endswith("/file_stream"):
            self._take_points(json.loads(content))
        else:
            self._answer("end" if self.server.exit_code is not None else "start", {})

    do_PUT = do_GET = do_POST  # noqa: N815

    def _answer_query(self, question: dict[str, Any]) -> None:
        words = question["query"].split("(")[0].split()
        name = question.get("operationName") or (words[1] if len(words) > 1 else words[0])
        self.server.requests.append(name)
        stage = {"UpsertBucket": "run"}.get(name, "model" if "rtifact" in name else "start")
        if name == "CreateArtifact":
            self.server.artifacts.append(question["variables"])
        entity = {"id": "e", "name": "team", "organization": None}
        bucket = {"id": "r", "name": question.get("variables", {}).get("name"), "displayName": "name", "config": "{}"}
        bucket |= {"project": {"id": "p", "name": "mnist-ddp", "entity": entity}, "historyLineCount": 0}
        answers: dict[str, Any] = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "Viewer": {
                "viewer": {"id": "v", "username": "me", "entity": "team", "flags": "{}", "teams": {"edges": []}}
            },
            "ArtifactType": {"project": {"artifact": None}},
            "CreateArtifact": {
                "createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}}
            },
            "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}},
        }
        self._answer(stage, {"data": answers.get(name, {})})

    def _take_points(self, upload: dict[str, Any]) -> None:
        self.server.requests.append("file_stream")
        is_end = "exitcode" in upload
        if self.server.is_wrong_from("end" if is_end else "points"):
            self._answer("points", {})
            return
        lines = upload.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server.points += map(json.loads, lines)
        self.server.exit_code = upload.get("exitcode", self.server.exit_code)
        self._answer("points", {})

    def _answer(self, stage: str, answer: dict[str, Any]) -> None:
        fault = self.server.fault if self.server.is_wrong_from(stage) else None
        content = json.dumps(answer).encode()
        if fault == "silence":
            self.server.is_closed.wait()
        if fault in ("silence", "hang up"):
            self.close_connection = True
            return
        if fault == "html":
            content = b"<html><body>Sign in to the guest network</body></html>"
        elif fault in ("403", "500"):
            content = b'{"error": "no"}'
        if fault == "drip":
            content = b" " * 100 + content
        self.send_response(int(fault) if fault in ("403", "500") else 200)
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "drip":
            while content and not self.server.is_closed.wait(timeout=1):
                self.wfile.write(content[:1])
                self.wfile.flush()
                content = content[1:]
        self.wfile.write(content)


@contextmanager
def fake_server(fault: str | None = None, stage: str = "start") -> Iterator[FakeServer]:
    """A running server: wrong by `fault`, one of `FAULTS`, from `stage` on."""
    with FakeServer(fault, stage) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.is_closed.set()
            server.shutdown()


if __name__ == "__main__":  # for a look by hand: python -m tests.runs.tracking.fake_wandb [FAULT STAGE]
    import sys

    with fake_server(*sys.argv[1:]) as running:
        print(" ".join(f"{name}={value}" for name, value in running.environment.items()), flush=True)
        while True:
            time.sleep(3600)
