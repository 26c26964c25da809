"""Start `launch/train.sh` from wherever this package is installed.

NNODES=4 RDZV_ENDPOINT=first-node:29400 mopd-launch --config FILE.yaml [section.key=value ...]
mopd-launch --copy DIR        # copy the launchers and recipes, to adapt them
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import megatron_mopd


def launch_directory() -> Path:
    """The directory of launchers and recipes: inside the package, or next to it in the repository."""
    package = Path(megatron_mopd.__file__).parent
    return next(path for path in (package / "launch", package.parent / "launch") if path.is_dir())


def main() -> None:
    """Replace this process with the launcher, with the same arguments."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--copy"] and len(arguments) == 2:
        ignored = shutil.ignore_patterns("__pycache__")
        try:
            shutil.copytree(launch_directory(), arguments[1], ignore=ignored)
        except FileExistsError:
            sys.exit(f"error: --copy: {arguments[1]} already exists")
        print(f"copied to {arguments[1]}")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    # Call the shell explicitly, because installed files may have lost their execute permission. The ranks
    # must run in the interpreter that this command was installed for.
    environment = os.environ | {"PYTHON": os.environ.get("PYTHON", sys.executable)}
    os.execvpe("bash", ["bash", str(launch_directory() / "train.sh"), *arguments], environment)


if __name__ == "__main__":
    main()
