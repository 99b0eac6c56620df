"""Models of modelscope.cn through the package `modelscope`: brought to a local folder, recorded with revision and hashes."""

import json
import sys
import time
from pathlib import Path

from lib.config import UserError
from lib.hub_cache import write_whole
from lib.hub_client import STALL_SECONDS, bounded, first_line
from lib.hub_files import damage, missing_parts, missing_shards, model_files, sha256
from lib.hub_needs import Need
from lib.provenance import list_files


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


def fetch_modelscope(need: Need) -> None:
    """Bring a model to a local folder, unless it is there already, and record what was brought.

    Raises UserError without the package, without an answer, and for files that are damaged or missing.
    """
    if read_record(need.repo.repo_id, need.revision) is not None:
        return
    print(f"fetching {need} from modelscope.cn", file=sys.stderr, flush=True)
    folder = download_snapshot(need)
    files = list_files(folder, folder.resolve())
    used = {name: files[name] for name in model_files(files, need.allow_pickle, need.code)}
    faults = [f"{name} {fault}" for name, path in used.items() if (fault := damage(path, name))]
    faults += [f"{name} is missing" for name in missing_shards(used)]
    faults += [f"it has no {part}" for part in missing_parts(used, "model", need.allow_pickle)]
    if faults:
        raise UserError(f"{need} --source modelscope: {'; '.join(faults)}. See {folder}")
    record = {
        "source": "modelscope.cn",
        "model": need.repo.repo_id,
        "revision": need.revision,
        "folder": str(folder),
        "files": {name: sha256(path) for name, path in sorted(used.items())},
    }
    write_whole(record_path(need.repo.repo_id, need.revision), json.dumps(record, indent=1))


def download_snapshot(need: Need) -> Path:
    """The package's own download into its own cache, given up when nothing has come for STALL_SECONDS."""
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise UserError('--source modelscope needs its package; run: pip install -e ".[modelscope]"') from error
    started = time.monotonic()
    box: list[Path] = []

    def grew() -> bool:
        """Whether the package's cache has changed within the limit; it tells of no progress itself."""
        newest = max((path.stat().st_mtime for path in box[0].rglob("*") if path.is_file()), default=0) if box else 0
        return time.time() - newest < STALL_SECONDS

    box.append(Path.home() / ".cache" / "modelscope")
    try:
        return Path(
            bounded(
                lambda: snapshot_download(need.repo.repo_id, revision=need.revision),
                lambda: time.monotonic() - started > STALL_SECONDS and not grew(),
            )
        )
    except TimeoutError:
        raise UserError(f"{need} --source modelscope: nothing came for {STALL_SECONDS:g} seconds") from None
    except Exception as error:
        raise UserError(f"{need} --source modelscope: {first_line(error)}") from error
