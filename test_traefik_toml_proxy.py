# SPDX-License-Identifier: BSD-3-Clause
"""Tests: the pure rooms first, then a real Traefik, a whole JupyterHub, and the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from conftest import Backends, ProxyFactory, free_port, installed_traefik, stand_in_app
from traefik_toml_proxy import placeholder_certificate

# ---------------------------------------------------------------------------------------------
# The benchmark: pytest -m benchmark -s
# ---------------------------------------------------------------------------------------------


class Floor:
    """The least that a file provider can cost: rules.toml replaced by hand, then asking for the
    new route at the public port, once a millisecond, on a connection that stays open."""

    def __init__(self, directory: Path, urls: dict[str, str]) -> None:
        self.rules, self.urls = directory / "rules.toml", urls
        self.routes = {"/": urls["hub"]}
        self.port = free_port()
        default = {"stores": {"default": {"defaultCertificate": placeholder_certificate()}}}
        self.certificate = tomli_w.dumps({"tls": default})
        static = {
            "log": {"level": "ERROR"},
            "entryPoints": {"http": {"address": f"127.0.0.1:{self.port}"}},
            "providers": {
                "providersThrottleDuration": "0s",
                "file": {"filename": str(self.rules)},
            },
        }
        self.static = directory / "traefik.toml"
        self.static.write_text(tomli_w.dumps(static))

    async def start(self) -> None:
        self.replace()
        self.process = subprocess.Popen([installed_traefik(), "--configfile", str(self.static)])
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port)
        self.wait("/", "hub")

    async def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def replace(self) -> None:
        temporary = self.rules.with_suffix(".tmp")
        routes = "".join(
            f'[http.routers.r{i}]\nrule = "PathPrefix(`{path}`)"\nservice = "r{i}"\n'
            f'[http.services.r{i}.loadBalancer]\nservers = [{{ url = "{target}" }}]\n'
            for i, (path, target) in enumerate(self.routes.items())
        )
        temporary.write_text(self.certificate + routes)
        os.replace(temporary, self.rules)

    def wait(self, path: str, who: str) -> None:
        while True:
            try:
                self.connection.request("GET", path)
                if json.loads(self.connection.getresponse().read())["who"] == who:
                    return
            except OSError:
                self.connection.close()
            except ValueError:  # no route yet
                pass
            time.sleep(0.001)

    async def change(self, add: Iterable[str], delete: Iterable[str]) -> None:
        for path in add:
            self.routes[path] = self.urls["user"]
        for path in delete:
            del self.routes[path]
        self.replace()
        self.wait(path, "user" if add else "hub")


async def change(proxy: Any, add: Iterable[str] = (), delete: Iterable[str] = ()) -> float:
    """Make changes all at once; return how long it took, in ms."""
    began = time.perf_counter()
    if isinstance(proxy, Floor):
        await proxy.change(add, delete)
    else:
        target = "http://127.0.0.1:9"
        await asyncio.gather(
            *(proxy.add_route(path, target, {"user": path, "server_name": ""}) for path in add),
            *(proxy.delete_route(path) for path in delete),
        )
    return (time.perf_counter() - began) * 1000


async def longest_stall(stalls: list[float]) -> None:
    """Note in ms how much later than asked the event loop comes back, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append((time.perf_counter() - before) * 1000 - 1)


def resident_memory() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def contestant(kind: str, directory: Path, urls: dict[str, str]) -> Any:
    if kind == "floor":
        return Floor(directory, urls)
    if kind == "this proxy":
        return ProxyFactory(directory)()
    public, api = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    app = stand_in_app()
    if kind == "CHP":
        from jupyterhub.proxy import ConfigurableHTTPProxy

        options = {"api_url": api, "pid_file": str(directory / "chp.pid"), "log_level": "error"}
        return ConfigurableHTTPProxy(app=app, hub=app.hub, public_url=public, **options)
    from jupyterhub_traefik_proxy.fileprovider import TraefikFileProviderProxy

    return TraefikFileProviderProxy(
        app=app,
        hub=app.hub,
        public_url=public,
        traefik_api_url=api,
        traefik_api_username="api",
        traefik_api_password="secret",
        command=[installed_traefik()],
        static_config_file=str(directory / "traefik.toml"),
        dynamic_config_file=str(directory / "rules.toml"),
    )


