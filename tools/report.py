"""Write a run's report as one HTML page: python tools/report.py --help"""

from megatron_mopd.commands.report import main

if __name__ == "__main__":
    main()
