"""`python -m cxr_retrieval` is `cxr`."""

from cxr_retrieval.cli.app import main

main()
