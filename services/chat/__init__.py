"""Chat: answers to conversations of texts and pictures."""
