"""Write a run's report: one HTML page that needs no network, even while the run is in progress.

    python tools/report.py runs/demo                  # a demo's directory: its mopd run, with the see-saw
    python tools/report.py runs/my_run --base runs/base --expert math=runs/math --expert code=runs/code

The page shows accuracy per model and task, headroom recovered, curves of every domain and teacher, where the
time went, the pipeline as planned and as measured, samples with the tokens on which student and teacher
disagree, alarms, the resolved configuration, the teachers' manifest and package versions. If there is nothing
to report, prints one line of advice and exits with status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.backend.messages import visible
from megatron_mopd.observe.access import closed_to_others
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.recorded_run import ReportError


@closed_to_others()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory, or the directory of a demo")
    parser.add_argument("--output", type=Path, help="default: report.html in the run directory")
    parser.add_argument("--base", type=Path, help="run with the base's last evaluation, for the see-saw")
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="DOMAIN=RUN",
        help="run with the last evaluation of this domain's expert; may be repeated",
    )
    options = parser.parse_args(arguments)
    experts = {}
    for text in options.expert:
        domain, separator, run = text.partition("=")
        if not separator:
            parser.error(f"--expert {text}: expected DOMAIN=RUN")
        experts[domain] = run
    try:
        page = write_page(options.run, options.output, base=options.base, experts=experts)
        print(visible(page))
    except (ReportError, OSError) as error:
        print(f"error: {visible(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
