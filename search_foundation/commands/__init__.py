"""The commands of ``search-foundation``, one module each."""
