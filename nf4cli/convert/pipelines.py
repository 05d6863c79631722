"""A whole diffusers pipeline, written or decoded component by component."""

from __future__ import annotations
