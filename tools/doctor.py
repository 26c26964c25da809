"""Examine this machine and a run's configuration before training: python tools/doctor.py --help"""

from megatron_mopd.commands.doctor import main

if __name__ == "__main__":
    main()
