"""What is installed, what will be used, what is missing: python tools/doctor.py --help"""

from megatron_mopd.commands.doctor import main

if __name__ == "__main__":
    main()
