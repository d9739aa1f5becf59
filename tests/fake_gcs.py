"""A server on this machine that answers like Google Cloud Storage's JSON API, as far as gcsfs, google-cloud-storage and
TensorStore ask: buckets and objects in memory, listed, read in ranges, uploaded in one or several pieces, deleted."""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """objects: by "bucket/name" the (generation, content). requests: "METHOD path" of everything that was asked."""

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = set(buckets)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.requests: list[str] = []
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # gcsfs asks twice and leaves the slower answer
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """The variables that make the three clients ask here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google's own servers over gRPC, at length
        }


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[Server]:
    server = Server(*buckets)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def log_message(self, *args):
        pass

    def _answer(self, status=200, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = [*headers, ("Content-Type", "application/json")]
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self):
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        with self.server.lock:
            self.server.requests.append(f"{self.command} {urllib.parse.unquote(self.path)}")
            found = re.fullmatch(r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?(/?)", url.path)
            if found is None:
                return self._answer(501, b"what is " + self.path.encode())
            kind, bucket, name, _ = found.groups()
            if bucket not in self.server.buckets:
                return self._answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            if kind == "upload":
                return self._upload(bucket, query, data)
            if name:
                return self._object(bucket, urllib.parse.unquote(name), query)
            if url.path.rstrip("/").endswith("/o"):
                return self._list(bucket, query)
            return self._answer(200, {"kind": "storage#bucket", "id": bucket, "name": bucket, "locationType": "region"})

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _about(self, key):
        generation, content = self.server.objects[key]
        bucket, name = key.split("/", 1)
        return {
            "kind": "storage#object", "id": f"{key}/{generation}", "name": name, "bucket": bucket,
            "generation": str(generation), "metageneration": "1", "size": str(len(content)), "etag": f"e{generation}",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
            "mediaLink": f"{self.server.url}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, '')}?alt=media",
        }  # fmt: skip

    def _object(self, bucket, name, query):
        key = f"{bucket}/{name}"
        if key not in self.server.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"No such object: {key}"}})
        generation, content = self.server.objects[key]
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412, b"{}")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if self.command == "DELETE":
            del self.server.objects[key]
            return self._answer(204)
        if query.get("alt") != "media":
            return self._answer(200, self._about(key))
        md5 = self._about(key)["md5Hash"]
        headers = [("x-goog-generation", str(generation)), ("ETag", f"e{generation}"), ("x-goog-hash", f"md5={md5}")]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self._answer(416, b"", [("Content-Range", f"bytes */{len(content)}")])
        headers.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
        return self._answer(206, content[first : last + 1], headers)

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            name = key.removeprefix(f"{bucket}/")
            if name == key or not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._about(key))
        return self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket, query, data):
        if "upload_id" in query:
            return self._piece(query["upload_id"], data)
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(data)["name"]
            number = str(next(self.server.numbers))
            self.server.uploads[number] = (f"{bucket}/{name}", bytearray())
            place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self._answer(200, b"", [("Location", place)])
        name, content = query.get("name"), data
        if query["uploadType"] == "multipart":
            marker = data[: re.search(rb"\r?\n", data).start()]
            _, about, rest = data.split(marker, 2)
            content = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            content = re.sub(rb"\r?\n" + re.escape(marker) + rb"--\s*$", b"", content)
            content = content.removesuffix(b"\n" + marker + b"--")
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
        return self._store(f"{bucket}/{name}", content, query)

    def _piece(self, number, data):
        key, sofar = self.server.uploads[number]
        sofar += data
        total = self.headers.get("Content-Range", "/*").rsplit("/", 1)[1]
        if total == "*" or int(total) > len(sofar):
            return self._answer(308, b"", [("Range", f"bytes=0-{len(sofar) - 1}")] if sofar else [])
        del self.server.uploads[number]
        return self._store(key, bytes(sofar), {})

    def _store(self, key, content, query):
        present = self.server.objects[key][0] if key in self.server.objects else 0
        if query.get("ifGenerationMatch", str(present)) != str(present):
            return self._answer(412, b"{}")
        self.server.objects[key] = (next(self.server.numbers), content)
        return self._answer(200, self._about(key))
