"""Asynchronous embedding jobs: stored, shared between workers, and finished whatever dies on the way."""
