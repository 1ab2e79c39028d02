"""`python -m moe_cpt`, which launchers start by `-m`."""

from moe_cpt.cli import main

if __name__ == "__main__":
    main()
