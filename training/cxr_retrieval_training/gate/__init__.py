"""The gate: what it learns from, and how it is fitted."""
