"""Classification: zero-shot by labels, few-shot by trained classifiers."""
