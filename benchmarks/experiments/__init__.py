"""Claims of the literature, tested on real data."""
