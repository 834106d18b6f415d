"""What a run was computed on: versions and machine, for run.toml and for recorded results."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from selfsup.cores import cores

PACKAGES = ("selfsup", "torch", "numpy", "tokenizers", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the packages whose version can change a number."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def processor() -> str:
    """The processor's own name for itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    import torch

    facts: dict[str, Any] = {
        "platform": platform.platform(terse=True),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def command_line() -> str:
    """What was typed to make this process, or `Python API`."""
    program = Path(sys.argv[0])
    ours = program.name == "selfsup" or program.parts[-2:] == ("selfsup", "__main__.py")
    if not ours:
        return "Python API"
    return shown("selfsup", *sys.argv[1:])


def shown(*words: str) -> str:
    """A command line as it stands in a result, the folder of the shared data by its variable."""
    quoted = [shlex.quote(word) for word in words]
    data = os.environ.get("SELFSUP_DATA")  # where studies find their data sets: elsewhere for each
    if data:
        quoted = [word.replace(data, "$SELFSUP_DATA") for word in quoted]
    return " ".join(quoted)
