"""Examine this machine, and a run's configuration, before training.

    python tools/doctor.py                                               # this host
    python tools/doctor.py --config FILE.yaml [section.key=value ...]    # and a whole run, short of training
    python tools/doctor.py --confinement                                 # attacks on the scoring process
    torchrun --nproc-per-node N tools/doctor.py [--config FILE.yaml] [section.key=value ...]

Under torchrun (or with `MODULE=megatron_mopd.commands.doctor launch/train.sh` on every node) every host is
examined, and the bandwidth of every group of the chosen layout is measured. Exit status 0: no problem that
prevents training (warnings do not); 1: at least one problem; 2: the command line is invalid.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.backend.finding import Level, show, summary, worst
from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.software import required_findings
from megatron_mopd.commands.confinement_examination import attack_findings, attack_summary


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file of a run, to check everything short of training")
    parser.add_argument("--directory", help="disk to examine; default: the run's run_dir, or this directory")
    parser.add_argument(
        "--world-size", type=int, help="number of ranks of the run, if not started by torchrun"
    )
    parser.add_argument("--ranks-per-host", type=int, help="default: torchrun's, or the number of GPUs")
    parser.add_argument(
        "--confinement",
        action="store_true",
        help="only attack the process in which answers are scored, and print what is refused",
    )
    parser.add_argument("--checksums", action="store_true", help="read every checkpoint completely")
    parser.add_argument(
        "--disk-mib", type=int, default=256, help="size of the file that measures the disk's speed"
    )
    parser.add_argument(
        "--network-mib", type=int, help="buffer of the bandwidth test (64 on GPUs, 4 on CPUs)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with the status."""
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    is_speaker = os.environ.get("RANK", "0") == "0"
    software = required_findings()
    if is_speaker:
        print(f"megatron_mopd doctor on {socket.gethostname()}, in {visible(Path.cwd())}")
        show("Packages that training needs", software)
    elif worst(software) == Level.PROBLEM:
        show(f"Packages on {socket.gethostname()}", [f for f in software if f.level == Level.PROBLEM])
    if worst(software) == Level.PROBLEM:
        # Everything below imports these packages.
        if is_speaker:
            print(f"\n{summary(software)} (install these first: the rest was not examined)")
        sys.exit(1)
    if options.confinement:
        if is_speaker:
            found = attack_findings()
            show("What hostile code in a confined process can do", found)
            print(f"\n{attack_summary(found)}")
            sys.exit(1 if worst(found) == Level.PROBLEM else 0)
        sys.exit(0)
    # Imported late, because the doctor must work without torch or megatron-core up to this point.
    from megatron_mopd.commands.examination import examine

    found = examine(options, software)
    if is_speaker:
        print(f"\n{summary(found)}")
    sys.exit(1 if worst(found) == Level.PROBLEM else 0)


if __name__ == "__main__":
    main()
