"""Loading an entry before it enters the cache: in a fresh process that has no other cache and no network."""

import subprocess
import sys
from pathlib import Path

from lib.errors import UserError
from lib.hub.cache.files import ADAPTER_WEIGHTS, is_adapter
from lib.hub.cache.layout import Repo, snapshot_files
from lib.hub.endpoint import offline_environment
from lib.hub.needs import read_card

LOAD_MODEL = """
import sys
from transformers import AutoConfig, AutoModel, AutoTokenizer
for kind, more in ((AutoConfig, {}), (AutoTokenizer, {}), (AutoModel, {"dtype": "auto"})):
    kind.from_pretrained(sys.argv[1], revision=sys.argv[2], trust_remote_code=False, **more)
"""
LOAD_ADAPTER = """
import sys
import torch
from safetensors.torch import load_file
for path in sys.argv[4:]:
    if path.endswith(".safetensors"):
        load_file(path)
    else:
        torch.load(path, weights_only=True, map_location="cpu")
"""
LOAD_DATASET = """
import sys
from lib.data.sources import load_hub
from lib.errors import UserError
try:
    load_hub(sys.argv[1], sys.argv[3] or None, sys.argv[2])
except UserError as error:
    sys.exit(str(error).splitlines()[0])
"""


def check_loads(root: Path, repo: Repo, revision: str, snapshot: Path) -> None:
    """Load `snapshot`, which lies in the cache `root`. Raises UserError with the reason when it does not load."""
    files = snapshot_files(snapshot)
    code = LOAD_DATASET if repo.repo_type == "dataset" else LOAD_ADAPTER if is_adapter(files) else LOAD_MODEL
    configs = read_card(snapshot / "README.md").get("configs") if repo.repo_type == "dataset" else None
    first = str(configs[0].get("config_name", "")) if isinstance(configs, list) and len(configs) > 1 else ""
    weights = [str(path) for name, path in files.items() if ADAPTER_WEIGHTS.fullmatch(name)]
    done = subprocess.run(
        [sys.executable, "-c", code, repo.repo_id, revision, first, *weights],
        env=offline_environment(root),
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{repo} does not load from these files, nothing was changed: {reason}\n"
            f"Files: {', '.join(files)}. To import it all the same: --load_check False"
        )
