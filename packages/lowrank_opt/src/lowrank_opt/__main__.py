"""`python -m lowrank_opt`, which launchers start by `-m`."""

from lowrank_opt.cli import main

if __name__ == "__main__":
    main()
