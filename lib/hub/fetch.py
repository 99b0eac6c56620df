"""The one moment at which a run may ask the Hub: before it starts. Afterwards it reads the cache and asks nobody."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.config.sections import HubConfig
from lib.errors import UserError, redact
from lib.hub.advice import missing_report
from lib.hub.cache.files import has_name, missing_parts
from lib.hub.cache.layout import COMMIT, blob_name, cache_root, find_snapshot, read_ref, read_tree, snapshot_files
from lib.hub.cache.publish import CacheError, lock_repo, locks_folder, writing
from lib.hub.client import Fault, Listing, ask, ask_all
from lib.hub.download import download
from lib.hub.endpoint import (
    OFFICIAL,
    go_offline,
    is_first_process,
    is_official,
    offline_asked,
    settle_endpoint,
    shorten,
)
from lib.hub.importing.folder import REFUSED, import_folder
from lib.hub.importing.provenance import Provenance, list_files
from lib.hub.needs import (
    Need,
    base_needs,
    check_names,
    damaged_files,
    missing_from_cache,
    read_card,
    wanted_files,
)
from lib.runtime.atomic import write_atomically


def fetch(needs: Sequence[Need], hub: HubConfig) -> None:
    """Bring what a run needs into the cache, then switch every library offline; end with code 2 and a message if not.

    With all of it in the cache, a Hub that does not answer within `--hub_timeout` costs a warning. Of the processes of a
    machine the first one asks; the others meet it when their group is built, and read its cache.
    """
    try:
        endpoint = settle_endpoint(hub.hub_endpoint, hub.send_token_to_mirror)
        check_names(needs)
        if is_first_process():
            prepare(needs, hub, endpoint)
            models = [find_snapshot(need.repo, need.revision) for need in needs if need.repo.repo_type == "model"]
            below = [need for folder in models for need in base_needs(folder)]
            check_names(below)
            prepare(below, hub, endpoint)
        go_offline()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        os._exit(2)  # a question that hangs in its thread must not keep the process


def prepare(needs: Sequence[Need], hub: HubConfig, endpoint: str) -> None:
    """Decide for each repository between the Hub and the cache. Raises UserError for what neither has."""
    for need in (need for need in needs if need.source == "modelscope"):
        from lib.hub.modelscope import fetch_modelscope

        fetch_modelscope(need, hub.hub_timeout, hub.verify_hashes)
    needs = [need for need in needs if need.source == "hub"]
    # A commit never changes: one that is whole in the cache is not asked for.
    open_needs = [need for need in needs if missing_from_cache(need) or not COMMIT.fullmatch(need.revision)]
    questions = [(need.repo, need.revision) for need in open_needs]
    answers: list[Listing | Fault]
    if asked := offline_asked():
        answers = [Fault("offline", f"{asked} forbids to ask the Hub")] * len(questions)
    else:
        answers = ask_all(questions, endpoint, hub.hub_timeout, hub.send_token_to_mirror)
    settled = dict(zip(open_needs, answers, strict=True))
    settle_offline({need: answer for need, answer in settled.items() if isinstance(answer, Fault)}, endpoint)
    for need, answer in settled.items():
        if isinstance(answer, Listing):
            settle_online(need, answer, hub, endpoint)
    for need in needs:
        if faults := damaged_files(need):
            raise UserError(damage_report(need, faults))
        if hub.verify_hashes:
            verify_hashes(need)


def settle_offline(faults: dict[Need, Fault], endpoint: str) -> None:
    """Go on from the cache, and say so, with what the Hub did not give. Raises UserError for all that is not in it."""
    lacking = {need: missing_from_cache(need) for need in faults}
    reports = [
        missing_report(need, faults[need].text, parts, endpoint, faults[need].kind)
        for need, parts in lacking.items()
        if parts
    ]
    if reports:
        raise UserError("\n\n".join(reports))
    for need, fault in faults.items():
        snapshot = find_snapshot(need.repo, need.revision)
        copy = f"commit {snapshot.name[:12]}" if snapshot else "as `datasets` has it"
        if fault.kind != "offline":
            print(f"warning: {fault.text}; {need} is read from the cache ({copy})", file=sys.stderr, flush=True)


def settle_online(need: Need, listing: Listing, hub: HubConfig, endpoint: str) -> None:
    """Bring the files of a commit that the cache lacks, each checked against its hash before it can be read."""
    if hub.verify_hashes and not is_official(endpoint):
        compare_with_official(need, listing, hub)
    try:
        if not is_whole(need, listing):
            bring(need, listing, hub, endpoint)
        elif read_ref(need.repo.folder, need.revision) != listing.commit:
            with writing():
                write_atomically(need.repo.folder / "refs" / need.revision, listing.commit)
    except Fault as fault:
        settle_offline({need: fault}, endpoint)
    except CacheError as error:
        settle_offline({need: Fault("disk", str(error))}, endpoint)


def is_whole(need: Need, listing: Listing) -> bool:
    snapshot = need.repo.folder / "snapshots" / listing.commit
    files = snapshot_files(snapshot) if snapshot.is_dir() else {}
    card = read_card(files["README.md"]) if need.repo.repo_type == "dataset" and "README.md" in files else None
    unread = need.repo.repo_type == "dataset" and "README.md" in listing.tree and "README.md" not in files
    return bool(files) and not unread and set(wanted_files(need, listing.tree, card)) <= set(files)


def bring(need: Need, listing: Listing, hub: HubConfig, endpoint: str) -> None:
    """Download to a folder beside the cache, check, and publish, as an import does: nothing bad is ever in the cache.

    What a download that broke off has brought stays beside the cache, and the next one goes on from there.
    """
    told = f"{need}: another process is fetching it; waiting"
    with lock_repo(need.repo, "fetch", told), kept_folder(need, listing.commit) as folder:
        if is_whole(need, listing):  # another process has brought it meanwhile
            return
        card = None
        if need.repo.repo_type == "dataset" and "README.md" in listing.tree:
            download(need.repo, listing, ["README.md"], folder, endpoint, hub.send_token_to_mirror)
            card = read_card(folder / "README.md")
        wanted = wanted_files(need, listing.tree, card)
        check_wanted(need, wanted, listing, endpoint)
        size = sum(listing.tree[name]["size"] for name in wanted)
        place = f"from {redact(endpoint)} into {shorten(cache_root())}"
        print(f"fetching {need}: {len(wanted)} files, {size / 1e6:,.1f} MB, {place}", file=sys.stderr, flush=True)
        check_room(size, folder)
        download(need.repo, listing, wanted, folder, endpoint, hub.send_token_to_mirror)
        files = list_files(folder, folder.resolve())
        names = {name: blob_name(entry) for name, entry in listing.tree.items()}
        known = Provenance("download", files, listing.commit, names, listing.tree)
        publish(need, folder, known, endpoint)


def publish(need: Need, folder: Path, known: Provenance, endpoint: str) -> None:
    """Import what was brought. Raises UserError when it is not what the server lists, CacheError as an import does."""
    trust: dict[str, Any] = {"allow_pickle": need.allow_pickle, "move_ref": True, "load_check": False}
    try:
        import_folder(folder, need.repo, need.revision, known=known, **trust)
    except CacheError:
        raise
    except UserError as error:
        text = str(error).replace(f"{need.repo} {REFUSED}", "").strip()
        raise UserError(
            f"{need}: what {redact(endpoint)} sent is not what it lists; nothing of it was kept.\n  {text}\n"
            f"Try again, or another --hub_endpoint; then: python hub.py doctor {need.flag} {need.repo.repo_id}"
        ) from None


@contextlib.contextmanager
def kept_folder(need: Need, commit: str) -> Iterator[Path]:
    """The folder of a download; it stays when that broke off, until it is whole or another commit is wanted."""
    folder = locks_folder(need.repo) / f"fetch-{commit}"
    for other in locks_folder(need.repo).glob("fetch-*"):
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)
    with writing():
        folder.mkdir(exist_ok=True)
    try:
        yield folder
    except Fault as fault:
        kept = any(path.is_file() for path in folder.rglob("*"))
        raise Fault(
            fault.kind, fault.text + "; what came is kept, and the next start goes on from there" * kept
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def check_room(size: int, folder: Path) -> None:
    """Raise Fault when the disk of the cache has not so many bytes free, without those that are there already."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size - there > (free := shutil.disk_usage(folder).free):
        text = (
            f"{(size - there) / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free in {shorten(cache_root())}"
        )
        raise Fault("disk", text)


