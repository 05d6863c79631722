"""The version of nf4, which manifests and journals record."""

__version__ = "0.2.0"
