"""Image captioning you can read: the chapters under `nbs/` explain and define every module of this package."""
__version__ = "0.1.0"
