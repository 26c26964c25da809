"""Write a run's report: one HTML page that needs no network, also while the run is going.

    python tools/report.py runs/demo                  # a demo's directory: its mopd run, with the see-saw
    python tools/report.py runs/my_run --base runs/base --expert math=runs/math --expert code=runs/code

The page has who is good at what, headroom recovered, curves of every domain and teacher, where the time went,
the pipeline planned and measured, samples with the tokens on which student and teacher disagree, alarms, the
resolved configuration, the teachers' manifest and the versions of packages. Exit status 2, with one line on
what to do, when there is nothing to report.
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
    parser.add_argument("--base", type=Path, help="run whose last evaluation is the base's, for the see-saw")
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="DOMAIN=RUN",
        help="run whose last evaluation is this domain's expert's; may be given several times",
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
