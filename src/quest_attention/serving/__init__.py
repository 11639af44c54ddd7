"""What servers share, whatever engine they run: it knows torch and the verbs, and imports no engine.

    options.py   what stands under "quest" in a server's JSON
    requests.py  the budget that a request asks for itself
    rows.py      which decode rows of a batch run Quest, and how many tokens they read
    counters.py  what was read, counted where it was read

An engine's adapter stands above and imports from here, as `vllm` does. It brings its own configuration, its own
metadata of a batch and what its messages call the size of a page.
"""
