"""Quest inside vLLM: a plugin that is off unless a server asks for it.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"quest": {"token_budget": 2048}}'

    plugin.py    the entry point: makes Quest known to vLLM, in every process
    options.py   what stands under "quest" in --additional-config
    refusals.py  what Quest cannot serve, said before a model is loaded
    speculation.py  which drafts go with Quest
    transfers.py KV connectors: which move blocks with their metadata
    kinds.py     what a model has beside full attention, and what follows for its metadata
    ranks.py     the layers of a model that are sparse
    layout.py    where page metadata lies: inside vLLM's own blocks, so that it travels and is paid for with them
    scales.py    caches in 8 bits, and the scales of a layer
    step.py      the rows of a batch that run Quest; builder.py finds them, for any device
    batches.py   batches of vLLM: how long their rows are, and batches of some of the rows
    row_tokens.py  where the query tokens of rows lie in a batch, where they check drafts
    impl.py      the attention of a layer, for any device: which rows go where
    cpu.py, gpu.py  the attention backends: the stock one, with Quest for decode rows past the budget
    proposer.py  drafts of the model itself with Quest, which stock attention checks
    requests.py  budgets that requests ask for themselves
    folding.py   KV heads folded into blocks, for the stock kernel of a CPU
    places.py    where a token's numbers lie in a block of a CPU's cache, for who reads them back
    break_even.py  from which context on it pays, as measured
    metrics.py   the counters for Prometheus
    worker.py    a worker's name, and its counters over vLLM's `collective_rpc`

What another engine would share lies below, in `quest_attention.serving`. docs/vllm.md says how to install, serve and
tune. Nothing here imports vLLM before vLLM imports it.
"""
