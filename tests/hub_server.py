"""A Hugging Face Hub on the loopback, in memory: what huggingface_hub sends without Xet, and what it expects back.

It can be told to fail (`HubServer.fail`), and keeps every request that it received.
"""

import base64
import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

SIGNATURE = "X-Amz-Signature=presigned-secret"
REASONS = {  # the words of the real Hub
    401: "Invalid username or password.",
    403: "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
    409: "Another operation on this repository is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    413: "Payload too large",
    429: "Too many requests",
}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes  # what arrived of it


class Answer(NamedTuple):
    """What is sent back; all but bytes as JSON."""

    status: int
    content: dict | list | bytes
    headers: dict[str, str] = {}


@dataclass
class Repository:
    """A model repository with one branch, `main`."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"initial commit").hexdigest()])

    def oid(self, path: str) -> str:
        """What the Hub knows a file by: the sha256 of a large one, git's hash of another."""
        content = self.files[path]
        blob = b"blob %d\0" % len(content) + content
        return hashlib.sha256(content).hexdigest() if path in self.large else hashlib.sha1(blob).hexdigest()


class HubServer:
    """The server; it runs in a thread between `start` and `stop`, or inside `with`, and keeps its port.

    Each method that returns an `Answer` answers one route.

    Args:
        token: what every write, and every read of a private repository, must carry; None lets everyone in.
    """

    def __init__(self, token: str | None = None):
        self.token = token
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.port = 0
        self.recover()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> None:
        self.closing.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self._server.hub, self._server.daemon_threads, self._server.block_on_close = self, True, False
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuse every connection from now on; what was stored stays."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, where: str, how: int | str, times: float = math.inf) -> None:
        """Fail from now on.

        Args:
            where: "create", "yaml", "preupload", "batch", "put", "verify", "commit", or "any" of them.
            how: a status, "timeout" (no answer until the server stops) or "cut" (half of the body is read).
            times: how often, until it recovers by itself.
        """
        self.failure, self.failures_left = (where, how), times

    def recover(self) -> None:
        self.failure, self.failures_left = None, 0

    def next_failure(self, place: str) -> int | str | None:
        with self.lock:
            if self.failure is None or self.failure[0] not in (place, "any") or self.failures_left == 0:
                return None
            self.failures_left -= 1
            return self.failure[1]

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id].files

    def sent(self, place: str) -> list[Request]:
        """The requests that reached one place, by its name in `fail`."""
        return [request for request in self.requests if _find_route(request.method, request.path)[0] == place]

    def whoami(self, body: bytes) -> Answer:
        return Answer(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'user'}/{asked['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        self.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return Answer(200, {"url": url, "name": repo_id})

    def validate_yaml(self, body: bytes) -> Answer:
        header = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            return Answer(400, {"errors": [{"message": f"not valid YAML: {error}"}], "warnings": []})
        return Answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        repository, answers = self.repositories[repo], []
        for file in json.loads(body)["files"]:
            large = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in repository.files:
                answer["oid"] = repository.oid(file["path"])  # the client leaves out what has not changed
            answers.append(answer)
        return Answer(200, {"files": answers})

    def batch(self, body: bytes, repo: str) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.endpoint}/storage/{asked['oid']}?{SIGNATURE}", "header": {}}
            verify = {"href": f"{self.endpoint}/api/models/{repo}/verify", "header": {}}
            actions = {} if asked["oid"] in self.storage else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": asked["oid"], "size": asked["size"], "authenticated": True, **actions})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return Answer(400, {"error": "the content has another sha256"})
        self.storage[oid] = body
        return Answer(200, b"")

    def verify(self, body: bytes, repo: str) -> Answer:
        asked = json.loads(body)
        stored = len(self.storage.get(asked["oid"], b"")) == asked["size"]
        return Answer(200 if stored else 404, {"success": stored})

    def commit(self, body: bytes, repo: str, revision: str) -> Answer:
        repository = self.repositories[repo]
        lines = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
        for key, value in lines:
            if key == "lfsFile" and value["oid"] not in self.storage:
                return Answer(400, {"error": f"the content of {value['path']} was never uploaded"})
        for key, value in lines:
            if key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                repository.large.discard(value["path"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.storage[value["oid"]]
                repository.large.add(value["path"])
            elif key == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(hashlib.sha1(body + repository.commits[-1].encode()).hexdigest())
        url = f"{self.endpoint}/{repo}/commit/{repository.commits[-1]}"
        return Answer(200, {"success": True, "commitUrl": url, "commitOid": repository.commits[-1], "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str = "main") -> Answer:
        repository = self.repositories[repo]
        about = {"id": repo, "sha": repository.commits[-1], "private": repository.private, "tags": []}
        return Answer(200, {**about, "siblings": [{"rfilename": path} for path in repository.files]})

    def tree(self, body: bytes, repo: str, revision: str) -> Answer:
        oid, files = self.repositories[repo].oid, self.repositories[repo].files
        return Answer(200, [{"type": "file", "path": p, "size": len(c), "oid": oid(p)} for p, c in files.items()])

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> Answer:
        repository = self.repositories[repo]
        headers = {"X-Repo-Commit": repository.commits[-1]}
        if path not in repository.files:
            return Answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{repository.oid(path)}"'
        if path in repository.large:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(repository.files[path]))}
        return Answer(200, repository.files[path], headers)


REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [  # method, path, place to fail at, what answers
    ("POST", r"/api/repos/create", "create", HubServer.create),
    ("POST", r"/api/validate-yaml", "yaml", HubServer.validate_yaml),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload", HubServer.preupload),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "batch", HubServer.batch),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "put", HubServer.put),
    ("POST", rf"/api/models/{REPOSITORY}/verify", "verify", HubServer.verify),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit", HubServer.commit),
    ("GET", r"/api/whoami-v2", "read", HubServer.whoami),
    ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "read", HubServer.info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)", "read", HubServer.tree),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "read", HubServer.resolve),
]


def _find_route(method: str, path: str) -> tuple:
    """Place, what answers, and its arguments; the place is None where there is no such route."""
    for route_method, pattern, place, answer in ROUTES:
        if route_method == method.replace("HEAD", "GET") and (match := re.fullmatch(pattern, urlsplit(path).path)):
            return place, answer, {name: unquote(value) for name, value in match.groupdict().items() if value}
    return None, None, {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        """Nothing: tests look at `HubServer.requests`."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a client that gave up
            super().handle()

    def do_POST(self) -> None:
        hub = self.server.hub
        place, answer, arguments = _find_route(self.command, self.path)
        how = hub.next_failure(place) if place not in (None, "read") else None
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if how == "cut" else length)
        with hub.lock:
            hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
        if how == "timeout":
            hub.closing.wait()
        if how in ("timeout", "cut") or hub.closing.is_set():
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        with hub.lock:
            refused = _failure(how) if how else self._refuse(place, arguments)
            self._send(refused or answer(hub, body, **arguments))

    do_GET = do_HEAD = do_PUT = do_POST

    def _refuse(self, place: str | None, arguments: dict[str, str]) -> Answer | None:
        if place is None:
            return Answer(404, {"error": f"no such route: {self.command} {self.path}"})
        hub, repository = self.server.hub, self.server.hub.repositories.get(arguments.get("repo"))
        # storage is reached by a signed address; what is public can be read by everyone
        free = place == "put" or (place == "read" and repository is not None and not repository.private)
        if hub.token and not free and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return _failure(401)
        if "repo" in arguments and repository is None:
            return Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "revision" in arguments and arguments["revision"] not in ("main", repository.commits[-1]):
            return Answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})

    def _send(self, answer: Answer) -> None:
        data = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _failure(status: int) -> Answer:
    if status >= 500:  # said by a machine in front of the Hub, which speaks no JSON
        return Answer(status, b"<html><body>the Hub is down</body></html>", {"Content-Type": "text/html"})
    return Answer(status, {"error": REASONS[status]}, {"Retry-After": "7"} if status == 429 else {})
