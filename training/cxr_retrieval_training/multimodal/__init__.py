"""Films and reports in one subspace, in which either is found by the other (Yu et al. 2021)."""
