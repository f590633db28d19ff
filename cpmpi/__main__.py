"""``python -m cpmpi``: the command line."""

from cpmpi.jobs.cli import main

if __name__ == "__main__":
    main()
