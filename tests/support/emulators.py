"""Object stores on this machine: moto for s3://, gcp-storage-emulator for gs://."""

import contextlib
import io
import logging
import os
import re
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "bucket"
# One port per scheme and process: the libraries keep the address of the first store they met.
PORTS: dict[str, int] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def object_store(scheme: str, cache: Path) -> Iterator[str]:
    """An empty bucket that this process and its children reach; yields its address."""
    start = {"s3": start_s3, "gs": start_gs}[scheme]
    port = PORTS.setdefault(scheme, free_port())
    with mock.patch.dict(os.environ, {"LORY_CACHE": str(cache)}):
        server = start(port)
        try:
            yield f"{scheme}://{BUCKET}"
        finally:
            server.stop()
            forget_connections(scheme)


def forget_connections(scheme: str) -> None:
    """Makes the next store reachable: fsspec and epath keep what is connected to this one."""
    import fsspec
    from etils.epath import backend

    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def start_s3(port: int):
    import boto3
    from moto.server import ThreadedMotoServer

    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return server


def start_gs(port: int):
    from gcp_storage_emulator import server as emulator

    emulator.RequestHandler = with_preconditions(emulator.RequestHandler)
    os.environ |= {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",  # what Orbax writes with
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nothing",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask for credentials
    }
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    return server


def with_preconditions(handler_class: type) -> type:
    """Adds what Cloud Storage does and this emulator does not: generations as conditions.

    TensorStore, with which Orbax writes, relies on them: an object is replaced only if it is still
    the one that was read.
    """
    if handler_class.__name__ == "WithPreconditions":
        return handler_class

    class WithPreconditions(handler_class):
        def do_GET(self) -> None:
            if not self.is_refused():
                super().do_GET()

        def do_POST(self) -> None:
            if not self.is_refused():
                super().do_POST()

        def do_DELETE(self) -> None:
            if not self.is_refused():
                super().do_DELETE()

        def is_refused(self) -> bool:
            query = parse_qs(urlsplit(self.path).query)
            generation = self.generation()
            status = None
            if query.get("ifGenerationMatch", [generation])[0] != generation:
                status = HTTPStatus.PRECONDITION_FAILED
            elif query.get("ifGenerationNotMatch", [""])[0] == generation:
                status = HTTPStatus.NOT_MODIFIED
            if status is not None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            return status is not None

        def generation(self) -> str:
            """The generation of the object that is asked for; "0" if there is none."""
            from gcp_storage_emulator.exceptions import NotFound

            url = urlsplit(self.path)
            found = re.search(r"/b/([^/]+)/o(?:/(.+))?$", url.path)
            name = found and (found[2] or parse_qs(url.query).get("name", [None])[0])
            if found and not name and "uploadType=multipart" in url.query:
                name = self.name_in_body()
            if not name:
                return "0"
            try:
                return self.storage.get_file_obj(found[1], unquote(name))["generation"]
            except NotFound:
                return "0"

        def name_in_body(self) -> str | None:
            """The name of an upload whose first part describes the object."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.rfile = io.BytesIO(body)
            name = re.search(rb'"name": *"([^"]+)"', body)
            return quote(name[1].decode()) if name else None

        def end_headers(self) -> None:
            if self.command == "GET" and "alt=media" in self.path:
                self.send_header("x-goog-generation", self.generation())
            super().end_headers()

    return WithPreconditions
