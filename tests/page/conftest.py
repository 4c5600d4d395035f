"""Pages that are served while a test runs."""

from __future__ import annotations

from pages import page as page
from pages import served as served
