"""Fetching what a run reads: the only moment when it asks the Hub is before it starts; afterwards it reads the cache."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.config.sections import HubConfig
from lib.errors import UserError, one_message, redact
from lib.hub.advice import missing_report
from lib.hub.cache.contents import matches_hash
from lib.hub.cache.files import missing_parts
from lib.hub.cache.layout import (
    COMMIT,
    blob_name,
    cache_root,
    false_refs,
    find_snapshot,
    linked_blob,
    read_ref,
    read_tree,
    snapshot_files,
)
from lib.hub.cache.publish import CacheError, lock_repo, locks_folder, writing
from lib.hub.client import Fault, Listing, request_listing, request_listings
from lib.hub.download import download
from lib.hub.endpoint import (
    OFFICIAL,
    configure_endpoint,
    go_offline,
    is_first_process,
    is_official,
    offline_variable,
    shorten,
)
from lib.hub.importing.folder import add_to_cache, find_faults
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
from lib.runtime.network import telling_others
from lib.runtime.signals import is_first_to_fail


def fetch(needs: Sequence[Need], hub: HubConfig) -> None:
    """Bring what a run reads into the cache, then switch every library offline; on failure exit with code 2 and a message.

    When the cache has everything, a Hub that does not answer within `--hub_timeout` costs a warning. Only the first
    process of a machine asks; the others wait for it where their process group is built, however long it downloads, and read
    its cache.
    """
    try:
        endpoint = configure_endpoint(hub.hub_endpoint, hub.send_token_to_mirror)
        check_names(needs)
        if is_first_process():
            with telling_others():
                ensure_cached(needs, hub, endpoint)
                models = [find_snapshot(need.repo, need.revision) for need in needs if need.repo.repo_type == "model"]
                bases = [need for folder in models for need in base_needs(folder)]
                check_names(bases)
                ensure_cached(bases, hub, endpoint)
        go_offline()
    except UserError as error:
        if is_first_to_fail():
            print(one_message(f"error: {redact(str(error))}"), file=sys.stderr, flush=True)
        os._exit(2)  # at once: a request may still hang in its thread


def ensure_cached(needs: Sequence[Need], hub: HubConfig, endpoint: str) -> None:
    """Update the cache from the Hub, or go on with what it has. Raises UserError for what neither has."""
    for need in (need for need in needs if need.source == "modelscope"):
        from lib.hub.modelscope import fetch_modelscope

        fetch_modelscope(need, hub.hub_timeout, hub.verify_hashes)
    needs = [need for need in needs if need.source == "hub"]
    # A commit never changes: one that is complete in the cache needs no request, but to be compared with the Hub.
    asked = [
        need for need in needs if hub.verify_hashes or missing_from_cache(need) or not COMMIT.fullmatch(need.revision)
    ]
    answers: Sequence[Listing | Fault]
    if variable := offline_variable():
        answers = [Fault("offline", f"{variable} forbids requests to the Hub")] * len(asked)
    else:
        questions = [(need.repo, need.revision) for need in asked]
        answers = request_listings(questions, endpoint, hub.hub_timeout, hub.send_token_to_mirror)
    pairs = list(zip(asked, answers, strict=True))
    use_cache({need: answer for need, answer in pairs if isinstance(answer, Fault)}, endpoint)
    for need, answer in pairs:
        if isinstance(answer, Listing):
            update_cache(need, answer, hub, endpoint)
    listings = {need: answer for need, answer in pairs if isinstance(answer, Listing)}
    for need in needs:
        if names := false_refs(need.repo.folder):
            place = shorten(need.repo.folder / "refs")
            text = f"in {place} {', '.join(names[:3])} names another commit than itself; it is ignored, remove it"
            print(f"warning: {text}", file=sys.stderr, flush=True)
        if faults := damaged_files(need):
            raise UserError(damage_report(need, faults))
        if hub.verify_hashes:
            verify_hashes(need, listings.get(need))


def use_cache(faults: dict[Need, Fault], endpoint: str) -> None:
    """Go on with what the cache has, after a warning. Raises UserError with all that is not in the cache."""
    missing = {need: missing_from_cache(need) for need in faults}
    reports = [
        missing_report(need, faults[need].text, parts, endpoint, faults[need].kind)
        for need, parts in missing.items()
        if parts
    ]
    if reports:
        raise UserError("\n\n".join(reports))
    for need, fault in faults.items():
        snapshot = find_snapshot(need.repo, need.revision)
        copy = f"commit {snapshot.name[:12]}" if snapshot else "the tables that `datasets` made"
        if fault.kind != "offline":
            print(
                one_message(f"warning: {fault.text}; {need} is read from the cache ({copy})"),
                file=sys.stderr,
                flush=True,
            )


def update_cache(need: Need, listing: Listing, hub: HubConfig, endpoint: str) -> None:
    """Download the files of a commit that the cache lacks, or go on with what it has."""
    if hub.verify_hashes and not is_official(endpoint):
        compare_with_official(need, listing, hub)
    try:
        if not is_complete(need, listing):
            download_to_cache(need, listing, hub, endpoint)
        elif read_ref(need.repo.folder, need.revision) != listing.commit:
            with writing():
                write_atomically(need.repo.folder / "refs" / need.revision, listing.commit)
    except Fault as fault:
        use_cache({need: fault}, endpoint)
    except CacheError as error:
        use_cache({need: Fault("disk", str(error))}, endpoint)


def is_complete(need: Need, listing: Listing) -> bool:
    """Whether the cache has all files of a commit that the run reads."""
    snapshot = need.repo.folder / "snapshots" / listing.commit
    files = snapshot_files(snapshot) if snapshot.is_dir() else {}
    card = read_card(files["README.md"]) if need.repo.repo_type == "dataset" and "README.md" in files else None
    unread = need.repo.repo_type == "dataset" and "README.md" in listing.tree and "README.md" not in files
    return bool(files) and not unread and set(wanted_files(need, listing.tree, card)) <= set(files)


def download_to_cache(need: Need, listing: Listing, hub: HubConfig, endpoint: str) -> None:
    """Download to a folder beside the cache, compare every file with its hash, then publish them as an import does.

    After a broken download its files stay beside the cache, and the next call continues it. Raises UserError when the
    files are not the listed ones, Fault as `download` does, CacheError when the cache cannot be written.
    """
    waiting = f"{need}: another process is downloading it; waiting"
    with lock_repo(need.repo, "fetch", waiting), partial_folder(need, listing.commit) as folder:
        if is_complete(need, listing):  # by the other process
            return
        card = None
        if need.repo.repo_type == "dataset" and "README.md" in listing.tree:
            download(need.repo, listing, ["README.md"], folder, endpoint, hub.send_token_to_mirror)
            card = read_card(folder / "README.md")
        wanted = wanted_files(need, listing.tree, card)
        check_usable(need, wanted, listing, endpoint)
        size = sum(listing.tree[name]["size"] for name in wanted)
        place = f"from {redact(endpoint)} into {shorten(cache_root())}"
        print(
            one_message(f"fetching {need}: {len(wanted)} files, {size / 1e6:,.1f} MB, {place}"),
            file=sys.stderr,
            flush=True,
        )
        check_space(size, folder)
        download(need.repo, listing, wanted, folder, endpoint, hub.send_token_to_mirror)
        names = {name: blob_name(entry) for name, entry in listing.tree.items()}
        known = Provenance("download", list_files(folder, folder.resolve()), listing.commit, names, listing.tree)
        try:
            if faults := find_faults(known, need.repo, need.allow_pickle):
                raise UserError("\n  ".join(faults))
            add_to_cache(known, need.repo, need.revision, move_ref=True, load_check=False)
        except CacheError:
            raise
        except UserError as error:
            raise UserError(
                f"{need}: what {redact(endpoint)} sent is not what it lists; nothing of it was kept.\n  {error}\n"
                f"Try again, or another --hub_endpoint; then: python hub.py doctor {need.flag} {need.repo.repo_id}"
            ) from None


@contextlib.contextmanager
def partial_folder(need: Need, commit: str) -> Iterator[Path]:
    """The folder of a download; after a Fault or Ctrl-C it stays, until the download is complete or of another commit."""
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
        text = "; what was downloaded is kept, and the next start continues from there" if kept else ""
        raise Fault(fault.kind, fault.text + text) from None
    except KeyboardInterrupt:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def check_space(size: int, folder: Path) -> None:
    """Raise Fault when the disk of the cache has no space for `size` bytes less those that are in `folder` already."""
    size -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > (free := shutil.disk_usage(folder).free):
        place = shorten(cache_root())
        raise Fault("disk", f"{size / 1e9:.1f} GB are to be downloaded, {free / 1e9:.1f} GB are free in {place}")


def check_usable(need: Need, wanted: list[str], listing: Listing, endpoint: str) -> None:
    """Raise UserError when the files that the run would read do not make a model or data set."""
    missing = missing_parts(wanted, need.repo.repo_type, need.allow_pickle)
    pickled = any(name.endswith(".bin") for name in listing.tree)
    if missing and need.repo.repo_type == "model" and pickled and "weights" in " ".join(missing):
        raise UserError(
            f"{need} has pickled weights only (.bin), which can run programs when they are loaded. "
            "If you trust who made them: --allow_pickle. Else look for a revision with safetensors (often refs/pr/N)."
        )
    if missing:
        programs = [name for name in listing.tree if name.endswith(".py")]
        hint = " It is made by a program, which is not run; try --revision refs/convert/parquet." if programs else ""
        raise UserError(f"{need} at {redact(endpoint)} has no {', no '.join(missing)}.{hint}")


def verify_hashes(need: Need, listing: Listing | None = None) -> None:
    """Raise UserError unless every file that the run reads matches its hash: the Hub's, or else that in the cache."""
    snapshot = find_snapshot(need.repo, need.revision)
    if snapshot is None:
        return
    files, tree = snapshot_files(snapshot), read_tree(need.repo.folder, snapshot.name) or {}
    if listing and listing.commit == snapshot.name:
        tree = listing.tree
    card = read_card(snapshot / "README.md") if need.repo.repo_type == "dataset" else None
    faults = []
    for name in wanted_files(need, files, card):
        digest = blob_name(tree[name]) if name in tree else linked_blob(files[name])
        if matches_hash(files[name], digest) is not True:
            faults.append(f"{name} does not match its hash {digest[:16]}...: it was altered, or no hash is known")
    if faults:
        raise UserError(damage_report(need, faults))


def compare_with_official(need: Need, listing: Listing, hub: HubConfig) -> None:
    """Raise UserError where a mirror lists other contents than the Hub itself; warn where the Hub cannot be asked."""
    answer = request_listing(need.repo, listing.commit, OFFICIAL, hub.hub_timeout)
    if isinstance(answer, Fault) and answer.kind == "revision":
        raise UserError(
            f"{need}: the mirror names the commit {listing.commit[:12]}, which the Hub does not have; not used"
        )
    if isinstance(answer, Fault):
        text = f"{need}: hashes are compared with those of the mirror alone, since {answer.text}"
        print(one_message(f"warning: {text}"), file=sys.stderr, flush=True)
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
        f"Remove it with `hf cache rm {entry} --yes` and fetch it again; `python hub.py verify` checks all others."
    )
