"""Where the Hub is, whether it may be asked, and whose token it gets: settled before huggingface_hub is imported.

huggingface_hub and datasets read these variables once, when they are imported. What is settled here also holds where
they are imported already, and for the processes started from this one.
"""

import os
import sys
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


def settle_endpoint(given: str | None, send_token: bool = False) -> str:
    """The endpoint in force: that of the flag, of HF_ENDPOINT, or the Hub itself. A mirror gets no token unless asked.

    Raises UserError when it is no http(s) address.
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
    # Its user agent would first ask the same server another question, within our limit.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not is_official(endpoint):
        # The faster protocol of the Hub leaves the mirror for servers that the mirror was chosen to avoid.
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


def offline_asked() -> str | None:
    """The variable by which the user forbids the Hub, as it is set; None when it may be asked."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in TRUE:
            return f"{name}={os.environ[name]}"
    return None


def go_offline() -> None:
    """From here on every library reads the cache and none asks the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    if "datasets.config" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def offline_environment(cache: Path) -> dict[str, str]:
    """The environment of a process that sees one cache and no Hub, and leaves nothing behind outside of `cache`."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    return os.environ | settings | {"CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": str(cache / "modules")}


def is_first_process() -> bool:
    """Whether this is the process of its machine that asks the Hub; the others wait for it and read its cache."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def datasets_cache() -> Path:
    """Where `datasets` keeps the tables it has made of data sets."""
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
    """The proxy on the way to an address, without its password; None when there is none."""
    parts, found = urlsplit(endpoint), getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    proxy = found.get(parts.scheme) or found.get("all")
    return redact(proxy) if proxy else None


def misspelt() -> list[tuple[str, str]]:
    """(variable, what was meant) for variables of the environment that nothing reads, such as HF-ENDPOINT."""
    import difflib

    found = []
    for name in os.environ:
        plain = name.upper().replace("-", "_")
        close = difflib.get_close_matches(plain, KNOWN_VARIABLES, 1, 0.9)
        if name not in KNOWN_VARIABLES and close and plain.startswith(("HF", "H_F")) and not is_known(name):
            found.append((name, close[0]))
    return sorted(found)


def late_variables() -> list[str]:
    """Variables that were set or changed after huggingface_hub had read them."""
    constants = sys.modules.get("huggingface_hub.constants")
    read = {"HF_ENDPOINT": "ENDPOINT", "HF_HUB_CACHE": "HF_HUB_CACHE", "HF_HOME": "HF_HOME"}
    pairs = [(name, os.environ.get(name), getattr(constants, field, None)) for name, field in read.items()]
    return [name for name, now, then in pairs if constants and now and now.rstrip("/") != str(then).rstrip("/")]


def is_known(name: str) -> bool:
    """Whether huggingface_hub itself reads a variable of this name."""
    from huggingface_hub import constants

    return name in Path(constants.__file__).read_text(encoding="utf-8")


def shorten(path: Path) -> str:
    """A path as a person writes it: relative to here, else from the home folder."""
    for start, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(start):
            return prefix + path.relative_to(start).as_posix()
    return str(path)
