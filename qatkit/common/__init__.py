"""Shared helpers, independent of any technique: tables, lazy exports, file writes, devices."""
