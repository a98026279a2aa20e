"""The embedded sampler's engine: continuous batching of any `transformers` causal LM, in this process.

    draw.py       logits -> tokens and behaviour log-probs                    (pure)
    columns.py    the KV cache: rows aligned at one column                    (tensors)
    attention.py  one new token per row, without repeating keys and values    (tensors)
    prefixes.py   what sessions have seen, for their next request             (tensors)
    batch.py      rows that share weights: join, step, leave                  (tensors and numpy)
    versions.py   weights by version: full models and adapters side by side   (modules)
    worker.py     the thread that runs them all

`asyncrl.sampling.transformers` is the asyncio side.
"""
