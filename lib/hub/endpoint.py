"""The address of the Hub, whether it may be asked, and who gets the token: set before huggingface_hub is imported.

huggingface_hub and datasets read these variables once, on import. What is set here also holds where they are imported
already, and for processes started from this one.
"""

import difflib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lib.errors import UserError, redact

OFFICIAL = "https://huggingface.co"
KNOWN_VARIABLES = (
    *("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"),
    *("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_TOKEN_PATH", "HF_HUB_ETAG_TIMEOUT"),
)
TRUE = {"1", "ON", "YES", "TRUE"}


def configure_endpoint(given: str | None, send_token: bool = False) -> str:
    """Choose the endpoint (the flag, else HF_ENDPOINT, else the Hub itself) and set it for all libraries.

    A mirror gets no token without `send_token`. Raises UserError when the endpoint is not an http(s) address.
    """
    flag = "--hub_endpoint" if given else "HF_ENDPOINT"
    endpoint = (given or os.environ.get("HF_ENDPOINT") or OFFICIAL).strip().rstrip("/")
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise UserError(f"{flag} {endpoint}: expected an address such as https://hf-mirror.com")
    os.environ["HF_ENDPOINT"] = endpoint
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants:
        constants.ENDPOINT = endpoint
        constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    # To build its user agent the library would send the server one more request, within our time limit.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not is_official(endpoint):
        # Xet, the Hub's faster protocol, connects to other servers than the mirror.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        if not send_token:
            os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
            if constants:
                constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    return endpoint


def is_official(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    return parts.scheme == "https" and (host in ("huggingface.co", "hf.co") or host.endswith(".huggingface.co"))


def offline_variable() -> str | None:
    """The variable with which the user forbids requests to the Hub, as NAME=VALUE; None when they are allowed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in TRUE:
            return f"{name}={os.environ[name]}"
    return None


def go_offline() -> None:
    """From here on every library reads the cache and sends the Hub no request."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def offline_environment(cache: Path) -> dict[str, str]:
    """The environment of a process that has one cache and no Hub, and writes nothing outside of `cache`."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    return os.environ | settings | {"CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": str(cache / "modules")}


def is_first_process() -> bool:
    """Whether this is the process of its machine that asks the Hub; the others wait for it and read its cache."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def datasets_cache() -> Path:
    """The folder of the tables that `datasets` has made; found without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.path.expandvars(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets")).expanduser()


def modelscope_endpoint() -> str:
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")


def modelscope_cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def token_source() -> str | None:
    """Where the user's token is, never the token; None when there is none."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "in HF_TOKEN"
    from huggingface_hub import constants

    return f"in {shorten(Path(constants.HF_TOKEN_PATH))}" if Path(constants.HF_TOKEN_PATH).is_file() else None


def proxies() -> dict[str, str]:
    """The proxies that the environment names, without their passwords."""
    names = ("https_proxy", "http_proxy", "all_proxy", "no_proxy")
    found = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in names}
    return {name: redact(value) for name, value in found.items() if value}


def proxy_of(endpoint: str) -> str | None:
    """The proxy for an address, without its password; None when there is none."""
    parts, found = urlsplit(endpoint), getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    proxy = found.get(parts.scheme) or found.get("all")
    return redact(proxy) if proxy else None


def misspelt_variables() -> list[tuple[str, str]]:
    """(name, intended name) of environment variables that no library reads, such as HF-ENDPOINT."""
    spec = find_spec("huggingface_hub.constants")  # read, not imported: that would be too early
    read_by_library = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    found = []
    for name in sorted(os.environ):
        plain = name.upper().replace("-", "_")
        close = difflib.get_close_matches(plain, KNOWN_VARIABLES, 1, 0.9)
        if name not in KNOWN_VARIABLES and close and plain.startswith(("HF", "H_F")) and name not in read_by_library:
            found.append((name, close[0]))
    return found


def late_variables() -> list[str]:
    """Variables that were set or changed after huggingface_hub had read them."""
    constants = sys.modules.get("huggingface_hub.constants")
    read = {"HF_ENDPOINT": "ENDPOINT", "HF_HUB_CACHE": "HF_HUB_CACHE", "HF_HOME": "HF_HOME"}
    pairs = [(name, os.environ.get(name), getattr(constants, field, None)) for name, field in read.items()]
    return [name for name, now, then in pairs if constants and now and now.rstrip("/") != str(then).rstrip("/")]


def shorten(path: Path) -> str:
    """A path as a person writes it: relative to the working folder, else from the home folder."""
    for start, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(start):
            return prefix + path.relative_to(start).as_posix()
    return str(path)
