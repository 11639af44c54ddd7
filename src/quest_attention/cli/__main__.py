"""`python -m quest_attention.cli`: the `quest` command where no script was installed."""

from quest_attention.cli.app import main

if __name__ == "__main__":
    main()
