"""A hub on loopback: what huggingface_hub asks for when it lists, reads and commits, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Repositories by `datasets/ORG/NAME` or `models/ORG/NAME`, each a mapping of paths to bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.tokens: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _say(self, status: int, content: bytes | dict | list, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response_only(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._say(404, {"error": code}, X_Error_Code=code)

    def _handle(self) -> None:
        body, parts = self._body(), urlsplit(self.path)
        path = unquote(parts.path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self._say(409, {"error": "exists", "url": f"{self.server.address}/{name}"})
            self.server.repositories[name], self.server.private[name] = {}, asked.get("visibility") == "private"
            return self._say(200, {"url": f"{self.server.address}/{name.removeprefix('models/')}"})
        if path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._say(200, {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.server.blobs[found[1]] = body
            return self._say(200, b"")
        if found := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)(/.*)?", path):
            return self._api(found[1], found[2] or "", body, parse_qs(parts.query))
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name = found[1] if found[1].startswith("datasets/") else f"models/{found[1]}"
            return self._resolve(self.server.repositories.get(name, {}), found[2])
        return self._missing("EntryNotFound")

    def _lfs(self, asked: dict) -> dict:
        known = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.server.blobs:
            return known
        return known | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{asked['oid']}", "header": {}}}}

    def _api(self, name: str, rest: str, body: bytes, query: dict[str, list[str]]) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            return self._missing("RepoNotFound")
        if rest.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".arrow") else "regular", "oid": None}
                for f in asked
            ]
            return self._say(200, {"files": [kind | {"shouldIgnore": False} for kind in kinds]})
        if rest.startswith("/commit/"):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
            self.server.commits.append([line["value"]["path"] for line in lines if line["key"] != "header"])
            address = f"{self.server.address}/{name}/commit/{REVISION}"
            return self._say(200, {"success": True, "commitOid": REVISION, "commitUrl": address})
        if rest.startswith("/tree/"):
            below = unquote(rest.split("/", 3)[3]) + "/" if rest.count("/") > 2 else ""
            found = {path: data for path, data in files.items() if path.startswith(below)}
            if below and not found:
                return self._missing("EntryNotFound")
            return self._say(200, self._entries(found, below, query.get("recursive", [""])[0].lower() == "true"))
        if rest.startswith("/paths-info/"):
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            wanted = [asked] if isinstance(asked, str) else asked
            return self._say(200, [entry for entry in self._entries(files, "", True) if entry["path"] in wanted])
        return self._say(200, {"id": name.split("/", 1)[1], "sha": REVISION, "private": True, "siblings": []})

    def _entries(self, files: dict[str, bytes], below: str, recursive: bool) -> list[dict]:
        entries: dict[str, dict] = {}
        for path, data in files.items():
            folders = path.removeprefix(below).split("/")[:-1]
            for i in range(len(folders)):
                folder = below + "/".join(folders[: i + 1])
                if recursive or i == 0:
                    entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if recursive or not folders:
                sha = hashlib.sha256(data).hexdigest()
                entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                lfs = {"lfs": {"oid": sha, "size": len(data), "pointerSize": 130}} if path.endswith(".arrow") else {}
                entries[path] = entry | lfs
        return list(entries.values())

    def _resolve(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._missing("EntryNotFound")
        data, ranged = files[path], self.headers.get("Range", "").removeprefix("bytes=").split("-")
        tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": REVISION}
        if len(ranged) == 2:
            first, last = int(ranged[0]), min(int(ranged[1] or len(data) - 1), len(data) - 1)
            tags["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._say(206, data[first : last + 1], **tags)
        return self._say(200, data, **tags)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def log_message(self, *args) -> None:
        pass
