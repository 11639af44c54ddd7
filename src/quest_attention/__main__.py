"""`python -m quest_attention`: the `quest` command where no script was installed."""

from quest_attention.cli import main

if __name__ == "__main__":
    main()
