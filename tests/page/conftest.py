"""Pages that are served while a test runs."""

from __future__ import annotations

from serving import page as page
from serving import served as served
