"""`python -m rwkv_distill`, which launchers start by `-m`."""

from rwkv_distill.cli import main

if __name__ == "__main__":
    main()
