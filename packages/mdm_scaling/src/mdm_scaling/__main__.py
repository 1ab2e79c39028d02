"""`python -m mdm_scaling`, which launchers start by `-m`."""

from mdm_scaling.cli import main

if __name__ == "__main__":
    main()
