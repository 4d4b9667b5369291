"""Image captioning you can read: the chapters under `nbs/` explain and define every module of this package."""
__version__ = "0.1.0"

_PUBLIC = {"load": "expnet.train.checkpoints", "caption": "expnet.decode.caption", "Beam": "expnet.decode.search", "Greedy": "expnet.decode.search"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """The public names, imported at first use so that `import expnet` costs nothing."""
    from importlib import import_module
    if name not in _PUBLIC: raise AttributeError(f"module 'expnet' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