def check_wanted(need: Need, wanted: list[str], listing: Listing, endpoint: str) -> None:
    """Raise UserError when a repository has nothing that the run could read."""
    lacking = missing_parts(wanted, need.repo.repo_type, need.allow_pickle)
    pickled = any(name.endswith(".bin") for name in listing.tree)
    if lacking and need.repo.repo_type == "model" and pickled and "weights" in " ".join(lacking):
        raise UserError(
            f"{need} has pickled weights only (.bin), which can run programs when they are loaded. "
            "If you trust who made them: --allow_pickle. Else look for a revision with safetensors (often refs/pr/N)."
        )
    if lacking:
        programs = [name for name in listing.tree if name.endswith(".py")]
        hint = " It is made by a program, which is not run; try --revision refs/convert/parquet." if programs else ""
        raise UserError(f"{need} at {redact(endpoint)} has no {', no '.join(lacking)}.{hint}")


# ---------------------------------------------------------------------------------------------------- hashes


def verify_hashes(need: Need) -> None:
    """Raise UserError unless every file that the run reads has the content of its name."""
    snapshot = find_snapshot(need.repo, need.revision)
    if snapshot is None:
        return
    tree, files = read_tree(need.repo.folder, snapshot.name) or {}, snapshot_files(snapshot)
    card = read_card(files["README.md"]) if need.repo.repo_type == "dataset" and "README.md" in files else None
    faults = []
    for name in wanted_files(need, files, card):
        wanted = blob_name(tree[name]) if name in tree else Path(files[name]).resolve().name
        if has_name(files[name], wanted) is not True:
            faults.append(
                f"{name} is not what its hash {wanted[:16]}... says: it was altered, or has no hash to compare with"
            )
    if faults:
        raise UserError(damage_report(need, faults))


