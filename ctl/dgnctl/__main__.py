"""`python -m dgnctl`."""

from dgnctl.cli import main

if __name__ == "__main__":
    main()
