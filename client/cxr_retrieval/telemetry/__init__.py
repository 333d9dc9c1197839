"""A run as it is seen from outside: metrics, log, traces; each watches `archive.watching`'s events."""
