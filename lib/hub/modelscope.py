"""Models of modelscope.cn through the package `modelscope`: brought to a local folder, recorded with revision and hashes."""

import json
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from lib.errors import UserError, first_line
from lib.hub.cache.files import damage, missing_parts, missing_shards, model_files
from lib.hub.client import bounded
from lib.hub.download import STALL_SECONDS
from lib.hub.endpoint import modelscope_cache, modelscope_endpoint, offline_asked
from lib.hub.importing.provenance import list_files
from lib.hub.needs import Need
from lib.runtime.atomic import sha256, write_atomically


def record_path(model: str, revision: str) -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("finetune", "modelscope", f"{model.replace('/', '--')}--{revision}")) / "record.json"


def read_record(model: str, revision: str) -> dict | None:
    """{folder, revision, files: {name: sha256}} of a model brought before, while its files are still there."""
    path = record_path(model, revision)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if all((Path(record["folder"]) / name).is_file() for name in record["files"]) else None


def modelscope_folder(model: str, revision: str) -> Path:
    """The folder of a model that `fetch_modelscope` has brought. Raises UserError when there is none."""
    record = read_record(model, revision)
    if record is None:
        raise UserError(
            f"--model {model} --source modelscope: not on this machine yet, and this process fetches nothing"
        )
    return Path(record["folder"])


def fetch_modelscope(need: Need, limit: float, verify: bool = False) -> None:
    """Bring a model to a local folder, unless it is there already, and record what was brought.

    `verify` compares what is there already with the hashes recorded then. Raises UserError without the package, without
    an answer in `limit` seconds, and for files that are damaged, altered or missing.
    """
    if record := read_record(need.repo.repo_id, need.revision):
        if verify:
            compare_with_record(need, record)
        return
    if asked := offline_asked():
        raise UserError(f"{need} --source modelscope: not on this machine yet, and {asked} forbids to ask for it")
    if find_spec("modelscope") is None:
        raise UserError('--source modelscope needs its package; run: pip install -e ".[modelscope]"')
    names = ask_modelscope(need, limit)  # before the package is imported, which takes seconds
    wanted = model_files(names, need.allow_pickle, need.code)
    print(f"fetching {need} from {modelscope_endpoint()}", file=sys.stderr, flush=True)
    folder = download_snapshot(need, wanted)
    files = list_files(folder, folder.resolve())
    used = {name: files[name] for name in model_files(files, need.allow_pickle, need.code)}
    faults = [f"{name} {fault}" for name, path in used.items() if (fault := damage(path, name))]
    faults += [f"{name} is missing" for name in missing_shards(used)]
    faults += [f"it has no {part}" for part in missing_parts(used, "model", need.allow_pickle)]
    if faults:
        raise UserError(f"{need} --source modelscope: {'; '.join(faults)}. See {folder}")
    record = {
        "source": modelscope_endpoint(),
        "model": need.repo.repo_id,
        "revision": need.revision,
        "folder": str(folder),
        "files": {name: sha256(path) for name, path in sorted(used.items())},
    }
    write_atomically(record_path(need.repo.repo_id, need.revision), json.dumps(record, indent=1))


def compare_with_record(need: Need, record: dict) -> None:
    folder = Path(record["folder"])
    if other := [name for name, digest in record["files"].items() if sha256(folder / name) != digest]:
        raise UserError(f"{need} --source modelscope: altered since it was brought: {', '.join(other)}. See {folder}")


def ask_modelscope(need: Need, limit: float) -> list[str]:
    """The names of a model's files: one question before the package is let go, which itself retries for minutes.

    Raises UserError with what is to be done when the answer is not good, or does not come within `limit` seconds.
    """
    endpoint, started = modelscope_endpoint(), time.monotonic()
    place = f"{endpoint}/api/v1/models/{need.repo.repo_id}/repo/files?Revision={quote(need.revision)}&Recursive=True"

    def question() -> bytes:
        with urlopen(Request(place, headers={"User-Agent": "finetune"}), timeout=limit) as answer:
            return answer.read()

    try:
        files = json.loads(bounded(question, lambda: time.monotonic() - started > limit))["Data"]["Files"]
        return [file["Path"] for file in files if file.get("Type") != "tree"]
    except HTTPError as error:
        fault = f"{endpoint} answered {error.code}" + (": no such model or revision" if error.code == 404 else "")
    except TimeoutError:
        fault = f"{endpoint} did not answer within {limit:g} seconds (--hub_timeout)"
    except (ValueError, KeyError, TypeError):
        fault = f"{endpoint} answered with something else, such as the page of a login portal or a proxy"
    except OSError as error:
        fault = f"{endpoint} cannot be reached ({first_line(error)})"
    raise UserError(
        f"{need} --source modelscope: {fault}. It is not on this machine yet; from another one carry the folder that\n"
        f"  modelscope download --model {need.repo.repo_id} --local_dir FOLDER\n"
        f"makes, then --model FOLDER, or: python hub.py import FOLDER --repo_id {need.repo.repo_id}"
    )


def download_snapshot(need: Need, wanted: list[str]) -> Path:
    """The package's own download into its own cache, given up when nothing has come for STALL_SECONDS."""
    cache, started = modelscope_cache(), time.time()

    def is_stalled() -> bool:
        # The package tells of no progress; its files do.
        if time.time() - started < STALL_SECONDS:
            return False
        newest = max((path.stat().st_mtime for path in cache.rglob("*") if path.is_file()), default=0.0)
        return time.time() - newest > STALL_SECONDS

    def work() -> Path:
        from modelscope.hub.snapshot_download import snapshot_download

        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        return Path(snapshot_download(need.repo.repo_id, revision=need.revision, allow_patterns=wanted))

    try:
        return bounded(work, is_stalled)
    except TimeoutError:
        raise UserError(f"{need} --source modelscope: nothing came for {STALL_SECONDS:g} seconds") from None
    except Exception as error:  # the package raises all kinds, each about this one model
        raise UserError(f"{need} --source modelscope: {first_line(error)}") from error
