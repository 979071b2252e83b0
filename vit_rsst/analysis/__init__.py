"""Analysis: what models cost and what pruning left of them."""
