"""A Hub on this machine: the part of the Hugging Face Hub's HTTP interface that pushing and loading a model need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, USER = "hf_good", "me"
COMMIT = "c" * 40


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    url: str
    repos: dict[str, Repo] = field(default_factory=dict)


@contextmanager
def serve() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def reply(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main\?.*)?", self.path):
            if repo := self.hub.repos.get(match[1]):
                self.reply(200, {"id": match[1], "sha": COMMIT, "private": repo.private, "siblings": []})
            else:
                self.fail(404, "RepoNotFound", "Repository not found")
            return
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if match is None:
            self.fail(404, "", "Not found")
            return
        name, revision, file = match.groups()
        repo = self.hub.repos.get(name)
        if repo is None:
            self.fail(404, "RepoNotFound", "Repository not found")
        elif repo.gated:
            self.fail(403, "GatedRepo", "Access to this model is restricted")
        elif revision not in ("main", "v1", COMMIT):
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file not in repo.files:
            self.fail(404, "EntryNotFound", "Entry not found")
        else:
            content = repo.files[file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.reply(200, content, ETag=etag, X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(401, "", "Invalid username or password.")
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            known = "license: wtf" not in json.loads(body)["content"]
            errors = [] if known else [{"message": '"license" must be one of [apache-2.0, mit, …]'}]
            self.reply(200 if known else 400, {"errors": errors, "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.reply(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repos[match[1]].files[line["value"]["path"]] = content
            url = f"{self.hub.url}/{match[1]}/commit/{COMMIT}"
            self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            raise AssertionError(self.path)

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization'] or USER}/{request['name']}"
        described = {"url": f"{self.hub.url}/{name}", "name": name, "id": "0"}
        if not name.startswith(f"{USER}/"):
            self.fail(403, "", f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        elif name in self.hub.repos:
            self.reply(409, {**described, "error": "You already created this model repo"})
        else:
            private = request.get("private") or request.get("visibility") == "private"  # by huggingface_hub's version
            self.hub.repos[name] = Repo(private=private)
            self.reply(200, described)
