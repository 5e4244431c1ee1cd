"""`https://HOST/FILE.gguf`: a file of a web server, resumed where it was interrupted.

Owns one GET with its Range, its redirects and its checks. From https a redirect may lead to https only;
plain http is for this machine itself (loopback), where there is no wire to listen on. No credentials are
ever sent to a server. Proxies and certificates are the system's, through urllib's environment variables.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import IO, Final
from urllib.parse import unquote, urlsplit, urlunsplit

import orjson

from myllm import __version__
from myllm.errors import (
    BadDataError,
    IOFailureError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)
from myllm.models.names import name_from
from myllm.models.sources import Fetched, Progress
from myllm.models.store import CHUNK, Staging, create_private, write_errors

TIMEOUT_SECONDS: Final = 30.0
"""How long a server may be silent."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HttpsSource:
    """The staging folder holds the bytes so far, and in `validator` what tells whether they still fit."""

    needs_network = True
    resumes = True

    def check(self, place: str) -> str:
        _check_url(place)
        return urlunsplit(urlsplit(place)._replace(fragment=""))

    def state(self, place: str) -> None:
        return None

    def fetch(self, place: str, staging: Staging, progress: Progress) -> Fetched:
        part = staging.part(1, 1)
        with _open(place, _resume_headers(staging.folder, part)) as response:
            start, total = _starts_at(response, part)
            _keep_validator(staging.folder, response.headers)
            if total is not None and total - start > (free := staging.free_bytes()):
                raise IOFailureError(
                    f"{place}: {total - start:,} bytes to come, the disk has {free:,}; free some"
                )
            progress(start, total)
            _receive(place, response, part, start, total, progress)
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return Fetched(name_from(unquote(urlsplit(place).path)), (part,), digest.hexdigest())


def _check_url(url: str) -> None:
    """Raises UsageError unless `url` is https, or http to this machine, without credentials."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r:.200}: not a URL: {error}") from error
    if not host or not url.isprintable() or " " in url:
        raise UsageError(f"{url!r:.200}: not a URL")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"https://{host}: a URL with a password in it would be kept on record; leave it out")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise UsageError(f"{url!r:.200}: only https is safe to fetch a model by; http is for loopback")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where the user could have asked to go."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            _check_url(newurl)
        except UsageError as error:
            raise PermissionDeniedError(
                f"{req.full_url}: redirects to a place not allowed: {error}"
            ) from error
        if not req.full_url.startswith("http:") and newurl.startswith("http:"):
            raise PermissionDeniedError(f"{req.full_url}: redirects from https to http; not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked, also of redirects
        url, headers={"User-Agent": f"myllm/{__version__}", "Accept-Encoding": "identity", **headers}
    )
    opener = urllib.request.build_opener(_CheckedRedirects)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the bytes so far do not fit the file that is there now
            return _open(url, {})
        raise _status_error(url, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(f"{url}: cannot be reached: {reason}; check the network") from error
    return response


def _status_error(url: str, status: int) -> NotFoundError | PermissionDeniedError | UnavailableError:
    if status in (404, 410):
        return NotFoundError(f"{url}: no such file there ({status}); check the address")
    if status in (401, 403):
        return PermissionDeniedError(f"{url}: the server refused ({status}); download it another way")
    return UnavailableError(f"{url}: the server answered {status}; try again later")


def _resume_headers(folder: Path, part: Path) -> dict[str, str]:
    """Asks for the rest, if the file there is still the one begun; empty where there is nothing to go on."""
    try:
        size = part.stat().st_size
        validator = str(orjson.loads((folder / "validator").read_bytes()))
    except (OSError, ValueError):
        return {}
    return {"Range": f"bytes={size}-", "If-Range": validator} if size else {}


def _keep_validator(folder: Path, headers: Message) -> None:
    """Remembers the strong ETag (RFC 9110 §13.1.5 allows no weak one in If-Range), or the date."""
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    file = folder / "validator"
    with write_errors(str(file)):
        file.unlink(missing_ok=True)
        if validator:
            with os.fdopen(create_private(file), "wb") as out:
                out.write(orjson.dumps(validator))


def _starts_at(response: http.client.HTTPResponse, part: Path) -> tuple[int, int | None]:
    """Where the body begins in the file, and the file's size where it is known."""
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        size = part.stat().st_size
        if match is None or int(match[1]) != size or int(match[2]) + 1 != int(match[3]):
            raise BadDataError("server: its answer to a Range request makes no sense; pull again")
        return size, int(match[3])
    with suppress(FileNotFoundError):
        part.unlink()
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _receive(
    url: str,
    response: http.client.HTTPResponse,
    part: Path,
    start: int,
    total: int | None,
    progress: Progress,
) -> None:
    """Appends the body to `part`. Raises UnavailableError where it ends early, which can be resumed."""
    done = start
    with write_errors(str(part)):
        descriptor = (
            os.open(part, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW) if start else create_private(part)
        )
    with os.fdopen(descriptor, "ab") as out:
        while True:
            try:
                chunk = response.read1(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise UnavailableError(
                    f"{url}: broke off after {done:,} bytes; pull again to resume"
                ) from error
            if not chunk:
                break
            with write_errors(str(part)):
                out.write(chunk)
            done += len(chunk)
            if total is not None and done > total:
                raise BadDataError(f"{url}: longer than the {total:,} bytes the server announced")
            progress(done, total)
    if total is not None and done < total:
        raise UnavailableError(f"{url}: broke off after {done:,} of {total:,} bytes; pull again to resume")


SOURCE = HttpsSource()