async def measure(kind: str, size: int, directory: Path, urls: dict[str, str]) -> dict[str, float]:
    """Return the figures of one contestant with a table of one size; times in ms, memory in MB."""
    logging.disable(logging.ERROR)
    proxy, figures = contestant(kind, directory, urls), {}
    began = time.perf_counter()
    await proxy.start()
    figures["start"] = (time.perf_counter() - began) * 1000
    if kind != "floor":
        await proxy.add_route("/", urls["hub"], {"hub": True})
    before = resident_memory()
    names = [f"/user/student{number:04d}/" for number in range(size)]
    await change(proxy, names)
    figures["memory"] = resident_memory() - before
    slow = kind == "JTP"  # seconds a change: fewer of them
    new = [f"/user/new{number:04d}/" for number in range(3 if slow else 20)]
    figures["add"] = statistics.median([await change(proxy, [name]) for name in new])
    figures["delete"] = statistics.median([await change(proxy, (), [name]) for name in new])
    for count in (10, 50, 200, 1000):
        if slow and count * size > 2000:
            continue
        stalls: list[float] = []
        watch = asyncio.ensure_future(longest_stall(stalls))
        await asyncio.sleep(0.05)
        many = [f"/user/many{number:04d}/" for number in range(count)]
        figures[f"add {count} at once"] = await change(proxy, many)
        figures[f"delete {count} at once"] = await change(proxy, (), many)
        await asyncio.sleep(0.05)
        watch.cancel()
        if kind != "floor":  # it works in the loop's thread
            figures[f"longest stall, {count}"] = max(stalls)
    began = time.perf_counter()
    stopped = proxy.stop()
    if stopped is not None:
        await stopped
    figures["stop"] = (time.perf_counter() - began) * 1000
    return figures


def measure_in_process(answers: Any, *args: Any) -> None:
    try:
        answers.put(asyncio.run(measure(*args)))
    except Exception:
        answers.put(traceback.format_exc())
        raise


@pytest.mark.benchmark
def test_benchmark(tmp_path: Path, backends: Backends) -> None:
    """Print a table of what routes cost with this proxy, its peers and by hand."""
    kinds = ["this proxy", "floor"]
    if shutil.which("configurable-http-proxy"):
        kinds.append("CHP")
    with contextlib.suppress(ImportError):
        __import__("jupyterhub_traefik_proxy")
        kinds.append("JTP")
    urls = {"hub": backends("hub"), "user": backends("user")}
    spawn = multiprocessing.get_context("spawn")
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("times in ms, memory in MB; ratio: this proxy to the floor, and to CHP")
    for size in (10, 100, 1000):
        table: dict[str, dict[str, float]] = {}
        for kind in kinds:
            directory = tmp_path / f"{kind}-{size}"
            directory.mkdir()
            answers = spawn.Queue()
            args = (answers, kind, size, directory, urls)
            process = spawn.Process(target=measure_in_process, args=args)
            process.start()
            table[kind] = answers.get(timeout=900)
            process.join()
            assert isinstance(table[kind], dict), table[kind]
        print(
            f"\n{f'{size} routes':24}" + "".join(f"{kind:>12}" for kind in kinds) + "       ratios"
        )
        for figure in table["this proxy"]:
            row = [table[kind].get(figure) for kind in kinds]
            cells = "".join("           -" if n is None else f"{n:12.1f}" for n in row)
            ratios = [f"{row[0] / n:6.2f}" if n else "     -" for n in row[1:3]]
            print(f"{figure:24}{cells}  {' '.join(ratios)}")
