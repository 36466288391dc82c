"""Training of packed models: stored floats by gradient, codes by a latent weight. Same bytes, same kernels.

`layer.py` is one trained linear, `distill.py` the loop, `folder.py` reads a packed folder and writes it back.
"""
