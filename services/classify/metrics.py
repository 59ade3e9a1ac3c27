"""Metrics of classification."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

LABEL_HITS = Counter(
    "searchfoundation_label_cache_hits", "Labels of zero-shot calls whose vector was known.", ("model",)
)
LABEL_MISSES = Counter(
    "searchfoundation_label_cache_misses", "Labels of zero-shot calls that had to be embedded.", ("model",)
)
LABEL_BYTES = Gauge("searchfoundation_label_cache_bytes", "Memory of the label vectors kept.")
CLASSIFIER_HITS = Counter(
    "searchfoundation_classifier_cache_hits", "Calls whose classifier was in memory in its last version."
)
CLASSIFIER_MISSES = Counter(
    "searchfoundation_classifier_cache_misses", "Calls whose classifier was read from the database."
)
BUSY = Counter(
    "searchfoundation_classifier_busy", "Updates refused because another one of the classifier went on."
)
LEARN_SECONDS = Histogram(
    "searchfoundation_learn_seconds",
    "Time of learning from the vectors of one training.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
