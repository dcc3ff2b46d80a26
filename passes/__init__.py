"""Inductor passes; `cache_write` is the first. Importing this package loads no Inductor."""
