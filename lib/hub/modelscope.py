"""Models of modelscope.cn, by the package `modelscope`: downloaded to a local folder, recorded with revision and hashes."""

import json
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from lib.errors import UserError, first_line, one_message, redact
from lib.hub.cache.contents import file_damage
from lib.hub.cache.files import missing_parts, missing_shards, model_files
from lib.hub.client import call_with_timeout
from lib.hub.download import STALL_SECONDS
from lib.hub.endpoint import modelscope_cache, modelscope_endpoint, offline_variable
from lib.hub.importing.provenance import list_files
from lib.hub.needs import Need
from lib.runtime.atomic import sha256, write_atomically


def fetch_modelscope(need: Need, limit: float, verify: bool = False) -> None:
    """Download a model to a local folder, unless it is there already, and record its files.

    `verify` compares a model that is there with the recorded hashes. Raises UserError without the package, without an
    answer in `limit` seconds, and for files that are damaged, altered or missing.
    """
    if record := read_record(need.repo.repo_id, need.revision):
        folder = Path(record["folder"])
        other = [name for name, digest in record["files"].items() if verify and sha256(folder / name) != digest]
        if other:
            raise UserError(f"{need} --source modelscope: altered since the download: {', '.join(other)}. See {folder}")
        return
    if variable := offline_variable():
        raise UserError(f"{need} --source modelscope: not on this machine yet, and {variable} forbids to request it")
    if find_spec("modelscope") is None:
        raise UserError('--source modelscope needs its package; run: pip install -e ".[modelscope]"')
    names = request_file_names(need, limit)  # before the package is imported, which takes seconds
    print(one_message(redact(f"fetching {need} from {modelscope_endpoint()}")), file=sys.stderr, flush=True)
    folder = download_snapshot(need, model_files(names, need.allow_pickle, need.code))
    files = list_files(folder, folder.resolve())
    used = {name: files[name] for name in model_files(files, need.allow_pickle, need.code)}
    faults = [f"{name} {fault}" for name, path in used.items() if (fault := file_damage(path, name))]
    faults += [f"{name} is missing" for name in missing_shards(used)]
    faults += [f"it has no {part}" for part in missing_parts(used, "model", need.allow_pickle)]
    if faults:
        raise UserError(f"{need} --source modelscope: {'; '.join(faults)}. See {folder}")
    record = {
        "source": redact(modelscope_endpoint()),
        "model": need.repo.repo_id,
        "revision": need.revision,
        "folder": str(folder),
        "files": {name: sha256(path) for name, path in sorted(used.items())},
    }
    write_atomically(record_path(need.repo.repo_id, need.revision), json.dumps(record, indent=1))


def modelscope_folder(model: str, revision: str) -> Path:
    """The folder of a model that `fetch_modelscope` has downloaded. Raises UserError when there is none."""
    record = read_record(model, revision)
    if record is None:
        raise UserError(
            f"--model {model} --source modelscope: not on this machine yet, and this process downloads nothing"
        )
    return Path(record["folder"])


def read_record(model: str, revision: str) -> dict | None:
    """{source, model, revision, folder, files: {name: sha256}} of a downloaded model; None unless its files exist."""
    path = record_path(model, revision)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if all((Path(record["folder"]) / name).is_file() for name in record["files"]) else None


def record_path(model: str, revision: str) -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("finetune", "modelscope", f"{model.replace('/', '--')}--{revision}")) / "record.json"


def request_file_names(need: Need, limit: float) -> list[str]:
    """The names of a model's files, by one request of our own: the package retries for minutes.

    Raises UserError with the way to carry the model here when there is no good answer within `limit` seconds.
    """
    endpoint, started = modelscope_endpoint(), time.monotonic()
    url = f"{endpoint}/api/v1/models/{need.repo.repo_id}/repo/files?Revision={quote(need.revision)}&Recursive=True"

    def request() -> bytes:
        with urlopen(Request(url, headers={"User-Agent": "finetune"}), timeout=limit) as answer:
            return answer.read()

    try:
        answer = call_with_timeout(request, is_late=lambda: time.monotonic() - started > limit)
        return [file["Path"] for file in json.loads(answer)["Data"]["Files"] if file.get("Type") != "tree"]
    except HTTPError as error:
        fault = f"{endpoint} answered {error.code}" + (": no such model or revision" if error.code == 404 else "")
    except TimeoutError:
        fault = f"{endpoint} did not answer within {limit:g} seconds (--hub_timeout)"
    except (ValueError, KeyError, TypeError):
        fault = f"{endpoint} did not answer as ModelScope does; it may be the page of a login portal or a proxy"
    except OSError as error:
        fault = f"{endpoint} cannot be reached ({first_line(error)})"
    raise UserError(
        f"{need} --source modelscope: {fault}. It is not on this machine yet; on another one run\n"
        f"  modelscope download --model {need.repo.repo_id} --local_dir FOLDER\n"
        f"and carry the folder here; then --model FOLDER, or: python hub.py import FOLDER --repo_id {need.repo.repo_id}"
    )


def download_snapshot(need: Need, wanted: list[str]) -> Path:
    """The package's own download to its own cache, given up when no file has grown for STALL_SECONDS."""
    cache, started = modelscope_cache(), time.time()

    def is_stalled() -> bool:
        if time.time() - started < STALL_SECONDS:
            return False
        newest = max((path.stat().st_mtime for path in cache.rglob("*") if path.is_file()), default=0.0)
        return time.time() - newest > STALL_SECONDS

    def work() -> Path:
        from modelscope.hub.snapshot_download import snapshot_download

        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        return Path(snapshot_download(need.repo.repo_id, revision=need.revision, allow_patterns=wanted))

    try:
        return call_with_timeout(work, is_stalled)
    except TimeoutError:
        raise UserError(f"{need} --source modelscope: nothing arrived for {STALL_SECONDS:g} seconds") from None
    except Exception as error:  # the package has no error class of its own for all of them
        raise UserError(f"{need} --source modelscope: {first_line(error)}") from error
