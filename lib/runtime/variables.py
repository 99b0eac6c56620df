"""The environment variables of this process, for those who hand them to a library."""

import os


def variables(prefix: str) -> dict[str, str]:
    """Those whose names begin with `prefix`."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}