def compare_with_official(need: Need, listing: Listing, hub: HubConfig) -> None:
    """Raise UserError where a mirror lists other contents than the Hub itself; warn where the Hub cannot be asked."""
    answer = ask(need.repo, listing.commit, OFFICIAL, hub.hub_timeout)
    if isinstance(answer, Fault) and answer.kind == "revision":
        raise UserError(
            f"{need}: the mirror names the commit {listing.commit[:12]}, which the Hub does not have; not used"
        )
    if isinstance(answer, Fault):
        text = f"{need}: hashes are compared with those of the mirror alone, since {answer.text}"
        print(f"warning: {text}", file=sys.stderr, flush=True)
        return
    other = sorted(name for name, entry in listing.tree.items() if entry != answer.tree.get(name))
    if other or set(listing.tree) != set(answer.tree):
        raise UserError(
            f"{need}: the mirror lists other contents than the Hub for {', '.join(other) or 'some files'}; not used"
        )


def damage_report(need: Need, faults: list[str]) -> str:
    listed = "\n".join(f"  {fault}" for fault in faults)
    entry = f"{need.repo.repo_type}/{need.repo.repo_id}"
    return (
        f"{need} is damaged in the cache {shorten(need.repo.folder)}:\n{listed}\n"
        f"Remove it with `hf cache rm {entry} --yes` and bring it again; `python hub.py verify` looks at all others."
    )
