"""The forms of other vendors over rankings: an adapter for each, fields in, fields out, no logic."""
