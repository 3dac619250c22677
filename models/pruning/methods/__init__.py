"""One file per pruning method, each ending in its Method; `models.pruning` lists them."""
