"""What the requests of all capabilities have in common: texts, models, and words for what is wrong."""
