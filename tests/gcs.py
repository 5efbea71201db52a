"""A small stand-in for Google Cloud Storage on localhost, for gs:// paths.

Serves what gcsfs, google-cloud-storage and TensorStore's ``gcs`` driver ask of the JSON API: upload
(media, multipart, resumable), download with ranges, list with prefix, delimiter and pages, delete,
rewrite, generation preconditions. Objects are strongly consistent and appear whole, as the real
ones do. Not there: authentication, gRPC, hierarchical buckets, quotas of requests.
"""

import contextlib
import dataclasses
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

API, UPLOAD = "/storage/v1/b/", "/upload/storage/v1/b/"


@dataclasses.dataclass
class Store:
    """Objects by (bucket, name): content and generation."""

    buckets: set[str]
    url: str = ""
    objects: dict[tuple[str, str], tuple[bytes, int]] = dataclasses.field(default_factory=dict)
    sessions: dict[str, tuple[str, str, bytearray]] = dataclasses.field(default_factory=dict)
    #: Called with (method, bucket, name) before a write; may return an HTTP status to refuse it.
    refuse: object = None
    generation: int = 0
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(n for _, n in self.objects if n.startswith(prefix))

    def put(self, bucket, name, data):
        self.generation += 1
        self.objects[bucket, name] = (bytes(data), self.generation)
        return self.describe(bucket, name)

    def describe(self, bucket, name):
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "id": f"{bucket}/{name}",
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
        }  # fmt: skip


class Answer(Exception):
    def __init__(self, status, body=b"", headers=()):
        super().__init__(status)
        self.status, self.headers = status, dict(headers)
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def missing(what):
    return Answer(404, {"error": {"code": 404, "message": f"{what}: not found"}})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # 40 ms for every answer otherwise
    store: Store

    def log_message(self, format, *args):
        pass

    def handle_any(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        split = urllib.parse.urlsplit(self.path)
        query = {k: v[-1] for k, v in urllib.parse.parse_qs(split.query, True).items()}
        try:
            with self.store.lock:
                self.route(split.path, query, body)
            raise missing(split.path)
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Type" not in answer.headers:
                self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def chunks(self):
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def route(self, path, query, body):
        path = path.removeprefix("/download")
        if path.startswith("/session/"):
            self.chunk(path, body)
        if path.startswith(UPLOAD):
            bucket = urllib.parse.unquote(path.removeprefix(UPLOAD).removesuffix("/o"))
            self.upload(bucket, query, body)
        if path.startswith(API):
            bucket, _, rest = path.removeprefix(API).partition("/")
            if bucket not in self.store.buckets:
                raise missing(f"bucket {bucket}")
            if not rest:
                raise Answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
            if rest in ("o", "o/"):
                self.list(bucket, query)
            self.object(bucket, rest.removeprefix("o/"), query)

    # --- objects

    def object(self, bucket, rest, query):
        name, copy, target = rest.partition("/rewriteTo/b/")
        name = urllib.parse.unquote(name)
        if (bucket, name) not in self.store.objects:
            raise missing(f"object {name}")
        data, generation = self.store.objects[bucket, name]
        if copy:
            where, _, to = target.partition("/o/")
            found = self.store.put(where, urllib.parse.unquote(to), data)
            raise Answer(200, {"done": True, "objectSize": str(len(data)), "resource": found})
        self.require(bucket, name, query)
        if self.command == "DELETE":
            self.allow(bucket, name)
            del self.store.objects[bucket, name]
            raise Answer(204)
        if query.get("alt") != "media":
            raise Answer(200, self.store.describe(bucket, name))
        headers = {
            "x-goog-generation": generation, "Content-Type": "application/octet-stream",
            "x-goog-stored-content-length": len(data), "x-goog-stored-content-encoding": "identity",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            raise Answer(200, data, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            raise Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        raise Answer(206, data[start:stop], headers)

    def require(self, bucket, name, query):
        have = self.store.objects.get((bucket, name), (b"", 0))[1]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != have:
            raise Answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == have:
            raise Answer(304)

    def allow(self, bucket, name):
        status = self.store.refuse and self.store.refuse(self.command, bucket, name)
        if status:
            text = {403: "caller does not have storage.objects access"}.get(status, "refused")
            raise Answer(status, {"error": {"code": status, "message": text}})

    def upload(self, bucket, query, body):
        if bucket not in self.store.buckets:
            raise missing(f"bucket {bucket}")
        kind, content = query.get("uploadType", "media"), body
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, first, second = body.split(b"--" + boundary, 2)
            fields = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])
            query.setdefault("name", fields["name"])
            content = re.split(rb"\r?\n\r?\n", second, maxsplit=1)[1]
            content = re.sub(rb"\r?\n--" + re.escape(boundary) + rb"--\s*$", b"", content)
        elif kind == "resumable":
            query.setdefault("name", json.loads(body or b"{}").get("name", ""))
        name = query["name"]
        self.allow(bucket, name)
        self.require(bucket, name, query)
        if kind == "resumable":
            session = f"/session/{len(self.store.sessions)}"
            self.store.sessions[session] = (bucket, name, bytearray())
            raise Answer(200, b"", {"Location": f"{self.store.url}{session}"})
        raise Answer(200, self.store.put(bucket, name, content))

    def chunk(self, path, body):
        bucket, name, data = self.store.sessions[path]
        data += body
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total in ("", str(len(data))):
            raise Answer(200, self.store.put(bucket, name, data))
        raise Answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})

    def list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = max(query.get("startOffset", ""), query.get("pageToken", ""))
        end, most = query.get("endOffset"), int(query.get("maxResults", 1000))
        items, prefixes = [], []
        for name in sorted(n for b, n in self.store.objects if b == bucket):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            if len(items) + len(prefixes) == most:
                raise Answer(200, {"items": items, "prefixes": prefixes, "nextPageToken": name})
            head, cut, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if cut:
                prefixes += [] if prefix + head + cut in prefixes else [prefix + head + cut]
            else:
                items.append(self.store.describe(bucket, name))
        found = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        raise Answer(200, {k: v for k, v in found.items() if v})


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that hang up are no news."""


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[Store]:
    """A server with these buckets, empty; its address is in ``url``."""
    store = Store(set(buckets))
    server = Server(("localhost", 0), type("Bound", (Handler,), {"store": store}))
    store.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str) -> dict[str, str]:
    """What makes the three libraries talk to a server at this address."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore asks nobody else for one
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks about the bucket by gRPC
    }
