"""cxr-retrieval: which confirmed chest radiographs looked like this one, and what became of them. Research use only."""

from importlib.metadata import version as _version

__version__ = _version("cxr-retrieval")
