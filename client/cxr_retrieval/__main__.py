"""`python -m cxr_retrieval` is `cxr`."""

from cxr_retrieval.cli.entry import main

main()
