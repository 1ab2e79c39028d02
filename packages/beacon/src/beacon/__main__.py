"""`python -m beacon`, which launchers start by `-m`."""

from beacon.cli import main

if __name__ == "__main__":
    main()
