"""`python -m wan_dist`: the same as the `wan-dist` command."""

from wan_dist.cli.main import main

if __name__ == "__main__":
    main()
